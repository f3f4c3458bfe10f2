"""TRL's DPO trainer on rows that this package has already tokenized, counted and referenced."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import hash_module
from typing_extensions import override

from selective_dpo.curriculum.table import PAIR_ID
from selective_dpo.data.adapters import DropReason, read_pair
from selective_dpo.errors import ConfigError, DataError, NotFiniteError, name_some
from selective_dpo.logprobs.packing_support import PathName, choose_path
from selective_dpo.logprobs.reference import CHOSEN_COLUMN, REJECTED_COLUMN
from selective_dpo.losses import LOSSES, chance_loss
from selective_dpo.models import attention_of
from selective_dpo.training.batching import (
    BLANK,
    ROW,
    WEIGHT,
    Batch,
    LoggedMeans,
    SharedModel,
    WithinMemory,
    can_deal_by_length,
    can_part,
    deal_by_length,
    disable_dropout,
    is_tokenized,
    pairs_in,
    shares_rows,
    take_pairs,
    weigh_equally,
)

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

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
        """Collate `examples`."""
        batch: dict[str, Any] = self._inner(examples)
        batch[ROW] = torch.tensor([self._row_of[example[PAIR_ID]] for example in examples])
        return batch


def named_missing(before: Dataset, after: Dataset) -> str:
    """The pairs that `after` lacks, where they have ids."""
    if "pair_id" not in before.column_names:
        return ""
    left = set(after["pair_id"])
    return f" ({name_some(pair for pair in before['pair_id'] if pair not in left)})"


# ----------------------------------------------------------------------------------------------------
# Losses and gradients that are not finite stop a training before it learns from them.


_NAMED = 20


def require_finite_loss(
    trainer: Any,
    loss: Tensor,
    batch: Batch,
    ids_of: Callable[[Tensor], list[str]],
    loss_of: Callable[[Batch], Tensor],
) -> None:
    """Stop a training whose loss of `batch` is NaN or infinite on any process; all must call this together.

    Only then is each pair computed by itself, to name those at fault.

    Args:
        ids_of: the pair ids of the training rows `batch[ROW]`.
        loss_of: the loss of a batch, as the training computes it.

    Raises:
        NotFiniteError: on all processes alike.
    """
    is_bad = ~loss.detach().isfinite().all()
    if _nowhere(trainer, is_bad):
        return
    # Computed on every process, since the others wait for it; named where the loss is.
    bad = _pairs_not_finite(batch, loss_of)
    bad = bad if is_bad else []
    named = sorted(set(gather_object(ids_of(batch[ROW][bad]) if ROW in batch else [])))
    # The same on all processes, blank and repeated pairs included.
    pairs = pairs_in(batch) * trainer.accelerator.num_processes
    which = name_some(named, limit=_NAMED) if named else "their ids are not known: the rows have no pair_id"
    raise NotFiniteError(
        f"the loss of {len(named) or 'some'} of {pairs:,} pairs is not finite, and the training stopped "
        f"before update {trainer.state.global_step + 1:,} learned from it: {which}; leave them out "
        "(data.exclude), or, if it is most of them, lower learning_rate or use bfloat16 or float32 instead "
        "of float16"
    )


class FiniteGradients(TrainerCallback):
    """Stops a training before an update whose gradient is NaN or infinite.

    Not under float16's loss scaling, which skips such an update and lowers its scale. DeepSpeed makes its
    updates elsewhere; there only the losses are watched.

    Args:
        pairs: the ids of the update's pairs on this process, if they are known.
    """

    def __init__(self, trainer: Any, pairs: Callable[[], Sequence[str]]) -> None:
        self._trainer, self._pairs = trainer, pairs

    @override
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer.accelerator.scaler is not None:
            return
        gradients = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
        # Of a gradient that is spread over processes, each one looks at its own part.
        parts = [part.to_local() if hasattr(part, "to_local") else part for part in gradients]
        if _nowhere(trainer, _any_not_finite(parts, trainer.accelerator.device)):
            return
        named = sorted(set(gather_object(list(self._pairs()))))
        which = f" ({name_some(named, limit=_NAMED)})" if named else ""
        raise NotFiniteError(
            f"the gradient of update {state.global_step + 1:,} is not finite though the losses of its pairs "
            f"are{which}, and the training stopped before it: lower learning_rate, use bfloat16 or float32 "
            "instead of float16, or leave the pairs at fault out (data.exclude)"
        )


def _nowhere(trainer: Any, flag: Tensor) -> bool:
    """Whether `flag` is false on all processes."""
    if trainer.accelerator.num_processes > 1:
        flag = trainer.accelerator.gather(flag.reshape(1)).any()
    return not bool(flag)


def _any_not_finite(parts: list[Tensor], device: torch.device) -> Tensor:
    # The norm is not finite if any number is not: one look at the device. It may also overflow by itself.
    if not parts or bool(torch.nn.utils.get_total_norm(parts).isfinite()):
        return torch.tensor(False, device=device)
    return torch.tensor(not all(bool(part.isfinite().all()) for part in parts), device=device)


def _pairs_not_finite(batch: Batch, loss_of: Callable[[Batch], Tensor]) -> list[int]:
    """Places in the batch; all of it where no pair is at fault alone."""
    everyone = list(range(pairs_in(batch)))
    if not can_part(batch):
        return everyone
    with torch.no_grad():
        losses = [float(loss_of(take_pairs(batch, [pair]))) for pair in everyone]
    at_fault = [pair for pair, loss in enumerate(losses) if not torch.tensor(loss).isfinite()]
    return at_fault or everyone


# ----------------------------------------------------------------------------------------------------
# TRL's DPO trainer on rows that this package has already tokenized, counted and referenced.


_IN_ROWS = object()
"""Given to TRL as the reference model: it then loads none of its own."""


class PairTrainer(DPOTrainer):  # type: ignore[misc]  # TRL ships no types
    """`DPOTrainer` that takes token and reference columns as they are, and sends no telemetry.

    Rows without these columns are tokenized by TRL, except that it may drop none of them in silence. Each
    pair of an update weighs the same, also in the last update of an epoch (see `equal_weights`), and
    `disable_dropout` disables attention's dropout, too. Where memory runs out an update is made in smaller
    passes (see `micro_batches`). A loss or gradient that is not finite ends the training before the update,
    with a `NotFiniteError` that names the pairs.

    What TRL logs as means over the pairs of a batch are means over those of an update. `logits/*`, `entropy`
    and `mean_token_accuracy` stay TRL's means over tokens, batch by batch, so with accumulation they depend
    on which pairs share a batch.

    Args:
        path: `auto` computes the loss in one row a pair where the model's attention and the settings
            allow it (see `shared_step`), and deals the pairs of an update to its batches by length (see
            `update_batches`); both leave each update's pairs, weights and gradient what they are.
            `padded` leaves all that to TRL; `shared` refuses what rules shared rows out.
        Others: as for `DPOTrainer`.

    Raises:
        ConfigError: the model's attention cannot be trained on this device.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *more: Any,
        path: PathName = "auto",
        **others: Any,
    ) -> None:
        self._path: PathName = path
        self._shares_rows: bool | None = None
        in_rows = args is not None and ref_model is None and has_reference(train_dataset)
        if in_rows:
            args, in_rows = with_reference_in_rows(args, eval_dataset)
            if in_rows and not (others.get("peft_config") or isinstance(model, PeftModel)):
                ref_model = _IN_ROWS
        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *more, **others)
        if in_rows:
            # Only now: else TRL takes a digest of all weights, for a cache that is not used.
            self.precompute_ref_logps: bool = True
        if self.args.disable_dropout:
            disable_dropout(self.model)
            if self.ref_model is not None:
                disable_dropout(self.ref_model)
        if self.accelerator.device.type == "cpu" and attention_of(self.model) == "flex_attention":
            raise ConfigError("flex_attention cannot be trained on a CPU: use sdpa (model.attention)")
        self._logged = LoggedMeans(self)
        self._memory = WithinMemory(
            obstacle=self._obstacle_to_parts,
            logged=self._logged,
            zero_gradients=lambda: self.model.zero_grad(),
        )
        self._rows_of_update: list[torch.Tensor] = []
        self.add_callback(FiniteGradients(self, self._ids_of_update))

    @property
    def ref_model(self) -> Any:
        """TRL's reference model; None where the rows carry its log-probs, or an adapter can be left out."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        """Set by TRL."""
        self._ref_model = None if model is _IN_ROWS else model

    def get_train_dataloader(self) -> DataLoader[Any]:
        """TRL's data loader; where the rows have pair ids, its batches also say which rows they hold."""
        collator: Any = self.data_collator
        if self._ids_P:
            self.data_collator: Any = RowCollator(collator, self._ids_P)
        try:
            loader: DataLoader[Any] = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        return loader

    @functools.cached_property
    def _ids_P(self) -> list[str]:
        """The pair ids of the training rows; none if they have no ids."""
        rows = self.train_dataset
        has_ids = isinstance(rows, Dataset) and PAIR_ID in rows.column_names
        return list(rows[PAIR_ID]) if has_ids else []

    def _ids_of(self, rows: torch.Tensor) -> list[str]:
        return [self._ids_P[row] for row in rows.tolist()]

    def _ids_of_update(self) -> list[str]:
        return [name for rows in self._rows_of_update for name in self._ids_of(rows)]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns
        if PAIR_ID not in columns:
            self._signature_columns: Any = [*columns, PAIR_ID]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> Any:
        # Our preparation has decided about each row, with a reason; TRL's would decide again, without.
        if is_tokenized(dataset):
            return dataset
        pairs = dataset.map(as_scored)
        prepared = super()._prepare_dataset(pairs, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(prepared) != len(dataset):
            raise DataError(
                f"{dataset_name} data: the prompt alone fills max_length {args.max_length} in "
                f"{len(dataset) - len(prepared):,} pairs{named_missing(dataset, prepared)}; raise "
                "max_length, or leave them out"
            )
        return prepared

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if has_reference(dataset):
            return dataset
        self._precompute_model_hash: Any = self._precompute_model_hash or hash_module(self.model)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of the next update."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._note_update(batches)
        self._rows_of_update = [batch[ROW] for batch in batches if ROW in batch]
        self._memory.start_update()
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

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Forward and backward of one batch, in as many passes as memory allows."""
        step = super().training_step
        return self._memory.step(inputs, lambda part: step(model, part, num_items_in_batch))

    def _can_deal_by_length(self) -> bool:
        return self._path != "padded" and self._means_over_pairs()

    def _obstacle_to_parts(self) -> str:
        processes = self.accelerator.num_processes
        obstacles = [
            (not self._means_over_pairs(), "its loss is more than the mean over its pairs"),
            (self.is_deepspeed_enabled, "DeepSpeed decides by itself where an update ends"),
            (self.args.n_gpu > 1, "DataParallel copies the model"),
            (processes > 1, f"{processes} processes exchange gradients in it"),
        ]
        return next((reason for applies, reason in obstacles if applies), "")

    def _means_over_pairs(self) -> bool:
        return (
            LOSSES.keys() >= set(self.loss_types)
            and not self.aux_loss_enabled
            and self.accelerator.parallelism_config is None
        )

    def _can_weigh_equally(self) -> bool:
        # The loss of a blank pair must be known and its gradient zero; and the data loader must deal rows to
        # processes in the plain way.
        return (
            self._means_over_pairs()
            and isinstance(self.train_dataset, Dataset)
            and self.args.train_sampling_strategy in ("random", "sequential")
            and not self.args.dataloader_drop_last
            and self._deals_evenly()
        )

    def _deals_evenly(self) -> bool:
        """Whether the batches that the processes have at the same time are of the same size."""
        loading = self.args.accelerator_config
        return loading.even_batches and not (loading.split_batches or loading.dispatch_batches)

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weight, blank = inputs.pop(WEIGHT, 1.0), inputs.pop(BLANK, 0)
        rows = inputs.pop(ROW, None)
        if return_outputs:  # Whoever asks for the model's outputs means those of plain rows.
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self._mean_loss(model, inputs)
        if model.training:
            batch = inputs if rows is None else {**inputs, ROW: rows}
            require_finite_loss(self, loss, batch, self._ids_of, lambda pairs: self._mean_loss(model, pairs))
        if weight == 1.0 and not blank:
            return loss
        self._logged.weigh(weight)
        if blank:  # A pair whose log-probs are all 0, as an unmoved policy's log-ratios: not the update's.
            share = blank / (inputs["completion_mask"].shape[0] // 2)
            loss = loss - share * chance_loss(vars(self.args))
        return weight * loss

    def _mean_loss(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """TRL's loss of the pairs in `batch`, the blank ones included."""
        inputs = {name: part for name, part in batch.items() if name not in (WEIGHT, BLANK, ROW)}
        if not self._takes_shared_rows(model):
            plain: torch.Tensor = super().compute_loss(model, inputs)
            return plain
        with self._reference_shared(inputs):
            shared: torch.Tensor = super().compute_loss(self._sharing(model), inputs)
            return shared

    def _takes_shared_rows(self, model: Any) -> bool:
        if self._shares_rows is None:
            self._shares_rows = shares_rows(self, model, self._path)
        return self._shares_rows

    def _sharing(self, model: Any) -> SharedModel:
        return SharedModel(model, self.accelerator, self._tokenizer.pad_token_id)

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
        self.precompute_ref_logps = True
        try:
            yield
        finally:
            self.precompute_ref_logps = False

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine that the user did not ask for."""
