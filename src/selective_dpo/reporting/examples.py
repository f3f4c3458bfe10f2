"""Pairs to read: the easiest, the hardest, those in between, with their texts and what was measured."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.core.identity import Text
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.pairs import KEPT
from selective_dpo.errors import IdentityError, name_some

EXAMPLES_PER_GROUP = 5
EASIEST, HARDEST, MEDIAN = "Easiest pairs", "Hardest pairs", "Pairs of median difficulty"
BORDERLINE = "Borderline pairs, around the edge of the selection"
# With these rules no difficulty separates the selected pairs from the others.
_RULES_WITHOUT_EDGE = ("random", "all")


class ExamplePair(NamedTuple):
    """A pair to read, with what was measured for it."""

    pair_id: str
    rank: int
    difficulty: float
    spread: float | None
    selected: bool
    reason: str
    prompt: Text
    chosen: Text
    rejected: Text


class ExampleGroup(NamedTuple):
    """Pairs from one region of the difficulty scale."""

    title: str
    pairs: tuple[ExamplePair, ...]


def report_examples(path: Path, curriculum: Curriculum, rule: str) -> tuple[ExampleGroup, ...]:
    """The groups of a report: easiest, borderline (or median), hardest. `path` is `pairs.parquet`."""
    by_rank_P = rows_by_rank(curriculum)
    title, centre = borderline(np.asarray(curriculum.table["selected"])[by_rank_P], rule)
    half = EXAMPLES_PER_GROUP // 2 + 1
    regions = {
        EASIEST: by_rank_P[:EXAMPLES_PER_GROUP],
        title: by_rank_P[max(0, centre - half) : centre + half],
        HARDEST: by_rank_P[::-1][:EXAMPLES_PER_GROUP],
    }
    return read_groups(path, curriculum, {name: rows.tolist() for name, rows in regions.items()})


def read_groups(
    path: Path, curriculum: Curriculum, regions: Mapping[str, Sequence[int]]
) -> tuple[ExampleGroup, ...]:
    """For each title the pairs in these rows of the curriculum's table; texts from `pairs.parquet` at `path`.

    Raises:
        IdentityError: `path` does not hold one of the pairs.
    """
    table = curriculum.table
    wanted = sorted({row for rows in regions.values() for row in rows})
    shown = {row["pair_id"]: row for row in table.take(wanted).to_pylist()}
    pairs = {text["pair_id"]: _example(shown[text["pair_id"]], text) for text in _read_texts(path, shown)}
    if missing := [pair_id for pair_id in shown if pair_id not in pairs]:
        raise IdentityError(f"{path} is not of this curriculum's data: it does not hold {name_some(missing)}")
    ids = table["pair_id"]
    return tuple(
        ExampleGroup(name, tuple(pairs[ids[row].as_py()] for row in rows)) for name, rows in regions.items()
    )


def _read_texts(path: Path, pair_ids: Collection[str]) -> list[dict[str, Any]]:
    """The texts of some kept pairs. Of a large file only the row groups that hold them are read."""
    columns = ["pair_id", "status"]
    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        rows = np.flatnonzero(_is_wanted(file.read(columns), pair_ids))
        groups = np.unique(np.searchsorted(np.cumsum(sizes), rows, side="right"))
        table = file.read_row_groups(groups.tolist(), [*columns, "prompt", "chosen", "rejected"])
    texts: list[dict[str, Any]] = table.filter(pa.array(_is_wanted(table, pair_ids))).to_pylist()
    return texts


def _is_wanted(table: pa.Table, pair_ids: Collection[str]) -> NDArray[np.bool_]:
    ids = pa.array(list(pair_ids), type=pa.string())
    return np.asarray(pc.and_(pc.equal(table["status"], KEPT), pc.is_in(table["pair_id"], ids)))


def rows_by_rank(curriculum: Curriculum) -> NDArray[np.int64]:
    """Row numbers of the curriculum's table, easiest first: [P]."""
    return np.argsort(curriculum.table["rank"].to_numpy(), kind="stable")


def borderline(selected_by_rank_P: NDArray[np.bool_], rule: str) -> tuple[str, int]:
    """Title and centre of the middle group: the rank at which selection changes, else the median.

    Shapes: selected_by_rank_P [P] bool, easiest first. A band has two edges; the upper one is taken,
    for there the pairs are that were held to be too hard.
    """
    edges = np.flatnonzero(selected_by_rank_P[1:] != selected_by_rank_P[:-1]) + 1
    if rule in _RULES_WITHOUT_EDGE or not len(edges):
        return MEDIAN, len(selected_by_rank_P) // 2
    return BORDERLINE, int(edges[-1])


def _example(row: Mapping[str, Any], text: Mapping[str, Any]) -> ExamplePair:
    prompt, chosen, rejected = (json.loads(text[name] or '""') for name in ("prompt", "chosen", "rejected"))
    measured = {name: row[name] for name in ("pair_id", "rank", "difficulty", "spread", "selected", "reason")}
    return ExamplePair(**measured, prompt=prompt, chosen=chosen, rejected=rejected)
