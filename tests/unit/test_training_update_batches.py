"""Pairs of one update change places between its batches, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from selective_dpo.training.batching import (
    BLANK,
    WEIGHT,
    can_deal_by_length,
    deal_by_length,
    group_by_length,
    pair_rows,
    weigh_equally,
)

PROMPT = 2


def batch_of(*completions: tuple[int, int]) -> dict[str, Any]:
    """As TRL collates pairs with a prompt of 2 tokens and so many of chosen and rejected; each token is the
    number of chosen tokens, each reference the number of its side's."""
    width = PROMPT + max(max(pair) for pair in completions)
    rows = [
        (chosen, side)
        for place in (0, 1)
        for chosen, side in ((pair[0], pair[place]) for pair in completions)
    ]
    attended = torch.tensor([[int(at < PROMPT + side) for at in range(width)] for _, side in rows])
    completed = attended.clone()
    completed[:, :PROMPT] = 0
    return {
        "input_ids": torch.tensor([[chosen] for chosen, _ in rows]) * attended,
        "attention_mask": attended,
        "completion_mask": completed,
        "ref_chosen_logps": torch.tensor([-float(chosen) for chosen, _ in completions]),
        "ref_rejected_logps": torch.tensor([-float(rejected) for _, rejected in completions]),
    }


def contents(batch: dict[str, Any]) -> list[tuple[int, int]]:
    """Chosen and rejected tokens of each pair, checked against everything else that the batch says of it."""
    counts = batch["completion_mask"].sum(dim=1).tolist()
    pairs = list(zip(counts[: len(counts) // 2], counts[len(counts) // 2 :], strict=True))
    assert batch["attention_mask"].sum(dim=1).tolist() == [PROMPT + count for count in counts]
    assert batch["input_ids"][:, 0].tolist() == 2 * [chosen for chosen, _ in pairs]
    assert batch["ref_chosen_logps"].tolist() == [-chosen for chosen, _ in pairs]
    assert batch["ref_rejected_logps"].tolist() == [-rejected for _, rejected in pairs]
    return pairs


def test_similar_lengths_come_together_and_padding_goes() -> None:
    batches = [batch_of((1, 2), (9, 8)), batch_of((2, 2), (7, 9))]
    assert can_deal_by_length(batches)
    long, short = deal_by_length(batches)
    assert contents(long) == [(9, 8), (7, 9)] and contents(short) == [(2, 2), (1, 2)]
    assert long["input_ids"].shape == (4, PROMPT + 9) and short["input_ids"].shape == (4, PROMPT + 2)


def test_rows_keep_the_multiple_they_were_padded_to() -> None:
    short = deal_by_length([batch_of((1, 2), (9, 8)), batch_of((2, 2), (7, 9))], multiple_of=8)[1]
    assert contents(short) == [(2, 2), (1, 2)] and short["input_ids"].shape == (4, 8)


def test_weights_stay_with_the_pairs() -> None:
    # 5 pairs in batches of 3 and 2: each pair weighs 1 / 5, and the step divides by 2 batches.
    batches = [batch_of((1, 1), (2, 2), (9, 9)), batch_of((4, 4), (5, 5))]
    weigh_equally(batches, first=0, pairs=5, batch_size=3, processes=1, process=0)
    dealt = deal_by_length(batches)
    assert [contents(batch) for batch in dealt] == [[(9, 9), (5, 5)], [(4, 4), (2, 2), (1, 1)]]
    # Mean over its pairs / 2 batches x weight = 1 / 5 for each.
    np.testing.assert_allclose([batch[WEIGHT] / len(contents(batch)) / 2 for batch in dealt], 1 / 5)


def test_blank_pairs_move_to_the_end_and_are_counted_again() -> None:
    # 7 pairs on two processes, batches of 2: the second process has 2 + 1, and one repeated pair.
    batches = [batch_of((3, 3), (6, 6)), batch_of((8, 8), (5, 5))]
    weigh_equally(batches, first=0, pairs=7, batch_size=2, processes=2, process=1)
    assert [batch[BLANK] for batch in batches] == [0, 1]
    first, last = deal_by_length(batches)
    assert first[BLANK] == 0 and contents(first) == [(8, 8), (6, 6)]
    assert last[BLANK] == 1 and last["completion_mask"].sum(dim=1).tolist() == [3, 0, 3, 0]
    assert first[WEIGHT] == last[WEIGHT] == 2 * 2 * 2 / 7


def test_what_must_not_be_dealt() -> None:
    pair = batch_of((1, 2), (9, 8))
    assert not can_deal_by_length([pair])  # nowhere to go
    assert not can_deal_by_length([pair, {**pair, "pixel_values": torch.zeros(2)}])
    # Unweighted batches of different sizes: a pair would weigh more in the smaller one.
    assert not can_deal_by_length([pair, batch_of((1, 1))])


def test_groups_of_similar_length_by_hand() -> None:
    # Padding 100, 98, 10, 9 together costs 2 + 90 + 91; apart from the long ones, 2 + 1 and one more pass.
    lengths = np.array([10, 100, 9, 98])
    assert group_by_length(lengths, 50) == [[1, 3], [0, 2]]
    assert group_by_length(lengths, 0) == [[1], [3], [0], [2]]
    assert group_by_length(lengths, 1_000) == [[0, 1, 2, 3]]


def test_rows_of_pairs_and_of_blank_pairs() -> None:
    batch = batch_of((1, 2), (3, 1))
    batch["completion_mask"][[1, 3]] = 0
    rows = pair_rows(batch["input_ids"], batch["attention_mask"], batch["completion_mask"].bool())
    assert rows is not None
    found = {name: [part.tolist() for part in parts] for name, parts in rows.items()}
    assert found == {"prompt_ids": [[1, 1], []], "chosen_ids": [[1], []], "rejected_ids": [[1, 1], []]}
    batch["input_ids"][0, 0] = 7  # another prompt than the rejected row has
    assert pair_rows(batch["input_ids"], batch["attention_mask"], batch["completion_mask"].bool()) is None
