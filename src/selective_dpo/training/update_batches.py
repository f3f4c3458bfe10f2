"""The pairs of one update, dealt to its batches by length.

Padding costs what the longest row of a batch is longer than the others. Curricula and shuffling deal long
and short pairs to the same batch; within one optimizer step they may change places, since the step
averages over all of them. Nothing moves from one update to another, or from one process to another.

Dimension suffixes: P pairs of the update on this process, T tokens of TRL's padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selective_dpo.training.equal_weights import BLANK, WEIGHT
from selective_dpo.training.micro_batches import OF_A_PAIR
from selective_dpo.training.shared_step import SHARED_INPUTS

_MARKS = frozenset({WEIGHT, BLANK})
_ROWS = {"input_ids": 0, "attention_mask": 0, "completion_mask": 0}
"""Padded parts of a batch, and their padding; masked, so any token will do."""


def can_deal_by_length(batches: Sequence[dict[str, Any]]) -> bool:
    """Whether these batches hold nothing but pairs of text, each with the same weight in the update."""
    if len(batches) < 2 or any(set(batch) - SHARED_INPUTS - {*OF_A_PAIR} - _MARKS for batch in batches):
        return False
    if len({frozenset(batch) for batch in batches}) > 1:
        return False
    return WEIGHT in batches[0] or len({len(batch["input_ids"]) for batch in batches}) == 1


def deal_by_length(batches: Sequence[dict[str, Any]], *, multiple_of: int = 1) -> list[dict[str, Any]]:
    """The same pairs in as many batches of the same sizes, those of similar length together, longest first.

    The smallest batch gets the longest pairs. `batches` must have passed `can_deal_by_length`; weights
    and blanks (see `equal_weights`) go with the pairs. Rows are padded to a multiple of `multiple_of`.
    """
    sizes = [len(batch["input_ids"]) // 2 for batch in batches]
    width = max(batch["input_ids"].shape[1] for batch in batches)
    rows = {name: _stacked(batches, name, width) for name in _ROWS}
    of_pairs = {
        name: torch.cat([batch[name] for batch in batches]) for name in OF_A_PAIR if name in batches[0]
    }
    # A blank pair's rows are never computed: it has no length.
    scored_P2 = rows["completion_mask"].any(dim=2)
    lengths_P2 = rows["attention_mask"].sum(dim=2) * scored_P2
    totals_P, longest_P = (part.tolist() for part in (lengths_P2.sum(dim=1), lengths_P2.amax(dim=1)))
    blank_P = (~scored_P2.any(dim=1)).tolist()
    order = sorted(range(len(totals_P)), key=lambda pair: (-totals_P[pair], -longest_P[pair]))
    start, dealt = 0, []
    for size in sorted(sizes):
        own = order[start : start + size]
        start += size
        index = torch.tensor(own, device=scored_P2.device)
        used = max(1, int(rows["attention_mask"][index].sum(dim=2).max()))
        used = min(width, -(-used // multiple_of) * multiple_of)
        batch: dict[str, Any] = {
            name: part[index, :, :used].transpose(0, 1).flatten(0, 1) for name, part in rows.items()
        }
        batch.update({name: part[index] for name, part in of_pairs.items()})
        if WEIGHT in batches[0]:
            # Each pair's part of the update's mean, times the pairs that the batch's mean is over.
            batch[WEIGHT] = batches[0][WEIGHT] / sizes[0] * size
            batch[BLANK] = sum(blank_P[pair] for pair in own)
        dealt.append(batch)
    return dealt


def _stacked(batches: Sequence[dict[str, Any]], name: str, width: int) -> Tensor:
    """One padded part of all batches: [P, 2, T], chosen before rejected."""
    padded = [
        torch.nn.functional.pad(batch[name], (0, width - batch[name].shape[1]), value=_ROWS[name])
        for batch in batches
    ]
    return torch.cat([part.view(2, -1, width).transpose(0, 1) for part in padded])
