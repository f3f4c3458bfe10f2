"""The original repository's learning records (CSV, no header: prompt id, loss) as a curriculum."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from selective_dpo.artifacts import content_key, file_digest
from selective_dpo.config import SelectConfig
from selective_dpo.core.records import LossTable
from selective_dpo.curriculum.build import build_curriculum, resolved_selection
from selective_dpo.curriculum.number_files import read_records
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import DataError, RecordsError, name_some

# Two layouts: both halves in one file (seed41_step00.csv), or each in its own
# (learning_record-seed41-step0-first.csv and -second.csv).
_NUMBER = "[0-9]{1,9}"
_WHOLE = re.compile(rf"seed(?P<seed>{_NUMBER})_step(?P<step>{_NUMBER})\.csv(\.gz)?")
_HALF = re.compile(
    rf"learning_record-seed(?P<seed>{_NUMBER})-step(?P<step>{_NUMBER})-(?P<half>first|second)\.csv(\.gz)?"
)
_HALVES = ("first", "second")


class EvaluationCount(NamedTuple):
    """What the file (or the two halves) of one seed's evaluation held."""

    files: tuple[str, ...]
    seed: int
    evaluation: int
    """From 1; the original's step number plus one."""
    rows: int
    distinct_ids: int
    repeated_ids: int
    """Ids that stand more than once. Their first row is used, as the original's script does."""
    conflicting_ids: int
    """Those of them whose losses differ."""


class RecordFolder(NamedTuple):
    """The losses in a folder of records, and what was found on the way to them."""

    losses: LossTable
    counts: tuple[EvaluationCount, ...]
    """One for each seed and evaluation, in this order."""
    ignored: tuple[str, ...]
    """Names of other files in the folder."""
    repeated_ids: tuple[str, ...]
    """Ids that stand more than once in some evaluation, sorted."""
    conflicting_ids: tuple[str, ...]
    """Those of them whose losses differ in some evaluation, sorted."""
    provenance: dict[str, Any]
    """`files` holds the SHA-256 of each."""


class Imported(NamedTuple):
    """A curriculum, and the folder that it was made from."""

    curriculum: Curriculum
    folder: RecordFolder

    def describe(self) -> str:
        """What was found, in a few lines."""
        facts = self.curriculum.facts
        found = self.folder
        repeats = [count.rows - count.distinct_ids for count in found.counts]
        lines = [
            f"{len(found.counts)} evaluations (seeds {', '.join(map(str, facts['seeds']))}), "
            f"{_span([count.rows for count in found.counts])} rows each: "
            f"{facts['pairs']:,} distinct ids, {facts['selected']:,} selected",
            f"  {_span(repeats)} rows in each repeat an id; the first row of an id is used",
            f"  {len(found.repeated_ids):,} ids are repeated in some evaluation, "
            f"{len(found.conflicting_ids):,} of them with different losses",
        ]
        if facts["partial"]:
            lines.append(f"  {facts['partial']:,} ids lack some of their losses")
        if found.ignored:
            lines.append(f"  {len(found.ignored):,} other files were not read: {name_some(found.ignored)}")
        return "\n".join(lines)


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


class _Column(NamedTuple):
    """The losses of one seed's evaluation, each id once."""

    tally: EvaluationCount
    ids: pa.Array
    losses_N: NDArray[np.float64]
    repeated: list[str]
    conflicting: list[str]


def import_records(folder: str | Path, select: SelectConfig | Mapping[str, Any] | None = None) -> Imported:
    """The curriculum of the learning records in `folder` (see `read_record_folder`).

    The original's ids name prompts; they become both `pair_id` and `prompt_id`, and the curriculum's
    provenance says so.

    Raises:
        DataError, RecordsError: as `read_record_folder`.
        ConfigError: the selection is not valid.
    """
    config = resolved_selection(select)
    found = read_record_folder(Path(folder), allow_partial=config.allow_partial)
    key = content_key(files=found.provenance["files"], select=config.model_dump(mode="json"))
    return Imported(build_curriculum(found.losses, config, provenance=found.provenance, key=key), found)


def read_record_folder(folder: Path, *, allow_partial: bool = False) -> RecordFolder:
    """Read the learning records in `folder`, plain or gzipped, in either of the original's layouts.

    Of repeated ids the first row is used and all are counted.

    Raises:
        DataError: no such files; one is missing, unreadable, doubled, or has a bad line (which is named).
        RecordsError: an id is missing in some file, unless `allow_partial`.
    """
    groups, ignored = _find_files(folder, allow_partial=allow_partial)
    columns = [_read_column(key, paths) for key, paths in sorted(groups.items())]
    table = _loss_table(columns, allow_partial=allow_partial)
    digests = {path.name: file_digest(path) for paths in groups.values() for path in paths}
    repeated = sorted({item for column in columns for item in column.repeated})
    conflicting = sorted({item for column in columns for item in column.conflicting})
    provenance = {
        "source": "learning records of the original repository",
        "ids": "the original's prompt ids, taken for both pair_id and prompt_id",
        "folder": folder.resolve().name,
        "files": digests,
        "rows": sum(column.tally.rows for column in columns),
        "repeated_ids": len(repeated),
        "conflicting_ids": len(conflicting),
    }
    counts = tuple(column.tally for column in columns)
    return RecordFolder(table, counts, tuple(ignored), tuple(repeated), tuple(conflicting), provenance)


def _find_files(folder: Path, *, allow_partial: bool) -> tuple[dict[tuple[int, int], list[Path]], list[str]]:
    """Files by (seed, evaluation), halves in order; and the names of the files that are neither."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    found: dict[tuple[int, int], dict[str, Path]] = {}
    ignored = []
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        match = _WHOLE.fullmatch(path.name) or _HALF.fullmatch(path.name)
        if match is None:
            ignored.append(path.name)
            continue
        parts = found.setdefault((int(match["seed"]), int(match["step"]) + 1), {})
        half = match.groupdict().get("half", "")
        if half in parts or (parts and ("" in parts or not half)):
            other = next(iter(parts.values()))
            raise DataError(f"{path.name} and {other.name} hold the same evaluation: remove one of them")
        parts[half] = path
    if not found:
        raise DataError(
            f"{folder} holds no seed41_step00.csv or learning_record-seed41-step0-first.csv files"
        )
    if not allow_partial:
        _require_grid(folder, found)
    return {
        key: [parts[half] for half in ("", *_HALVES) if half in parts] for key, parts in found.items()
    }, ignored


def _require_grid(folder: Path, found: Mapping[tuple[int, int], Mapping[str, Path]]) -> None:
    seeds = {seed for seed, _ in found}
    evaluations = {evaluation for _, evaluation in found}
    missing = [
        f"seed {seed} step {evaluation - 1}"
        for seed in sorted(seeds)
        for evaluation in sorted(evaluations)
        if (seed, evaluation) not in found
    ]
    missing += [
        f"the {half} half of seed {seed} step {evaluation - 1}"
        for (seed, evaluation), parts in sorted(found.items())
        for half in _HALVES
        if "" not in parts and half not in parts
    ]
    if missing:
        raise DataError(f"{folder} lacks {name_some(missing)}; add it, or accept this with --allow-partial")


def _read_column(key: tuple[int, int], paths: list[Path]) -> _Column:
    halves = [read_records(path) for path in paths]
    ids = pa.concat_arrays([half.ids for half in halves])
    losses_N = np.concatenate([half.values_N for half in halves])
    coded = pc.dictionary_encode(ids)
    code_N = coded.indices.to_numpy()
    # The dictionary is in order of first appearance, and so are the first rows of its codes.
    _, first_D = np.unique(code_N, return_index=True)
    repeated_D = np.bincount(code_N) > 1
    differs_N = losses_N != losses_N[first_D][code_N]
    conflicting_D = np.bincount(code_N, weights=differs_N) > 0
    tally = EvaluationCount(
        files=tuple(path.name for path in paths),
        seed=key[0],
        evaluation=key[1],
        rows=len(losses_N),
        distinct_ids=len(first_D),
        repeated_ids=int(repeated_D.sum()),
        conflicting_ids=int(conflicting_D.sum()),
    )
    named = [coded.dictionary.filter(pa.array(flag_D)).to_pylist() for flag_D in (repeated_D, conflicting_D)]
    return _Column(tally, coded.dictionary, losses_N[first_D], *named)


def _loss_table(columns: list[_Column], *, allow_partial: bool) -> LossTable:
    ids = pc.unique(pa.chunked_array([column.ids for column in columns]))
    for column in columns:
        absent = ids.filter(pc.invert(pc.is_in(ids, value_set=column.ids)))
        if len(absent) and not allow_partial:
            raise RecordsError(
                f"{len(absent):,} of {len(ids):,} ids are missing in {' and '.join(column.tally.files)}: "
                f"{name_some(absent.to_pylist())}; add them, or accept this with --allow-partial"
            )
    names_P, order_P = np.unique(np.asarray(ids.to_pylist(), dtype=np.str_), return_index=True)
    row_of_P = np.empty(len(order_P), dtype=np.intp)
    row_of_P[order_P] = np.arange(len(order_P))
    seeds = sorted({column.tally.seed for column in columns})
    evaluations = sorted({column.tally.evaluation for column in columns})
    losses_PSE = np.full((len(ids), len(seeds), len(evaluations)), np.nan)
    for column in columns:
        rows = row_of_P[pc.index_in(column.ids, value_set=ids).to_numpy()]
        s, e = seeds.index(column.tally.seed), evaluations.index(column.tally.evaluation)
        losses_PSE[rows, s, e] = column.losses_N
    return LossTable(names_P, names_P, tuple(seeds), tuple(evaluations), losses_PSE)
