"""`inspect`: pairs of a curriculum as text, by difficulty or by id."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.store import PAIRS
from selective_dpo.errors import ArtifactError, ConfigError, IdentityError, name_some
from selective_dpo.identity import Text
from selective_dpo.logprobs.nonfinite import REASON as NOT_FINITE
from selective_dpo.report.content import (
    EASIEST,
    HARDEST,
    MEDIAN,
    ExampleGroup,
    ExamplePair,
    borderline,
    read_groups,
    rows_by_rank,
)
from selective_dpo.report.tables import printable, turns
from selective_dpo.storage.artifacts import verify_folder

LONGEST = 600
"""Characters of a message that are shown."""

NAMED = "Named pairs"


class Wanted(NamedTuple):
    """How many pairs of each region, and which ones by id (or the beginning of it)."""

    easiest: int = 0
    borderline: int = 0
    median: int = 0
    hardest: int = 0
    pair_ids: tuple[str, ...] = ()


class Look(NamedTuple):
    """What was asked for."""

    groups: tuple[ExampleGroup, ...]
    total: int
    """Scored pairs of the curriculum."""


DEFAULT = Wanted(easiest=3, median=3, hardest=3)


def look_at(source: Path, wanted: Wanted, pairs: Path | None = None) -> Look:
    """The wanted pairs of the curriculum at `source`, a `.parquet` file or a run's folder.

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
    measured = curriculum.measured
    _refuse_without_difficulty(wanted.pair_ids, curriculum)
    groups = read_groups(folder / PAIRS, measured, _regions(measured, wanted))
    return Look(groups, len(measured.pair_ids))


def group_text(group: ExampleGroup, total: int, *, longest: int | None = LONGEST) -> str:
    """A group as text; `total` is the number of scored pairs. Each message is cut after `longest` characters.

    Control characters of the data are replaced, so that they do not reach a terminal.
    """
    parts = [f"{group.title} ({len(group.pairs)})"]
    parts += ["\n".join(_pair_lines(pair, total, longest)) for pair in group.pairs]
    return "\n\n".join(parts)


def find_ids(beginnings: Sequence[str], pair_ids: Sequence[str]) -> list[str]:
    """The one id that begins with each of `beginnings`; each found id once.

    Raises:
        IdentityError: none does, or several do; some candidates are named.
    """
    found: dict[str, None] = {}
    for beginning in beginnings:
        candidates = [pair_id for pair_id in pair_ids if pair_id.startswith(beginning.lower())]
        if len(candidates) != 1:
            raise IdentityError(_which(beginning, candidates, pair_ids))
        found[candidates[0]] = None
    return list(found)


def _refuse_without_difficulty(beginnings: Sequence[str], curriculum: Curriculum) -> None:
    aside = curriculum.table.filter(pc.is_null(curriculum.table["difficulty"]))
    reason_of = dict(zip(aside["pair_id"].to_pylist(), aside["reason"].to_pylist(), strict=True))
    not_finite = "its records are not finite (see quarantine.json in the run's reference and scores folders)"
    for beginning in beginnings:
        for pair_id, reason in reason_of.items():
            if pair_id.startswith(beginning.lower()):
                why = not_finite if reason == NOT_FINITE else reason
                raise IdentityError(f"pair {pair_id} has no difficulty: {why}")


def _regions(curriculum: Curriculum, wanted: Wanted) -> dict[str, list[int]]:
    by_rank_P = rows_by_rank(curriculum)
    rule = str((curriculum.facts.get("select") or {}).get("rule", ""))
    title, edge = borderline(np.asarray(curriculum.table["selected"])[by_rank_P], rule)
    regions: dict[str, list[int]] = {}
    for name, rows in (
        (EASIEST, by_rank_P[: wanted.easiest]),
        (title, by_rank_P[_around(edge, wanted.borderline, len(by_rank_P))]),
        (MEDIAN, by_rank_P[_around(len(by_rank_P) // 2, wanted.median, len(by_rank_P))]),
        (HARDEST, by_rank_P[::-1][: wanted.hardest]),
    ):
        if len(rows):
            regions.setdefault(name, rows.tolist())
    if wanted.pair_ids:
        ids = curriculum.pair_ids
        places = {pair_id: row for row, pair_id in enumerate(ids)}
        regions[NAMED] = [places[pair_id] for pair_id in find_ids(wanted.pair_ids, ids)]
    return regions


def _around(centre: int, count: int, total: int) -> slice:
    start = min(max(0, centre - (count + 1) // 2), max(0, total - count))
    return slice(start, start + count)


def _which(beginning: str, candidates: Sequence[str], pair_ids: Sequence[str]) -> str:
    shown = printable(beginning)
    if len(candidates) > 1:
        return (
            f"pair {shown!r} may be any of {len(candidates):,}: {name_some(candidates)}; give more of the id"
        )
    near = list(pair_ids)
    for length in range(1, len(beginning) + 1):
        closer = [pair_id for pair_id in near if pair_id.startswith(beginning[:length].lower())]
        if not closer:
            break
        near = closer
    return f"no pair {shown!r} among the {len(pair_ids):,} of this curriculum; nearest: {name_some(near, 3)}"


def _pair_lines(pair: ExamplePair, total: int, longest: int | None) -> Iterator[str]:
    spread = "" if pair.spread is None or math.isnan(pair.spread) else f", spread {pair.spread:.4f}"
    state = "selected" if pair.selected else "not selected"
    yield (
        f"{pair.pair_id}  difficulty {pair.difficulty:.4f}{spread}, rank {pair.rank + 1:,} of {total:,}, "
        f"{state}: {printable(pair.reason)}"
    )
    for name, text in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        yield f"  {name}"
        yield from _text_lines(text, longest)


def _text_lines(text: Text, longest: int | None) -> Iterator[str]:
    for turn in turns(text, longest):
        lines = turn.text.split("\n") if turn.text else [""]
        if turn.role:
            lines[0] = f"{turn.role}: {lines[0]}"
        if turn.cut:
            lines[-1] += f" … ({turn.cut:,} more characters)"
        yield from (f"    {line}".rstrip() for line in lines)
