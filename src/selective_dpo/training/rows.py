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


def with_cached_reference(args: DPOConfig, train: Dataset) -> DPOConfig:
    """`args` telling TRL to read the reference from the rows, where those of `train` carry it.

    With the flag on TRL loads no reference model; `PairTrainer` then answers its request to compute
    the log-probs with the rows' own columns. For evaluation rows without them TRL computes them once,
    with the model as it is before training.

    Raises:
        ConfigError: `args` need a reference that fixed sums of log-probs cannot give.
    """
    if not has_reference(train):
        return args
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
    args = copy.copy(args)
    args.precompute_ref_log_probs = True
    return args


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
