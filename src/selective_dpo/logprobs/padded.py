"""A padded row for each completion, prompt included: what every causal language model can compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from selective_dpo.logprobs.packed import IGNORED_LABEL

_ROWS_AT_ONCE = 10_000


class PartLengths(NamedTuple):
    """Tokens of each pair's parts: [P] each."""

    prompt_P: NDArray[np.int64]
    chosen_P: NDArray[np.int64]
    rejected_P: NDArray[np.int64]


class PairBatch(NamedTuple):
    """Right-padded rows, the batch's chosen ones first, then its rejected ones: [2B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def part_lengths(tokens: Dataset) -> PartLengths:
    """Tokens of prompt, chosen and rejected, per row, without making Python lists of them."""
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    rows = tokens.select_columns(columns).with_format("arrow")
    counts = [
        np.stack([pc.list_value_length(batch[name]).to_numpy() for name in columns])
        for batch in rows.iter(_ROWS_AT_ONCE)
    ]
    return PartLengths(*np.concatenate([np.zeros((3, 0), dtype=np.int64), *counts], axis=1))


def pair_lengths(tokens: Dataset) -> NDArray[np.int64]:
    """Tokens of the longer of prompt + chosen and prompt + rejected, per row: [P]."""
    prompt_P, chosen_P, rejected_P = part_lengths(tokens)
    return prompt_P + np.maximum(chosen_P, rejected_P)


def make_batch(rows: Mapping[str, Sequence[Sequence[int]]], pad_token_id: int) -> PairBatch:
    """Pad tokenized pairs into one batch; labels mark the completion's tokens only."""
    sequences, masks = [], []
    for side in ("chosen_ids", "rejected_ids"):
        for prompt, completion in zip(rows["prompt_ids"], rows[side], strict=True):
            sequences.append(torch.tensor([*prompt, *completion]))
            masks.append(torch.tensor([0] * len(prompt) + [1] * len(completion)))
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    is_completion = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_value=0)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    attention_mask = (torch.arange(input_ids.shape[1])[None, :] < lengths[:, None]).long()
    return PairBatch(input_ids, attention_mask, input_ids.masked_fill(is_completion == 0, IGNORED_LABEL))


def batch_logps(model: Any, batch: PairBatch) -> Tensor:
    """Summed log-probability of each row's completion: [2B] float32.

    `model` must carry TRL's fused head (`trl.trainer.utils.add_fused_lm_head`), which gives per-token
    log-probabilities without the [B, T, V] logits.
    """
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        fused_lm_head=True,
        use_cache=False,
    )
    summed: Tensor = output.log_probs.float().sum(dim=1)
    return summed
