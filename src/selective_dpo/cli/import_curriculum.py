"""`import-curriculum PATH --out CURRICULUM`: outside difficulties; `import-records` is its older name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from selective_dpo.cli.paths import path_text
from selective_dpo.cli.select_options import add_select_options, read_select

TAKES_OVERRIDES = True


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """What is imported, what it is joined with, where to write, and the selection."""
    parser.add_argument(
        "source",
        type=path_text,
        metavar="PATH",
        help="a CSV or Parquet file of ids and difficulties, such as NAME_learning_order.csv[.gz]; a folder "
        "of the original's seed41_step00.csv[.gz] and the like; another run's folder or curriculum.parquet",
    )
    parser.add_argument(
        "--out",
        type=path_text,
        required=True,
        metavar="CURRICULUM",
        help="a .parquet file, or a folder",
    )
    parser.add_argument(
        "--pairs",
        type=path_text,
        default="",
        metavar="FOLDER",
        help="a run's pairs folder, whose pairs are given these difficulties; default: ids stand for pairs",
    )
    parser.add_argument(
        "--id-column", default="", metavar="NAME", help="of a file; default: pair_id, else prompt_id"
    )
    parser.add_argument(
        "--difficulty-column",
        default="",
        metavar="NAME",
        help="of a file; default: learning_order, else difficulty",
    )
    parser.add_argument(
        "--names",
        choices=("pair_id", "prompt_id"),
        default=None,
        help="what the ids of a file name; default: as their column says",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="accept missing records and ids; short for --select.allow_partial true",
    )
    add_select_options(parser)


def execute(verb: str, options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Import, write, and say what was found."""
    from selective_dpo.curriculum.import_ import (
        import_curriculum,
        import_records,
        imported_in_words,
        is_records,
    )
    from selective_dpo.report.tables import printable

    if options.allow_partial:
        overrides = [*overrides, ("select.allow_partial", "true")]
    select = read_select(overrides)
    columns = {name: getattr(options, name) for name in ("id_column", "difficulty_column", "names")}
    if is_records(Path(options.source)) and not options.pairs and not any(columns.values()):
        imported = import_records(options.source, select)
        curriculum, told = imported.curriculum, imported.describe()
    else:
        curriculum = import_curriculum(options.source, options.pairs or None, select, **columns)
        facts = curriculum.facts
        told = f"{imported_in_words(facts['provenance']['imported'])}; {facts['selected']:,} selected"
    path = curriculum.save(options.out)
    print(printable(told))
    print(printable(str(path)))
    return 0
