"""`run`, `score`, `curriculum`, `train`, `evaluate`, `report`: a recipe up to that stage."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from selective_dpo.cli.recipe_options import add_recipe_options, read_recipe

TAKES_OVERRIDES = True


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """RECIPE and the stage's own options."""
    add_recipe_options(parser)
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="accept a recipe that differs from the one the run folder was made with; stages that the "
        "change does not touch are kept",
    )
    if verb == "score":
        parser.add_argument(
            "--only", default="", metavar="NAMES", help="some scorers, as seed41-fold0,seed41-fold1"
        )
    if verb == "curriculum":
        parser.add_argument(
            "--allow-partial",
            action="store_true",
            help="build it from the records that are there; short for --select.allow_partial true",
        )


def execute(verb: str, options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Run the stage; several processes are started first where the recipe says so."""
    from selective_dpo.distributed.progress import quieten_libraries

    if getattr(options, "allow_partial", False):
        overrides = [*overrides, ("select.allow_partial", "true")]
    recipe = read_recipe(options, overrides)
    quieten_libraries()
    from selective_dpo.run import run as verbs

    only = tuple(name for name in getattr(options, "only", "").split(",") if name)
    return verbs.run_verb(verb, recipe, fresh=options.fresh, only=only, command_line=options.command_line)
