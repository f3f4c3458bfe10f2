"""TRL's DPO trainer on rows that this package has already tokenized, counted and referenced."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from trl import DPOConfig, DPOTrainer

from selective_dpo.core.dpo import LN_2
from selective_dpo.engine.paths import choose_path
from selective_dpo.engine.reference import CHOSEN_COLUMN, REJECTED_COLUMN
from selective_dpo.engine.ways import PathName
from selective_dpo.errors import ConfigError, DataError, name_some
from selective_dpo.training.equal_weights import BLANK, WEIGHT, weigh_equally
from selective_dpo.training.shared_step import TOKEN_COLUMNS, SharedModel, shares_rows
from selective_dpo.training.update_batches import MEANS_OVER_PAIRS, can_deal_by_length, deal_by_length

_PAIR_MEANS = tuple(
    f"{kind}/{part}"
    for kind, parts in (
        ("rewards", ("chosen", "rejected", "accuracies", "margins")),
        ("logps", ("chosen", "rejected")),
    )
    for part in parts
)
"""What TRL logs as means over the pairs of a batch."""
_ROWS_AT_ONCE = 10_000


def is_tokenized(dataset: Any) -> bool:
    """Whether the rows carry TRL's token columns."""
    return isinstance(dataset, Dataset) and set(TOKEN_COLUMNS) <= set(dataset.column_names)


def has_reference(dataset: Any) -> bool:
    """Whether the rows carry reference log-probs."""
    return isinstance(dataset, Dataset) and {CHOSEN_COLUMN, REJECTED_COLUMN} <= set(dataset.column_names)


def pair_lengths(dataset: Dataset) -> NDArray[np.int64]:
    """Tokens of prompt plus the longer completion of each tokenized row: [P], without copying the tokens."""
    rows = dataset.select_columns(list(TOKEN_COLUMNS)).with_format("arrow")
    lengths = []
    for batch in rows.iter(_ROWS_AT_ONCE):
        prompt, chosen, rejected = (pc.list_value_length(batch[name]) for name in TOKEN_COLUMNS)
        lengths.append(pc.add(prompt, pc.max_element_wise(chosen, rejected)).to_numpy())
    return np.concatenate(lengths).astype(np.int64)


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


class PairTrainer(DPOTrainer):  # type: ignore[misc]  # TRL ships no types
    """`DPOTrainer` that takes token and reference columns as they are, and sends no telemetry.

    Rows without these columns are left to TRL, except that it may drop none of them in silence. Each
    pair of an update weighs the same, also in the last update of an epoch (see `equal_weights`).

    Args:
        path: `auto` computes the loss in one row a pair where the model's attention and the settings
            allow it (see `shared_step`), and deals the pairs of an update to its batches by length (see
            `update_batches`); both leave each update's pairs, weights and gradient what they are.
            `padded` leaves all that to TRL; `shared` refuses what rules shared rows out.
        Others: as for `DPOTrainer`.
    """

    def __init__(self, *args: Any, path: PathName = "auto", **others: Any) -> None:
        self._path: PathName = path
        self._shares_rows: bool | None = None
        super().__init__(*args, **others)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> Any:
        # Our preparation has decided about each row, with a reason; TRL's would decide again, without.
        if is_tokenized(dataset):
            return dataset
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(prepared) != len(dataset):
            raise DataError(
                f"{dataset_name} data: the prompt alone fills max_length {args.max_length} in "
                f"{len(dataset) - len(prepared):,} pairs{_named(dataset, prepared)}; raise max_length, or "
                "leave them out"
            )
        return prepared

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if has_reference(dataset):
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of the next update."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._note_update(batches)
        if batches and self._can_weigh_equally():
            pairs, size = len(self.train_dataset), self._train_batch_size
            processes, accumulated = self.accelerator.num_processes, self.args.gradient_accumulation_steps
            updates = -(-pairs // (size * processes * accumulated))
            weigh_equally(
                batches,
                first=self.state.global_step % updates * accumulated,
                pairs=pairs,
                batch_size=size,
                processes=processes,
                process=self.accelerator.process_index,
            )
        if self._can_deal_by_length() and can_deal_by_length(batches):
            multiple = getattr(self.data_collator, "pad_to_multiple_of", None)
            batches = deal_by_length(batches, multiple_of=multiple or 1)
        return batches, items

    def _note_update(self, batches: list[dict[str, Any]]) -> None:
        """Called with the batches of each update as the data loader deals them."""

    def _can_deal_by_length(self) -> bool:
        return (
            self._path != "padded"
            and set(self.loss_types) <= MEANS_OVER_PAIRS
            and not self.aux_loss_enabled
            and self.accelerator.parallelism_config is None
        )

    def _can_weigh_equally(self) -> bool:
        # The loss of a blank pair must be known and its gradient zero, which holds for DPO's own loss; and
        # the data loader must deal rows to processes in the plain way.
        loading, args = self.args.accelerator_config, self.args
        return (
            self.loss_types == ["sigmoid"]
            and not self.aux_loss_enabled
            and isinstance(self.train_dataset, Dataset)
            and args.train_sampling_strategy in ("random", "sequential")
            and loading.even_batches
            and not (args.dataloader_drop_last or loading.split_batches or loading.dispatch_batches)
            and self.accelerator.parallelism_config is None
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weight, blank = inputs.pop(WEIGHT, 1.0), inputs.pop(BLANK, 0)
        # Whoever asks for the model's outputs means those of plain rows.
        if not return_outputs and self._takes_shared_rows(model):
            model = self._sharing(model)
            with self._reference_shared(inputs):
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if weight == 1.0 and not blank:
            return result
        self._weigh_logged_means(weight)
        # Training asks for the loss alone. A blank pair's loss, ln 2, is no part of the update's.
        share = blank / (inputs["completion_mask"].shape[0] // 2)
        return weight * (result - share * LN_2 * self.loss_weights[0])

    def _weigh_logged_means(self, weight: float) -> None:
        # TRL logs the mean over batches of each batch's mean; a blank pair counts in it with 0. Weighed,
        # it becomes the mean over the update's own pairs, as the loss is.
        for name in _PAIR_MEANS:
            self._metrics["train"][name][-1] *= weight

    def _takes_shared_rows(self, model: Any) -> bool:
        if self._shares_rows is None:
            self._shares_rows = shares_rows(self, model, self._path)
        return self._shares_rows

    def _sharing(self, model: Any) -> SharedModel:
        return SharedModel(model, self.accelerator, self.processing_class.pad_token_id)

    @contextlib.contextmanager
    def _reference_shared(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Inside, `inputs` carry the reference's log-probs, from shared rows where it can take them."""
        reference_model = self.ref_model or self.model
        live = not self.precompute_ref_logps
        if not live or choose_path(reference_model, inputs["input_ids"].shape[1]).name == "padded":
            yield
            return
        reference = self._sharing(reference_model)
        inputs[CHOSEN_COLUMN], inputs[REJECTED_COLUMN] = self.compute_ref_log_probs(reference, inputs)
        # TRL reads the log-probs from the batch where it believes them computed beforehand.
        self.precompute_ref_logps: bool = True
        try:
            yield
        finally:
            self.precompute_ref_logps = False

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine that the user did not ask for."""


def _named(before: Dataset, after: Dataset) -> str:
    """The pairs that `after` lacks, where they have ids."""
    if "pair_id" not in before.column_names:
        return ""
    left = set(after["pair_id"])
    return f" ({name_some(pair for pair in before['pair_id'] if pair not in left)})"
