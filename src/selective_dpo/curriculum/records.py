"""Held-out records as columns, and the dense arrays that everything downstream computes on."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.criteria import CRITERIA, RECORD_COLUMNS, by_record
from selective_dpo.errors import ArtifactError, ConfigError, IdentityError, RecordsError, name_some
from selective_dpo.identity import MAX_ID_BYTES, positions_of
from selective_dpo.logprobs.nonfinite import quarantined_pair

MAX_LOSS = 1e30
"""In nats. A loss beyond it is no measurement; the sums and squares of those below stay finite."""


@dataclass(frozen=True)
class Records:
    """One row a held-out measurement; columns of equal length R.

    `evaluation` counts from 1; `fold` is the half that the pair is in, so its scorer was trained on
    the other half. Log-probs are sums over the completion's tokens, in nats; `margin` is beta times
    the difference of the chosen and rejected log-ratios; `loss` is the scorer's own training loss, for
    DPO's own -log sigmoid(margin), in nats (see `losses`).
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
    others: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """Further record columns [P, S, E] by name: those that a criterion reads."""

    @property
    def counts_P(self) -> NDArray[np.int64]:
        """Number of records of each pair."""
        return np.asarray(np.count_nonzero(np.isfinite(by_record(self.losses_PSE)), axis=1), dtype=np.int64)

    @property
    def complete(self) -> int:
        """Number of records of a pair that has all: one for each seed and evaluation."""
        return len(self.seeds_S) * len(self.evaluations_E)

    def of_pairs(self, kept_P: NDArray[np.bool_]) -> LossTable:
        """The table of some pairs."""
        return dataclasses.replace(
            self,
            pair_ids_P=self.pair_ids_P[kept_P],
            prompt_ids_P=self.prompt_ids_P[kept_P],
            losses_PSE=self.losses_PSE[kept_P],
            others={name: values_PSE[kept_P] for name, values_PSE in self.others.items()},
        )

    def of_seed(self, s: int) -> LossTable:
        """The table of one seed, given by its index."""
        return dataclasses.replace(
            self,
            seeds_S=self.seeds_S[s : s + 1],
            losses_PSE=self.losses_PSE[:, s : s + 1],
            others={name: values_PSE[:, s : s + 1] for name, values_PSE in self.others.items()},
        )


def loss_table(
    records: Records, *, allow_partial: bool = False, columns: Collection[str] = ("loss",)
) -> LossTable:
    """Arrange records by (pair, seed, evaluation), each exactly once; `columns` as a criterion reads them.

    Raises:
        RecordsError: no records; a record stands twice; a loss is not finite; a pair was measured in both
            folds of a seed; or, unless `allow_partial`, a pair lacks a record. Some of the pairs are named.
    """
    return arrange(_to_arrow(records), columns, allow_partial=allow_partial)


def read_loss_table(
    paths: Sequence[Path],
    *,
    allow_partial: bool = False,
    without: Collection[str] = (),
    columns: Collection[str] = ("loss",),
) -> LossTable:
    """What `loss_table` makes of the records in all these files, without the pairs of the ids `without`.

    Thirty million records take about 3 GB: ids are read as codes, file by file.

    Raises:
        ArtifactError: a file is missing, or does not hold records (see `read_records`).
        RecordsError: what `loss_table` refuses.
    """
    names = ["pair_id", "prompt_id", "seed", "fold", "evaluation", *{"loss": None} | dict.fromkeys(columns)]
    left_out = pa.array(list(without), type=pa.string())
    tables = []
    for path in paths:
        table = read_columns(path, names)
        if without:
            table = table.filter(pc.invert(pc.is_in(table["pair_id"], value_set=left_out)))
        for place, name in enumerate(_TEXT):
            table = table.set_column(place, name, pc.dictionary_encode(table[name]))
        tables.append(table)
    records = pa.concat_tables(tables or [SCHEMA.empty_table()])
    return arrange(records, columns, allow_partial=allow_partial)


def arrange(
    table: pa.Table, columns: Collection[str] = ("loss",), *, allow_partial: bool = False
) -> LossTable:
    """What `loss_table` makes of an Arrow table of records, whose rows come in any order."""
    if not len(table):
        raise RecordsError("there are no records: run the scoring first")
    code_R, ids_D = codes(table["pair_id"])
    by_id_P = pc.sort_indices(ids_D).to_numpy()
    pair_R = np.argsort(by_id_P).astype(np.int32)[code_R]
    # Of several values written to one place the last one stays, so rows are written from the last on.
    first_P = np.empty(len(by_id_P), dtype=np.int64)
    first_P[pair_R[::-1]] = np.arange(len(pair_R) - 1, -1, -1)
    ids_P = text_array(ids_D.take(pa.array(by_id_P)))
    prompt_R, prompts_D = codes(table["prompt_id"])
    prompts_P = text_array(prompts_D)[prompt_R[first_P]]
    (seeds_S, seed_R), (evaluations_E, evaluation_R) = (_axis(table[name]) for name in ("seed", "evaluation"))
    shape = len(ids_P), len(seeds_S), len(evaluations_E)
    cell_R = np.ravel_multi_index((pair_R, seed_R, evaluation_R), shape)

    arranged: dict[str, NDArray[np.float64]] = {}
    for name in {"loss": None} | dict.fromkeys(columns):
        values_R = table[name].to_numpy()
        # Written so that NaN, which compares with nothing, is refused as well.
        _refuse(ids_P, pair_R[~(np.abs(values_R) <= MAX_LOSS)], f"have a {name} that is not finite")
        arranged[name] = np.full(shape, np.nan)
        arranged[name].reshape(-1)[cell_R] = values_R

    times_PR = np.bincount(cell_R, minlength=int(np.prod(shape))).reshape(len(ids_P), -1)
    repeated = np.flatnonzero((times_PR > 1).any(axis=1))
    _refuse(ids_P, repeated, "have two records for one seed and evaluation")

    # A seed's two scorers were trained on one fold each: the scorer of the other fold knows the pair.
    fold_PS, fold_R = np.zeros(shape[:2], dtype=np.int64), table["fold"].to_numpy()
    fold_PS[pair_R, seed_R] = fold_R
    # The last record of a pair and seed stands there now: an earlier one of the other fold differs from it.
    two_folds = pair_R[fold_PS[pair_R, seed_R] != fold_R]
    remedy = "; one of its two scorers was trained on them, so score that seed again"
    _refuse(ids_P, two_folds, "have records of both folds of one seed", remedy)

    made = LossTable(ids_P, prompts_P, seeds_S, evaluations_E, arranged.pop("loss"), arranged)
    if not allow_partial:
        _require_complete(made)
    return made


def _axis(column: pa.ChunkedArray) -> tuple[tuple[int, ...], NDArray[np.intp]]:
    """The distinct whole numbers of a column, rising, and the index of each row's among them."""
    values_A = np.sort(pc.unique(column).to_numpy())
    return tuple(values_A.tolist()), np.searchsorted(values_A, column.to_numpy())


def _refuse(ids_P: NDArray[np.str_], rows: NDArray[np.integer[Any]], what: str, remedy: str = "") -> None:
    if len(rows):
        named = ids_P[np.unique(rows)]
        raise RecordsError(f"{len(named):,} pairs {what}: {name_some(named)}{remedy}")


def _require_complete(table: LossTable) -> None:
    lacking = table.pair_ids_P[table.counts_P < table.complete]
    if len(lacking):
        pairs = len(table.pair_ids_P)
        raise RecordsError(
            f"{len(lacking):,} of {pairs:,} pairs lack some of their {table.complete} records: "
            f"{name_some(lacking)}; score them, or accept them with --allow-partial"
        )


# --- records.parquet: the columns of `Records`, by their names --------------------------------------------

_TEXT = ("pair_id", "prompt_id")

_KINDS = (
    (pa.string(), _TEXT),
    (pa.int64(), ("seed", "fold", "evaluation", "step")),
    (pa.float64(), RECORD_COLUMNS),
)

SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for kind, names in _KINDS for name in names])


def write_records(records: Records, path: Path) -> None:
    """Write records to `path`, as a file of a folder that is still being filled (see `publish_folder`).

    Raises:
        ValueError: the columns differ in length.
    """
    pq.write_table(_to_arrow(records), path)


def _to_arrow(records: Records) -> pa.Table:
    columns = [pa.array(getattr(records, each.name), type=each.type) for each in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


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
        found, wanted = (Counter((each.name, each.type) for each in fields) for fields in (schema, SCHEMA))
        if wrong := sorted({name for name, _ in (found - wanted) + (wanted - found)}):
            raise ArtifactError(
                f"{path} does not hold records: column(s) {', '.join(wrong)} missing, extra, repeated or "
                "mistyped"
            )
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


def _to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    if column.type != pa.string():
        return np.asarray(column.to_numpy())
    # Ids repeat in every evaluation: only the distinct ones are converted.
    code_N, distinct = codes(column)
    return np.asarray(text_array(distinct)[code_N])


class Sifted(NamedTuple):
    """What `sift` makes of records."""

    records: Records
    """All records of the pairs that have only finite ones."""
    quarantined: list[dict[str, Any]]
    """The other pairs, for `write_quarantine`."""


def sift(records: Records) -> Sifted:
    """Take out the pairs that have a value that is not finite in any of their records."""
    finite_VR = np.stack([np.isfinite(getattr(records, name)) for name in RECORD_COLUMNS])
    bad_rows = np.flatnonzero(~finite_VR.all(axis=0))
    if not len(bad_rows):
        return Sifted(records, [])
    found: dict[str, dict[str, Any]] = {}
    for row in bad_rows.tolist():
        pair = str(records.pair_id[row])
        entry = found.setdefault(pair, quarantined_pair(pair, str(records.prompt_id[row])))
        values = [
            name for name, is_finite in zip(RECORD_COLUMNS, finite_VR[:, row], strict=True) if not is_finite
        ]
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
        ConfigError: there is no such criterion, the table lacks a column that it reads, or it does not
            return a number for each pair.
    """
    criterion, losses_PR = CRITERIA[how], by_record(table.losses_PSE)
    _refuse(table.pair_ids_P, np.flatnonzero(np.isinf(losses_PR).any(axis=1)), "have an infinite loss")
    if not allow_partial:
        _require_complete(table)
    columns = {"loss": table.losses_PSE, **table.others}
    if lacking := [name for name in criterion.reads if name not in columns]:
        raise ConfigError(
            f"criterion {how!r} reads {', '.join(lacking)}, which these losses come without: build the "
            "curriculum from the records of a run"
        )
    has_gaps = bool(np.isnan(losses_PR).any())
    with warnings.catch_warnings():
        # Of pairs without a record that is read, which are named below.
        warnings.simplefilter("ignore", RuntimeWarning)
        scores = criterion.score(**{name: columns[name] for name in criterion.reads})
        spread_P = np.nanstd(losses_PR, axis=1) if has_gaps else losses_PR.std(axis=1)
    difficulty_P = np.asarray(scores, dtype=np.float64)
    if difficulty_P.shape != table.pair_ids_P.shape:
        raise ConfigError(
            f"criterion {how!r} returned shape {difficulty_P.shape} for {len(losses_PR):,} pairs: it must "
            "return one number for each pair"
        )
    unread = np.flatnonzero(~np.isfinite(difficulty_P))
    _refuse(table.pair_ids_P, unread, f"have no record that '{how}' reads")
    return Difficulty(difficulty_P, spread_P, table.counts_P)


# --- Columns of ids as NumPy arrays, without a Python string for each row ---------------------------------


def text_array(column: pa.Array | pa.ChunkedArray) -> NDArray[np.str_]:
    """Strings without nulls as a NumPy array of the width of the longest.

    Raises:
        IdentityError: as `require_plain`.
    """
    require_plain(column, what="ids")
    width = pc.max(pc.binary_length(column)).as_py() or 1
    if not pc.all(pc.string_is_ascii(column), min_count=0).as_py():
        return np.asarray(column.to_pylist(), dtype=np.str_)
    # Padded with NUL, which NumPy leaves out, all are of one width, and their bytes are NumPy's.
    padded = pc.ascii_rpad(column, width, "\0").cast(pa.binary()).cast(pa.binary(width))
    chunks = padded.chunks if isinstance(padded, pa.ChunkedArray) else [padded]
    letters = [np.frombuffer(chunk.buffers()[1], f"S{width}", len(chunk)) for chunk in chunks if len(chunk)]
    return np.concatenate([np.empty(0, f"S{width}"), *letters]).astype(np.str_)


def require_plain(column: pa.Array | pa.ChunkedArray, *, what: str) -> None:
    """Check that texts can be ids: NumPy drops NUL characters at their ends and pads all to the longest.

    Raises:
        IdentityError: one is null, holds a NUL character, is too long or is not UTF-8; `what` names them.
    """
    wrong = pc.fill_null(
        pc.or_(pc.match_substring(column, "\0"), pc.greater(pc.binary_length(column), MAX_ID_BYTES)), True
    )
    count = pc.sum(wrong).as_py() or 0
    if count:
        shown = [str(text)[:40] for text in column.filter(wrong).cast(pa.binary()).to_pylist()[:5]]
        raise IdentityError(
            f"{what}: {count:,} are missing, hold a NUL character or have more than {MAX_ID_BYTES} bytes: "
            f"{name_some(shown)}"
        )
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise IdentityError(f"{what} are not all UTF-8 text ({error})") from error


def codes(column: pa.Array | pa.ChunkedArray) -> tuple[NDArray[np.int32], pa.Array]:
    """For each row the index of its value among the distinct ones, which come in order of appearance."""
    coded = pc.dictionary_encode(column)
    if isinstance(coded, pa.ChunkedArray):
        if not coded.num_chunks:
            return np.empty(0, dtype=np.int32), pa.array([], type=column.type)
        coded = coded.unify_dictionaries().combine_chunks()
    return coded.indices.to_numpy(), coded.dictionary


def id_positions(wanted: pa.ChunkedArray, available: pa.ChunkedArray, *, what: str) -> NDArray[np.int64]:
    """Where each of `wanted` stands in `available`: `identity.positions_of` for columns of ids.

    Raises:
        IdentityError: an id is wanted but not available, or stands twice in either column.
    """
    where = pc.index_in(wanted, value_set=available)
    is_one_to_one = not where.null_count and all(
        pc.count_distinct(ids, mode="all").as_py() == len(ids) for ids in (wanted, available)
    )
    if not is_one_to_one:  # which names the ids that are wrong
        return positions_of(wanted.to_pylist(), available.to_pylist(), what=what)
    return np.asarray(where.to_numpy(), dtype=np.int64)
