"""What must hold of a curriculum before anybody trains on it: each fault is counted and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import ValidationError

from selective_dpo.config import SelectConfig
from selective_dpo.core.identity import require_unique
from selective_dpo.curriculum.arrow_columns import require_plain
from selective_dpo.curriculum.quarantine import REASON
from selective_dpo.errors import ArtifactError, IdentityError, name_some

_FACTS: dict[str, type] = {
    "key": str,
    "pairs": int,
    "selected": int,
    "select": dict,
    "seeds": list,
    "evaluations": list,
    "quarantined": int,
    "partial": int,
    "agreement": dict,
    "provenance": dict,
    "cost": dict,
}
_NO_PLACE = -1
_REMEDY = "build the curriculum again from its records"


def require_sound_table(table: pa.Table) -> None:
    """Check the rows of a curriculum, whose columns have the right types already.

    Raises:
        IdentityError: an id is missing (null), stands twice, or out of order.
        ArtifactError: a difficulty is not finite (null, of a pair set aside, is allowed); ranks or places in
            the training order are not each there once; or a pair has a place and is not selected.
    """
    ids = table["pair_id"]
    _require_sound_ids(ids)
    require_plain(table["prompt_id"], what="curriculum: prompt ids")
    is_aside_P = np.asarray(pc.is_null(table["difficulty"]), dtype=np.bool_)
    _refuse(ids, ~is_aside_P & ~np.isfinite(table["difficulty"].to_numpy()), "have no finite difficulty")
    rank_P, position_P = (_whole_numbers(table[name]) for name in ("rank", "position"))
    wrong_rank_P = _out_of_place(rank_P, ~is_aside_P) | (is_aside_P & (rank_P != _NO_PLACE))
    _refuse(ids, wrong_rank_P, "have a wrong rank")
    _refuse(ids, np.asarray(pc.is_null(table["selected"]), dtype=np.bool_), "are neither selected nor not")
    selected_P = np.asarray(table["selected"], dtype=np.bool_)
    is_unlike_P = (selected_P != (position_P != _NO_PLACE)) | (selected_P & is_aside_P)
    _refuse(ids, is_unlike_P, "are selected without a place in the order or a difficulty, or the reverse")
    _refuse(ids, _out_of_place(position_P, selected_P), "have a wrong place in the training order")


def require_facts(facts: Mapping[str, Any], table: pa.Table, where: object) -> None:
    """Check that the facts read from a file are complete and of this table.

    Raises:
        ArtifactError: one is missing, of the wrong kind, or says another number than the table.
    """
    wrong = [name for name, kind in _FACTS.items() if not isinstance(facts.get(name), kind)]
    wrong += [
        name
        for name in ("seeds", "evaluations")
        if name not in wrong and not all(type(number) is int for number in facts[name])
    ]
    if wrong:
        raise ArtifactError(f"{where}: {name_some(wrong)} missing or of the wrong kind; {_REMEDY}")
    aside = table.filter(pc.is_null(table["difficulty"]))
    counts = {
        "pairs": len(table) - len(aside),
        "selected": pc.sum(table["selected"]).as_py() or 0,
        "quarantined": pc.sum(pc.equal(aside["reason"], REASON)).as_py() or 0,
    }
    differing = [f"{facts[name]:,} {name}" for name, count in counts.items() if facts[name] != count]
    if differing:
        raise ArtifactError(f"{where} says {name_some(differing)}, unlike its table; {_REMEDY}")
    try:
        SelectConfig(**facts["select"])
    except (ValidationError, TypeError) as error:
        raise ArtifactError(f"{where}: select is no selection; {_REMEDY}") from error


def require_losses(table: pa.Table, names: Sequence[str], where: object) -> None:
    """Check that the table has the columns of losses `names`, which its facts imply.

    Raises:
        ArtifactError: one is missing, there twice, or holds no numbers.
    """
    kinds = dict(zip(table.column_names, table.schema.types, strict=True))
    wrong = [name for name in names if kinds.get(name) != pa.float64() or table.column_names.count(name) != 1]
    if wrong:
        raise ArtifactError(f"{where}: the table has no losses {name_some(wrong)}; {_REMEDY}")


def _require_sound_ids(ids: pa.ChunkedArray) -> None:
    if ids.null_count:
        raise IdentityError(f"curriculum: {ids.null_count:,} of {len(ids):,} pair ids are missing; {_REMEDY}")
    require_plain(ids, what="curriculum: pair ids")
    if pc.count_distinct(ids, mode="all").as_py() < len(ids):
        require_unique(ids.to_pylist(), what="curriculum")
    before, after = ids.slice(0, max(0, len(ids) - 1)), ids.slice(1)
    falls = pc.less(after, before)
    count = pc.sum(falls).as_py() or 0
    if count:
        named = name_some(after.filter(falls).to_pylist())
        raise IdentityError(f"curriculum: {count:,} pair ids are out of order: {named}; {_REMEDY}")


def _whole_numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    # -2 stands for null: no row may have it.
    return np.asarray(pc.fill_null(column, -2).to_numpy(), dtype=np.int64)


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
