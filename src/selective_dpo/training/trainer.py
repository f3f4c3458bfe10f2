"""TRL's DPO trainer on rows that this package has already tokenized, counted and referenced."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import hash_module
from typing_extensions import override

from selective_dpo.curriculum.table import PAIR_ID, WEIGHT
from selective_dpo.data.adapters import DropReason, read_pair
from selective_dpo.errors import ConfigError, DataError, NotFiniteError, name_some
from selective_dpo.logprobs.packing_support import PathName, RowCollator
from selective_dpo.logprobs.reference import CHOSEN_COLUMN, REJECTED_COLUMN
from selective_dpo.logprobs.rows import to_device
from selective_dpo.losses import LOSSES, chance_loss
from selective_dpo.models import attention_of
from selective_dpo.training.batching import (
    PAIR_MEANS,
    PAIRS,
    PairBatch,
    PairCollator,
    WithinMemory,
    disable_dropout,
    group_batches,
    is_tokenized,
    loss_inputs,
    row_collator,
    row_model,
    token_columns,
    weigh_equally,
    weighted,
)

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


def has_reference(dataset: Any) -> bool:
    """Whether the rows carry reference log-probs."""
    return isinstance(dataset, Dataset) and {CHOSEN_COLUMN, REJECTED_COLUMN} <= set(dataset.column_names)


def with_reference_in_rows(args: DPOConfig, evaluated: Any) -> tuple[DPOConfig, bool]:
    """For training rows that carry the reference's log-probs: `args`, and whether `evaluated` carry them.

    Where they do, TRL is to compute nothing. Else its `precompute_ref_log_probs` makes up for what they lack,
    with the model as it is before training. `evaluated` is as TRL takes it: one set of rows, several by name,
    or None.

    Raises:
        ConfigError: `args` need a reference that fixed sums of log-probs cannot give.
    """
    problem = "sync_ref_model changes the reference during training" if args.sync_ref_model else ""
    if args.ld_alpha is not None:
        problem = "ld_alpha weighs the reference's tokens one by one"
    if problem:
        raise ConfigError(
            f"{problem}, but the rows carry its log-probs as sums ({CHOSEN_COLUMN}, {REJECTED_COLUMN}): "
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
    parts = ("prompt", "chosen", "rejected")
    return {} if isinstance(pair, DropReason) else {part: getattr(pair, part) for part in parts}


# --- losses and gradients that are not finite ---------------------------------------------------------------


_NAMED = 20


def require_finite_loss(
    trainer: Any, loss: Tensor, batch: PairBatch, loss_of: Callable[[PairBatch], Tensor]
) -> None:
    """Stop a training whose loss of `batch` is NaN or infinite on any process; all must call this together.

    Only then is each pair computed by itself, to name those at fault.

    Args:
        loss_of: the loss of a batch, as the training computes it.

    Raises:
        NotFiniteError: on all processes alike.
    """
    is_bad = ~loss.detach().isfinite().all()
    if not _on_any_process(trainer, is_bad):
        return
    # Computed on every process, since the others wait for it; named where the loss is.
    at_fault = []
    if batch.is_text:
        with torch.no_grad():
            alone = [batch.take([place]) for place in range(len(batch.pairs))]
            at_fault = [name for pair in alone if not loss_of(pair).isfinite() for name in pair.ids]
    named = sorted(set(gather_object((at_fault or batch.ids) if is_bad else [])))
    # The same on all processes, blank and repeated pairs included.
    pairs = len(batch.pairs) * trainer.accelerator.num_processes
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
        # The norm is not finite if any number is not: one look at the device. It may also overflow by itself.
        is_bad = bool(parts) and not torch.nn.utils.get_total_norm(parts).isfinite()
        is_bad = is_bad and not all(bool(part.isfinite().all()) for part in parts)
        if not _on_any_process(trainer, torch.tensor(is_bad, device=trainer.accelerator.device)):
            return
        named = sorted(set(gather_object(list(self._pairs()))))
        which = f" ({name_some(named, limit=_NAMED)})" if named else ""
        raise NotFiniteError(
            f"the gradient of update {state.global_step + 1:,} is not finite though the losses of its pairs "
            f"are{which}, and the training stopped before it: lower learning_rate, use bfloat16 or float32 "
            "instead of float16, or leave the pairs at fault out (data.exclude)"
        )


def _on_any_process(trainer: Any, flag: Tensor) -> bool:
    if trainer.accelerator.num_processes > 1:
        flag = trainer.accelerator.gather(flag.reshape(1)).any()
    return bool(flag)


# --- the trainer --------------------------------------------------------------------------------------------


def _as_it_is(model: Any) -> Any:
    return model


_IN_ROWS = object()
"""Given to TRL as the reference model: it then loads none of its own."""


class PairTrainer(DPOTrainer):  # type: ignore[misc]  # TRL ships no types
    """`DPOTrainer` that takes token and reference columns as they are, and sends no telemetry.

    Rows without these columns are tokenized by TRL, except that it may drop none of them in silence. Each
    pair of an update weighs the same, also in the last update of an epoch, and `disable_dropout` disables
    attention's dropout, too. Where memory runs out an update is made in smaller passes. A loss or gradient
    that is not finite ends the training before the update, with a `NotFiniteError` that names the pairs.
    See `batching`.

    What TRL logs as means over the pairs of a batch are means over those of an update. `logits/*`, `entropy`
    and `mean_token_accuracy` stay TRL's means over tokens, batch by batch, so with accumulation they depend
    on which pairs share a batch.

    Args:
        path: `auto` computes the loss in one row a pair, or one a completion, whichever costs less, where the
            model's attention and the settings allow it, and groups the pairs of an update in batches of
            similar length; both leave each update's pairs, weights and gradient what they are. `padded`
            leaves all that to TRL; `shared` takes one row a pair and refuses what rules that out.
        Others: as for `DPOTrainer`.

    Raises:
        ConfigError: `path` is none of these, or the model's attention cannot be trained on this device.
    """

    _has_weights = False
    """Whether each training row has a weight (`curriculum.table.WEIGHT`)."""

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
        if path not in get_args(PathName):
            raise ConfigError(f"path={path!r} is none of {', '.join(get_args(PathName))}")
        self._path: PathName = path
        self._rows: RowCollator | Literal["unknown"] | None = "unknown"
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
        self._memory = WithinMemory(self, self._obstacle_to_smaller_passes)
        self._update: list[PairBatch] = []
        self.add_callback(
            FiniteGradients(self, lambda: [name for batch in self._update for name in batch.ids])
        )

    @property
    def ref_model(self) -> Any:
        """TRL's; None where the rows carry its log-probs, or an adapter can be left out."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        """Set by TRL."""
        self._ref_model = None if model is _IN_ROWS else model

    def get_train_dataloader(self) -> DataLoader[Any]:
        """TRL's data loader, whose batches are pairs; see `batching`."""
        with self._collating_pairs(self.train_dataset):
            loader: DataLoader[Any] = super().get_train_dataloader()
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """TRL's data loader, whose batches are pairs unless metrics are computed from the model's outputs."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        with self._collating_pairs(None if self.compute_metrics is not None else rows):
            loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
        return loader

    @contextlib.contextmanager
    def _collating_pairs(self, rows: Any) -> Iterator[None]:
        """Inside, data loaders of `rows` are made with a `PairCollator` where that can be done."""
        collator: Any = self.data_collator
        loading = self.args.accelerator_config
        # These cut or join batches of tensors.
        if isinstance(rows, Dataset) and not (loading.split_batches or loading.dispatch_batches):
            is_text = type(collator) is DataCollatorForPreference and is_tokenized(rows)
            self.data_collator: Any = PairCollator(
                self.args.max_length, self.args.truncation_mode, has_tokens=is_text
            )
        try:
            yield
        finally:
            self.data_collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns
        own = [PAIR_ID, WEIGHT] if self._has_weights else [PAIR_ID]
        self._signature_columns: Any = [*columns, *(name for name in own if name not in columns)]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> Any:
        # Our preparation has decided about each row, with a reason; TRL's would decide again, without.
        if is_tokenized(dataset):
            return dataset
        pairs = dataset.map(as_scored)
        prepared = super()._prepare_dataset(pairs, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(prepared) != len(dataset):
            which = ""
            if PAIR_ID in dataset.column_names:
                left = set(prepared[PAIR_ID])
                which = f" ({name_some(pair for pair in dataset[PAIR_ID] if pair not in left)})"
            raise DataError(
                f"{dataset_name} data: the prompt alone fills max_length {args.max_length} in "
                f"{len(dataset) - len(prepared):,} pairs{which}; raise max_length, or leave them out"
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
        if not all(PAIRS in batch for batch in batches):
            return batches, items
        update = [batch[PAIRS] for batch in batches]
        self._note_update(update)
        self._memory.start_update()  # what is logged from here on is forgotten where the update is repeated
        if update and self._can_weigh_equally():
            pairs, size = len(self.train_dataset), self._train_batch_size
            processes, accumulated = self.accelerator.num_processes, self.args.gradient_accumulation_steps
            updates = -(-pairs // (size * processes * accumulated))
            update = weigh_equally(
                update,
                first=self.state.global_step % updates * accumulated,
                pairs=pairs,
                batch_size=size,
                processes=processes,
                process=self.accelerator.process_index,
            )
        if self._path != "padded" and self._means_over_pairs():
            update = group_batches(update)
        self._update = update
        return [{**batch, PAIRS: own} for batch, own in zip(batches, update, strict=True)], items

    def _note_update(self, batches: list[PairBatch]) -> None:
        """Called with the batches of each update as the data loader gives them."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Forward and backward of one batch, in as many passes as memory allows."""
        step = super().training_step
        if PAIRS not in inputs:
            return step(model, inputs, num_items_in_batch)
        return self._memory.step(inputs[PAIRS], lambda part: step(model, {PAIRS: part}, num_items_in_batch))

    def _obstacle_to_smaller_passes(self) -> str:
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
        # The loss of a blank pair must be known and its gradient zero; and each process must get its
        # batches in the plain way.
        return (
            self._means_over_pairs()
            and self.args.train_sampling_strategy in ("random", "sequential")
            and not self.args.dataloader_drop_last
            and self.args.accelerator_config.even_batches
        )

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = inputs.get(PAIRS)
        if batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self._mean_loss(model, batch)
        if model.training:
            require_finite_loss(self, loss, batch, lambda pairs: self._mean_loss(model, pairs))
        if batch.weight == 1.0 and not batch.blanks:
            return loss
        # TRL's mean over passes of each one's mean then becomes the mean over the update's own pairs; a blank
        # pair counts in it with 0.
        for name in PAIR_MEANS:
            self._metrics["train"][name][-1] *= batch.weight
        if batch.blanks:  # A blank pair's log-probs are all 0, as an unmoved policy's log-ratios.
            loss = loss - batch.blanks / len(batch.pairs) * chance_loss(vars(self.args))
        return batch.weight * loss

    def _mean_loss(self, model: Any, batch: PairBatch) -> Tensor:
        """TRL's loss of the pairs in `batch`, the blank ones included."""
        if self._rows == "unknown":  # at the first batch, when the model is where it is trained
            self._rows = row_collator(self, model, self._path)
        weigh: Callable[[Any], Any] = _as_it_is
        if self._has_weights and model.training:  # rows to evaluate have none
            weigh = partial(weighted, pair_weights_B=batch.pair_weights)
        if self._rows is None or not batch.is_text:
            plain: Tensor = super().compute_loss(weigh(model), self._plain_inputs(batch))
            return plain
        device, is_given = self.accelerator.device, self.precompute_ref_logps
        rows = self._rows(token_columns(batch)).to(device)
        inputs = {name: to_device(part, device) for name, part in loss_inputs(batch).items()}
        if not is_given:
            reference = row_model(self.ref_model or self.model, self.accelerator, rows)
            inputs[CHOSEN_COLUMN], inputs[REJECTED_COLUMN] = self.compute_ref_log_probs(reference, inputs)
        # TRL reads the log-probs from the batch where it believes them computed beforehand.
        self.precompute_ref_logps = True
        try:
            loss: Tensor = super().compute_loss(weigh(row_model(model, self.accelerator, rows)), inputs)
        finally:
            self.precompute_ref_logps = is_given
        return loss

    def _plain_inputs(self, batch: PairBatch) -> dict[str, Any]:
        """The batch as TRL collates it, on the device."""
        inputs: dict[str, Any] = self.data_collator([pair.example for pair in batch.pairs])
        if batch.blanks:
            blank = torch.tensor([pair.is_blank for pair in batch.pairs])
            inputs["completion_mask"][torch.cat([blank, blank])] = 0
            for name in (CHOSEN_COLUMN, REJECTED_COLUMN):
                if name in inputs:
                    inputs[name] = inputs[name].masked_fill(blank, 0.0)
        prepared: dict[str, Any] = self._prepare_inputs(inputs)
        return prepared

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine that the user did not ask for."""
