"""The rows of tokens that a model reads for pairs, packed or padded, and the forward pass over them.

A packed row is `prompt, chosen without its last token, rejected without its last token`. A token sees the
prompt and the earlier tokens of its own part, and positions start again after the prompt for each completion,
so every token is computed as it would be in a row of its own. A padded row has the prompt and one completion,
again without its last token, which predicts nothing.

The head is TRL's (`trl.trainer.utils.add_fused_lm_head`), shown only the positions that predict a token of a
completion; on devices without Triton it would project every position.

Dimension suffixes: P pairs of a data set, B pairs of a batch, R rows (B packed or 2B padded ones), T tokens
of a row, 2B the chosen completions followed by the rejected ones, N labels (tokens of all completions that
something predicts), L labels of the longest completion.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
import torch._dynamo.config
import torch.fx.experimental._config
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.models import attention_of, language_model

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""TRL's tokenized pair."""

TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What TRL's fused head gives for each label."""

PROMPT, CHOSEN, REJECTED, PADDING = range(4)
"""The parts of a packed row, in the order they stand in it."""

_FLEX_BLOCK = 128
"""Tokens in a block of FlexAttention's mask."""

_CUDA_ALIGNMENT = 8
"""CUDA's kernels copy a mask whose rows do not start at multiples of this."""

ROWS_AT_ONCE = 10_000

Pairs = Mapping[str, Sequence[Sequence[int]]]
"""Tokenized pairs by column: `prompt_ids`, `chosen_ids`, `rejected_ids`."""

RowKind = Literal["packed", "padded", "masked"]
"""`packed`: a row for each pair; `padded`: one for each completion, without a mask, since causal attention
hides padding at a row's end; `masked`: the same with a mask of the padding, for models that want one."""


class PartLengths(NamedTuple):
    """Tokens of each pair's parts: [P] each."""

    prompt_P: NDArray[np.int64]
    chosen_P: NDArray[np.int64]
    rejected_P: NDArray[np.int64]

    @property
    def padded_P(self) -> NDArray[np.int64]:
        """Of the longer of prompt + chosen and prompt + rejected."""
        return self.prompt_P + np.maximum(self.chosen_P, self.rejected_P)

    @property
    def packed_P(self) -> NDArray[np.int64]:
        """Of each pair's packed row."""
        return self.prompt_P + np.maximum(self.chosen_P - 1, 0) + np.maximum(self.rejected_P - 1, 0)


def part_lengths(tokens: Dataset) -> PartLengths:
    """Tokens of prompt, chosen and rejected, per row, without making Python lists of them."""
    rows = tokens.select_columns(list(TOKEN_COLUMNS)).with_format("arrow")
    counts = [
        np.stack([pc.list_value_length(batch[name]).to_numpy() for name in TOKEN_COLUMNS])
        for batch in rows.iter(ROWS_AT_ONCE)
    ]
    return PartLengths(*np.concatenate([np.zeros((3, 0), dtype=np.int64), *counts], axis=1))


class RowBatch(NamedTuple):
    """Right-padded rows [R, T], and where each completion's tokens are predicted in them; all int64."""

    input_ids: Tensor
    position_ids: Tensor | None
    """Each completion counts on from the prompt. None: not packed."""
    parts: Tensor | None
    """PROMPT, CHOSEN, REJECTED or PADDING. None: not packed."""
    attention_mask: Tensor | None
    """0 for padding. None: not masked."""
    labels_N: Tensor
    """The completions' tokens, chosen ones first, completion by completion."""
    predicted_at_N: Tensor
    """The position, counted through the flattened [R * T], that predicts each label."""
    places_2BL: Tensor
    """Which of the N labels each token of a completion is; N after its end."""

    def to(self, device: torch.device) -> RowBatch:
        """The same batch on `device`."""
        return RowBatch(*(part if part is None else to_device(part, device) for part in self))  # type: ignore[arg-type]


class PairRows(NamedTuple):
    """The rows of a batch of pairs, in groups that go through the model one after the other."""

    groups: list[RowBatch]
    order_2B: Tensor
    """Where each completion of the batch stands among those of all groups."""

    def to(self, device: torch.device) -> PairRows:
        """The same rows on `device`."""
        return PairRows([group.to(device) for group in self.groups], to_device(self.order_2B, device))


def make_rows(pairs: Pairs, kind: RowKind, pad_token_id: int, *, multiple_of: int = 1) -> RowBatch:
    """The rows of `pairs`.

    T is rounded up to `multiple_of`, for attention kernels that want it. The first token of a completion has
    no label where the prompt is empty: nothing predicts it.
    """
    prompts, *sides = (pairs[name] for name in TOKEN_COLUMNS)
    if kind == "packed":
        rows = list(zip(prompts, zip(*sides, strict=True), strict=True))
    else:
        rows = [(prompt, (ids,)) for side in sides for prompt, ids in zip(prompts, side, strict=True)]
    lengths = [len(prompt) + sum(max(0, len(ids) - 1) for ids in completions) for prompt, completions in rows]
    width = -(-max(1, *lengths) // multiple_of) * multiple_of
    input_ids_RT = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    position_ids_RT = np.zeros_like(input_ids_RT)
    parts_RT = np.full_like(input_ids_RT, PADDING)
    labels: tuple[list[_Labels], list[_Labels]] = ([], [])
    for row, (prompt, completions) in enumerate(rows):
        start = len(prompt)
        input_ids_RT[row, :start] = prompt
        position_ids_RT[row, :start] = np.arange(start)
        parts_RT[row, :start] = PROMPT
        for side, ids in enumerate(completions):
            end = start + max(0, len(ids) - 1)
            input_ids_RT[row, start:end] = ids[:-1]
            position_ids_RT[row, start:end] = np.arange(len(prompt), len(prompt) + end - start)
            parts_RT[row, start:end] = CHOSEN + side
            # Label 0 is predicted by the prompt's last token, label j by the completion's token j - 1.
            predicted_at = row * width + np.append(len(prompt) - 1, np.arange(start, end))
            first = 0 if len(prompt) else 1
            labels[side].append((np.asarray(ids, dtype=np.int64)[first:], predicted_at[first : len(ids)]))
            start = end
    input_ids, position_ids, parts = map(torch.from_numpy, (input_ids_RT, position_ids_RT, parts_RT))
    by_label = _in_order([*labels[0], *labels[1]])
    if kind == "packed":
        return RowBatch(input_ids, position_ids, parts, None, *by_label)
    return RowBatch(input_ids, None, None, (parts != PADDING).long() if kind == "masked" else None, *by_label)


_Labels = tuple[NDArray[np.int64], NDArray[np.int64]]
"""A completion's tokens, and the positions that predict them."""


def _in_order(labels: Sequence[_Labels]) -> tuple[Tensor, Tensor, Tensor]:
    counts_2B = np.array([len(ids) for ids, _ in labels], dtype=np.int64)
    total = int(counts_2B.sum())
    is_label_2BL = np.arange(max(1, counts_2B.max())) < counts_2B[:, None]
    places_2BL = np.full(is_label_2BL.shape, total)
    places_2BL[is_label_2BL] = np.arange(total)
    ids_N, predicted_at_N = (torch.from_numpy(np.concatenate(column)) for column in zip(*labels, strict=True))
    return ids_N, predicted_at_N, torch.from_numpy(places_2BL)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from pinned memory to a GPU, so that nobody waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
    """The same rule as a FlexAttention `BlockMask`, which skips blocks that no token may see.

    Of each two blocks it is told from the parts that are in them whether any token sees any, and whether all
    see all: what is made has a cell for two blocks, not for two tokens. parts [B, T].
    """
    from torch.nn.attention.flex_attention import BlockMask

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shared = (parts[row, key] == PROMPT) | (parts[row, key] == parts[row, query])
        return shared & (key <= query)

    batch, width = parts.shape
    blocks = -(-width // _FLEX_BLOCK)
    # A last block that is not full is filled with what it has already: the parts in it stay the same.
    filled = torch.cat([parts, parts[:, -1:].expand(-1, blocks * _FLEX_BLOCK - width)], dim=1)
    kinds = torch.tensor([PADDING, PROMPT, CHOSEN, REJECTED], device=parts.device)
    # has_BNP: whether a part occurs in a block.
    has_BNP = (filled.view(batch, blocks, _FLEX_BLOCK, 1) == kinds).any(dim=2)
    has_prompt_BN = has_BNP[..., 1]
    is_one_part_BN = has_BNP.sum(dim=-1) == 1
    common_BQK = (has_BNP[:, :, None] & has_BNP[:, None]).any(dim=-1)
    # Within the keys' block each part is the prompt, or the queries' only one.
    fits_BQK = ~(has_BNP[:, None] & ~has_BNP[:, :, None] & (kinds != PROMPT)).any(dim=-1)
    only_prompt_BN = has_prompt_BN & is_one_part_BN
    before_QK = torch.ones(blocks, blocks, dtype=torch.bool, device=parts.device).tril(-1)
    full_BQK = before_QK & (only_prompt_BN[:, None] | (is_one_part_BN[:, :, None] & fits_BQK))
    same_QK = torch.eye(blocks, dtype=torch.bool, device=parts.device)
    some_BQK = (before_QK & (has_prompt_BN[:, None] | common_BQK)) | same_QK

    def listed(chosen_BQK: Tensor) -> tuple[Tensor, Tensor]:
        # The chosen blocks' numbers come first, in their order.
        order_BQK = chosen_BQK.int().argsort(dim=-1, descending=True, stable=True).int()
        return chosen_BQK.sum(dim=-1, dtype=torch.int32)[:, None], order_BQK[:, None].contiguous()

    return BlockMask.from_kv_blocks(
        *listed(some_BQK & ~full_BQK),
        *listed(full_BQK),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(width, width),
    )


def _packed_mask(model: Any, parts: Tensor) -> Any:
    if attention_of(model) == "flex_attention":
        return block_mask(parts)
    # Attention wants a mask in the precision of its queries; any other would be converted in each layer.
    dtype: torch.dtype = language_model(model).dtype
    if torch.is_autocast_enabled(parts.device.type):
        dtype = torch.get_autocast_dtype(parts.device.type)
    return additive_mask(parts, dtype)


_COMPILATIONS = 64
"""More than there can be. torch's limit is 8, beyond which FlexAttention makes all T * T scores, and says
nothing."""


@contextlib.contextmanager
def _compiled_for_all_shapes() -> Iterator[None]:
    """Inside, FlexAttention is compiled for any number of rows and any width, not for the first it sees.

    One row, and a width of one block, still count as cases of their own, and so do training and scoring:
    there are at most eight compilations. transformers, which compiles it, has no option for this.
    """
    with (
        torch._dynamo.config.patch(assume_static_by_default=False, recompile_limit=_COMPILATIONS),
        # Else numbers that happen to be equal at first, such as rows and heads, would have to stay so.
        torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        yield


def width_multiple(model: Any) -> int:
    """What the padded length of packed rows should be a multiple of, for the model's attention."""
    if attention_of(model) == "flex_attention":
        return _FLEX_BLOCK
    return _CUDA_ALIGNMENT if next(model.parameters()).device.type == "cuda" else 1


# --- the forward pass ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def log_probs_only(model: Any) -> Iterator[None]:
    """Inside, `model` has TRL's fused head, and it gives log-probabilities only.

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


def forward_logps(model: Any, rows: PairRows) -> Tensor:
    """Log-probability of each pair's completions, summed over their tokens: [B, 2] float32, chosen first.

    Differentiable. `model` must carry TRL's fused head (see `log_probs_only`) and be where `rows` are.
    """
    return forward_fields(model, rows)["log_probs"].float().sum(dim=1).view(2, -1).T


def forward_fields(model: Any, rows: PairRows) -> dict[str, Tensor]:
    """What TRL's fused head gives for each completion's tokens, by name: [2B, L] each, 0 after the end.

    Differentiable, also where there is no label at all, so that every process has a gradient to share. Which
    of `TOKEN_FIELDS` there are is for the head to say that `model` carries. For packed rows,
    `packing_support.packing_obstacle` must have found none.
    """
    outputs = [row_outputs(model, group) for group in rows.groups]
    longest = max(group.places_2BL.shape[1] for group in rows.groups)
    fields = {}
    for name in TOKEN_FIELDS:
        if getattr(outputs[0], name) is None:
            continue
        each = []
        for group, output in zip(rows.groups, outputs, strict=True):
            field_N = getattr(output, name)[0]
            field_2BL = torch.cat([field_N, field_N.new_zeros(1)])[group.places_2BL]
            each.append(torch.nn.functional.pad(field_2BL, (0, longest - field_2BL.shape[1])))
        fields[name] = torch.cat(each)[rows.order_2B]
    return fields


def row_outputs(model: Any, batch: RowBatch) -> Any:
    """TRL's fused head at the positions that predict a label, and only there: its fields are [1, N]."""
    mask = batch.attention_mask if batch.parts is None else _packed_mask(model, batch.parts)
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}

    def keep_predicting(module: Any, arguments: Any, output: Any) -> Any:
        # Adapters of virtual tokens put them before each row.
        hidden_RTH = output.last_hidden_state[:, -batch.input_ids.shape[1] :]
        at_N = batch.predicted_at_N.to(hidden_RTH.device)
        output.last_hidden_state = hidden_RTH.flatten(0, 1).index_select(0, at_N)[None]
        return output

    is_flex = attention_of(model) == "flex_attention"
    hook = language_model(model).base_model.register_forward_hook(keep_predicting)
    try:
        with _compiled_for_all_shapes() if is_flex else contextlib.nullcontext():
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
