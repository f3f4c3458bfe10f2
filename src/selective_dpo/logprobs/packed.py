"""The rows of tokens that a model reads for pairs: packed, or padded.

A packed row is `prompt, chosen without its last token, rejected without its last token`. Attention lets a
token see the prompt and the earlier tokens of its own part, and positions start again after the prompt for
each completion, so every token is computed as it would be in a row of its own. The prompt's last position
predicts the first token of both completions; a completion's last token predicts nothing and is left out.

A padded row holds a prompt and one completion. It needs no mask: padding stands at its end, where causal
attention hides it from every token before.

The head is TRL's (`trl.trainer.utils.add_fused_lm_head`): logit scaling, soft-capping, bias, sharded weights
and its backward pass are not written a second time. It is shown only the positions that predict a token of
a completion; on devices without Triton it would project every position.

Dimension suffixes: P pairs of a data set, B pairs of a batch, R rows (B packed or 2B padded ones), T tokens
of a row, 2B the chosen completions followed by the rejected ones, N labels (tokens of all completions that
something predicts), L labels of the longest completion.
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
"""The parts of a packed row, in the order they stand in it."""

_FLEX_BLOCK = 128
"""Tokens in a block of FlexAttention's mask."""

CUDA_ALIGNMENT = 8
"""CUDA's kernels copy a mask whose rows do not start at multiples of this."""

Pairs = Mapping[str, Sequence[Sequence[int]]]
"""Tokenized pairs by column: `prompt_ids`, `chosen_ids`, `rejected_ids`."""


class RowBatch(NamedTuple):
    """Right-padded rows, and where each completion's tokens are predicted in them."""

    input_ids: Tensor
    """[R, T] int64."""
    position_ids: Tensor | None
    """[R, T] int64; each completion counts on from the prompt. None: padded rows."""
    parts: Tensor | None
    """[R, T] int64: PROMPT, CHOSEN, REJECTED or PADDING. None: padded rows."""
    labels_N: Tensor
    """The completions' tokens, int64, chosen ones first, completion by completion."""
    predicted_at_N: Tensor
    """The position, counted through the flattened [R * T], that predicts each label."""
    places_2BL: Tensor
    """Which of the N labels each token of a completion is; N after its end."""

    def to(self, device: torch.device) -> RowBatch:
        """The same batch on `device`."""
        moved = [part if part is None else to_device(part, device) for part in self]
        return RowBatch(*moved)  # type: ignore[arg-type]  # None only where it was None


def shared_lengths(
    prompt_P: NDArray[np.int64], chosen_P: NDArray[np.int64], rejected_P: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Tokens of each pair's packed row, from the tokens of prompt, chosen and rejected: all [P]."""
    return prompt_P + np.maximum(chosen_P - 1, 0) + np.maximum(rejected_P - 1, 0)


def pack_pairs(pairs: Pairs, pad_token_id: int, *, multiple_of: int = 1) -> RowBatch:
    """One row for each pair, its prompt once.

    T is rounded up to `multiple_of`, for attention kernels that want it. As in a row of its own, the first
    token of a completion has no label where the prompt is empty: nothing predicts it.
    """
    triples = list(zip(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"], strict=True))
    counts_B3 = np.array([[len(part) for part in triple] for triple in triples], dtype=np.int64)
    width = _rounded_up(int(shared_lengths(*counts_B3.reshape(-1, 3).T).max(initial=1)), multiple_of)
    input_ids_RT = np.full((len(triples), width), pad_token_id, dtype=np.int64)
    position_ids_RT = np.zeros_like(input_ids_RT)
    parts_RT = np.full_like(input_ids_RT, PADDING)
    labels: tuple[list[_Labels], list[_Labels]] = ([], [])
    for row, (prompt, *completions) in enumerate(triples):
        start = len(prompt)
        input_ids_RT[row, :start] = prompt
        position_ids_RT[row, :start] = np.arange(start)
        parts_RT[row, :start] = PROMPT
        for side, completion in enumerate(completions):
            end = start + max(0, len(completion) - 1)
            input_ids_RT[row, start:end] = completion[:-1]
            position_ids_RT[row, start:end] = np.arange(len(prompt), len(prompt) + end - start)
            parts_RT[row, start:end] = CHOSEN + side
            # Label 0 is predicted by the prompt's last token, label j by the completion's token j - 1.
            predicted_at = row * width + np.append(len(prompt) - 1, np.arange(start, end))
            labels[side].append(_labels(prompt, completion, predicted_at))
            start = end
    input_ids, position_ids, parts = map(torch.from_numpy, (input_ids_RT, position_ids_RT, parts_RT))
    return RowBatch(input_ids, position_ids, parts, *_in_order([*labels[0], *labels[1]]))


def pad_pairs(pairs: Pairs, pad_token_id: int, *, multiple_of: int = 1) -> RowBatch:
    """A row for each completion, prompt included; labels and `multiple_of` as for `pack_pairs`."""
    rows = [
        (prompt, completion)
        for side in ("chosen_ids", "rejected_ids")
        for prompt, completion in zip(pairs["prompt_ids"], pairs[side], strict=True)
    ]
    longest = max((len(prompt) + len(completion) for prompt, completion in rows), default=1)
    width = _rounded_up(longest, multiple_of)
    input_ids_RT = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    labels = []
    for row, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids_RT[row, :start] = prompt
        input_ids_RT[row, start:end] = completion
        labels.append(_labels(prompt, completion, row * width + np.arange(start - 1, end - 1)))
    return RowBatch(torch.from_numpy(input_ids_RT), None, None, *_in_order(labels))


class _Labels(NamedTuple):
    """A completion's tokens, and the positions that predict them."""

    ids: NDArray[np.int64]
    predicted_at: NDArray[np.int64]


def _labels(prompt: Sequence[int], completion: Sequence[int], predicted_at: NDArray[np.int64]) -> _Labels:
    first = 0 if len(prompt) else 1
    ids = np.asarray(completion, dtype=np.int64)[first:]
    return _Labels(ids, predicted_at[first : len(completion)])


def _in_order(labels: Sequence[_Labels]) -> tuple[Tensor, Tensor, Tensor]:
    counts = [len(each.ids) for each in labels]
    total = sum(counts)
    places_2BL = np.full((len(labels), max(1, max(counts, default=1))), total, dtype=np.int64)
    start = 0
    for row, count in enumerate(counts):
        places_2BL[row, :count] = np.arange(start, start + count)
        start += count
    none = [np.zeros(0, dtype=np.int64)]
    ids_N = np.concatenate([*(each.ids for each in labels), *none])
    predicted_at_N = np.concatenate([*(each.predicted_at for each in labels), *none])
    return torch.from_numpy(ids_N), torch.from_numpy(predicted_at_N), torch.from_numpy(places_2BL)


def _rounded_up(count: int, multiple_of: int) -> int:
    return -(-max(1, count) // multiple_of) * multiple_of


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from pinned memory to a GPU, so that nobody waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def by_completion(field_N: Tensor, places_2BL: Tensor) -> Tensor:
    """One number for each label, laid out completion by completion, 0 after a completion's end: [2B, L].

    Differentiable, also where there is no label at all, so that every process has a gradient to share. The
    device is not waited for.
    """
    return torch.cat([field_N, field_N.new_zeros(1)])[places_2BL]


# --- masks of packed rows -----------------------------------------------------------------------------------


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


# --- the model ----------------------------------------------------------------------------------------------


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


def width_multiple(model: Any) -> int:
    """What the padded length of packed rows should be a multiple of, for the model's attention."""
    if attention_of(model) == "flex_attention":
        return _FLEX_BLOCK
    return CUDA_ALIGNMENT if next(model.parameters()).device.type == "cuda" else 1


def row_outputs(model: Any, batch: RowBatch) -> Any:
    """TRL's fused head at the positions that predict a label, and only there: its fields are [1, N].

    Which fields there are is for the head to say that `model` carries. For packed rows,
    `packing_support.choose_path` must have said that the model's attention can take them.
    """
    mask = None if batch.parts is None else _packed_mask(model, batch.parts)
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}

    def keep_predicting(module: Any, arguments: Any, output: Any) -> Any:
        hidden_RTH = output.last_hidden_state
        at_N = batch.predicted_at_N.to(hidden_RTH.device)
        output.last_hidden_state = hidden_RTH.flatten(0, 1).index_select(0, at_N)[None]
        return output

    hook = language_model(model).base_model.register_forward_hook(keep_predicting)
    try:
        return model(
            input_ids=batch.input_ids,
            attention_mask=mask,
            **positions,
            shift_labels=batch.labels_N[None],
            fused_lm_head=True,
            use_cache=False,
        )
    finally:
        hook.remove()


def row_log_probs(model: Any, batch: RowBatch) -> Tensor:
    """Log-probability of each completion token: [2B, L] float32, chosen first, 0 after a completion's end.

    Differentiable; the model must carry TRL's fused head.
    """
    return by_completion(row_outputs(model, batch).log_probs[0].float(), batch.places_2BL)


def _packed_mask(model: Any, parts: Tensor) -> Any:
    if attention_of(model) == "flex_attention":
        return block_mask(parts)
    # Attention wants a mask in the precision of its queries; any other would be converted in each layer.
    dtype: torch.dtype = language_model(model).dtype
    if torch.is_autocast_enabled(parts.device.type):
        dtype = torch.get_autocast_dtype(parts.device.type)
    return additive_mask(parts, dtype)
