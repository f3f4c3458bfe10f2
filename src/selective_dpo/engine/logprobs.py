"""Sequence log-probabilities of preference pairs under a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from selective_dpo.engine.batching import token_budget_batches
from selective_dpo.engine.processes import combine_by_position, this_process
from selective_dpo.progress import Progress

IGNORED_LABEL = -100
"""transformers' label for positions without a loss."""


class PairLogps(NamedTuple):
    """Log-probabilities of chosen and rejected, summed over their tokens, in nats."""

    pair_ids: list[str]
    chosen_P: NDArray[np.float64]
    rejected_P: NDArray[np.float64]


class PairBatch(NamedTuple):
    """Right-padded rows, the batch's chosen ones first, then its rejected ones: [2B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def pair_lengths(tokens: Dataset) -> NDArray[np.int64]:
    """Tokens of the longer of prompt + chosen and prompt + rejected, per row: [P]."""
    counts = {
        name: np.fromiter((len(ids) for ids in tokens[name]), dtype=np.int64, count=len(tokens))
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }
    return counts["prompt_ids"] + np.maximum(counts["chosen_ids"], counts["rejected_ids"])


def make_batch(rows: dict[str, Sequence[Sequence[int]]], pad_token_id: int) -> PairBatch:
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


def pair_logps(
    model: Any,
    tokens: Dataset,
    *,
    tokens_per_batch: int,
    pad_token_id: int,
    autocast_dtype: torch.dtype | None,
    what: str,
) -> PairLogps:
    """Log-probabilities of every pair of `tokens`, without gradients, in evaluation mode.

    The work is dealt to all processes of a distributed run, batch by batch, and every process returns
    the whole result; `model` may be sharded, since all of them run the same number of batches.

    Raises:
        IdentityError: a pair was not computed exactly once over all processes.
    """
    process = this_process()
    device = next(model.parameters()).device
    batches = token_budget_batches(pair_lengths(tokens), tokens_per_batch)
    rounds = -(-len(batches) // process.num_processes)
    values_P2 = np.zeros((len(tokens), 2))
    done_P = np.zeros(len(tokens), dtype=np.bool_)
    with _evaluating(model), _autocast(device, autocast_dtype), Progress(len(tokens), what) as progress:
        for turn in range(rounds):
            number = turn * process.num_processes + process.process_index
            # A process without a batch in the last round repeats one: sharded models need every rank.
            rows = batches[min(number, len(batches) - 1)]
            batch = make_batch(tokens[rows], pad_token_id)
            logps = batch_logps(model, PairBatch(*(part.to(device) for part in batch)))
            if number < len(batches):
                values_P2[rows] = logps.view(2, -1).T.double().cpu().numpy()
                done_P[rows] = True
            progress.advance(sum(map(len, batches[turn * process.num_processes :][: process.num_processes])))
    ids = list(tokens["pair_id"])
    values_P2 = combine_by_position(values_P2, done_P, ids, what=what)
    return PairLogps(ids, values_P2[:, 0], values_P2[:, 1])


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off and no gradients inside; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    if dtype is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = torch.autocast(device.type, dtype=dtype)
    return context
