"""Which rows a model reads for pairs: packed ones, with the prompt shared, or padded ones.

Rules know which of transformers' models compute packed rows rightly, and it is tried on a pair. Packed rows
hold fewer tokens, but their mask makes attention cost the square of a longer row: the cheaper ones are taken.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate.utils import gather
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from selective_dpo.distributed.processes import this_process
from selective_dpo.logprobs.rows import (
    TOKEN_COLUMNS,
    PairRows,
    Pairs,
    PartLengths,
    RowKind,
    forward_logps,
    make_rows,
    part_lengths,
    width_multiple,
)
from selective_dpo.models import attention_of, language_model

TAKES_ANY_MASK = ("sdpa", "eager", "flex_attention")
"""Attention of transformers that uses a [B, 1, T, T] mask, or a BlockMask, as it is given."""

_ORDINARY_LAYERS = frozenset({"full_attention", "sliding_attention"})


def packing_obstacle(model: Any, longest: int) -> str | None:
    """What keeps a causal language model, wrapped or not, from sharing a prompt between two completions in
    one row, if anything.

    `longest` are the tokens of the longest prompt + completion that will be computed. Windows of attention
    at least as long never cut anything.
    """
    inner = language_model(model)
    config = inner.config.get_text_config()
    if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
        return "prompt-learning adapters put tokens before each row"
    if config._attn_implementation not in TAKES_ANY_MASK:
        return f"{config._attn_implementation} attention takes no mask"
    if inner._is_stateful:
        return f"{config.model_type} carries a state from token to token"
    layers = getattr(config, "layer_types", None) or ()
    other_layers = set(layers) - _ORDINARY_LAYERS
    if other_layers:
        return f"{config.model_type} has layers of {', '.join(sorted(other_layers))}"
    if "position_ids" not in inspect.signature(inner.base_model.forward).parameters:
        return f"{config.model_type} takes no positions"
    if getattr(config, "alibi", False):
        return f"{config.model_type} takes distances from the row, not from positions"
    if getattr(config, "output_router_logits", False):
        return "the router's balancing loss needs a plain padding mask"
    window = getattr(config, "sliding_window", None)
    if window is not None and longest > window and (not layers or "sliding_attention" in layers):
        return f"attention is limited to {window:,} tokens and the longest pair has {longest:,}"
    return None


# --- cost ---------------------------------------------------------------------------------------------------


class RowCosts(NamedTuple):
    """What rows cost in one layer of a model, in FLOPs of a matrix product as fast as its linear layers.

    For each token, padding included, and for each of the T * T cells of a row's attention: under a packed
    row's mask all of them are computed, and causal attention skips about half of a padded row's.
    """

    token: float
    packed_cell: float
    padded_cell: float


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


def packed_saves(costs: RowCosts, packed_P: NDArray[np.int64], padded_P: NDArray[np.int64]) -> bool:
    """Whether rows of these lengths cost less packed, each in a batch of its own."""
    packed, padded = packed_P.astype(float), padded_P.astype(float)
    packed_cost = (packed * costs.token + packed**2 * costs.packed_cell).sum()
    return bool(packed_cost < 2 * (padded * costs.token + padded**2 * costs.padded_cell).sum())


class RowCollator:
    """Makes the rows of pairs for one model, on the CPU.

    Args:
        kind: of the rows; None: packed or padded ones, whichever cost less, batch by batch.
        multiple_of: what the length of rows should be a multiple of, besides what the model wants.
        splits: pairs of different length go through the model one group after the other. A CPU gains nothing
            from larger batches.
    """

    def __init__(
        self,
        model: Any,
        *,
        pad_token_id: int,
        kind: RowKind | None = None,
        multiple_of: int = 1,
        splits: bool = False,
    ) -> None:
        self._pad_token_id, self._kind, self._splits = pad_token_id, kind, splits
        self._costs = row_costs(model) if kind is None else None
        self._multiple_of = math.lcm(multiple_of, 1 if kind == "masked" else width_multiple(model))

    def __call__(self, pairs: Pairs) -> PairRows:
        """The rows of a batch of pairs."""
        counts_3B = np.array([[len(part) for part in pairs[name]] for name in TOKEN_COLUMNS], dtype=np.int64)
        lengths = PartLengths(*counts_3B)
        count = len(lengths.prompt_P)
        groups = group_by_length(lengths.packed_P, WORTH_A_PASS) if self._splits else [list(range(count))]
        rows = []
        for group in groups:
            own = {name: [pairs[name][place] for place in group] for name in TOKEN_COLUMNS}
            kind = self._kind or self._cheaper(PartLengths(*counts_3B[:, group]))
            rows.append(make_rows(own, kind, self._pad_token_id, multiple_of=self._multiple_of))
        at_2B = np.concatenate([[*group, *(count + place for place in group)] for group in groups])
        return PairRows(rows, torch.from_numpy(np.argsort(at_2B)))

    def _cheaper(self, lengths: PartLengths) -> RowKind:
        longest = (each.max(initial=1, keepdims=True) for each in (lengths.packed_P, lengths.padded_P))
        packed_1, padded_1 = (-(-each // self._multiple_of) * self._multiple_of for each in longest)
        assert self._costs is not None
        return "packed" if packed_saves(self._costs, packed_1, padded_1) else "padded"


WORTH_A_PASS = 256
"""Tokens of padding that are worth another pass through the model on a CPU."""


def group_by_length(lengths_B: NDArray[np.int64], worth_a_pass: int) -> list[list[int]]:
    """Groups of pairs, the longest pairs first, that cost the fewest tokens: those of their padded rows, and
    `worth_a_pass` for each group.

    Shapes: lengths_B [B]. Numbers of pairs, rising in each group; together the groups hold each
    of 0..B-1 exactly once.
    """
    order = np.argsort(-lengths_B, kind="stable")
    # best[n]: what the n longest pairs cost, and their groups.
    best: list[tuple[int, list[list[int]]]] = [(0, [])]
    for end in range(1, len(order) + 1):
        cost, start = min(
            (best[start][0] + worth_a_pass + (end - start) * int(lengths_B[order[start]]), start)
            for start in range(end)
        )
        best.append((cost, [*best[start][1], sorted(order[start:end].tolist())]))
    return best[-1][1]


# --- the choice ---------------------------------------------------------------------------------------------


PathName = Literal["auto", "shared", "padded"]

_TRIED_TOKENS = 256
"""Length of the pair that the choice is tried on, where there is one as long."""

_TOLERANCE_32, _TOLERANCE_16 = 1e-3, 0.1
"""Nats a token that rows without and with a mask of their padding may differ by, in single and in half
precision.

Far above rounding, and far below what a completion changes that sees the other one.
"""


class RowPlan(NamedTuple):
    """How the pairs of a data set go through a model."""

    kind: RowKind
    """`masked` also where the model was not found to compute the others rightly."""
    lengths_P: NDArray[np.int64]
    """Tokens of each pair's row, or of the longer of its two."""

    @property
    def rows_per_pair(self) -> int:
        """Rows of each pair."""
        return 1 if self.kind == "packed" else 2


def plan_rows(model: Any, tokens: Dataset, pad_token_id: int, name: PathName) -> RowPlan:
    """Packed rows for `shared`, masked ones for `padded`; for `auto`, the cheapest of those that this model
    computes rightly, all pairs together.

    A model that does not honour the mask of packed rows (a custom model, say) gives other log-probs in them,
    so they are tried on a pair, once a model. `model` must carry TRL's fused head, and drop nothing out.
    """
    lengths = part_lengths(tokens)
    packed, masked = RowPlan("packed", lengths.packed_P), RowPlan("masked", lengths.padded_P)
    if name != "auto":
        return packed if name == "shared" else masked
    obstacle = packing_obstacle(model, int(lengths.padded_P.max(initial=0)))
    if obstacle is None and len(tokens):
        difference, tolerance = _tried_difference(model, tokens, lengths.packed_P, pad_token_id)
        if difference > tolerance:
            obstacle = f"shared rows change this model's log-probs by {difference:.2g} a token"
        elif not packed_saves(row_costs(model), lengths.packed_P, lengths.padded_P):
            say_once(2, "at these lengths a shared prompt saves less than its mask costs")
            return RowPlan("padded", lengths.padded_P)
    plan = packed if obstacle is None else masked
    say_once(plan.rows_per_pair, obstacle or f"{attention_of(model)} attention takes a mask for each token")
    return plan


_Trials = dict[tuple[str, str, bool], tuple[int, float]]
"""By attention, device and half precision: tokens of the pair that was tried, and the difference."""

_TRIALS: WeakKeyDictionary[torch.nn.Module, _Trials] = WeakKeyDictionary()


def _tried_difference(
    model: Any, tokens: Dataset, packed_P: NDArray[np.int64], pad_token_id: int
) -> tuple[float, float]:
    """By how many nats a token rows without a mask of their padding differ, and may differ.

    A model is tried once for each precision, device and attention, and again where a longer pair says more.
    """
    inner = language_model(model)
    device = next(model.parameters()).device
    half = torch.is_autocast_enabled(device.type) or inner.dtype.itemsize < 4
    tolerance = _TOLERANCE_16 if half else _TOLERANCE_32
    # The longest pair that is short enough, else the shortest.
    short = np.flatnonzero(packed_P <= _TRIED_TOKENS)
    row = int(short[np.argmax(packed_P[short])]) if len(short) else int(np.argmin(packed_P))
    length, under = int(packed_P[row]), (attention_of(model), device.type, half)
    trials = _TRIALS.setdefault(inner, {})
    tried, difference = trials.get(under, (-1, 0.0))
    if tried >= min(length, _TRIED_TOKENS):
        return difference, tolerance
    pairs = tokens[[row]]
    kinds: tuple[RowKind, ...] = ("masked", "packed", "padded")
    collators = [RowCollator(model, pad_token_id=pad_token_id, kind=kind) for kind in kinds]
    with torch.no_grad():
        plain_B2, *others = (forward_logps(model, collate(pairs).to(device)) for collate in collators)
    counts_2 = torch.tensor([max(1, len(pairs[name][0])) for name in TOKEN_COLUMNS[1:]], device=device)
    gaps = torch.stack([gap_per_token(each_B2, plain_B2, counts_2) for each_B2 in others])
    # All processes must choose alike, even if rounding differs between them.
    if this_process().num_processes > 1:
        gaps = gather(gaps.to(this_process().device))
    difference = max(difference, float(gaps.nan_to_num(0.0, posinf=torch.inf).max()))
    if not gaps.isnan().any():
        trials[under] = (length, difference)
    return difference, tolerance


def gap_per_token(ours_B2: Tensor, plain_B2: Tensor, counts_B2: Tensor) -> Tensor:
    """The difference of each completion's log-prob a token: [B, 2], as are the log-probs and their tokens.

    Infinite where only ours is not a number, and so wrong; NaN where plain rows give none either, which the
    loss will say.
    """
    gap_B2 = (ours_B2 - plain_B2).abs() / counts_B2
    return gap_B2.where(ours_B2.isfinite(), torch.inf).where(plain_B2.isfinite(), torch.nan)


@functools.cache
def say_once(rows_per_pair: int, reason: str) -> None:
    """Say which rows are computed and why, once for each answer."""
    if this_process().is_main_process:
        rows = "one row a pair" if rows_per_pair == 1 else "one row a completion"
        sys.stderr.write(f"log-probs: {rows} ({reason})\n")
