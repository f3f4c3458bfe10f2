"""One row for a pair: its prompt once, then both completions, each blind to the other.

A row is `prompt, chosen without its last token, rejected without its last token`. Attention lets a
token see the prompt and the earlier tokens of its own part, and positions start again after the prompt
for each completion, so every token is computed as it would be in a row of its own. The prompt's last
position predicts the first token of both completions; a completion's last token predicts nothing and
is left out.

Dimension suffixes: P pairs of a data set, B pairs of a batch, T tokens of the padded row, L tokens of
the longest completion, 2B the batch's chosen completions followed by its rejected ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.models import attention_of, language_model

IGNORED_LABEL = -100
"""transformers' label for positions without a loss."""

PROMPT, CHOSEN, REJECTED, PADDING = range(4)
"""The parts of a row, in the order they stand in it."""


class SharedBatch(NamedTuple):
    """Right-padded rows, one a pair, and where each completion's tokens are predicted in them."""

    input_ids: Tensor
    """[B, T] int64."""
    position_ids: Tensor
    """[B, T] int64; each completion counts on from the prompt."""
    parts: Tensor
    """[B, T] int64: PROMPT, CHOSEN, REJECTED or PADDING."""
    labels: Tensor
    """[2B, L] int64: the completions' tokens, `IGNORED_LABEL` after their end."""
    predicted_at: Tensor
    """[2B, L] int64: the position, counted through the flattened [B * T], that predicts each label."""

    def to(self, device: torch.device) -> SharedBatch:
        """The same batch on `device`."""
        return SharedBatch(*(part.to(device) for part in self))


def shared_lengths(
    prompt_P: NDArray[np.int64], chosen_P: NDArray[np.int64], rejected_P: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Tokens of each pair's row, from the tokens of prompt, chosen and rejected: all [P]."""
    return prompt_P + np.maximum(chosen_P - 1, 0) + np.maximum(rejected_P - 1, 0)


def make_shared_batch(
    rows: Mapping[str, Sequence[Sequence[int] | NDArray[np.int64]]],
    pad_token_id: int,
    *,
    multiple_of: int = 1,
) -> SharedBatch:
    """Put tokenized pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`) into one row each.

    T is rounded up to `multiple_of`, for attention kernels that want it. As in a row of its own, the
    first token of a completion has no label where the prompt is empty: nothing predicts it.
    """
    pairs = list(zip(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True))
    counts_B3 = np.array([[len(part) for part in pair] for pair in pairs], dtype=np.int64).reshape(-1, 3)
    longest = int(shared_lengths(*counts_B3.T).max(initial=1))
    width = -(-max(1, longest) // multiple_of) * multiple_of
    length = max(1, int(counts_B3[:, 1:].max(initial=1)))
    input_ids_BT = np.full((len(pairs), width), pad_token_id, dtype=np.int64)
    position_ids_BT = np.zeros((len(pairs), width), dtype=np.int64)
    parts_BT = np.full((len(pairs), width), PADDING, dtype=np.int64)
    labels_2BL = np.full((2, len(pairs), length), IGNORED_LABEL, dtype=np.int64)
    predicted_at_2BL = np.zeros((2, len(pairs), length), dtype=np.int64)
    for row, (prompt, *completions) in enumerate(pairs):
        input_ids_BT[row, : len(prompt)] = prompt
        position_ids_BT[row, : len(prompt)] = np.arange(len(prompt))
        parts_BT[row, : len(prompt)] = PROMPT
        start = len(prompt)
        for side, completion in enumerate(completions):
            end = start + max(0, len(completion) - 1)
            input_ids_BT[row, start:end] = completion[:-1]
            position_ids_BT[row, start:end] = np.arange(len(prompt), len(prompt) + end - start)
            parts_BT[row, start:end] = CHOSEN + side
            first = 0 if len(prompt) else 1
            labels_2BL[side, row, first : len(completion)] = completion[first:]
            # Label 0 is predicted by the prompt's last token, label j by the completion's token j - 1.
            predicted_at_2BL[side, row, 0] = row * width + max(0, len(prompt) - 1)
            predicted_at_2BL[side, row, 1 : len(completion)] = row * width + np.arange(start, end)
            start = end
    flat = (labels_2BL.reshape(-1, length), predicted_at_2BL.reshape(-1, length))
    return SharedBatch(
        *(torch.from_numpy(array) for array in (input_ids_BT, position_ids_BT, parts_BT, *flat))
    )


def additive_mask(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """What each token may see, as a number to add to its attention scores: [B, 1, T, T] of `dtype`.

    0 where it may look, the lowest number of `dtype` elsewhere. Padding sees itself and the prompt, so
    that no token sees nothing, which would give NaN; only padding sees padding.
    """
    keys_B1T, queries_BT1 = parts[:, None, :], parts[:, :, None]
    visible_BTT = ((keys_B1T == PROMPT) | (keys_B1T == queries_BT1)).tril()
    mask_BTT = torch.zeros(visible_BTT.shape, dtype=dtype, device=parts.device)
    return mask_BTT.masked_fill_(~visible_BTT, torch.finfo(dtype).min)[:, None]


def block_mask(parts: Tensor) -> Any:
    """The same rule as a FlexAttention `BlockMask`, which skips blocks that no token may see."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shared = (parts[row, key] == PROMPT) | (parts[row, key] == parts[row, query])
        return shared & (key <= query)

    batch, width = parts.shape
    return create_block_mask(visible, batch, None, width, width, device=parts.device)


# ----------------------------------------------------------------------------------------------------
# TRL's fused head, given only what scoring needs of it.
#
# The head is TRL's throughout (`trl.trainer.utils.add_fused_lm_head`): logit scaling, soft-capping, bias,
# sharded weights and its backward pass are not written a second time. Two things are arranged around it:
# that it computes log-probabilities and nothing else, and that it is shown only the positions that
# predict a completion's token. It would project every position on devices without Triton.


@contextlib.contextmanager
def log_probs_only(model: Any) -> Iterator[None]:
    """Inside, the fused head gives log-probabilities only, whatever a trainer asked it for.

    TRL's trainer also has it compute entropy, mean logit and accuracy of each token, to log them.
    """
    inner = language_model(model)
    before = inner.__dict__.get("forward")
    add_fused_lm_head(inner)
    try:
        yield
    finally:
        if before is None:
            del inner.forward
        else:
            inner.forward = before


def predicted_outputs(model: Any, labels: Tensor, predicted_at: Tensor, **inputs: Any) -> Any:
    """TRL's fused head at the positions that predict a label, and only there.

    `inputs` go to the model as they are. Returns TRL's output; its per-token fields are [1, N], for the N
    labels that are not ignored, row by row. Which fields there are is for the head to say that `model`
    carries.

    Shapes: labels, predicted_at [R, L], as in `SharedBatch`.
    """
    is_label = labels != IGNORED_LABEL
    at_N = predicted_at[is_label]

    def keep_predicting(module: Any, arguments: Any, output: Any) -> Any:
        hidden_BTH = output.last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, at_N.to(hidden_BTH.device))
        output.last_hidden_state = hidden_NH[None]
        return output

    hook = language_model(model).base_model.register_forward_hook(keep_predicting)
    try:
        return model(shift_labels=labels[is_label][None], fused_lm_head=True, use_cache=False, **inputs)
    finally:
        hook.remove()


def completion_log_probs(model: Any, labels: Tensor, predicted_at: Tensor, **inputs: Any) -> Tensor:
    """Log-probability of each label under the position that predicts it: [R, L] float32, 0 where ignored.

    Differentiable; the model must carry TRL's fused head. Shapes and `inputs` as in `predicted_outputs`.
    """
    log_probs_N = predicted_outputs(model, labels, predicted_at, **inputs).log_probs[0].float()
    empty: Tensor = torch.zeros(labels.shape, dtype=torch.float32, device=log_probs_N.device)
    return empty.masked_scatter((labels != IGNORED_LABEL).to(log_probs_N.device), log_probs_N)


# ----------------------------------------------------------------------------------------------------
# Log-probabilities of a batch of pairs by shared rows, for scoring and for training alike.


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
