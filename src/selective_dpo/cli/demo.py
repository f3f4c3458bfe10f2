"""`demo`: the whole method on the embedded world."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from selective_dpo.cli.paths import path_text

TAKES_OVERRIDES = False


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """Where and which world."""
    parser.add_argument(
        "--out", type=path_text, default="runs", metavar="FOLDER", help="where the run folder is made"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world (default 0)")


def execute(verb: str, options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Run it; its lines are printed as they come."""
    from selective_dpo.distributed.progress import quieten_libraries

    quieten_libraries()
    from selective_dpo.run.demo import demo

    demo(Path(options.out), seed=options.seed)
    return 0
