"""Which forward pass a model can take: pairs in shared rows, or plain padded rows."""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

from selective_dpo.engine.heads import language_model

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


def attention_of(model: Any) -> str:
    """Name of the attention implementation in use: `sdpa`, `eager`, ..."""
    name: str = _text_config(model)._attn_implementation
    return name


def _text_config(model: Any) -> Any:
    return language_model(model).config.get_text_config()


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
