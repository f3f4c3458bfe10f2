"""Difficulty from outside: a file of ids and numbers, another run's curriculum, or the original's records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from selective_dpo.artifacts import content_key, file_digest, read_json
from selective_dpo.config import SelectConfig
from selective_dpo.core.aggregation import Difficulty, difficulty
from selective_dpo.core.identity import require_unique
from selective_dpo.core.records import LossTable
from selective_dpo.curriculum.apply import dataset_ids
from selective_dpo.curriculum.arrow_columns import text_array
from selective_dpo.curriculum.build import assemble, resolved_selection
from selective_dpo.curriculum.importing import read_record_folder
from selective_dpo.curriculum.number_files import Columns, read_columns
from selective_dpo.curriculum.table import Curriculum, digest_of_table, facts_path
from selective_dpo.data.store import load_ids
from selective_dpo.errors import ArtifactError, ConfigError, DataError, IdentityError, name_some

if TYPE_CHECKING:
    from datasets import Dataset

IdKind = Literal["pair_id", "prompt_id"]
ID_COLUMNS: tuple[IdKind, ...] = ("pair_id", "prompt_id")
"""What an id may name; a file that has both columns is joined by the first."""
DIFFICULTY_COLUMNS = ("learning_order", "difficulty")
"""The original's name for it, and ours."""
REASON = "no difficulty in the imported curriculum"
"""Why a pair is not selected that the outside difficulties do not know."""


class Outside(NamedTuple):
    """Difficulties that were not measured in this run; N distinct ids."""

    names: IdKind
    """What the ids name. A prompt's difficulty is that of all its pairs."""
    ids: pa.Array
    difficulty_N: NDArray[np.float64]
    digest: str
    """SHA-256 of the content."""
    facts: dict[str, Any]
    """Kind, name, columns and the like, for provenance. `nats`: whether these are DPO losses."""


def read_outside(
    path: str | Path, *, id_column: str = "", difficulty_column: str = "", names: IdKind | None = None
) -> Outside:
    """Read difficulties: what `path` is decides how.

    - a folder or `.parquet` with a curriculum's facts (`.json`) beside it: a curriculum, as a run makes it;
    - another folder: the original's records, as `read_record_folder` takes them;
    - else a CSV or Parquet file, plain or gzipped.

    Args:
        id_column, difficulty_column: of a file; default: `pair_id` or `prompt_id`, and `learning_order` or
            `difficulty`.
        names: what the ids of a file name; default: what their column is called.

    Raises:
        ConfigError: an argument would have no effect, or is needed.
        DataError: nothing that can be read.
        IdentityError: an id stands twice (named).
        ArtifactError: a damaged curriculum.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a CSV or Parquet file, or a curriculum's folder")
    is_file = not path.is_dir() and not facts_path(path).is_file()
    if is_file:
        return _of_file(path, Columns(id_column, difficulty_column), names)
    if id_column or difficulty_column or names:
        raise ConfigError(f"{path} is no file with a choice of columns: leave out the options that name them")
    return _of_records(path) if is_records(path) else _of_curriculum(path)


def is_records(path: Path) -> bool:
    """Whether `path` is a folder, and no curriculum's: then it is read as one of the original's records."""
    return path.is_dir() and not facts_path(path).is_file()


def _of_file(path: Path, given: Columns, names: IdKind | None) -> Outside:
    def choose(header: list[str]) -> Columns:
        wanted = (given.id or ID_COLUMNS, given.number or DIFFICULTY_COLUMNS)
        found = [
            next((name for name in ([each] if isinstance(each, str) else each) if name in header), "")
            for each in wanted
        ]
        if not all(found):
            raise DataError(
                f"{path} has columns {name_some(header, limit=12) or 'none'}, and needs one of ids "
                f"({given.id or ' or '.join(ID_COLUMNS)}) and one of difficulties "
                f"({given.number or ' or '.join(DIFFICULTY_COLUMNS)}): name others with "
                "`selective-dpo import-curriculum --id-column NAME --difficulty-column NAME`"
            )
        return Columns(*found)

    columns, numbers = read_columns(path, choose)
    kind = names or next((kind for kind in ID_COLUMNS if kind == columns.id), None)
    if kind is None:
        raise ConfigError(
            f"say what the ids in column {columns.id!r} name: --names pair_id or --names prompt_id"
        )
    require_unique(numbers.ids.to_pylist(), what=str(path))
    digest = file_digest(path)
    facts = {
        "kind": "file",
        "name": path.name,
        "sha256": digest,
        "id_column": columns.id,
        "difficulty_column": columns.number,
        "nats": columns.number == DIFFICULTY_COLUMNS[0],
    }
    return Outside(kind, numbers.ids, numbers.values_N, digest, facts)


def _of_curriculum(path: Path) -> Outside:
    curriculum = Curriculum.load(path)
    table, facts = curriculum.measured.table, curriculum.facts
    origin, earlier = facts["provenance"], imported_from(facts)
    digest = digest_of_table(path)
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    made_by = {
        "run": folder.name,
        "model": _model_name(folder / "config.json"),
        "model_sha256": (origin.get("inputs") or {}).get("model"),
        "recipe_sha256": origin.get("recipe_sha256"),
        "key": facts["key"],
        "aggregate": facts["select"]["aggregate"],
        "seeds": facts["seeds"],
        "evaluations": facts["evaluations"],
    }
    own = {
        "kind": "curriculum",
        "name": folder.name,
        "sha256": digest,
        "made_by": {name: value for name, value in made_by.items() if value is not None},
        "nats": facts["select"]["aggregate"] != "rank-mean" and (earlier is None or earlier["nats"]),
        **({"imported": dict(earlier)} if earlier else {}),
    }
    names: IdKind = "prompt_id" if table["pair_id"] == table["prompt_id"] else "pair_id"
    return Outside(names, table["pair_id"].combine_chunks(), curriculum.measured.difficulty_P, digest, own)


def _model_name(config: Path) -> str | None:
    """The last part of the model's name or path: a path says nothing elsewhere."""
    try:
        return Path(str(read_json(config)["model"]["path"])).name
    except (ArtifactError, KeyError, TypeError):
        return None


def _of_records(path: Path) -> Outside:
    found = read_record_folder(path)
    origin, losses = found.provenance, found.losses
    digest = content_key(files=origin["files"])
    own = {"kind": "records", "name": origin["folder"], "sha256": digest, "nats": True}
    own |= {name: origin[name] for name in ("rows", "repeated_ids", "conflicting_ids")}
    return Outside("prompt_id", pa.array(losses.pair_ids_P), difficulty(losses).difficulty_P, digest, own)


def pairs_joined(outside: Outside, pair_ids: pa.ChunkedArray, prompt_ids: pa.ChunkedArray) -> Joined:
    """Look up the difficulty of each pair.

    Raises:
        IdentityError: no pair at all has one; some ids of both are named.
    """
    keys = pair_ids if outside.names == "pair_id" else prompt_ids
    row_P = pc.index_in(keys, value_set=outside.ids)
    known_P = np.asarray(row_P.is_valid())
    if not known_P.any():
        raise IdentityError(
            f"none of {len(keys):,} pairs has a difficulty in {outside.facts['name']}: its "
            f"{len(outside.ids):,} ids, such as {outside.ids[0]}, are no {outside.names} of the data, such "
            f"as {keys[0] if len(keys) else 'none'}; give the rows the {outside.names} that it was made with"
        )
    used_P = pc.fill_null(row_P, 0).to_numpy()
    times_N = np.bincount(used_P[known_P], minlength=len(outside.ids))
    counts = {
        "pairs": len(known_P),
        "pairs_without_difficulty": int((~known_P).sum()),
        "ids": len(outside.ids),
        "ids_without_pairs": int((times_N == 0).sum()),
        "ids_shared_by_pairs": int((times_N > 1).sum()),
        "pairs_sharing_an_id": int(times_N[times_N > 1].sum()),
    }
    return Joined(np.where(known_P, outside.difficulty_N[used_P], np.nan), counts)


class Joined(NamedTuple):
    """Outside difficulties of P pairs."""

    difficulty_P: NDArray[np.float64]
    """NaN: the pair has none."""
    counts: dict[str, int]


def outside_curriculum(
    outside: Outside,
    pair_ids: pa.ChunkedArray,
    prompt_ids: pa.ChunkedArray,
    select: SelectConfig | Mapping[str, Any] | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
    key: str = "",
) -> Curriculum:
    """The curriculum of these pairs by their outside difficulty; pairs without one are not selected.

    There are no losses in it, no seeds, and nothing to agree: `count` is 0 and `spread` null.

    Raises:
        IdentityError: no pair has a difficulty, or a pair id stands twice.
        ConfigError: the selection is not valid, does not fit the number of pairs, or aggregates losses.
    """
    config = resolved_selection(select)
    if config.about_records:
        raise ConfigError(
            f"select.{config.about_records[0]} has no effect on an imported difficulty, which is one number "
            "a pair: leave it out"
        )
    found = pairs_joined(outside, pair_ids, prompt_ids)
    ids_P, prompt_ids_P = text_array(pair_ids), text_array(prompt_ids)
    require_unique(ids_P.tolist(), what="pairs")
    order_P = np.argsort(ids_P, kind="stable")
    is_known_P = np.isfinite(found.difficulty_P[order_P])
    known, aside = order_P[is_known_P], order_P[~is_known_P]
    nothing = np.zeros(len(known))
    losses = LossTable(ids_P[known], prompt_ids_P[known], (), (), np.empty((len(known), 0, 0)))
    measured = Difficulty(found.difficulty_P[known], nothing * np.nan, nothing.astype(np.int64))
    imported = {**outside.facts, "joined_by": outside.names, **found.counts}
    facts = {
        "key": key or content_key(imported=outside.digest, select=config.model_dump(mode="json")),
        "agreement": {},
        "provenance": {**(provenance or {}), "imported": imported},
        "cost": {},
    }
    without = dict(zip(ids_P[aside].tolist(), prompt_ids_P[aside].tolist(), strict=True))
    return assemble(losses, measured, config, facts, aside=without, reason=REASON)


def import_curriculum(
    path: str | Path,
    pairs: str | Path | Dataset | None = None,
    select: SelectConfig | Mapping[str, Any] | None = None,
    **columns: Any,
) -> Curriculum:
    """Make a curriculum from difficulties that come from outside.

    Args:
        path: see `read_outside`.
        pairs: what they are joined with: a run's folder of prepared pairs, or a `datasets.Dataset` of
            preference pairs, whose rows may have their own `prompt_id`. None: the ids name pairs and prompts
            both.
        select: the selection.
        columns: the other arguments of `read_outside`.

    Raises:
        SelectiveDPOError: as `read_outside` and `outside_curriculum`.
    """
    outside = read_outside(path, **columns)
    if pairs is None:
        ids = pa.chunked_array([outside.ids])
        return outside_curriculum(outside, ids, ids, select)
    table = load_ids(Path(pairs)) if isinstance(pairs, str | Path) else dataset_ids(pairs)
    return outside_curriculum(outside, table["pair_id"], table["prompt_id"], select)


def imported_from(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a curriculum's facts say of where its difficulty was imported from; None: it was measured."""
    found: Mapping[str, Any] | None = (facts.get("provenance") or {}).get("imported")
    return found


def imported_in_words(imported: Mapping[str, Any]) -> str:
    """Of what `imported_from` gives: the join, in one line."""
    shared, without = imported["pairs_sharing_an_id"], imported["pairs_without_difficulty"]
    return (
        f"{imported['kind']} {imported['name']}, joined by {imported['joined_by']}: "
        f"{imported['pairs'] - without:,} of {imported['pairs']:,} pairs have a difficulty, "
        f"{shared:,} of which share it with another; {without:,} have none and are not selected; "
        f"{imported['ids_without_pairs']:,} of {imported['ids']:,} ids have no pair"
    )
