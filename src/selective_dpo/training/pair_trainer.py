"""TRL's DPO trainer on rows that this package has already tokenized, counted and referenced."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from selective_dpo.engine.reference import CHOSEN_COLUMN, REJECTED_COLUMN

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def is_tokenized(dataset: Any) -> bool:
    """Whether the rows carry TRL's token columns."""
    return isinstance(dataset, Dataset) and set(TOKEN_COLUMNS) <= set(dataset.column_names)


def has_reference(dataset: Any) -> bool:
    """Whether the rows carry reference log-probs."""
    return isinstance(dataset, Dataset) and {CHOSEN_COLUMN, REJECTED_COLUMN} <= set(dataset.column_names)


def with_cached_reference(args: DPOConfig, *datasets: Dataset | None) -> DPOConfig:
    """`args` telling TRL to read the reference from the rows, where all of them carry it.

    With the flag on TRL loads no reference model; `PairTrainer` then answers its request to compute
    the log-probs with the rows' own columns.
    """
    given = [dataset for dataset in datasets if dataset is not None]
    if not given or not all(has_reference(dataset) for dataset in given):
        return args
    args = copy.copy(args)
    args.precompute_ref_log_probs = True
    return args


class PairTrainer(DPOTrainer):  # type: ignore[misc]  # TRL ships no types
    """`DPOTrainer` that takes token and reference columns as they are, and sends no telemetry.

    Rows without these columns are left to TRL, except that it may drop none of them in silence.
    """

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> Any:
        # Our preparation has decided about each row, with a reason; TRL's would decide again, without.
        if is_tokenized(dataset):
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if has_reference(dataset):
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine that the user did not ask for."""
