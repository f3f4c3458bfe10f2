"""How the engine would take pairs through the recipe's model: in which rows, in which batches."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from selective_dpo.config import Recipe
from selective_dpo.logprobs.memory import Budget, TokenBudget, bounded_batches, budget_for, most_tokens
from selective_dpo.logprobs.packed import CUDA_ALIGNMENT, width_multiple
from selective_dpo.logprobs.packing_support import RowLayout, choose_path
from selective_dpo.run.planning.batches import NO_WORK, Work, padded_rows, total_work
from selective_dpo.run.planning.inputs import KeptPairs


class Forwarding(NamedTuple):
    """The engine's choices for one model."""

    path: RowLayout
    model: Any
    """On the meta device; None where its configuration cannot be had."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What it would run on here."""

    @property
    def multiple_of(self) -> int:
        """What the length of shared rows is a multiple of."""
        aligned = CUDA_ALIGNMENT if self.device == "cuda" else 1
        return aligned if self.model is None else max(aligned, width_multiple(self.model))

    @property
    def rows_per_pair(self) -> int:
        """Rows that a pair takes."""
        return 1 if self.path.name == "shared" else 2

    def tokens_of(self, budget: TokenBudget) -> int:
        """Tokens of a full batch; of an automatic budget those that it has where memory is plenty."""
        return most_tokens(self.device) if budget == "auto" else budget

    def work(self, pairs: KeptPairs, token_budget: TokenBudget) -> Work:
        """One forward pass over `pairs`, padding included."""
        tokens_per_batch = self.tokens_of(token_budget)
        shared, rows_per_pair = self.path.name == "shared", self.rows_per_pair
        lengths_P = pairs.shared_lengths_P if shared else pairs.lengths_P
        if not len(lengths_P):
            return NO_WORK
        # Of an unknown model the bytes of masks are unknown: then only tokens bound a batch.
        unbounded = Budget(tokens_per_batch, tokens_per_batch * int(lengths_P.max()))
        budget = budget_for(self.model, tokens_per_batch) if self.model is not None else unbounded
        multiple_of = self.multiple_of if shared else 1
        return total_work(
            padded_rows(len(rows) * rows_per_pair, int(lengths_P[rows].max()), multiple_of=multiple_of)
            for rows in bounded_batches(lengths_P, budget, rows_per_pair=rows_per_pair)
        )


def forwarding_of(recipe: Recipe, model: Any) -> Forwarding:
    """The choices for the recipe's model, `model` being it on the meta device (None: not to be had).

    The engine also tries its choice on a pair and may go back to padded rows; that needs the weights.
    """
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    if model is None:
        shared = recipe.model.attention in ("sdpa", "eager", "flex_attention")
        reason = "as most models with this attention"
        return Forwarding(RowLayout("shared" if shared else "padded", reason), None, device)
    model.config._attn_implementation = recipe.model.attention
    model.to(getattr(torch, recipe.model.dtype))
    return Forwarding(choose_path(model, recipe.data.max_length), model, device)
