"""Which forward pass a model can take: pairs in shared rows, or plain padded rows."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from selective_dpo.distributed.processes import this_process
from selective_dpo.logprobs.packed import make_shared_batch, shared_lengths, shared_log_probs, width_multiple
from selective_dpo.logprobs.padded import PairBatch, batch_logps, make_batch, pair_lengths, part_lengths
from selective_dpo.models import attention_of, language_model

_TAKES_ANY_MASK = ("sdpa", "eager", "flex_attention")
"""Attention of transformers that uses a [B, 1, T, T] mask, or a BlockMask, as it is given."""

_ORDINARY_LAYERS = frozenset({"full_attention", "sliding_attention"})


class Path(NamedTuple):
    """How pairs go through a model, and why."""

    name: Literal["shared", "padded"]
    """`shared`: prompt, chosen and rejected in one row; `padded`: a row for each completion."""
    reason: str


def choose_path(model: Any, longest: int) -> Path:
    """Shared rows where the model's attention can take them, plain padded rows where it cannot.

    Args:
        model: A causal language model, wrapped or not.
        longest: Tokens of the longest prompt + completion that will be computed. Windows of attention
            at least as long never cut anything, so they do not matter.

    The rules know transformers' own models; `ways.choose_way` tries the choice on a pair.
    """
    obstacle = _obstacle(model, longest)
    if obstacle is not None:
        return Path("padded", obstacle)
    return Path("shared", f"{attention_of(model)} attention takes a mask for each token")


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


# ----------------------------------------------------------------------------------------------------
# Pairs through a model in shared or in padded rows: the choice, tested on the pairs themselves.


PathName = Literal["auto", "shared", "padded"]

Rows = Mapping[str, Sequence[Sequence[int]]]

_TESTED_TOKENS = 256
"""Length of the pair that the choice is tested on, where there is one as long."""

_TOLERANCE_32, _TOLERANCE_16 = 1e-3, 0.1
"""Nats a token that the two ways may differ by, in single and in half precision.

Far above rounding, and far below what a completion changes that sees the other one.
"""


class Way(NamedTuple):
    """How the pairs of a data set go through a model."""

    lengths_P: NDArray[np.int64]
    """Tokens of each pair's row, or of the longer of its two."""
    rows_per_pair: int
    logps: Callable[[Rows], Tensor]
    """Summed log-probability of each completion: [2B] float32, the chosen ones first."""


def choose_way(model: Any, tokens: Dataset, pad_token_id: int, name: PathName) -> Way:
    """The way called `name`; for `auto`, the faster one that this model computes rightly.

    Shared rows are tried on one pair first. A model that does not honour the mask (a custom model, say)
    gives other log-probs in them than in padded rows, which then are used. `model` must carry TRL's
    fused head, and be in evaluation mode without gradients.
    """
    device = next(model.parameters()).device

    def padded_logps(rows: Rows) -> Tensor:
        return batch_logps(model, PairBatch(*(part.to(device) for part in make_batch(rows, pad_token_id))))

    def shared_logps(rows: Rows) -> Tensor:
        batch = make_shared_batch(rows, pad_token_id, multiple_of=width_multiple(model))
        return shared_log_probs(model, batch.to(device)).sum(dim=1)

    padded = Way(pair_lengths(tokens), 2, padded_logps)
    shared = Way(shared_lengths(*part_lengths(tokens)), 1, shared_logps)
    if name != "auto":
        return shared if name == "shared" else padded
    path = choose_path(model, int(padded.lengths_P.max(initial=0)))
    if path.name == "shared" and len(tokens):
        tried = tokens[[_pair_to_try(shared.lengths_P)]]
        difference = _difference_per_token(shared, padded, tried)
        if difference > _tolerance(model, device):
            path = Path("padded", f"shared rows change this model's log-probs by {difference:.2g} a token")
    say_once(path)
    return shared if path.name == "shared" else padded


def _pair_to_try(lengths_P: NDArray[np.int64]) -> int:
    """The longest pair within `_TESTED_TOKENS`, else the shortest."""
    short = np.flatnonzero(lengths_P <= _TESTED_TOKENS)
    return int(short[np.argmax(lengths_P[short])]) if len(short) else int(np.argmin(lengths_P))


def _difference_per_token(shared: Way, padded: Way, rows: Rows) -> float:
    counts = torch.tensor([max(1, len(ids)) for side in ("chosen_ids", "rejected_ids") for ids in rows[side]])
    ours, plain = (way.logps(rows).cpu() for way in (shared, padded))
    gap = (ours - plain).abs() / counts
    # Where plain rows give no number either, the loss will say so; where only shared ones do, they are wrong.
    gap = gap.where(ours.isfinite(), torch.inf).where(plain.isfinite(), 0.0)
    # All processes must choose alike, even if rounding differs between them.
    if this_process().num_processes > 1:
        gap = gather(gap.to(this_process().device))
    return float(gap.max())


def _tolerance(model: Any, device: torch.device) -> float:
    half = torch.is_autocast_enabled(device.type) or language_model(model).dtype.itemsize < 4
    return _TOLERANCE_16 if half else _TOLERANCE_32


@functools.cache
def say_once(path: Path) -> None:
    """Tell the user which rows are computed and why, once for each answer."""
    rows = "one row a pair" if path.name == "shared" else "one row a completion"
    if this_process().is_main_process:
        sys.stderr.write(f"log-probs: {rows} ({path.reason})\n")
