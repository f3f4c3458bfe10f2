"""Batches that fit into memory: budgets, cutting, and trying again with less.

A batch of B rows of T tokens holds B * T activations and B * T * T numbers of its mask and scores; both are
bounded. The costliest batch runs first, so that memory runs out at the beginning, if at all.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils import gather
from numpy.typing import NDArray

from selective_dpo.distributed.processes import this_process
from selective_dpo.errors import ModelError, is_out_of_memory
from selective_dpo.models import attention_of, language_model

logger = logging.getLogger(__name__)

_CPU_SHARE, _GPU_SHARE = 0.25, 0.5
"""Part of the free memory to plan with. The rest is for what the estimate leaves out and, on a CPU, for
neighbours: there, a system out of memory ends a process without asking."""

_MAX_CPU_TOKENS, _MAX_GPU_TOKENS = 4_096, 65_536
"""Beyond these, larger batches are not faster."""

_HEAD_TILE = (4_096, 32_768)
"""Positions by vocabulary entries that TRL's fused head projects at a time."""

Value = TypeVar("Value")

TokenBudget = int | Literal["auto"]


class Budget(NamedTuple):
    """What a batch of B rows of T tokens may cost."""

    tokens: int
    """At most this many B * T."""
    cells: int
    """At most this many B * T * T."""


def budget_for(model: Any, tokens: TokenBudget) -> Budget:
    """The budget of `tokens` a batch; `auto`: as many as free memory allows, in the process that
    has least.

    Masks and scores, which grow with the square of the length, may take as much memory as the
    activations of a full batch of short rows, and no more.
    """
    config, size = language_model(model).config.get_text_config(), language_model(model).dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # At the peak of a layer: residual, normalised input, queries, keys, values, rotated ones and outputs;
    # gate, up and product.
    token_bytes = (10 * config.hidden_size + 3 * inner) * size
    # The mask; eager attention also holds scores, masked scores, their float32 softmax and the result.
    heads = getattr(config, "num_attention_heads", 0) if attention_of(model) == "eager" else 0
    cell_bytes = size + 2 + heads * (3 * size + 4)
    if tokens == "auto":
        tokens = _automatic_tokens(next(model.parameters()).device, token_bytes, config.vocab_size)
    return Budget(tokens, max(tokens, tokens * token_bytes // cell_bytes))


def most_tokens(device_type: str) -> int:
    """The largest automatic budget, in tokens, on a device of this type."""
    return _MAX_CPU_TOKENS if device_type == "cpu" else _MAX_GPU_TOKENS


def _automatic_tokens(device: torch.device, token_bytes: int, vocabulary: int) -> int:
    usable = int(_free_bytes(device) * (_CPU_SHARE if device.type == "cpu" else _GPU_SHARE))
    positions, entries = _HEAD_TILE
    # Projected logits, and what is computed from them, as float32: about four arrays of a tile's size.
    logit_bytes = 16 * min(entries, vocabulary)
    # Twice: cells may take as much again as the activations.
    tokens = usable // (2 * token_bytes + logit_bytes)
    if tokens > positions:
        tokens = (usable - positions * logit_bytes) // (2 * token_bytes)
    # A power of two: the memory that happens to be free a little more or less must not change how sums round.
    tokens = 1 << (max(1, min(tokens, most_tokens(device.type))).bit_length() - 1)
    process = this_process()
    if process.num_processes == 1:
        return tokens
    return int(gather(torch.tensor([tokens], device=process.device)).min())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return 4 * 2**30
    return pages * size


def bounded_batches(
    lengths_P: NDArray[np.int64], budget: Budget, *, rows_per_pair: int = 1
) -> list[NDArray[np.int64]]:
    """Cut pairs, sorted by length, into batches within `budget`, the costliest first.

    A pair that exceeds the budget on its own is a batch on its own.

    Shapes: lengths_P [P], tokens of a pair's longest row. The result is a list of arrays of row numbers
    that together hold each of 0..P-1 exactly once.
    """
    by_length = np.argsort(-lengths_P, kind="stable")
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < len(by_length):
        longest = max(1, int(lengths_P[by_length[start]])) * rows_per_pair
        per_batch = min(budget.tokens // longest, budget.cells * rows_per_pair // longest**2)
        batches.append(by_length[start : start + max(1, per_batch)])
        start += len(batches[-1])
    costs = [_cost(lengths_P[rows], rows_per_pair) for rows in batches]
    shares = [cost.tokens / budget.tokens + cost.cells / budget.cells for cost in costs]
    return [batches[number] for number in np.argsort(np.negative(shares), kind="stable")]


def run_within_memory(
    run: Callable[[NDArray[np.int64]], None],
    batches: list[NDArray[np.int64]],
    lengths_P: NDArray[np.int64],
    budget: Budget,
    *,
    rows_per_pair: int = 1,
    recover: bool = True,
) -> Budget:
    """`run` every batch; when memory runs out, halve the budget, cut what is left anew and go on.

    Returns the budget that sufficed. With `recover` false the first failure is final: processes that
    share one model's weights must all run the same batches.

    Raises:
        ModelError: a single pair does not fit, or memory ran out with `recover` false.
    """
    waiting = deque(batches)
    while waiting:
        rows = waiting[0]
        _, problem = attempt(functools.partial(run, rows))
        if not problem:
            waiting.popleft()
            continue
        cost = _cost(lengths_P[rows], rows_per_pair)
        if not recover or len(rows) == 1:
            lower = "tokens_per_batch" if len(rows) > 1 else "data.max_length"
            raise ModelError(
                f"out of memory in a batch of {len(rows):,} pairs and {cost.tokens:,} tokens: lower {lower}, "
                "use bfloat16, or share the model among more processes"
            )
        budget = Budget(min(budget.tokens, cost.tokens) // 2, min(budget.cells, cost.cells) // 2)
        logger.warning(
            "out of memory with %s tokens a batch: going on with %s",
            f"{cost.tokens:,}",
            f"{budget.tokens:,}",
        )
        left = np.concatenate(list(waiting))
        again = bounded_batches(lengths_P[left], budget, rows_per_pair=rows_per_pair)
        waiting = deque(left[batch] for batch in again)
    return budget


def attempt(run: Callable[[], Value]) -> tuple[Value | None, str]:
    """What `run` returns and, where it ran out of memory instead, the error's message."""
    try:
        return run(), ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = str(error) or type(error).__name__
    # Only here, after the handler, are the failed pass's tensors no longer held by its traceback.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, problem


def _cost(lengths_B: NDArray[np.int64], rows_per_pair: int) -> Budget:
    longest, rows = max(1, int(lengths_B.max())), len(lengths_B) * rows_per_pair
    return Budget(rows * longest, rows * longest**2)
