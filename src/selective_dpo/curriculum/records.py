"""Held-out records as columns, and the one dense array that everything downstream computes on."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.criteria import CRITERIA, by_record
from selective_dpo.curriculum.columns import codes, first_rows, text_array
from selective_dpo.errors import ArtifactError, RecordsError, name_some
from selective_dpo.logprobs.nonfinite import quarantined_pair

LARGEST_LOSS = 1e30
"""In nats. A loss beyond it is no measurement; the sums and squares of those below stay finite."""


@dataclass(frozen=True)
class Records:
    """One row a held-out measurement; columns of equal length R.

    `evaluation` counts from 1; `fold` is the half that the pair is in, so its scorer was trained on
    the other half. Log-probs are sums over the completion's tokens, in nats; `margin` is beta times
    the difference of the chosen and rejected log-ratios; `loss` is the scorer's own training loss, for
    DPO's own -log sigmoid(margin), in nats (see `core.losses`).
    """

    pair_id: NDArray[np.str_]
    prompt_id: NDArray[np.str_]
    seed: NDArray[np.int64]
    fold: NDArray[np.int64]
    evaluation: NDArray[np.int64]
    step: NDArray[np.int64]
    policy_chosen_logp: NDArray[np.float64]
    policy_rejected_logp: NDArray[np.float64]
    reference_chosen_logp: NDArray[np.float64]
    reference_rejected_logp: NDArray[np.float64]
    margin: NDArray[np.float64]
    loss: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.pair_id)


@dataclass(frozen=True)
class LossTable:
    """Losses by pair, seed and evaluation: what difficulty, agreement and selection are computed from."""

    pair_ids_P: NDArray[np.str_]
    """Sorted, unique."""
    prompt_ids_P: NDArray[np.str_]
    seeds_S: tuple[int, ...]
    evaluations_E: tuple[int, ...]
    losses_PSE: NDArray[np.float64]
    """NaN where there is no record; complete tables have none."""

    @property
    def counts_P(self) -> NDArray[np.int64]:
        """Number of records of each pair."""
        pairs, seeds, evaluations = self.losses_PSE.shape
        held_PR = np.isfinite(self.losses_PSE).reshape(pairs, seeds * evaluations)
        return np.asarray(np.count_nonzero(held_PR, axis=1), dtype=np.int64)


class CodedRecords(NamedTuple):
    """Some records, their keys given as places along the axes of a table of losses; columns of length R."""

    pair_R: NDArray[np.integer[Any]]
    seed_R: NDArray[np.integer[Any]]
    evaluation_R: NDArray[np.integer[Any]]
    fold_R: NDArray[np.integer[Any]]
    """The folds themselves: they are no axis."""
    loss_R: NDArray[np.float64]


class Axes(NamedTuple):
    """What the places along a table of losses stand for."""

    pair_ids_P: NDArray[np.str_]
    """Sorted, unique."""
    prompt_ids_P: NDArray[np.str_]
    seeds_S: tuple[int, ...]
    evaluations_E: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, S, E)."""
        return len(self.pair_ids_P), len(self.seeds_S), len(self.evaluations_E)


def loss_table(records: Records, *, allow_partial: bool = False) -> LossTable:
    """Arrange records by (pair, seed, evaluation), each exactly once.

    Raises:
        RecordsError: no records; a record stands twice; a loss is not finite; a pair was measured in both
            folds of a seed; or, unless `allow_partial`, a pair lacks a record. Some of the pairs are named.
    """
    pair_ids, first, pair_R = np.unique(records.pair_id, return_index=True, return_inverse=True)
    seeds, seed_R = np.unique(records.seed, return_inverse=True)
    evaluations, evaluation_R = np.unique(records.evaluation, return_inverse=True)
    axes = Axes(pair_ids, records.prompt_id[first], tuple(seeds.tolist()), tuple(evaluations.tolist()))
    part = CodedRecords(pair_R, seed_R, evaluation_R, records.fold, records.loss)
    return arrange(axes, [part], allow_partial=allow_partial)


def arrange(axes: Axes, parts: Sequence[CodedRecords], *, allow_partial: bool = False) -> LossTable:
    """The table of the records in `parts`; `loss_table` says what is refused."""
    if not any(len(part.loss_R) for part in parts):
        raise RecordsError("there are no records: run the scoring first")
    _require_finite(axes, parts)
    losses_PSE = np.full(axes.shape, np.nan)
    records_P = np.zeros(len(axes.pair_ids_P), dtype=np.int64)
    for part in parts:
        cell_R = np.ravel_multi_index((part.pair_R, part.seed_R, part.evaluation_R), axes.shape)
        losses_PSE.reshape(-1)[cell_R] = part.loss_R
        records_P += np.bincount(part.pair_R, minlength=len(records_P))
    table = LossTable(*axes, losses_PSE)
    # All losses are finite, so a pair with more records than filled cells has two in one of them.
    counts_P = table.counts_P
    if (records_P > counts_P).any():
        repeated = axes.pair_ids_P[records_P > counts_P]
        raise RecordsError(
            f"{len(repeated):,} pairs have two records for one seed and evaluation: {name_some(repeated)}"
        )
    _require_one_fold(axes, parts)
    complete = len(axes.seeds_S) * len(axes.evaluations_E)
    if (counts_P < complete).any() and not allow_partial:
        lacking = axes.pair_ids_P[counts_P < complete]
        raise RecordsError(
            f"{len(lacking):,} of {len(counts_P):,} pairs lack some of their {complete} records: "
            f"{name_some(lacking)}; score them, or accept them with --allow-partial"
        )
    return table


def _require_finite(axes: Axes, parts: Sequence[CodedRecords]) -> None:
    # Written so that NaN, which compares with nothing, is refused as well.
    bad = np.concatenate([part.pair_R[~(np.abs(part.loss_R) <= LARGEST_LOSS)] for part in parts])
    if len(bad):
        named = axes.pair_ids_P[np.unique(bad)]
        raise RecordsError(f"{len(named):,} pairs have a loss that is not finite: {name_some(named)}")


def _require_one_fold(axes: Axes, parts: Sequence[CodedRecords]) -> None:
    """A seed's two scorers were trained on one fold each: the scorer of the other fold knows the pair."""
    fold_PS = np.zeros(axes.shape[:2], dtype=np.int64)
    for part in parts:
        fold_PS[part.pair_R, part.seed_R] = part.fold_R
    # The last record of a pair and seed stands there now: an earlier one of the other fold differs from it.
    differs = [part.pair_R[fold_PS[part.pair_R, part.seed_R] != part.fold_R] for part in parts]
    two_folds = np.concatenate(differs)
    if len(two_folds):
        named = axes.pair_ids_P[np.unique(two_folds)]
        raise RecordsError(
            f"{len(named):,} pairs have records of both folds of one seed: {name_some(named)}; "
            "one of its two scorers was trained on them, so score that seed again"
        )


# ----------------------------------------------------------------------------------------------------
# records.parquet: the columns of `Records`, by their names.


_TEXT = ("pair_id", "prompt_id")

_WHOLE = ("seed", "fold", "evaluation", "step")


def _kind(name: str) -> pa.DataType:
    if name in _TEXT:
        return pa.string()
    return pa.int64() if name in _WHOLE else pa.float64()


SCHEMA = pa.schema(
    [pa.field(field.name, _kind(field.name), nullable=False) for field in dataclasses.fields(Records)]
)


def write_records(records: Records, path: Path) -> None:
    """Write records to `path`, as a file of a folder that is still being filled (see `publish_folder`).

    Raises:
        ValueError: the columns differ in length.
    """
    columns = [pa.array(getattr(records, field.name), type=field.type) for field in SCHEMA]
    pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), path)


def read_records(path: Path) -> Records:
    """Read a records file.

    Raises:
        ArtifactError: it is missing or not Parquet, its columns are not those of `Records` in name and
            type, or a value is null.
    """
    table = read_columns(path, SCHEMA.names)
    columns: dict[str, Any] = {name: _to_numpy(table[name]) for name in SCHEMA.names}
    return Records(**columns)


def concat_records(parts: Sequence[Records]) -> Records:
    """The records of several scorers, one after the other.

    Raises:
        ValueError: there are none to put together.
    """
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in SCHEMA.names
    }
    return Records(**columns)


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Some columns of a records file, as Arrow; all of it is checked as `read_records` does."""
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist: run the scoring that makes it")
    try:
        schema = pq.read_schema(path)
        _require_record_columns(path, schema)
        # A column that cannot hold nulls need not be read to know that there are none.
        nullable = [name for name in SCHEMA.names if schema.field(name).nullable]
        table = pq.read_table(path, columns=[*dict.fromkeys([*names, *nullable])])
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:  # also names that are no text
        raise ArtifactError(
            f"{path} is not a Parquet file ({error}); delete its folder and score again"
        ) from error
    empty = [name for name in table.column_names if table[name].null_count]
    if empty:
        raise ArtifactError(f"{path} has nulls in column(s) {', '.join(empty)}")
    return table.select(names).cast(pa.schema([SCHEMA.field(name) for name in names]))


def _require_record_columns(path: Path, schema: pa.Schema) -> None:
    found = {field.name: field.type for field in schema}
    wanted = {field.name: field.type for field in SCHEMA}
    if found != wanted or len(schema) != len(SCHEMA):
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        wrong += sorted({name for name in schema.names if schema.names.count(name) > 1})
        raise ArtifactError(
            f"{path} does not hold records: column(s) {', '.join(wrong)} missing, extra, repeated or mistyped"
        )


def _to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    if column.type != pa.string():
        return np.asarray(column.to_numpy())
    # Ids repeat in every evaluation: only the distinct ones are converted.
    code_N, distinct = codes(column)
    return np.asarray(text_array(distinct)[code_N])


# ----------------------------------------------------------------------------------------------------
# From records files straight to the table of losses: 30 million records are no problem as columns.
#
# A file's ids stay in Arrow and are read as codes; the losses go from the file into their places. The
# result equals `loss_table(concat_records([read_records(path) ...]))`, which needs ten times the memory.


_COLUMNS = ("pair_id", "prompt_id", "seed", "fold", "evaluation", "loss")


def read_loss_table(
    paths: Sequence[Path], *, allow_partial: bool = False, without: Collection[str] = ()
) -> LossTable:
    """The losses in records files, by pair, seed and evaluation, each exactly once.

    Pairs of the ids `without` are left out, whatever was measured of them.

    Raises:
        ArtifactError: a file is missing, or does not hold records (see `read_records`).
        RecordsError: what `loss_table` refuses.
    """
    files = [_read(path, pa.array(list(without), type=pa.string())) for path in paths]
    ids = pa.chunked_array([file.pairs.values for file in files], type=pa.string())
    id_N, distinct = codes(ids)
    by_id_P = pc.sort_indices(distinct).to_numpy()
    prompts = pa.chunked_array([file.prompts for file in files], type=pa.string())
    place_P = np.empty(len(by_id_P), dtype=np.int32)
    place_P[by_id_P] = np.arange(len(by_id_P))
    first_P = first_rows(id_N, len(distinct))
    axes = Axes(
        text_array(distinct.take(pa.array(by_id_P))),
        text_array(prompts.take(pa.array(first_P[by_id_P]))),
        _axis([file.seeds for file in files]),
        _axis([file.evaluations for file in files]),
    )
    starts = np.cumsum([0, *(len(file.pairs.values) for file in files)])
    parts = [
        _placed(file, place_P[id_N[start:stop]], axes)
        for file, start, stop in zip(files, starts[:-1], starts[1:], strict=True)
    ]
    return arrange(axes, parts, allow_partial=allow_partial)


class _Coded(NamedTuple):
    """A column as its distinct values and the place of each row's among them."""

    code_R: NDArray[np.int32]
    values: pa.Array


class _File(NamedTuple):
    pairs: _Coded
    prompts: pa.Array
    """Of each distinct pair."""
    seeds: _Coded
    evaluations: _Coded
    fold_R: NDArray[np.int64]
    loss_R: NDArray[np.float64]


def _read(path: Path, without: pa.Array) -> _File:
    table = read_columns(path, _COLUMNS)
    if len(without):
        table = table.filter(pc.invert(pc.is_in(table["pair_id"], value_set=without)))
    pairs = _Coded(*codes(table["pair_id"]))
    first = first_rows(pairs.code_R, len(pairs.values))
    return _File(
        pairs,
        _one_chunk(table["prompt_id"].take(pa.array(first))),
        _Coded(*codes(table["seed"])),
        _Coded(*codes(table["evaluation"])),
        table["fold"].to_numpy(),
        table["loss"].to_numpy(),
    )


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.array([], type=column.type)


def _axis(columns: Sequence[_Coded]) -> tuple[int, ...]:
    return tuple(sorted({value for column in columns for value in column.values.to_pylist()}))


def _placed(file: _File, place_D: NDArray[np.int32], axes: Axes) -> CodedRecords:
    return CodedRecords(
        place_D[file.pairs.code_R],
        _along(file.seeds, axes.seeds_S),
        _along(file.evaluations, axes.evaluations_E),
        file.fold_R,
        file.loss_R,
    )


def _along(column: _Coded, axis: tuple[int, ...]) -> NDArray[np.int32]:
    places = [axis.index(value) for value in column.values.to_pylist()]
    return np.array(places, dtype=np.int32)[column.code_R]


_VALUES = (
    "policy_chosen_logp",
    "policy_rejected_logp",
    "reference_chosen_logp",
    "reference_rejected_logp",
    "margin",
    "loss",
)


class Sifted(NamedTuple):
    """Records parted by pair."""

    records: Records
    """All records of the pairs that have only finite ones."""
    quarantined: list[dict[str, Any]]
    """The other pairs, for `write_quarantine`."""


def sift(records: Records) -> Sifted:
    """Part the pairs with a value that is not finite in any record from the others."""
    finite_VR = np.stack([np.isfinite(getattr(records, name)) for name in _VALUES])
    bad_rows = np.flatnonzero(~finite_VR.all(axis=0))
    if not len(bad_rows):
        return Sifted(records, [])
    found: dict[str, dict[str, Any]] = {}
    for row in bad_rows.tolist():
        pair = str(records.pair_id[row])
        entry = found.setdefault(pair, quarantined_pair(pair, str(records.prompt_id[row])))
        values = [name for name, is_finite in zip(_VALUES, finite_VR[:, row], strict=True) if not is_finite]
        place = {"evaluation": int(records.evaluation[row]), "step": int(records.step[row])}
        entry["not_finite"].append({**place, "values": values})
    kept_R = ~np.isin(records.pair_id, list(found))
    whole = Records(**{name: column[kept_R] for name, column in vars(records).items()})
    return Sifted(whole, [found[pair] for pair in sorted(found)])


class Difficulty(NamedTuple):
    """One number a pair, and what it was made from."""

    difficulty_P: NDArray[np.float64]
    """Larger is harder. In the loss's unit, but for criteria that say otherwise, such as `rank-mean`."""
    spread_P: NDArray[np.float64]
    """Standard deviation of the pair's own losses (divisor n: 0 for a single record)."""
    count_P: NDArray[np.int64]
    """Number of the pair's records."""


def difficulty(table: LossTable, how: str = "mean", *, allow_partial: bool = False) -> Difficulty:
    """Reduce losses_PSE [P, S, E] to one difficulty for each pair, by the criterion `how`.

    With `allow_partial` it is taken over the records that a pair has.

    Raises:
        RecordsError: a loss is infinite; a pair lacks records and `allow_partial` is off; or a pair
            has none of the records that `how` reads. Some of the pairs are named.
        ValueError: there is no such criterion.
    """
    if how not in CRITERIA:
        raise ValueError(f"unknown criterion {how!r}: use {', '.join(CRITERIA)}")
    losses_PSE = table.losses_PSE
    if np.isinf(losses_PSE).any():
        bad = table.pair_ids_P[np.isinf(losses_PSE).any(axis=(1, 2))]
        raise RecordsError(f"{len(bad):,} pairs have an infinite loss: {name_some(bad)}")
    count_P = table.counts_P
    complete = losses_PSE.shape[1] * losses_PSE.shape[2]
    lacking = table.pair_ids_P[count_P < complete]
    if len(lacking) and not allow_partial:
        raise RecordsError(
            f"{len(lacking):,} of {len(count_P):,} pairs lack some of their {complete} records: "
            f"{name_some(lacking)}; score them, or accept them with --allow-partial"
        )
    with warnings.catch_warnings():
        # Of pairs without a record that is read, which are named below.
        warnings.simplefilter("ignore", RuntimeWarning)
        difficulty_P = CRITERIA[how].score(losses_PSE)
        spread_P = np.nanstd(by_record(losses_PSE), axis=1) if len(lacking) else by_record(losses_PSE).std(1)
    empty = table.pair_ids_P[~np.isfinite(difficulty_P)]
    if len(empty):
        raise RecordsError(f"{len(empty):,} pairs have no record that '{how}' reads: {name_some(empty)}")
    return Difficulty(difficulty_P, spread_P, count_P)
