"""Losses and gradients that are not finite stop a training before it learns from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from selective_dpo.errors import NotFiniteError, name_some
from selective_dpo.training.micro_batches import ROW, Batch, can_part, pairs_in, take_pairs

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
