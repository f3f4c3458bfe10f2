"""The curriculum: pairs with difficulty, rank, selection and order, plus where it all came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selective_dpo.artifacts import SCHEMA_VERSION, file_digest, read_json, replacing, write_json
from selective_dpo.core.identity import ids_digest
from selective_dpo.curriculum.checks import require_facts, require_losses, require_sound_table
from selective_dpo.digests import digest
from selective_dpo.errors import ArtifactError
from selective_dpo.locks import holding, lock_beside

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

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
`spread` is the standard deviation of the pair's losses. The losses follow as `loss_seed41_evaluation1` ...
Pairs that were set aside as not finite (see `quarantine`) have no numbers: null, a count of 0 and rank -1."""


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
        """The same without the pairs that were set aside as not finite: all that has a difficulty."""
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
    def order_digest(self) -> str:
        """SHA-256 of the selected ids in training order."""
        return ids_digest(self.order)

    def apply(self, dataset: Dataset, *, allow_unscored: bool = False) -> Dataset:
        """The selected pairs of a preference data set, in training order (see `apply_curriculum`)."""
        # Imported here: a curriculum can be read and inspected without loading `datasets`.
        from selective_dpo.curriculum.apply import apply_curriculum

        return apply_curriculum(self, dataset, allow_unscored=allow_unscored)

    def save(self, path: str | Path) -> Path:
        """Write `curriculum.parquet` and `curriculum.json`, and return the table's path.

        `path` is a folder, or a `.parquet` file beside which the `.json` goes. The facts go last and hold
        the table's SHA-256, so they are the manifest.

        Raises:
            BusyError: another process is writing it.
        """
        table_path, facts_path = _paths(Path(path))
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
        table_path, facts_path = _paths(Path(path))
        if not table_path.is_file():
            raise ArtifactError(f"no curriculum at {table_path}")
        facts = _read_facts(facts_path)
        if facts.pop("schema_version", None) != SCHEMA_VERSION:
            raise ArtifactError(f"{facts_path} is not of schema version {SCHEMA_VERSION}")
        if facts.pop("table_sha256", None) != file_digest(table_path):
            raise ArtifactError(f"{table_path} is not the table that {facts_path.name} was written for")
        if facts.pop("facts_sha256", None) != digest(facts):
            raise ArtifactError(f"{facts_path} was changed since it was written; build the curriculum again")
        made = cls(_read_table(table_path), facts)
        require_facts(facts, made.table, facts_path)
        columns = [loss_column(seed, number) for seed in facts["seeds"] for number in facts["evaluations"]]
        require_losses(made.table, columns, facts_path)
        return made


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = read_json(path)
        digest(facts)
    except (ValueError, RecursionError) as error:  # NaN, or blocks in blocks without end
        raise ArtifactError(f"{path} does not hold the facts of a curriculum: {error}") from error
    except IsADirectoryError:
        raise ArtifactError(f"{path} is a folder, not the facts of a curriculum") from None
    return facts


def _read_table(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a curriculum's table: {error}") from error
    return table


def _paths(path: Path) -> tuple[Path, Path]:
    if path.suffix == ".parquet":
        return path, path.with_suffix(".json")
    return path / TABLE, path / FACTS
