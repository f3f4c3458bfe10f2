"""`export CURRICULUM --format csv|parquet|jsonl|datasets --out PATH`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from selective_dpo.cli.paths import path_text
from selective_dpo.errors import ConfigError

TAKES_OVERRIDES = False
WITH_TEXTS = ("jsonl", "datasets")
"""Formats that hold the pairs' texts, and not only their ids."""


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """CURRICULUM, the format and where to write."""
    parser.add_argument(
        "curriculum", type=path_text, metavar="CURRICULUM", help="a curriculum.parquet, or a run's folder"
    )
    parser.add_argument("--format", required=True, choices=("csv", "parquet", "jsonl", "datasets"))
    parser.add_argument("--out", type=path_text, required=True, metavar="PATH")
    parser.add_argument(
        "--pairs",
        type=path_text,
        default="",
        metavar="FOLDER",
        help="the run's pairs folder, for jsonl and datasets; default: pairs beside the curriculum",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at PATH")


def execute(verb: str, options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Export and say what was written."""
    from selective_dpo.curriculum.export import export_curriculum
    from selective_dpo.curriculum.table import Curriculum
    from selective_dpo.data.store import pairs_file
    from selective_dpo.report.tables import printable
    from selective_dpo.storage.artifacts import verify_folder

    if options.pairs and options.format not in WITH_TEXTS:
        raise ConfigError(f"--pairs has no effect with --format {options.format}; leave it out")
    source = Path(options.curriculum)
    curriculum = Curriculum.load(source)
    beside = (source.parent if source.suffix == ".parquet" else source) / "pairs"
    folder = Path(options.pairs) if options.pairs else beside
    wanted = options.format in WITH_TEXTS and (options.pairs or folder.is_dir())
    pairs = pairs_file(folder) if wanted else None
    if wanted:
        verify_folder(folder)
    path = export_curriculum(
        curriculum, Path(options.out), options.format, pairs=pairs, overwrite=options.overwrite
    )
    print(f"{printable(str(path))}: {len(curriculum.order):,} selected of {len(curriculum.table):,} pairs")
    return 0
