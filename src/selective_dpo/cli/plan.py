"""`plan RECIPE`: what a run would do and cost."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from selective_dpo.cli.paths import path_text
from selective_dpo.cli.recipe_options import add_recipe_options, read_recipe

TAKES_OVERRIDES = True


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """RECIPE, and where the plan may go as JSON."""
    add_recipe_options(parser)
    parser.add_argument(
        "--json", type=path_text, default="", metavar="PATH", help="also write the plan as JSON"
    )


def execute(verb: str, options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Work the plan out and print it."""
    from selective_dpo.distributed.progress import quieten_libraries

    recipe = read_recipe(options, overrides)
    quieten_libraries()
    from selective_dpo.run.plan import make_plan, plan_text
    from selective_dpo.storage.artifacts import write_json

    plan = make_plan(recipe)
    print(plan_text(plan))
    if options.json:
        write_json(Path(options.json), plan.to_json())
    return 0
