"""Pairs to read: the easiest, the hardest, those in between, or those named by id."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.adapters import KEPT
from selective_dpo.data.store import PAIRS
from selective_dpo.errors import ArtifactError, ConfigError, IdentityError, name_some
from selective_dpo.identity import Text
from selective_dpo.logprobs.nonfinite import REASON as NOT_FINITE
from selective_dpo.report.tables import printable, turns
from selective_dpo.storage.artifacts import verify_folder

LONGEST = 600
"""Characters of a message that are shown."""

EASIEST, HARDEST, MEDIAN = "Easiest pairs", "Hardest pairs", "Pairs of median difficulty"
BORDERLINE = "Borderline pairs, around the edge of the selection"
NAMED = "Named pairs"

# With these rules no difficulty separates the selected pairs from the others.
_RULES_WITHOUT_EDGE = ("random", "all")


class Wanted(NamedTuple):
    """How many pairs of each region, and which ones by id (or the beginning of it)."""

    easiest: int = 0
    borderline: int = 0
    median: int = 0
    hardest: int = 0
    pair_ids: tuple[str, ...] = ()


DEFAULT = Wanted(easiest=3, median=3, hardest=3)
OF_A_REPORT = Wanted(easiest=5, borderline=6, hardest=5)


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


def look_at(source: Path, wanted: Wanted, pairs: Path | None = None) -> tuple[tuple[ExampleGroup, ...], int]:
    """The wanted pairs of the curriculum at `source`, a `.parquet` file or a run's folder, and how many
    scored pairs it holds.

    Texts come from the folder `pairs`; None: the folder `pairs` beside the curriculum.

    Raises:
        ArtifactError: no curriculum, or no complete folder of pairs.
        ConfigError: nothing, or less than nothing, is wanted.
        IdentityError: an id is unknown or the beginning of several; or the pairs are other data.
    """
    if min(wanted[:4]) < 0 or not (any(wanted[:4]) or wanted.pair_ids):
        raise ConfigError("nothing to show: give a number above 0, or --pair ID")
    curriculum = Curriculum.load(source)
    folder = pairs or (source.parent if source.suffix == ".parquet" else source) / "pairs"
    if not folder.is_dir():
        raise ArtifactError(
            f"no pairs at {folder}, so no texts to show: give the run's pairs folder with --pairs"
        )
    verify_folder(folder)
    _refuse_without_difficulty(wanted.pair_ids, curriculum)
    measured = curriculum.measured
    return example_groups(folder / PAIRS, measured, wanted), len(measured.pair_ids)


def example_groups(path: Path, curriculum: Curriculum, wanted: Wanted) -> tuple[ExampleGroup, ...]:
    """The wanted pairs of `curriculum`, in which each has a difficulty; texts from `pairs.parquet` at `path`.

    Raises:
        IdentityError: an id is unknown or the beginning of several; or `path` lacks one of the pairs.
    """
    rows_by_title = _rows_by_title(curriculum, wanted)
    shown_rows = sorted({row for rows in rows_by_title.values() for row in rows})
    measured = {row["pair_id"]: row for row in curriculum.table.take(shown_rows).to_pylist()}
    table = pq.read_table(
        path,
        columns=["pair_id", "prompt", "chosen", "rejected"],
        filters=(pc.field("status") == KEPT) & pc.field("pair_id").isin(list(measured)),
    )
    texts = {text["pair_id"]: text for text in table.to_pylist()}
    if missing := [pair_id for pair_id in measured if pair_id not in texts]:
        raise IdentityError(f"{path} is not of this curriculum's data: it does not hold {name_some(missing)}")
    pairs = {pair_id: _example(row, texts[pair_id]) for pair_id, row in measured.items()}
    ids = curriculum.table["pair_id"]
    return tuple(
        ExampleGroup(title, tuple(pairs[ids[row].as_py()] for row in rows))
        for title, rows in rows_by_title.items()
    )


def _rows_by_title(curriculum: Curriculum, wanted: Wanted) -> dict[str, list[int]]:
    """Row numbers of the curriculum's table, for each group that is not empty."""
    by_rank_P = np.argsort(curriculum.table["rank"].to_numpy(), kind="stable")
    rule = str((curriculum.facts.get("select") or {}).get("rule", ""))
    title, edge = borderline(np.asarray(curriculum.table["selected"])[by_rank_P], rule)

    def around(centre: int, count: int) -> NDArray[np.int64]:
        start = min(max(0, centre - (count + 1) // 2), max(0, len(by_rank_P) - count))
        return by_rank_P[start : start + count]

    found: dict[str, list[int]] = {}
    for name, rows in (
        (EASIEST, by_rank_P[: wanted.easiest]),
        (title, around(edge, wanted.borderline)),
        (MEDIAN, around(len(by_rank_P) // 2, wanted.median)),
        (HARDEST, by_rank_P[::-1][: wanted.hardest]),
    ):
        if len(rows):
            found.setdefault(name, rows.tolist())
    if wanted.pair_ids:
        ids = curriculum.pair_ids
        places = {pair_id: row for row, pair_id in enumerate(ids)}
        found[NAMED] = [places[pair_id] for pair_id in find_ids(wanted.pair_ids, ids)]
    return found


def borderline(selected_by_rank_P: NDArray[np.bool_], rule: str) -> tuple[str, int]:
    """Title and centre of the middle group: the rank at which selection changes, else the median.

    Shapes: selected_by_rank_P [P] bool, easiest first. A band has two edges. The upper one is taken: there
    are the pairs that were held to be too hard.
    """
    edges = np.flatnonzero(selected_by_rank_P[1:] != selected_by_rank_P[:-1]) + 1
    if rule in _RULES_WITHOUT_EDGE or not len(edges):
        return MEDIAN, len(selected_by_rank_P) // 2
    return BORDERLINE, int(edges[-1])


def _example(row: Mapping[str, Any], text: Mapping[str, Any]) -> ExamplePair:
    prompt, chosen, rejected = (json.loads(text[name] or '""') for name in ("prompt", "chosen", "rejected"))
    measured = {name: row[name] for name in ("pair_id", "rank", "difficulty", "spread", "selected", "reason")}
    return ExamplePair(**measured, prompt=prompt, chosen=chosen, rejected=rejected)


def find_ids(beginnings: Sequence[str], pair_ids: Sequence[str]) -> list[str]:
    """The one id that begins with each of `beginnings`; each found id once.

    Raises:
        IdentityError: none does, or several do; some candidates are named.
    """
    found: dict[str, None] = {}
    for beginning in beginnings:
        shown = printable(beginning)
        candidates = [pair_id for pair_id in pair_ids if pair_id.startswith(beginning.lower())]
        if len(candidates) > 1:
            raise IdentityError(
                f"pair {shown!r} may be any of {len(candidates):,}: {name_some(candidates)}; "
                "give more of the id"
            )
        if not candidates:
            raise IdentityError(
                f"no pair {shown!r} among the {len(pair_ids):,} of this curriculum; "
                "the column pair_id of curriculum.parquet holds their ids"
            )
        found[candidates[0]] = None
    return list(found)


def _refuse_without_difficulty(beginnings: Sequence[str], curriculum: Curriculum) -> None:
    aside = curriculum.table.filter(pc.is_null(curriculum.table["difficulty"]))
    not_finite = "its records are not finite (see quarantine.json in the run's reference and scores folders)"
    for pair_id, reason in zip(aside["pair_id"].to_pylist(), aside["reason"].to_pylist(), strict=True):
        if any(pair_id.startswith(beginning.lower()) for beginning in beginnings):
            why = not_finite if reason == NOT_FINITE else reason
            raise IdentityError(f"pair {pair_id} has no difficulty: {why}")


def group_text(group: ExampleGroup, total: int, *, longest: int | None = LONGEST) -> str:
    """A group as text; `total` is the number of scored pairs. Each message is cut after `longest` characters.

    Control characters of the data are replaced, so that they do not reach a terminal.
    """
    parts = [f"{group.title} ({len(group.pairs)})"]
    parts += ["\n".join(_pair_lines(pair, total, longest)) for pair in group.pairs]
    return "\n\n".join(parts)


def _pair_lines(pair: ExamplePair, total: int, longest: int | None) -> Iterator[str]:
    spread = "" if pair.spread is None or math.isnan(pair.spread) else f", spread {pair.spread:.4f}"
    state = "selected" if pair.selected else "not selected"
    yield (
        f"{pair.pair_id}  difficulty {pair.difficulty:.4f}{spread}, rank {pair.rank + 1:,} of {total:,}, "
        f"{state}: {printable(pair.reason)}"
    )
    for name, text in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        yield f"  {name}"
        for turn in turns(text, longest):
            lines = turn.text.split("\n") if turn.text else [""]
            if turn.role:
                lines[0] = f"{turn.role}: {lines[0]}"
            if turn.cut:
                lines[-1] += f" … ({turn.cut:,} more characters)"
            yield from (f"    {line}".rstrip() for line in lines)
