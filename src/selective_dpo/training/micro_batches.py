"""An update in as many passes as memory allows: where it runs out, the update is begun again in smaller ones.

The pairs of an update, their weights, and the data loader stay what they are, so the effective batch, the
schedule and the order consumed do too. transformers' `auto_find_batch_size` keeps none of that: it starts the
training again with 0.9 times the batch size and the same number of accumulated batches.

A failed backward pass may have left part of its gradient. So the whole update is repeated from gradients of
zero: no pair is lost, none counts twice. That needs the passes of this process to be nobody else's concern.
With several processes the training has to start again from its newest checkpoint (see `smaller_passes`), and
from there on each batch is run in parts of so many pairs, in as many on every process.

Dimension suffixes: B pairs of a batch, T tokens of TRL's padded rows (chosen rows before rejected, [2B, T]).
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from selective_dpo.engine.memory import is_out_of_memory
from selective_dpo.errors import ModelError
from selective_dpo.training.equal_weights import BLANK, WEIGHT
from selective_dpo.training.logged_means import LoggedMeans
from selective_dpo.training.smaller_passes import SmallerPasses

Batch = dict[str, Any]
ROW = "train_row"
"""Key of a batch: which row of the training data each pair is, [B]."""
PADDED = ("input_ids", "attention_mask", "completion_mask")
"""[2B, T] each."""
OF_A_PAIR = ("ref_chosen_logps", "ref_rejected_logps", ROW)
"""[B] each, where they are there."""
_KNOWN = {*PADDED, *OF_A_PAIR, WEIGHT, BLANK}

logger = logging.getLogger(__name__)


def can_part(batch: Batch) -> bool:
    """Whether the batch holds nothing but pairs of text, which can be told apart."""
    return set(PADDED) <= set(batch) <= _KNOWN


def pairs_in(batch: Batch) -> int:
    """Number of pairs, B."""
    return len(batch["input_ids"]) // 2


def take_pairs(batch: Batch, pairs: Sequence[int]) -> Batch:
    """Some pairs of a batch as one of its own, no wider than they need, with their share of its weight.

    The weighted losses of parts that hold all pairs once add up to the weighted loss of the batch.
    """
    whole = pairs_in(batch)
    index = torch.tensor([*pairs, *(whole + pair for pair in pairs)], device=batch["input_ids"].device)
    last = batch["attention_mask"][index].any(dim=0).nonzero()
    width = int(last[-1]) + 1 if len(last) else 1
    part = {name: batch[name][index, :width] for name in PADDED}
    part |= {name: batch[name][index[: len(pairs)]] for name in OF_A_PAIR if name in batch}
    part[WEIGHT] = batch.get(WEIGHT, 1.0) * len(pairs) / whole
    # A blank pair is one without a completion (see `equal_weights`).
    blank_B = ~part["completion_mask"].bool().view(2, len(pairs), -1).any(dim=2).any(dim=0)
    part[BLANK] = int(blank_B.sum()) if batch.get(BLANK) else 0
    return part


def cut(batch: Batch, most_tokens: int | None) -> list[Batch]:
    """The batch in parts of at most `most_tokens` padded tokens, a pair being the least; the longest first.

    None, or a batch that fits: the batch itself.
    """
    if most_tokens is None or batch["input_ids"].numel() <= most_tokens or not can_part(batch):
        return [batch]
    lengths_B = _lengths(batch)
    left = _longest_first(lengths_B)
    parts = []
    while left:
        many = max(1, most_tokens // max(1, 2 * int(lengths_B[left[0]])))
        parts.append(take_pairs(batch, left[:many]))
        left = left[many:]
    return parts


def cut_in_pairs(batch: Batch, most_pairs: int | None) -> list[Batch]:
    """The batch in parts of `most_pairs` pairs, the last one of those that are left; the longest first.

    Batches of as many pairs give as many parts, of the same sizes. None, or a batch that is no larger: the
    batch itself.
    """
    if most_pairs is None or pairs_in(batch) <= most_pairs or not can_part(batch):
        return [batch]
    order = _longest_first(_lengths(batch))
    starts = range(0, len(order), most_pairs)
    return [take_pairs(batch, order[start : start + most_pairs]) for start in starts]


def _lengths(batch: Batch) -> Tensor:
    """Tokens of each pair's longer row, [B]."""
    lengths_B: Tensor = batch["attention_mask"].sum(dim=1).view(2, -1).amax(dim=0)
    return lengths_B


def _longest_first(lengths_B: Tensor) -> list[int]:
    order: list[int] = lengths_B.argsort(descending=True, stable=True).tolist()
    return order


class WithinMemory:
    """Runs the batches of one update after the other, each in as many passes as memory allows.

    Args:
        obstacle: why batches cannot be run in parts, in a few words; empty: they can.
        logged: what passes log.
        zero_gradients: sets them to what they are when an update begins.
        keep_to_itself: inside of what it returns, the gradient of a pass is not sent to other processes.
    """

    def __init__(
        self,
        *,
        obstacle: Callable[[], str],
        logged: LoggedMeans,
        zero_gradients: Callable[[], object],
        keep_to_itself: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._obstacle, self._logged, self._zero_gradients = obstacle, logged, zero_gradients
        self._keep_to_itself = keep_to_itself
        self.restarts: SmallerPasses | None = None
        """How several processes go on where memory runs out."""
        self._most_tokens: int | None = None
        self._done: list[Batch] = []

    @property
    def most_tokens(self) -> int | None:
        """Padded tokens that a pass holds at most, once memory has run out; None: as they are dealt."""
        return self._most_tokens

    def start_update(self) -> None:
        """The next batch is the first of an update."""
        self._done = []
        self._logged.start_update()

    def step(self, batch: Batch, run: Callable[[Batch], Tensor]) -> Tensor:
        """`run` the batch forward and backward, and return the sum of what it returns for its parts.

        Raises:
            ModelError: a single pair does not fit, or the passes cannot be made smaller.
            StartAgainError: several processes have to start again to make them smaller.
        """
        batches, losses = [batch], list[Tensor]()
        while len(losses) < len(batches):
            before = self._most_tokens
            loss = self._run(batches[len(losses)], run)
            if loss is not None:
                losses.append(loss)
                continue
            self._say(before)
            self._zero_gradients()
            self._logged.back_to_update()
            batches, losses = [*self._done, batch], []
        self._done.append(batch)
        return losses[-1]

    def _run(self, batch: Batch, run: Callable[[Batch], Tensor]) -> Tensor | None:
        """The loss; None where memory ran out, and will be used more sparingly from now on."""
        self._logged.start_batch()
        parts = self._parts(batch)
        losses = []
        for number, part in enumerate(parts, start=1):
            problem = ""
            # One exchange of gradients for the batch, if any.
            waits = self._keep_to_itself() if number < len(parts) else contextlib.nullcontext()
            try:
                with waits:
                    losses.append(run(dict(part)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            if problem:
                # After the handler: until then its traceback holds the failed pass's tensors.
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self._lower(part, problem)
                return None
        if len(parts) > 1:
            self._logged.join([pairs_in(part) for part in parts])
        return torch.stack(losses).sum()

    def _parts(self, batch: Batch) -> list[Batch]:
        if self.restarts is None:
            return cut(batch, self._most_tokens)
        return [batch] if self._obstacle() else cut_in_pairs(batch, self.restarts.most_pairs)

    def _lower(self, part: Batch, problem: str) -> None:
        tokens, pairs = part["input_ids"].numel(), pairs_in(part)
        longest = tokens // (2 * pairs)
        what = f"out of memory in a training pass over {pairs:,} pair(s) of up to {longest:,} tokens"
        if pairs == 1:
            raise ModelError(
                f"{what}, and there is no smaller one: lower data.max_length, or use lora, bfloat16, "
                f"activation_checkpointing or more devices ({problem.splitlines()[0][:100]})"
            )
        obstacle = self._obstacle() or ("" if can_part(part) else "it holds more than pairs of text")
        if obstacle:
            raise ModelError(
                f"{what}, which cannot be parted ({obstacle}): lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps by the same factor, which leaves each update its pairs"
            )
        if self.restarts is not None:
            self.restarts.start_again(what, pairs=pairs)
        self._most_tokens = tokens // 2

    def _say(self, before: int | None) -> None:
        logger.warning(
            "out of memory%s: this update is repeated, and all go on, in passes of at most %s padded tokens; "
            "its pairs and their weights stay the same",
            "" if before is None else f" with {before:,} tokens a pass",
            f"{self._most_tokens:,}",
        )
