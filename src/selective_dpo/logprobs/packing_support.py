"""Which rows a model reads for pairs: packed ones, with the prompt shared, or padded ones.

The rules know which of transformers' models compute packed rows rightly; the choice is tried on a pair. Where
both are right, the cheaper ones are taken: packed rows hold fewer tokens, but their mask makes attention cost
the square of a longer row.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from selective_dpo.distributed.processes import this_process
from selective_dpo.logprobs.packed import (
    Pairs,
    pack_pairs,
    pad_pairs,
    row_log_probs,
    shared_lengths,
    width_multiple,
)
from selective_dpo.logprobs.padded import (
    PairBatch,
    PartLengths,
    batch_logps,
    make_batch,
    pair_lengths,
    part_lengths,
)
from selective_dpo.models import attention_of, language_model

_TAKES_ANY_MASK = ("sdpa", "eager", "flex_attention")
"""Attention of transformers that uses a [B, 1, T, T] mask, or a BlockMask, as it is given."""

_ORDINARY_LAYERS = frozenset({"full_attention", "sliding_attention"})


class RowLayout(NamedTuple):
    """How pairs go through a model, and why."""

    name: Literal["shared", "padded"]
    """`shared`: prompt, chosen and rejected packed into one row; `padded`: a row for each completion."""
    reason: str


def choose_path(model: Any, longest: int) -> RowLayout:
    """Packed rows where the model's attention can take them, padded rows where it cannot.

    Args:
        model: A causal language model, wrapped or not.
        longest: Tokens of the longest prompt + completion that will be computed. Windows of attention
            at least as long never cut anything, so they do not matter.
    """
    obstacle = _obstacle(model, longest)
    if obstacle is not None:
        return RowLayout("padded", obstacle)
    return RowLayout("shared", f"{attention_of(model)} attention takes a mask for each token")


def _obstacle(model: Any, longest: int) -> str | None:
    """What keeps the model from sharing a prompt between two completions in one row, if anything."""
    inner = language_model(model)
    config = inner.config.get_text_config()
    if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
        return "prompt-learning adapters put tokens before each row"
    if config._attn_implementation not in _TAKES_ANY_MASK:
        return f"{config._attn_implementation} attention takes no mask"
    if inner._is_stateful:
        return f"{config.model_type} carries a state from token to token"
    other_layers = set(getattr(config, "layer_types", None) or ()) - _ORDINARY_LAYERS
    if other_layers:
        return f"{config.model_type} has layers of {', '.join(sorted(other_layers))}"
    if "position_ids" not in inspect.signature(inner.base_model.forward).parameters:
        return f"{config.model_type} takes no positions"
    if getattr(config, "alibi", False):
        return f"{config.model_type} takes distances from the row, not from positions"
    if getattr(config, "output_router_logits", False):
        return "the router's balancing loss needs a plain padding mask"
    window = _window(config)
    if window is not None and longest > window:
        return f"attention is limited to {window:,} tokens and the longest pair has {longest:,}"
    return None


def _window(config: Any) -> int | None:
    layers = getattr(config, "layer_types", None)
    if layers and "sliding_attention" not in layers:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


# --- cost ---------------------------------------------------------------------------------------------------


class RowCosts(NamedTuple):
    """What rows cost in one layer of a model, in FLOPs of a matrix product as fast as its linear layers."""

    token: float
    """Each token of a row, padding included."""
    packed_cell: float
    """Each of the T * T cells of a packed row's attention, all of which are computed under a mask."""
    padded_cell: float
    """Each of the T * T cells of a padded row's, about half of which causal attention skips."""


_CELL_RATES = {"cpu": (1.1, 0.55), "cuda": (5.0, 0.9)}
"""Time for a FLOP of attention over all cells, masked and causal, in that of a FLOP of a matrix product.

For the CPU they are measured (`benchmarks/rows.py`); for CUDA they are estimates of a kernel that reads a
mask, and of FlashAttention's, which skips half of the cells and reaches about 60% of a matrix product's rate.
"""

_FLEX_CELL = 0.9
"""FlexAttention skips blocks that no token may see."""


def row_costs(model: Any) -> RowCosts:
    """The costs of a model's rows, from its sizes and its attention. They are the same in every run."""
    config = language_model(model).config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = (getattr(config, "head_dim", None) or hidden // heads) * heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if active := getattr(config, "num_experts_per_tok", None):
        inner = active * (getattr(config, "moe_intermediate_size", None) or inner)
    weights = 2 * hidden * width + 2 * hidden * width * shared // heads + 3 * hidden * inner
    device = next(model.parameters()).device.type
    packed, padded = _CELL_RATES.get(device, _CELL_RATES["cuda"])
    if attention_of(model) == "eager":
        padded = packed
    elif attention_of(model) == "flex_attention":
        packed = padded = _FLEX_CELL
    return RowCosts(2.0 * weights, 4.0 * width * packed, 4.0 * width * padded)


def packed_is_cheaper(costs: RowCosts, lengths: PartLengths, *, multiple_of: int = 1) -> bool:
    """Whether pairs of these lengths cost less in packed rows than in padded ones, as one batch."""
    packed_T = int(shared_lengths(*lengths).max(initial=1))
    padded_T = int((lengths.prompt_P + np.maximum(lengths.chosen_P, lengths.rejected_P)).max(initial=1))
    packed_T = -(-packed_T // multiple_of) * multiple_of
    packed = packed_T * costs.token + packed_T**2 * costs.packed_cell
    padded = 2 * (padded_T * costs.token + padded_T**2 * costs.padded_cell)
    return packed < padded


# --- the choice ---------------------------------------------------------------------------------------------


PathName = Literal["auto", "shared", "padded"]

_TRIED_TOKENS = 256
"""Length of the pair that the choice is tried on, where there is one as long."""

_TOLERANCE_32, _TOLERANCE_16 = 1e-3, 0.1
"""Nats a token that packed and padded rows may differ by, in single and in half precision.

Far above rounding, and far below what a completion changes that sees the other one.
"""


class RowPlan(NamedTuple):
    """How the pairs of a data set go through a model."""

    lengths_P: NDArray[np.int64]
    """Tokens of each pair's row, or of the longer of its two."""
    rows_per_pair: int
    logps: Callable[[Pairs], Tensor]
    """Summed log-probability of each completion: [2B] float32, the chosen ones first."""
    packable: bool
    """Whether the model computes packed rows rightly."""


def plan_rows(model: Any, tokens: Dataset, pad_token_id: int, name: PathName) -> RowPlan:
    """Rows of the layout called `name`; for `auto`, the cheaper of those that this model computes rightly.

    Packed rows are tried on one pair first. A model that does not honour the mask (a custom model, say)
    gives other log-probs in them than in padded rows, which then are used. `model` must carry TRL's
    fused head, and be in evaluation mode without gradients.
    """
    device = next(model.parameters()).device

    def plain_logps(pairs: Pairs) -> Tensor:
        return batch_logps(model, PairBatch(*(part.to(device) for part in make_batch(pairs, pad_token_id))))

    def padded_logps(pairs: Pairs) -> Tensor:
        return row_log_probs(model, pad_pairs(pairs, pad_token_id).to(device)).sum(dim=1)

    def packed_logps(pairs: Pairs) -> Tensor:
        batch = pack_pairs(pairs, pad_token_id, multiple_of=width_multiple(model))
        return row_log_probs(model, batch.to(device)).sum(dim=1)

    lengths = part_lengths(tokens)
    plain = RowPlan(pair_lengths(tokens), 2, plain_logps, packable=False)
    packed = RowPlan(shared_lengths(*lengths), 1, packed_logps, packable=True)
    if name != "auto":
        return packed if name == "shared" else plain
    layout = choose_path(model, int(plain.lengths_P.max(initial=0)))
    if layout.name == "shared" and len(tokens):
        pair = tokens[[_pair_to_try(packed.lengths_P)]]
        padded = plain._replace(logps=padded_logps, packable=True)
        difference = max(difference_per_token(each, plain, pair) for each in (packed, padded))
        if difference > _tolerance(model, device):
            reason = f"shared rows change this model's log-probs by {difference:.2g} a token"
            layout = RowLayout("padded", reason)
        elif not packed_saves(row_costs(model), lengths):
            say_once(RowLayout("padded", "at these lengths a shared prompt saves less than its mask costs"))
            return padded
    say_once(layout)
    return packed if layout.name == "shared" else plain


def packed_saves(costs: RowCosts, lengths: PartLengths) -> bool:
    """Whether all pairs together cost less packed, each in a batch of its own length."""
    packed_P = shared_lengths(*lengths).astype(float)
    padded_P = (lengths.prompt_P + np.maximum(lengths.chosen_P, lengths.rejected_P)).astype(float)
    packed = (packed_P * costs.token + packed_P**2 * costs.packed_cell).sum()
    return bool(packed < 2 * (padded_P * costs.token + padded_P**2 * costs.padded_cell).sum())


def _pair_to_try(lengths_P: NDArray[np.int64]) -> int:
    """The longest pair within `_TRIED_TOKENS`, else the shortest."""
    short = np.flatnonzero(lengths_P <= _TRIED_TOKENS)
    return int(short[np.argmax(lengths_P[short])]) if len(short) else int(np.argmin(lengths_P))


def difference_per_token(one: RowPlan, plain: RowPlan, pairs: Pairs) -> float:
    """The largest difference of a completion's log-prob a token between two plans.

    It is infinite where only the first gives no number.
    """
    completions = [*pairs["chosen_ids"], *pairs["rejected_ids"]]
    counts = torch.tensor([max(1, len(ids)) for ids in completions])
    ours, theirs = (plan.logps(pairs).cpu() for plan in (one, plain))
    gap = (ours - theirs).abs() / counts
    # Where plain rows give no number either, the loss will say so; where only ours do not, they are wrong.
    gap = gap.where(ours.isfinite(), torch.inf).where(theirs.isfinite(), 0.0)
    # All processes must choose alike, even if rounding differs between them.
    if this_process().num_processes > 1:
        gap = gather(gap.to(this_process().device))
    return float(gap.max())


def _tolerance(model: Any, device: torch.device) -> float:
    half = torch.is_autocast_enabled(device.type) or language_model(model).dtype.itemsize < 4
    return _TOLERANCE_16 if half else _TOLERANCE_32


@functools.cache
def say_once(layout: RowLayout) -> None:
    """Say which rows are computed and why, once for each answer."""
    rows = "one row a pair" if layout.name == "shared" else "one row a completion"
    if this_process().is_main_process:
        sys.stderr.write(f"log-probs: {rows} ({layout.reason})\n")
