"""How a training deals its pairs to updates, batches and passes, and what these compute.

`training.pair_trainer` decides it, and here it is followed step by step: a data loader deals batches to the
processes; within an update each process sorts its own pairs by length into its batches
(`training.update_batches`); a batch goes through the model in one row a pair, where the model's attention
can take that, and on one CPU in several passes (`training.shared_step`). A known order gives exact numbers,
a random one expected ones.

Dimension suffixes: P pairs, N pairs of an update on one process, B pairs of a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.config import Recipe, Settings
from selective_dpo.logprobs.packed import shared_lengths
from selective_dpo.logprobs.padded import PartLengths
from selective_dpo.losses import LOSSES
from selective_dpo.run.planning.batches import NO_WORK, Work, epoch_batches, padded_rows, total_work
from selective_dpo.run.planning.forwarding import Forwarding
from selective_dpo.run.planning.settings import trainer_value
from selective_dpo.training.batching import WORTH_A_PASS, dropouts, group_by_length

_SIMULATED_PAIRS = 4096
"""How many pairs in random order an expectation is taken over."""


class Dealing(NamedTuple):
    """The rules of one stage's training."""

    pairs_per_batch: int
    """On each process."""
    accumulation: int
    processes: int
    shared: bool
    """Prompt, chosen and rejected in one row; else a row for each completion."""
    by_length: bool
    """The pairs of an update are dealt to its batches by length; those that only fill the last batches are
    left without tokens in shared rows."""
    worth_a_pass: int | None
    """Tokens of padding that are worth a pass of their own; None: a batch is one pass."""
    multiple_of: int
    """What the length of rows is a multiple of."""

    @property
    def rows_per_pair(self) -> int:
        """Rows that a pair takes."""
        return 1 if self.shared else 2

    def evaluates(self, pairs_per_batch: int) -> Dealing:
        """The same for TRL's evaluation: batches as they come."""
        return self._replace(pairs_per_batch=pairs_per_batch, accumulation=1, by_length=False)


def dealing_of(recipe: Recipe, block: Literal["score", "train"], forwarding: Forwarding) -> Dealing:
    """The rules by which `block` trains the recipe's model."""
    given: Settings = getattr(recipe, block).trainer
    processes = recipe.launch.processes
    shared = forwarding.path.name == "shared" and not _rules_out_sharing(
        given, getattr(recipe, block).lora, forwarding.model
    )
    losses = trainer_value(given, "loss_type")
    losses = {losses} if isinstance(losses, str) else set(losses)
    alone_on_cpu = forwarding.device == "cpu" and processes == 1
    return Dealing(
        pairs_per_batch=trainer_value(given, "per_device_train_batch_size"),
        accumulation=trainer_value(given, "gradient_accumulation_steps"),
        processes=processes,
        shared=shared,
        by_length=LOSSES.keys() >= losses,
        worth_a_pass=WORTH_A_PASS if shared and alone_on_cpu else None,
        multiple_of=forwarding.multiple_of if shared else _padding_multiple(given),
    )


def ordered_work(parts: PartLengths, dealing: Dealing) -> Work:
    """One epoch over the pairs in their order, exactly."""
    rows = _rows_of(parts, dealing)
    updates = _updates(len(rows.width_P), dealing)
    return total_work(_update_work(batches, rows, dealing) for batches in updates)


def expected_work(parts: PartLengths, pairs: int, dealing: Dealing) -> Work:
    """One epoch over `pairs` of the P pairs, drawn and ordered at random: the mean over simulated epochs.

    The seed is fixed; of a long epoch a part is simulated. That the pairs drawn are a little longer or
    shorter than all of them is corrected for, so only their padding is estimated.
    """
    generator = np.random.default_rng(0)
    rows = _rows_of(parts, dealing)
    per_update = dealing.pairs_per_batch * dealing.accumulation * dealing.processes
    updates = min(math.ceil(pairs / per_update), math.ceil(_SIMULATED_PAIRS / per_update))
    once = min(pairs, updates * per_update)
    work, tokens = NO_WORK, 0.0
    for _ in range(math.ceil(_SIMULATED_PAIRS / once)):
        own = rows.take(generator.permutation(len(rows.width_P))[:pairs])
        dealt = itertools.islice(_updates(pairs, dealing), updates * dealing.processes)
        work = work.plus(total_work(_update_work(batches, own, dealing) for batches in dealt))
        tokens += float(own.width_P[:once].sum())
    return work.times(pairs * float(rows.width_P.mean()) / max(1.0, tokens))


class _Rows(NamedTuple):
    """Tokens of each pair, [P] each."""

    width_P: NDArray[np.int64]
    """Of its row, or of the longer of its two."""
    both_P: NDArray[np.int64]
    """Of prompt + chosen and prompt + rejected together, by which an update is sorted."""
    longest_P: NDArray[np.int64]
    """Of the longer one of these, which decides between equals."""

    def take(self, at: NDArray[np.int64]) -> _Rows:
        return _Rows(*(column[at] for column in self))


def _rows_of(parts: PartLengths, dealing: Dealing) -> _Rows:
    prompt_P, chosen_P, rejected_P = parts
    longest_P = prompt_P + np.maximum(chosen_P, rejected_P)
    width_P = shared_lengths(*parts) if dealing.shared else longest_P
    return _Rows(width_P, 2 * prompt_P + chosen_P + rejected_P, longest_P)


def _updates(pairs: int, dealing: Dealing) -> Iterator[list[NDArray[np.int64]]]:
    """For each update of an epoch, and each process in it: its batches, as positions in the order.

    Positions from `pairs` on are the epoch's beginning again, where last batches are filled with it.
    """
    size, processes = dealing.pairs_per_batch, dealing.processes
    epoch = epoch_batches(pairs, size, processes)
    stop = epoch.full * size + epoch.rest
    batches = [np.arange(start, min(start + size, stop)) for start in range(0, stop, size)]
    rounds = len(batches) // processes
    for first in range(0, rounds, dealing.accumulation):
        for process in range(processes):
            yield batches[process::processes][first : first + dealing.accumulation]


def _update_work(batches: list[NDArray[np.int64]], rows: _Rows, dealing: Dealing) -> Work:
    """What one process computes for one update."""
    positions_N = np.concatenate(batches)
    own = rows.take(positions_N % len(rows.width_P))
    blank_N = (positions_N >= len(rows.width_P)) & dealing.by_length
    width_N, both_N, longest_N = (np.where(blank_N, 0, column) for column in own)
    if not dealing.shared:
        width_N = own.width_P  # a row of its own keeps its tokens; only its labels are taken away
    sizes = [len(batch) for batch in batches]
    order_N = np.arange(len(positions_N))
    if dealing.by_length and len(batches) > 1:
        order_N, sizes = np.lexsort((-longest_N, -both_N)), sorted(sizes)
    dealt = np.split(width_N[order_N], np.cumsum(sizes)[:-1])
    return total_work(_batch_work(width_B, dealing) for width_B in dealt)


def _batch_work(width_B: NDArray[np.int64], dealing: Dealing) -> Work:
    groups = [list(range(len(width_B)))]
    if dealing.worth_a_pass is not None:
        groups = group_by_length(width_B, dealing.worth_a_pass)
    return total_work(
        padded_rows(
            len(group) * dealing.rows_per_pair, int(width_B[group].max()), multiple_of=dealing.multiple_of
        )
        for group in groups
    )


def _rules_out_sharing(given: Settings, lora: Settings | None, model: Any) -> bool:
    """Whether a stage's settings make its trainer take plain rows whatever the model's attention can."""
    if trainer_value(given, "torch_compile"):
        return True
    if trainer_value(given, "disable_dropout"):
        return False
    return (lora or {}).get("lora_dropout", 0.0) > 0 or (model is not None and any(dropouts(model)))


def _padding_multiple(given: Settings) -> int:
    multiple = trainer_value(given, "pad_to_multiple_of")
    # By default nothing is rounded on a CPU or GPU.
    return int(multiple) if str(multiple).isdecimal() else 1
