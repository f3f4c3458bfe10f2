"""`import-records DIR --out CURRICULUM`: the original repository's CSVs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from selective_dpo.cli.paths import path_text
from selective_dpo.cli.select_options import add_select_options, read_select

TAKES_OVERRIDES = True


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """DIR, where to write, and the selection."""
    parser.add_argument(
        "folder", type=path_text, metavar="DIR", help="folder of seed41_step00.csv[.gz] and the like"
    )
    parser.add_argument(
        "--out",
        type=path_text,
        required=True,
        metavar="CURRICULUM",
        help="a .parquet file, or a folder",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="accept missing files and ids; short for --select.allow_partial true",
    )
    add_select_options(parser)


def execute(verb: str, options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Import, write, and say what was found."""
    from selective_dpo.curriculum.importing import import_records
    from selective_dpo.reporting.text import printable

    if options.allow_partial:
        overrides = [*overrides, ("select.allow_partial", "true")]
    imported = import_records(options.folder, select=read_select(overrides))
    path = imported.curriculum.save(options.out)
    print(printable(imported.describe()))
    print(printable(str(path)))
    return 0
