"""Pairs of one update change places between its batches, and nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from selective_dpo.logprobs.packing_support import RowCollator, group_by_length
from selective_dpo.logprobs.rows import to_device
from selective_dpo.training.batching import (
    PAIRS,
    PairBatch,
    PairCollator,
    PairRow,
    group_batches,
    loss_inputs,
    token_columns,
    weigh_equally,
)
from tests.fixtures.families import tiny_family


def batch_of(*completions: tuple[int, int]) -> PairBatch:
    """Pairs with a prompt of 2 tokens and so many of chosen and rejected."""
    pairs = [
        PairRow(
            {"ref_chosen_logps": -float(chosen), "ref_rejected_logps": -float(rejected)},
            ([1, 2], chosen * [3], rejected * [4]),
        )
        for chosen, rejected in completions
    ]
    return PairBatch(pairs)


def contents(batch: PairBatch) -> list[tuple[int, int]]:
    """Chosen and rejected tokens of each pair."""
    return [pair.lengths[1:] for pair in batch.pairs]


def test_similar_lengths_come_together() -> None:
    batches = [batch_of((1, 2), (9, 8)), batch_of((2, 2), (7, 9))]
    long, short = group_batches(batches)
    assert contents(long) == [(9, 8), (7, 9)] and contents(short) == [(2, 2), (1, 2)]
    assert (long.padded_tokens, short.padded_tokens) == (4 * 11, 4 * 4)


def test_weights_stay_with_the_pairs() -> None:
    # 5 pairs in batches of 3 and 2: each pair weighs 1 / 5, and the step divides by 2 batches.
    batches = [batch_of((1, 1), (2, 2), (9, 9)), batch_of((4, 4), (5, 5))]
    weighed = weigh_equally(batches, first=0, pairs=5, batch_size=3, processes=1, process=0)
    grouped = group_batches(weighed)
    assert [contents(batch) for batch in grouped] == [[(9, 9), (5, 5)], [(4, 4), (2, 2), (1, 1)]]
    # Mean over its pairs / 2 batches x weight = 1 / 5 for each.
    np.testing.assert_allclose([batch.weight / len(batch.pairs) / 2 for batch in grouped], 1 / 5)


def test_blank_pairs_move_to_the_end() -> None:
    # 7 pairs on two processes, batches of 2: the second process has 2 + 1, and one repeated pair.
    batches = [batch_of((3, 3), (6, 6)), batch_of((8, 8), (5, 5))]
    weighed = weigh_equally(batches, first=0, pairs=7, batch_size=2, processes=2, process=1)
    assert [batch.blanks for batch in weighed] == [0, 1]
    first, last = group_batches(weighed)
    assert first.blanks == 0 and contents(first) == [(8, 8), (6, 6)]
    assert last.blanks == 1 and contents(last) == [(3, 3), (0, 0)]
    assert first.weight == last.weight == 2 * 2 * 2 / 7


def test_what_must_not_change_places() -> None:
    pair = batch_of((1, 2), (9, 8))
    unlike: list[list[PairBatch]] = [
        [batch_of((1, 2), (9, 8), (3, 4))],  # nowhere to go
        [pair, PairBatch([PairRow({"images": []}, None)] * 2)],
        # Unweighted batches of different sizes: a pair would weigh more in the smaller one.
        [pair, batch_of((1, 1))],
    ]
    for batches in unlike:
        assert group_batches(batches) == batches


def test_groups_of_similar_length_by_hand() -> None:
    # Padding 100, 98, 10, 9 together costs 2 + 90 + 91; apart from the long ones, 2 + 1 and one more pass.
    lengths = np.array([10, 100, 9, 98])
    assert group_by_length(lengths, 50) == [[1, 3], [0, 2]]
    assert group_by_length(lengths, 0) == [[1], [3], [0], [2]]
    assert group_by_length(lengths, 1_000) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("mode", "tokens"),
    [
        ("keep_start", [([1, 2], [3, 4], [5, 6]), ([1, 2, 3, 4], [], [])]),
        ("keep_end", [None, None]),  # the two rows of a pair begin with different tokens
    ],
)
def test_rows_are_cut_as_trl_cuts_them(mode: str, tokens: list[Any]) -> None:
    examples = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 7], "rejected_ids": [5, 6]},
        {"prompt_ids": [1, 2, 3, 4, 5], "chosen_ids": [6], "rejected_ids": [7]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    ]
    batch = PairCollator(4, mode, has_tokens=True)(examples)[PAIRS]
    assert [pair.tokens for pair in batch.pairs] == [*tokens, ([1], [2], [3])]
    assert batch.is_text == (mode == "keep_start")


@pytest.mark.parametrize("kind", [None, "packed"])
@pytest.mark.parametrize("splits", [True, False])
def test_what_trls_loss_reads_in_place_of_its_padded_batch(kind: Any, splits: bool) -> None:
    collate = RowCollator(tiny_family("llama"), pad_token_id=0, kind=kind, splits=splits)
    batch = batch_of((1, 3), (2, 1), (300, 1))
    blank = PairRow(batch.pairs[1].example, ([1], [2], [3]), is_blank=True)
    batch = PairBatch([batch.pairs[0], blank, batch.pairs[2]])
    inputs, rows = loss_inputs(batch), collate(token_columns(batch))
    assert len(rows.groups) == (2 if splits else 1)
    mask = inputs["completion_mask"]
    assert mask.sum(dim=1).tolist() == [1, 0, 300, 3, 0, 1] and mask.shape == (6, 301)
    # Its tokens count although they are not trained on, as TRL has it.
    assert inputs["attention_mask"].tolist() == [3, 2, 302, 5, 2, 3]
    assert inputs["ref_chosen_logps"].tolist() == [-1.0, 0.0, -300.0]
    # The labels of each completion, found through the groups.
    labels = [
        group.labels_N[places[places < len(group.labels_N)]].tolist()
        for group in rows.groups
        for places in group.places_2BL
    ]
    expected = [[3], [], 300 * [3], 3 * [4], [], [4]]
    assert [labels[place] for place in rows.order_2B] == expected


def test_an_empty_prompt_leaves_the_first_token_without_a_label() -> None:
    inputs = loss_inputs(PairBatch([PairRow({}, ([], [5, 6], [7]))]))
    # TRL counts the first token as part of the completion, and shifts it away.
    assert inputs["completion_mask"].tolist() == [[1, 1], [1, 0]]


class Copied:
    """Stands for a tensor on the CPU, and notes how it goes to a GPU."""

    device = SimpleNamespace(type="cpu")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def pin_memory(self) -> Copied:
        self.calls.append(("pinned",))
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> Copied:
        self.calls.append((device.type, non_blocking))
        return self


def test_rows_go_to_a_gpu_without_waiting() -> None:
    tensor: Any = Copied()
    to_device(tensor, torch.device("cuda"))
    assert tensor.calls == [("pinned",), ("cuda", True)]
