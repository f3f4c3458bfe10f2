"""What the report's browser of pairs shows: measured pairs with their texts, packed for one file."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selective_dpo.curriculum.table import P_WRONG, Curriculum
from selective_dpo.data.adapters import KEPT
from selective_dpo.identity import positions_of
from selective_dpo.report.tables import printable, turns

MAX_PAIRS = 20_000
MAX_BYTES = 27_000_000
"""Of the packed pairs; the page around them is small."""
LONGEST = 2_000
"""Characters of a message."""

ISSUES = "issues.parquet"

_TEXTS = ("prompt", "chosen", "rejected")
_NUMBERS = ("chosen_tokens", "rejected_tokens", "source")


class Packed(NamedTuple):
    """Pairs for the browser."""

    data: str
    """Base64 of compressed JSON: pairs, names of flags, names of sources."""
    shown: int
    measured: int


def pack_pairs(
    curriculum: Curriculum, run: Path, *, max_pairs: int = MAX_PAIRS, max_bytes: int = MAX_BYTES
) -> Packed:
    """The measured pairs of a run: all, or as many as fit, evenly over the ranks, easiest and hardest too.

    Flags are those of `issues.parquet`, where the run has one.

    Raises:
        IdentityError: a pair is not in the run's `pairs.parquet`.
    """
    measured = curriculum.measured
    count, size = len(measured.table), min(max_pairs, len(measured.table))
    while True:
        ranks = np.unique(np.linspace(0, count - 1, size).round().astype(np.int64))
        wanted = measured.table.filter(pc.is_in(measured.table["rank"], value_set=pa.array(ranks)))
        data = _packed(wanted, run)
        if len(data) <= max_bytes or size == 1:
            return Packed(data, len(wanted), count)
        size = max(1, int(size * 0.9 * max_bytes / len(data)))


def _packed(wanted: pa.Table, run: Path) -> str:
    ids = wanted["pair_id"].to_pylist()
    table = pq.read_table(
        run / "pairs" / "pairs.parquet",
        columns=["pair_id", *_TEXTS, *_NUMBERS],
        filters=(pc.field("status") == KEPT) & pc.field("pair_id").isin(ids),
    )
    at = positions_of(ids, table["pair_id"].to_pylist(), what="curriculum and pairs.parquet")
    texts = table.take(pa.array(at)).to_pylist()
    flags, issues = _issues(run / ISSUES, ids)
    sources = sorted({row["source"] or "" for row in texts})
    rows = []
    for row, text, issue in zip(wanted.to_pylist(), texts, issues, strict=True):
        rows.append(
            {
                "id": printable(row["pair_id"]),
                "rank": row["rank"],
                "difficulty": round(row["difficulty"], 6),
                "spread": _number(row["spread"]) if row["count"] > 1 else None,
                "p_wrong": _number(issue.get(P_WRONG, row.get(P_WRONG))),
                "selected": row["selected"],
                "flags": sum(1 << bit for bit, name in enumerate(flags) if issue.get(name)),
                "source": sources.index(text["source"] or ""),
                **{name: text[name] for name in ("chosen_tokens", "rejected_tokens")},
                **{name: [list(turn) for turn in turns(json.loads(text[name]), LONGEST)] for name in _TEXTS},
            }
        )
    content = {"pairs": rows, "flags": flags, "sources": [printable(name) for name in sources]}
    packed = gzip.compress(json.dumps(content, separators=(",", ":")).encode("utf-8"), mtime=0)
    return base64.b64encode(packed).decode("ascii")


def _issues(path: Path, ids: Sequence[str]) -> tuple[list[str], list[Mapping[str, Any]]]:
    if not path.is_file():
        return [], [{} for _ in ids]
    table = pq.read_table(path)
    flags = [field.name for field in table.schema if pa.types.is_boolean(field.type)]
    row_of = {row["pair_id"]: row for row in table.to_pylist()}
    return flags, [row_of.get(name, {}) for name in ids]


def _number(value: float | None) -> float | None:
    return None if value is None or value != value else round(value, 6)
