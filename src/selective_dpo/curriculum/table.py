"""The curriculum: pairs with difficulty, rank, selection and order, plus where it all came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selective_dpo.artifacts import SCHEMA_VERSION, file_digest, read_json, replacing, write_json
from selective_dpo.core.identity import ids_digest, require_unique
from selective_dpo.errors import ArtifactError

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
`spread` is the standard deviation of the pair's losses. The losses follow as `loss_seed41_evaluation1` ..."""


def loss_column(seed: int, evaluation: int) -> str:
    """Name of the column that holds the losses of one seed's evaluation."""
    return f"loss_seed{seed}_evaluation{evaluation}"


@dataclass(frozen=True)
class Curriculum:
    """A table of pairs (one row each, see `COLUMNS`) and the facts about it."""

    table: pa.Table
    facts: Mapping[str, Any]
    """Selection, agreement, provenance and cost; JSON values only."""

    def __post_init__(self) -> None:
        for name, kind in COLUMNS.items():
            if name not in self.table.column_names or self.table.schema.field(name).type != kind:
                raise ArtifactError(f"not a curriculum: column {name!r} of type {kind} is missing")
        if pc.count_distinct(self.table["pair_id"], mode="all").as_py() < len(self.table):
            require_unique(self.pair_ids, what="curriculum")

    @property
    def pair_ids(self) -> list[str]:
        """Every scored pair."""
        ids: list[str] = self.table["pair_id"].to_pylist()
        return ids

    @property
    def difficulty_P(self) -> NDArray[np.float64]:
        """Difficulty of each row, in nats."""
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
        """
        table_path, facts_path = _paths(Path(path))
        facts_path.unlink(missing_ok=True)
        with replacing(table_path) as partial:
            pq.write_table(self.table, partial)
        head = {"schema_version": SCHEMA_VERSION, "table_sha256": file_digest(table_path)}
        write_json(facts_path, {**head, **self.facts})
        return table_path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a curriculum from its `.parquet` file, or from the folder (such as a run's) that holds it.

        Raises:
            ArtifactError: not there, incomplete, damaged, or of another schema version.
        """
        table_path, facts_path = _paths(Path(path))
        if not table_path.is_file():
            raise ArtifactError(f"no curriculum at {table_path}")
        facts = read_json(facts_path)
        if facts.pop("schema_version", None) != SCHEMA_VERSION:
            raise ArtifactError(f"{facts_path} is not of schema version {SCHEMA_VERSION}")
        if facts.pop("table_sha256", None) != file_digest(table_path):
            raise ArtifactError(f"{table_path} is not the table that {facts_path.name} was written for")
        return cls(pq.read_table(table_path), json.loads(json.dumps(facts)))


def _paths(path: Path) -> tuple[Path, Path]:
    if path.suffix == ".parquet":
        return path, path.with_suffix(".json")
    return path / TABLE, path / FACTS
