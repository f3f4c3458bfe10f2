"""Training rows: what they carry, and which of them a batch holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig

from selective_dpo.curriculum.apply import PAIR_ID
from selective_dpo.data.pairs import DropReason, read_pair
from selective_dpo.engine.reference import CHOSEN_COLUMN, REJECTED_COLUMN
from selective_dpo.errors import ConfigError, name_some
from selective_dpo.training.micro_batches import ROW

PARTS = ("prompt", "chosen", "rejected")


def has_reference(dataset: Any) -> bool:
    """Whether the rows carry reference log-probs."""
    return isinstance(dataset, Dataset) and {CHOSEN_COLUMN, REJECTED_COLUMN} <= set(dataset.column_names)


def with_reference_in_rows(args: DPOConfig, evaluated: Any) -> tuple[DPOConfig, bool]:
    """For training rows that carry the reference's log-probs: `args`, and whether `evaluated` carry them.

    Where they do, TRL is to compute nothing. Else its `precompute_ref_log_probs` makes up for what they lack,
    with the model as it is before training.

    Args:
        evaluated: as TRL takes it: one set of rows, several by name, or None.

    Raises:
        ConfigError: `args` need a reference that fixed sums of log-probs cannot give.
    """
    problems = [
        (args.sync_ref_model, "sync_ref_model changes the reference during training"),
        (args.ld_alpha is not None, "ld_alpha weighs the reference's tokens one by one"),
    ]
    for is_wrong, reason in problems:
        if is_wrong:
            raise ConfigError(
                f"{reason}, but the rows carry its log-probs as sums ({CHOSEN_COLUMN}, {REJECTED_COLUMN}): "
                "leave the option out, or remove the columns"
            )
    sets = evaluated.values() if isinstance(evaluated, dict) else [] if evaluated is None else [evaluated]
    in_all = all(map(has_reference, sets))
    args = copy.copy(args)
    args.precompute_ref_log_probs = not in_all
    return args, in_all


def as_scored(row: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt, chosen and rejected of a raw row as its `pair_id` and its difficulty are of them.

    TRL reads fewer shapes, and splits prompts that are only implied elsewhere. What is no pair of text is
    left as it is.
    """
    pair = read_pair(row)
    return {} if isinstance(pair, DropReason) else {part: getattr(pair, part) for part in PARTS}


class RowCollator:
    """A collator's batch plus which rows of the training data it holds."""

    def __init__(self, inner: Any, ids_P: list[str]) -> None:
        self._inner = inner
        self._row_of = {name: row for row, name in enumerate(ids_P)}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._inner(examples)
        batch[ROW] = torch.tensor([self._row_of[example[PAIR_ID]] for example in examples])
        return batch


def named_missing(before: Dataset, after: Dataset) -> str:
    """The pairs that `after` lacks, where they have ids."""
    if "pair_id" not in before.column_names:
        return ""
    left = set(after["pair_id"])
    return f" ({name_some(pair for pair in before['pair_id'] if pair not in left)})"
