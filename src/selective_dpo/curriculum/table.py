"""The curriculum: pairs with difficulty, rank, selection and order, plus where it all came from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from selective_dpo.config import SelectConfig
from selective_dpo.curriculum.records import LossTable, require_plain, text_array
from selective_dpo.curriculum.select import NOT_SELECTED
from selective_dpo.errors import ArtifactError, ConfigError, DataError, IdentityError, name_some
from selective_dpo.identity import ids_digest, require_unique
from selective_dpo.logprobs.nonfinite import REASON
from selective_dpo.storage.artifacts import SCHEMA_VERSION, file_digest, read_json, replacing, write_json
from selective_dpo.storage.digests import digest
from selective_dpo.storage.locks import holding, lock_beside

if TYPE_CHECKING:
    from datasets import Dataset

    from selective_dpo.data.adapters import Pair

TABLE = "curriculum.parquet"

FACTS = "curriculum.json"

COLUMNS = {
    "pair_id": pa.string(),
    "prompt_id": pa.string(),
    "difficulty": pa.float64(),
    "spread": pa.float64(),
    "count": pa.int64(),
    "rank": pa.int64(),
    "selected": pa.bool_(),
    "reason": pa.string(),
    "position": pa.int64(),
}
"""`rank` counts from 0, the easiest; `position` is the place in the training order, -1 if not selected;
`spread` is the standard deviation of the pair's losses, null where the difficulty was imported. The losses
follow as `loss_seed41_evaluation1` ..., and where margins were measured `P_WRONG`. Pairs that were set aside
as not finite (see `logprobs.nonfinite`), and those that an imported curriculum does not know (see `import_`),
have no numbers: null, a count of 0 and rank -1."""

P_WRONG = "p_wrong"
"""Name of the column of `stats.calibration.probability_wrong`."""


ACTION, FLIPPED, WEIGHT = "action", "flipped", "weight"
"""Columns of a curriculum that was made with `select.action`, beside the flags': what was done to the pair
(empty: nothing), whether its chosen and rejected answers changed places, and what it weighs in training. The
numbers of a flipped pair are those of its new label; its id stays that of the pair in the data."""


PAIR_ID = "pair_id"

PROMPT_ID = "prompt_id"

DIFFICULTY = "difficulty"

logger = logging.getLogger(__name__)


def loss_column(seed: int, evaluation: int) -> str:
    """Name of the column that holds the losses of one seed's evaluation."""
    return f"loss_seed{seed}_evaluation{evaluation}"


@dataclass(frozen=True)
class Curriculum:
    """A table of pairs (one row each, sorted by id, see `COLUMNS`) and the facts about it.

    Raises:
        ArtifactError, IdentityError: the table is not that of a curriculum (see `require_sound_table`).
    """

    table: pa.Table
    facts: Mapping[str, Any]
    """Selection, agreement, provenance and cost; JSON values only."""

    def __post_init__(self) -> None:
        for name, kind in COLUMNS.items():
            if self.table.column_names.count(name) != 1 or self.table.schema.field(name).type != kind:
                raise ArtifactError(f"not a curriculum: column {name!r} of type {kind} is missing")
        require_sound_table(self.table)

    @property
    def pair_ids(self) -> list[str]:
        """Every scored pair."""
        ids: list[str] = self.table["pair_id"].to_pylist()
        return ids

    @property
    def measured(self) -> Curriculum:
        """The same without the pairs that have no difficulty."""
        if not self.table["difficulty"].null_count:
            return self
        return Curriculum(self.table.filter(pc.is_valid(self.table["difficulty"])), self.facts)

    @property
    def difficulty_P(self) -> NDArray[np.float64]:
        """Difficulty in the unit of the scorers' loss (nats for DPO's own), or its criterion's."""
        return np.asarray(self.table["difficulty"].to_numpy(), dtype=np.float64)

    @property
    def order(self) -> list[str]:
        """Ids of the selected pairs, in training order."""
        positions = self.table["position"].to_numpy()
        chosen = np.flatnonzero(positions >= 0)
        chosen = chosen[np.argsort(positions[chosen], kind="stable")]
        ids: list[str] = self.table["pair_id"].take(pa.array(chosen)).to_pylist()
        return ids

    @property
    def certified_order(self) -> list[str]:
        """What the digests of a training's `order.json` are of: `order`, with weights where there are any."""
        if WEIGHT not in self.table.column_names:
            return self.order
        chosen = self.table.filter(pc.greater_equal(self.table["position"], 0)).sort_by("position")
        return with_weights(chosen[PAIR_ID].to_pylist(), chosen[WEIGHT].to_pylist())

    @property
    def order_digest(self) -> str:
        """SHA-256 of the selected ids in training order."""
        return ids_digest(self.order)

    def apply(self, dataset: Dataset, *, allow_unscored: bool = False) -> Dataset:
        """The selected pairs of `dataset` in training order, with columns `pair_id` and `difficulty`.

        Of a curriculum with `WEIGHT` and `FLIPPED`, the weights are a column, too, and the answers of flipped
        pairs are exchanged: texts, tokens and reference log-probs.

        Rows are found by their `pair_id` column or, without one, by the id computed from `prompt`, `chosen`
        and `rejected`. Of rows with the same id the first is used. The texts or tokens are not copied: the
        result looks into `dataset` through indices.

        Args:
            allow_unscored: leave out rows that the curriculum does not know, and log how many, instead of
                refusing them. They were never scored, so nothing says whether they belong in or out.

        Raises:
            ConfigError: `dataset` is no `datasets.Dataset`.
            IdentityError: selected pairs are missing from `dataset`, or it holds rows that were not scored.
            DataError: `dataset` has neither a `pair_id` column nor preference columns.
        """
        require_dataset(dataset)
        ids = row_pair_ids(dataset)
        scored_row = pc.index_in(ids, value_set=self.table[PAIR_ID].combine_chunks(), skip_nulls=True)
        unscored = ids.filter(pc.is_null(scored_row))
        if len(unscored):
            told = f"{len(unscored):,} of {len(ids):,} rows are not in the curriculum"
            if not allow_unscored:
                unusable = unscored.null_count
                named = [f"{unusable:,} are not usable pairs"] if unusable else []
                raise IdentityError(
                    f"{told} ({name_some([*named, *unscored.drop_null().to_pylist()])}); {self._remedy}, or "
                    "leave them out: apply(dataset, allow_unscored=True)"
                )
            logger.warning("%s and are left out", told)
        order = pa.array(self.order, type=pa.string())
        # index_in gives the first of several equal ids, which is the row that the rest of the package keeps.
        rows = pc.index_in(order, value_set=ids)
        if rows.null_count:
            absent = order.filter(pc.is_null(rows)).to_pylist()
            raise IdentityError(
                f"{len(absent):,} of {len(order):,} selected pairs are not in the data set: "
                f"{name_some(absent)}; {self._remedy}"
            )
        # Columns go in before the rows are picked: adding them afterwards would copy the whole selection.
        annotated = dataset
        for name in (DIFFICULTY, WEIGHT) if WEIGHT in self.table.column_names else (DIFFICULTY,):
            annotated = annotated.remove_columns([name]) if name in dataset.column_names else annotated
            annotated = annotated.add_column(name, self.table[name].take(scored_row).to_numpy())
        if PAIR_ID not in annotated.column_names:
            annotated = annotated.add_column(PAIR_ID, ids.to_pylist())
        chosen_rows = np.asarray(rows, dtype=np.int64)
        if FLIPPED not in self.table.column_names:
            return annotated.select(chosen_rows)
        flipped = pc.fill_null(self.table[FLIPPED].take(scored_row), False)
        return _with_exchanged(annotated, np.asarray(flipped, dtype=np.bool_), chosen_rows)

    @property
    def _remedy(self) -> str:
        if self.table[PAIR_ID] == self.table[PROMPT_ID]:
            return (
                "its ids name prompts: join it with the data first, by import_curriculum(..., pairs=dataset)"
            )
        return "apply the curriculum to the data it was made from"

    def save(self, path: str | Path) -> Path:
        """Write `curriculum.parquet` and `curriculum.json`, and return the table's path.

        `path` is a folder, or a `.parquet` file beside which the `.json` goes. The facts go last and hold
        the table's SHA-256, so they are the manifest.

        Raises:
            BusyError: another process is writing it.
        """
        table_path, facts_path = paths_of(Path(path))
        # Whatever fails while the two are written, those that were there stay; a kill between the two renames
        # leaves facts that are not of the table, which `load` notices.
        with (
            holding(lock_beside(table_path), what=str(table_path)),
            replacing(facts_path) as partial_facts,
            replacing(table_path) as partial_table,
        ):
            pq.write_table(self.table, partial_table)
            head = {
                "schema_version": SCHEMA_VERSION,
                "table_sha256": file_digest(partial_table),
                "facts_sha256": digest(self.facts),
            }
            write_json(partial_facts, {**head, **self.facts})
        return table_path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a curriculum from its `.parquet` file, or from the folder (such as a run's) that holds it.

        Raises:
            ArtifactError: not there, incomplete, damaged, or of another schema version.
            IdentityError: its ids are missing, repeated or out of order.
        """
        table_path, facts_path = paths_of(Path(path))
        if not table_path.is_file():
            raise ArtifactError(f"no curriculum at {table_path}")
        try:
            facts = read_json(facts_path)
            head = {
                name: facts.pop(name, None) for name in ("schema_version", "table_sha256", "facts_sha256")
            }
            facts_sha256 = digest(facts)
        except (ValueError, RecursionError, IsADirectoryError) as error:  # also NaN, and blocks without end
            raise ArtifactError(f"{facts_path} does not hold the facts of a curriculum: {error}") from error
        if head["schema_version"] != SCHEMA_VERSION:
            raise ArtifactError(f"{facts_path} is not of schema version {SCHEMA_VERSION}")
        if head["table_sha256"] != file_digest(table_path):
            raise ArtifactError(f"{table_path} is not the table that {facts_path.name} was written for")
        if head["facts_sha256"] != facts_sha256:
            raise ArtifactError(f"{facts_path} was changed since it was written; build the curriculum again")
        try:
            with pq.ParquetFile(table_path) as file:
                table = file.read()
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ArtifactError(f"{table_path} is not a curriculum's table: {error}") from error
        made = cls(table, facts)
        require_facts(facts, table, facts_path)
        return made


def with_weights(ids: Sequence[str], weights: Sequence[float]) -> list[str]:
    """Each id with its weight in training, written so that another weight is another text."""
    return [f"{name} {weight!r}" for name, weight in zip(ids, weights, strict=True)]


def paths_of(path: Path) -> tuple[Path, Path]:
    """Where the table and the facts are of a curriculum at `path`, which is as `Curriculum.load` takes it."""
    if path.suffix == ".parquet":
        return path, path.with_suffix(".json")
    return path / TABLE, path / FACTS


# --- A curriculum applied to a data set: its selected rows, in training order -----------------------------


def require_dataset(data: object) -> None:
    """Refuse what is no `datasets.Dataset`: a folder of splits, a stream, rows of another kind.

    Raises:
        ConfigError: says what to pass.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(data, Dataset):
        return
    split = f", such as its split {next(iter(data), 'train')!r}" if isinstance(data, DatasetDict) else ""
    raise ConfigError(f"the pairs are a {type(data).__name__}: pass a datasets.Dataset{split}")


_EXCHANGED = {
    "chosen": "rejected",
    "chosen_ids": "rejected_ids",
    "ref_chosen_logps": "ref_rejected_logps",
    "score_chosen": "score_rejected",
    "chosen_rating": "rejected_rating",
}
"""Columns of a preference data set that are about one answer, and those about the other."""


def _with_exchanged(dataset: Dataset, flipped_N: NDArray[np.bool_], rows: NDArray[np.int64]) -> Dataset:
    """The `rows` of `dataset`, those of `flipped_N` [N] with their answers exchanged; looked up, not copied.

    Raises:
        DataError: only one of two columns that would be exchanged is there.
    """
    from datasets import concatenate_datasets

    names = set(dataset.column_names)
    if lone := [name for name, other in _EXCHANGED.items() if (name in names) != (other in names)]:
        raise DataError(f"the data set has only one of {lone[0]} and {_EXCHANGED[lone[0]]}: remove it")
    there = {name: other for name, other in _EXCHANGED.items() if name in names}
    turned = dataset.rename_columns(there | {other: name for name, other in there.items()})
    # Row n of the data set is row n of both together as it is, and row n + its length exchanged.
    both = concatenate_datasets([dataset, turned.select_columns(dataset.column_names)])
    return both.select(rows + len(dataset) * flipped_N[rows])


_IDS = pa.schema({PAIR_ID: pa.string(), PROMPT_ID: pa.string()})


def dataset_ids(dataset: Dataset) -> pa.Table:
    """`pair_id` and `prompt_id` of each usable pair of a preference data set, once.

    Columns of both names are taken as they are; else ids are those that preparing the rows would give.

    Raises:
        DataError: `dataset` has neither these nor preference columns.
    """
    if {PAIR_ID, PROMPT_ID} <= set(dataset.column_names):
        return dataset.select_columns(_IDS.names).with_format("arrow")[:].cast(_IDS)
    prompt_of = {pair.pair_id: pair.prompt_id for pair in reversed(_pairs(dataset)) if pair is not None}
    return pa.table([list(prompt_of), list(prompt_of.values())], schema=_IDS)


def row_pair_ids(dataset: Dataset) -> pa.Array:
    """Each row's pair id; null where the row is not a usable pair."""
    names = set(dataset.column_names)
    if PAIR_ID in names:
        column = dataset.select_columns([PAIR_ID]).with_format("arrow")[:][PAIR_ID]
        return column.cast(pa.string()).combine_chunks()
    return pa.array([None if pair is None else pair.pair_id for pair in _pairs(dataset)], pa.string())


def _pairs(dataset: Dataset) -> list[Pair | None]:
    """Each row's pair; None where the row is not a usable one."""
    names = set(dataset.column_names)
    if not {"chosen", "rejected"} <= names:
        raise DataError(
            "the data set has neither a pair_id column nor chosen and rejected ones "
            f"(it has: {name_some(sorted(names))})"
        )
    from selective_dpo.data.adapters import DropReason, parse_row

    parsed = (parse_row(row) for row in dataset.with_format(None))
    return [None if isinstance(pair, DropReason) else pair for pair in parsed]


# --- What must hold of a curriculum before anybody trains on it: each fault is counted and named ----------


class _Facts(BaseModel, strict=True):
    key: str
    pairs: int
    selected: int
    select: SelectConfig
    seeds: list[int]
    evaluations: list[int]
    quarantined: int
    partial: int
    agreement: dict[str, Any]
    provenance: dict[str, Any]
    cost: dict[str, Any]


_REMEDY = "build the curriculum again from its records"


def require_sound_table(table: pa.Table) -> None:
    """Check the rows of a curriculum, whose columns have the right types already.

    Raises:
        IdentityError: an id is missing (null), stands twice, or out of order.
        ArtifactError: a difficulty is not finite (null, of a pair set aside, is allowed); ranks or places in
            the training order are not each there once; or a pair has a place and is not selected.
    """
    ids = table["pair_id"]
    for name in ("pair_id", "prompt_id"):
        require_plain(table[name], what=f"curriculum: {name}s")
    if pc.count_distinct(ids, mode="all").as_py() < len(ids):
        require_unique(ids.to_pylist(), what="curriculum")
    after = ids.slice(1)
    fallen = after.filter(pc.less(after, ids.slice(0, len(after))))
    if len(fallen):
        named = name_some(fallen.to_pylist())
        raise IdentityError(f"curriculum: {len(fallen):,} pair ids are out of order: {named}; {_REMEDY}")
    is_aside_P = np.asarray(pc.is_null(table["difficulty"]), dtype=np.bool_)
    _refuse(ids, ~is_aside_P & ~np.isfinite(table["difficulty"].to_numpy()), "have no finite difficulty")
    # -2 stands for null: no row may have it.
    rank_P, position_P = (pc.fill_null(table[name], -2).to_numpy() for name in ("rank", "position"))
    wrong_rank_P = _out_of_place(rank_P, ~is_aside_P) | (is_aside_P & (rank_P != NOT_SELECTED))
    _refuse(ids, wrong_rank_P, "have a wrong rank")
    _refuse(ids, np.asarray(pc.is_null(table["selected"]), dtype=np.bool_), "are neither selected nor not")
    selected_P = np.asarray(table["selected"], dtype=np.bool_)
    is_unlike_P = (selected_P != (position_P != NOT_SELECTED)) | (selected_P & is_aside_P)
    _refuse(ids, is_unlike_P, "are selected without a place in the order or a difficulty, or the reverse")
    _refuse(ids, _out_of_place(position_P, selected_P), "have a wrong place in the training order")


def require_facts(facts: Mapping[str, Any], table: pa.Table, where: object) -> None:
    """Check that the facts read from a file are complete and of this table.

    Raises:
        ArtifactError: one is missing, of the wrong kind, or says another number than the table.
    """
    try:
        _Facts.model_validate(facts)
    except ValidationError as error:
        wrong = dict.fromkeys(each["loc"][0] for each in error.errors())
        raise ArtifactError(f"{where}: {name_some(wrong)} missing or of the wrong kind; {_REMEDY}") from error
    aside = table.filter(pc.is_null(table["difficulty"]))
    counts = {
        "pairs": len(table) - len(aside),
        "selected": pc.sum(table["selected"]).as_py() or 0,
        "quarantined": pc.sum(pc.equal(aside["reason"], REASON)).as_py() or 0,
    }
    differing = [f"{facts[name]:,} {name}" for name, count in counts.items() if facts[name] != count]
    if differing:
        raise ArtifactError(f"{where} says {name_some(differing)}, unlike its table; {_REMEDY}")
    require_losses(table, facts, where)


def require_losses(table: pa.Table, facts: Mapping[str, Any], where: object) -> None:
    """Check that the table has a column of losses for each seed and evaluation of its facts.

    Raises:
        ArtifactError: one is missing, there twice, or holds no numbers.
    """
    names = [loss_column(seed, number) for seed in facts["seeds"] for number in facts["evaluations"]]
    kinds = dict(zip(table.column_names, table.schema.types, strict=True))
    wrong = [name for name in names if kinds.get(name) != pa.float64() or table.column_names.count(name) != 1]
    if wrong:
        raise ArtifactError(f"{where}: the table has no losses {name_some(wrong)}; {_REMEDY}")


def _out_of_place(place_P: NDArray[np.int64], counted_P: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows among those counted whose place is not one of 0 to n - 1, or is another row's, too."""
    size = int(counted_P.sum())
    inside_P = counted_P & (place_P >= 0) & (place_P < size)
    times = np.bincount(place_P[inside_P], minlength=size)
    wrong_P = counted_P & ~inside_P
    wrong_P[inside_P] = times[place_P[inside_P]] > 1
    return wrong_P


def _refuse(ids: pa.ChunkedArray, wrong_P: NDArray[np.bool_], what: str) -> None:
    if wrong_P.any():
        named = name_some(ids.filter(pa.array(wrong_P)).to_pylist())
        raise ArtifactError(
            f"curriculum: {int(wrong_P.sum()):,} of {len(ids):,} pairs {what}: {named}; {_REMEDY}"
        )


# --- The losses of a curriculum, as the table that they were built from -----------------------------------


def curriculum_losses(curriculum: Curriculum) -> LossTable:
    """The losses by pair, seed and evaluation, NaN where there is no record; rows sorted by pair id.

    Pairs that were set aside as not finite are not among them.

    Raises:
        ArtifactError: the table lacks the losses of a seed and evaluation that the facts name.
    """
    table, facts = curriculum.measured.table, curriculum.facts
    seeds, evaluations = tuple(facts["seeds"]), tuple(facts["evaluations"])
    require_losses(table, facts, "the curriculum")
    losses_PSE = np.empty((len(table), len(seeds), len(evaluations)))
    for s, seed in enumerate(seeds):
        for e, evaluation in enumerate(evaluations):
            losses_PSE[:, s, e] = table[loss_column(seed, evaluation)].to_numpy()
    pair_ids_P, prompt_ids_P = (text_array(table[name]) for name in ("pair_id", "prompt_id"))
    return LossTable(pair_ids_P, prompt_ids_P, seeds, evaluations, losses_PSE)
