"""`--select.KEY VALUE` for verbs without a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from selective_dpo.config import SelectConfig
from selective_dpo.config.load import make_recipe
from selective_dpo.errors import ConfigError


def add_select_options(parser: argparse.ArgumentParser) -> None:
    """A word about the keys."""
    parser.epilog = "Selection keys: --select.rule, --select.fraction, --select.order ... (docs/recipe.md)."


def read_select(overrides: Sequence[tuple[str, str]]) -> SelectConfig:
    """The selection that the options describe."""
    for key, _ in overrides:
        if not key.startswith("select."):
            raise ConfigError(f"unknown option --{key}; only --select.* keys work here")
    # A recipe around the block, so that values are read and faults are named as in any recipe.
    anything = {"name": "selection", "model": {"path": "-"}, "data": {"train": [{"path": "-"}]}}
    return make_recipe(anything, overrides).select
