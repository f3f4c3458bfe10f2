"""`inspect CURRICULUM`: pairs to read, by difficulty or by id."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from selective_dpo.cli.paths import path_text

TAKES_OVERRIDES = False
_REGIONS = {
    "easiest": "of the smallest difficulty",
    "borderline": "around the edge of the selection",
    "median": "of median difficulty",
    "hardest": "of the largest difficulty",
}


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """CURRICULUM, and which of its pairs."""
    parser.add_argument(
        "curriculum", type=path_text, metavar="CURRICULUM", help="a curriculum.parquet, or a run's folder"
    )
    for name, meaning in _REGIONS.items():
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N", help=f"N pairs {meaning}")
    parser.add_argument(
        "--pair",
        nargs="+",
        action="extend",
        default=[],
        metavar="ID",
        help="these pairs, by id or its beginning",
    )
    parser.add_argument(
        "--pairs",
        type=path_text,
        default="",
        metavar="FOLDER",
        help="the run's pairs folder; default: beside the curriculum",
    )
    parser.add_argument("--full", action="store_true", help="whole texts, not only their beginnings")
    parser.epilog = "Without any of these: three of the easiest, three of the median, three of the hardest."


def execute(verb: str, options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Find the pairs and print them."""
    from selective_dpo.report.inspect import DEFAULT, LONGEST, Wanted, group_text, look_at

    asked = Wanted(**{name: getattr(options, name) for name in _REGIONS}, pair_ids=tuple(options.pair))
    pairs = Path(options.pairs) if options.pairs else None
    found = look_at(Path(options.curriculum), DEFAULT if asked == Wanted() else asked, pairs)
    longest = None if options.full else LONGEST
    print("\n\n\n".join(group_text(group, found.total, longest=longest) for group in found.groups))
    return 0
