"""A curriculum applied to a data set: its selected rows, in training order."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import ConfigError, DataError, IdentityError, name_some

if TYPE_CHECKING:
    from datasets import Dataset

    from selective_dpo.data.pairs import Pair

DIFFICULTY = "difficulty"
PAIR_ID = "pair_id"
PROMPT_ID = "prompt_id"
_IDS = pa.schema({PAIR_ID: pa.string(), PROMPT_ID: pa.string()})

logger = logging.getLogger(__name__)


def apply_curriculum(curriculum: Curriculum, dataset: Dataset, *, allow_unscored: bool = False) -> Dataset:
    """The selected pairs of `dataset` in training order, with columns `pair_id` and `difficulty`.

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
    ids = _pair_ids(dataset)
    scored_row = pc.index_in(ids, value_set=curriculum.table[PAIR_ID].combine_chunks(), skip_nulls=True)
    if scored_row.null_count and not allow_unscored:
        raise IdentityError(
            f"{scored_row.null_count:,} of {len(ids):,} rows are not in the curriculum "
            f"({_unscored(ids, scored_row)}); {_remedy(curriculum)}, or leave them out: "
            "apply(dataset, allow_unscored=True)"
        )
    if scored_row.null_count:
        logger.warning(
            "%s of %s rows are not in the curriculum and are left out",
            f"{scored_row.null_count:,}",
            f"{len(ids):,}",
        )
    order = pa.array(curriculum.order, type=pa.string())
    # index_in gives the first of several equal ids, which is the row that the rest of the package keeps.
    rows = pc.index_in(order, value_set=ids)
    if rows.null_count:
        absent = order.filter(pc.is_null(rows)).to_pylist()
        raise IdentityError(
            f"{len(absent):,} of {len(order):,} selected pairs are not in the data set: {name_some(absent)}; "
            f"{_remedy(curriculum)}"
        )
    difficulty = curriculum.table[DIFFICULTY].take(scored_row)
    # Columns go in before the rows are picked: adding them afterwards would copy the whole selection.
    annotated = dataset.remove_columns([DIFFICULTY]) if DIFFICULTY in dataset.column_names else dataset
    annotated = annotated.add_column(DIFFICULTY, difficulty.to_numpy())
    if PAIR_ID not in annotated.column_names:
        annotated = annotated.add_column(PAIR_ID, ids.to_pylist())
    return annotated.select(np.asarray(rows, dtype=np.int64))


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


def _remedy(curriculum: Curriculum) -> str:
    if curriculum.table[PAIR_ID] == curriculum.table[PROMPT_ID]:
        return "its ids name prompts: join it with the data first, by import_curriculum(..., pairs=dataset)"
    return "apply the curriculum to the data it was made from"


def dataset_ids(dataset: Dataset) -> pa.Table:
    """`pair_id` and `prompt_id` of each usable pair of a preference data set, once.

    Columns of both names are taken as they are; else ids are those that preparing the rows would give.

    Raises:
        DataError: `dataset` has neither these nor preference columns.
    """
    if {PAIR_ID, PROMPT_ID} <= set(dataset.column_names):
        return dataset.select_columns([PAIR_ID, PROMPT_ID]).with_format("arrow")[:].cast(_IDS)
    prompt_of = {pair.pair_id: pair.prompt_id for pair in reversed(_pairs(dataset)) if pair is not None}
    return pa.table([list(prompt_of), list(prompt_of.values())], schema=_IDS)


def _unscored(ids: pa.Array, scored_row: pa.Array) -> str:
    unknown = ids.filter(pc.is_null(scored_row))
    unusable = unknown.null_count
    parts = [f"{unusable:,} are not usable pairs"] if unusable else []
    named = unknown.drop_null().to_pylist()
    return ", ".join([*parts, *([name_some(named)] if named else [])])


def _pair_ids(dataset: Dataset) -> pa.Array:
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
    from selective_dpo.data.pairs import DropReason, parse_row

    parsed = (parse_row(row) for row in dataset.with_format(None))
    return [None if isinstance(pair, DropReason) else pair for pair in parsed]
