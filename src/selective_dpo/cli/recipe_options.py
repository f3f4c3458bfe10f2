"""Options shared by the verbs that take a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from selective_dpo.config import Recipe


def add_recipe_options(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """RECIPE, and a word about overrides. Left out where that is `optional`, it is empty."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe's YAML file", nargs="?" if optional else None, default=""
    )
    parser.epilog = (
        "Any recipe key can be given as an option: --select.fraction 0.6, --score.seeds '[41, 42]', "
        "--train.trainer.beta 0.05. Keys: docs/recipe.md."
    )


def read_recipe(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> Recipe:
    """The recipe with its overrides, fully checked."""
    from selective_dpo.config.load import load_recipe
    from selective_dpo.config.trainer_options import check_recipe_options

    recipe = load_recipe(options.recipe, overrides)
    check_recipe_options(recipe)
    return recipe
