"""`doctor [RECIPE]`: a line a check; exit code 2 if one says FAIL."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from selective_dpo.cli.recipe_options import add_recipe_options, read_recipe
from selective_dpo.errors import ConfigError

TAKES_OVERRIDES = True


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """RECIPE, if there is one."""
    add_recipe_options(parser, optional=True)


def execute(verb: str, options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Check, and print each answer as it comes."""
    from selective_dpo.distributed.progress import quieten_libraries

    if not options.recipe and overrides:
        raise ConfigError(f"--{overrides[0][0]} would have no effect without a recipe")
    recipe = read_recipe(options, overrides) if options.recipe else None
    quieten_libraries()
    from selective_dpo.report.tables import printable
    from selective_dpo.run.doctor import diagnose

    counts = {"ok": 0, "warn": 0, "FAIL": 0}
    for check in diagnose(recipe):
        print(printable(check.line()), flush=True)
        counts[check.status] += 1
    print(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['FAIL']} to mend")
    return 2 if counts["FAIL"] else 0
