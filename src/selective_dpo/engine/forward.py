"""Log-probabilities of a batch of pairs by shared rows, for scoring and for training alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selective_dpo.engine.heads import completion_log_probs, language_model, predicted_outputs
from selective_dpo.engine.paths import attention_of
from selective_dpo.engine.shared_rows import SharedBatch, additive_mask, block_mask

_FLEX_BLOCK = 128
"""Tokens in a block of FlexAttention's mask."""
CUDA_ALIGNMENT = 8
"""CUDA's kernels copy a mask whose rows do not start at multiples of this."""


def width_multiple(model: Any) -> int:
    """What the padded length of shared rows should be a multiple of, for the model's attention."""
    if attention_of(model) == "flex_attention":
        return _FLEX_BLOCK
    return CUDA_ALIGNMENT if next(model.parameters()).device.type == "cuda" else 1


def shared_log_probs(model: Any, batch: SharedBatch) -> Tensor:
    """Log-probability of each completion token: [2B, L] float32, chosen first, 0 after a completion's end.

    Differentiable. `model` must carry TRL's fused head, and `engine.paths.choose_path` must have said
    that its attention can take shared rows.
    """
    return completion_log_probs(model, batch.labels, batch.predicted_at, **_model_inputs(model, batch))


def shared_outputs(model: Any, batch: SharedBatch) -> Any:
    """All that the model's fused head says of each completion token: fields of [1, N], see
    `engine.heads.predicted_outputs`; the tokens in the order of `batch.labels`."""
    return predicted_outputs(model, batch.labels, batch.predicted_at, **_model_inputs(model, batch))


def _model_inputs(model: Any, batch: SharedBatch) -> dict[str, Any]:
    if attention_of(model) == "flex_attention":
        mask = block_mask(batch.parts)
    else:
        mask = additive_mask(batch.parts, _computing_dtype(model, batch.parts.device))
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": mask}


def _computing_dtype(model: Any, device: torch.device) -> torch.dtype:
    # Attention wants a mask in the precision of its queries; any other would be converted in each layer.
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtype: torch.dtype = language_model(model).dtype
    return dtype
