"""Each pair of an update weighs the same, however the update is dealt to processes and batches.

An optimizer step averages over processes and over accumulated batches. The last update of an epoch has
fewer pairs: its batches differ in size, and on several processes the data loader fills them with pairs from
the epoch's beginning. Averages of averages would then weigh some pairs more than others, and the repeated
ones would be trained on twice, so a policy would depend on the number of processes. Here repeated rows are
blanked and each batch's loss is scaled, so that the update is the mean over its own pairs. That holds for
every loss that is a mean over pairs (`core.losses.LOSSES`); what another one does with an uneven update is
left to TRL.

Shapes: B rows of a batch (pairs), R processes, A batches accumulated in an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

WEIGHT = "update_weight"
BLANK = "blank_pairs"
"""Keys of a batch: the factor of its loss, and how many of its pairs are blank."""


class Share(NamedTuple):
    """One process's part of one batch round."""

    own: int
    """Pairs that are this process's to train on."""
    everyones: int
    """Pairs that all processes train on."""


def share_of(batch: int, *, pairs: int, batch_size: int, processes: int, process: int) -> Share:
    """What is left of an epoch of `pairs` pairs for its `batch`-th round (from 0).

    A round deals `batch_size` consecutive pairs to each process in turn.
    """
    start = batch * batch_size * processes
    own = min(batch_size, max(0, pairs - start - process * batch_size))
    return Share(own, min(batch_size * processes, pairs - start))


def weigh_equally(
    batches: Sequence[dict[str, Any]],
    *,
    first: int,
    pairs: int,
    batch_size: int,
    processes: int,
    process: int,
) -> None:
    """Mark the batches of one update with their weight, and blank their repeated rows, in place.

    `first` is the update's first round. Batches are as TRL collates them: `completion_mask` [2B, T] with
    the chosen rows before the rejected, and reference log-probs [B] where there are any. A blank pair has
    no completion, hence log-probs of 0 without a gradient. Nothing is done to an update that is full.
    """
    shares = [
        share_of(first + number, pairs=pairs, batch_size=batch_size, processes=processes, process=process)
        for number in range(len(batches))
    ]
    in_update = sum(share.everyones for share in shares)
    for batch, share in zip(batches, shares, strict=True):
        mask = batch["completion_mask"]
        rows = mask.shape[0] // 2
        # The step averages over rows, processes and batches; the factor makes it 1 / in_update for each.
        batch[WEIGHT] = rows * processes * len(batches) / in_update
        batch[BLANK] = rows - share.own
        mask[share.own : rows] = 0
        mask[rows + share.own :] = 0
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in batch:
                batch[name][share.own :] = 0.0
