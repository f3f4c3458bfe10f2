"""How the engine would take pairs through the recipe's model: in which rows, in which batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from selective_dpo.config import Recipe
from selective_dpo.engine.memory import Budget, bounded_batches, budget_for
from selective_dpo.engine.paths import Path, choose_path
from selective_dpo.pipeline.planning.batches import NO_WORK, Work
from selective_dpo.pipeline.planning.inputs import KeptPairs


class Forwarding(NamedTuple):
    """The engine's choices for one model."""

    path: Path
    model: Any
    """On the meta device; None where its configuration cannot be had."""

    def work(self, pairs: KeptPairs, tokens_per_batch: int) -> Work:
        """One forward pass over `pairs`, padding included."""
        shared = self.path.name == "shared"
        lengths_P, rows_per_pair = (pairs.shared_lengths_P, 1) if shared else (pairs.lengths_P, 2)
        if not len(lengths_P):
            return NO_WORK
        # Of an unknown model the bytes of masks are unknown: then only tokens bound a batch.
        unbounded = Budget(tokens_per_batch, tokens_per_batch * int(lengths_P.max()))
        budget = budget_for(self.model, tokens_per_batch) if self.model is not None else unbounded
        work = NO_WORK
        for rows in bounded_batches(lengths_P, budget, rows_per_pair=rows_per_pair):
            longest, count = float(lengths_P[rows].max()), len(rows) * rows_per_pair
            work = work.plus(Work(count * longest, count * longest**2))
        return work


def forwarding_of(recipe: Recipe, model: Any) -> Forwarding:
    """The choices for the recipe's model, `model` being it on the meta device (None: not to be had).

    The engine also tries its choice on a pair and may go back to padded rows; that needs the weights.
    """
    if model is None:
        shared = recipe.model.attention in ("sdpa", "eager", "flex_attention")
        reason = "as most models with this attention"
        return Forwarding(Path("shared" if shared else "padded", reason), None)
    model.config._attn_implementation = recipe.model.attention
    model.to(getattr(torch, recipe.model.dtype))
    return Forwarding(choose_path(model, recipe.data.max_length), model)
