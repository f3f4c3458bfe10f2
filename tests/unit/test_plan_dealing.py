"""What a training computes: the plan's arithmetic by hand, and against the trainer's own dealing."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from selective_dpo.logprobs.packed import make_shared_batch
from selective_dpo.logprobs.packing_support import RowLayout as RowPath
from selective_dpo.logprobs.padded import PartLengths
from selective_dpo.run.planning.batches import Work, epoch_batches
from selective_dpo.run.planning.dealing import Dealing, dealing_of, expected_work, ordered_work
from selective_dpo.run.planning.forwarding import Forwarding
from selective_dpo.training.batching import can_deal_by_length, deal_by_length, pair_rows, weigh_equally
from tests.fixtures.families import tiny_family
from tests.fixtures.models import tiny_recipe

# Prompt, chosen, rejected -> the longer row, the shared row (without two last tokens), both rows together.
A = (2, 3, 4)  # 6, 2 + 2 + 3 = 7, 11
B = (1, 1, 1)  # 2, 1, 4
C = (4, 5, 2)  # 9, 4 + 4 + 1 = 9, 15
D = (3, 2, 2)  # 5, 3 + 1 + 1 = 5, 10
E = (1, 2, 1)  # 3, 1 + 1 + 0 = 2, 5

SHARED = Dealing(
    pairs_per_batch=2,
    accumulation=2,
    processes=1,
    shared=True,
    by_length=True,
    worth_a_pass=None,
    multiple_of=1,
)
PADDED = SHARED._replace(shared=False)
TRIPLES = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=9)


def parts(*pairs: tuple[int, int, int]) -> PartLengths:
    return PartLengths(*np.array(pairs, dtype=np.int64).T)


def test_an_update_is_sorted_into_its_batches() -> None:
    # Of B, C, A, D the batches are (C, A) and (D, B).
    assert ordered_work(parts(B, C, A, D), SHARED) == Work(2 * 9 + 2 * 5, 2 * 81 + 2 * 25)
    assert ordered_work(parts(B, C, A, D), PADDED) == Work(4 * 9 + 4 * 5, 4 * 81 + 4 * 25)
    # As they come: (B, C) and (A, D).
    as_they_come = PADDED._replace(by_length=False)
    assert ordered_work(parts(B, C, A, D), as_they_come) == Work(4 * 9 + 4 * 6, 4 * 81 + 4 * 36)
    # Updates of one batch have nothing to sort.
    assert ordered_work(parts(B, C, A, D), PADDED._replace(accumulation=1)).tokens == 60


def test_the_smaller_batch_gets_the_longest_pairs() -> None:
    three = SHARED._replace(accumulation=3)
    # Sorted C, A, D, E, B into batches of 1, 2 and 2.
    assert ordered_work(parts(A, B, C, D, E), three).tokens == 9 + 2 * 7 + 2 * 2
    # Losses that look at the batch leave them as they are: (A, B), (C, D), E.
    assert ordered_work(parts(A, B, C, D, E), three._replace(by_length=False)).tokens == 2 * 7 + 2 * 9 + 2
    # In updates of two batches the fifth pair is one of its own: C, A | D, B and E.
    assert ordered_work(parts(A, B, C, D, E), SHARED).tokens == 2 * 9 + 2 * 5 + 2


def test_passes_on_a_cpu() -> None:
    # A pass is worth 3 tokens. C and A: 2 x 9 + 3 together, 9 + 7 + 2 x 3 apart: together. D and B: 2 x 5 + 3
    # together, 5 + 1 + 2 x 3 apart: apart.
    assert ordered_work(parts(B, C, A, D), SHARED._replace(worth_a_pass=3)) == Work(18 + 6, 2 * 81 + 26)


def test_two_processes() -> None:
    both = SHARED._replace(pairs_per_batch=1, processes=2)
    # The first process has A and B, the second C and, to fill, A again: blank, a row of a token.
    assert ordered_work(parts(A, C, B), both).tokens == (7 + 1) + (9 + 1)
    assert ordered_work(parts(A, C, B), both._replace(by_length=False)).tokens == (7 + 1) + (9 + 7)
    # In rows of their own only labels are taken from the filling pair.
    assert ordered_work(parts(A, C, B), both._replace(shared=False)).tokens == 2 * (6 + 2) + 2 * (9 + 6)


def test_rows_of_a_multiple() -> None:
    assert ordered_work(parts(C, A), SHARED._replace(pairs_per_batch=1, multiple_of=8)).tokens == 16 + 8


@pytest.mark.parametrize("dealing", [SHARED, PADDED, SHARED._replace(worth_a_pass=3)])
@pytest.mark.parametrize("count", [3, 4])
def test_a_random_order_is_the_mean_over_orders(dealing: Dealing, count: int) -> None:
    orders = list(itertools.permutations((A, B, C, D), count))
    every = [ordered_work(parts(*order), dealing) for order in orders]
    found = expected_work(parts(A, B, C, D), count, dealing)
    # A thousand epochs are simulated, of four pairs.
    assert math.isclose(found.tokens, sum(work.tokens for work in every) / len(every), rel_tol=0.01)
    assert math.isclose(found.squares, sum(work.squares for work in every) / len(every), rel_tol=0.03)


def test_without_padding_an_expectation_is_exact() -> None:
    alone = SHARED._replace(pairs_per_batch=1)
    lengths = np.random.default_rng(1).integers(1, 500, size=(20_000, 3))
    many = PartLengths(*lengths.T)
    shared = lengths.sum(axis=1) - 2
    # Only a part of the 10,000 pairs is simulated.
    assert math.isclose(expected_work(many, 10_000, alone).tokens, 10_000 * shared.mean())


@given(
    triples=TRIPLES,
    size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    processes=st.integers(1, 3),
    shared=st.booleans(),
)
def test_it_is_what_the_trainer_does(
    triples: list[tuple[int, int, int]], size: int, accumulation: int, processes: int, shared: bool
) -> None:
    dealing = Dealing(size, accumulation, processes, shared, True, None, 1)
    planned = ordered_work(parts(*triples), dealing)
    computed = sum(_computed(triples, dealing, process) for process in range(processes))
    assert planned.tokens == computed


def _computed(triples: list[tuple[int, int, int]], dealing: Dealing, process: int) -> int:
    """Tokens of one process, from the functions that its trainer calls."""
    size, pairs = dealing.pairs_per_batch, len(triples)
    collate = DataCollatorForPreference(pad_token_id=0, max_length=None)
    epoch = epoch_batches(pairs, size, dealing.processes)
    positions = list(range(epoch.full * size + epoch.rest))
    batches = [positions[start : start + size] for start in range(0, len(positions), size)]
    own = batches[process :: dealing.processes]
    tokens = 0
    for first in range(0, len(own), dealing.accumulation):
        update = [
            collate([_row(triples[position % pairs]) for position in batch])
            for batch in own[first : first + dealing.accumulation]
        ]
        weigh_equally(
            update,
            first=first,
            pairs=pairs,
            batch_size=size,
            processes=dealing.processes,
            process=process,
        )
        if can_deal_by_length(update):
            update = deal_by_length(update)
        tokens += sum(_tokens(batch, dealing.shared) for batch in update)
    return tokens


def _row(triple: tuple[int, int, int]) -> dict[str, list[int]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {name: [1] * count for name, count in zip(names, triple, strict=True)}


def _tokens(batch: dict[str, Any], shared: bool) -> int:
    if not shared:
        return int(batch["input_ids"].numel())
    rows = pair_rows(batch["input_ids"], batch["attention_mask"], batch["completion_mask"].bool())
    assert rows is not None
    return make_shared_batch(rows, 0).input_ids.numel()


def test_which_rules_a_recipe_is_trained_by(tmp_path: Path) -> None:
    takes_any_mask = Forwarding(RowPath("shared", ""), None)

    def rules(forwarding: Forwarding = takes_any_mask, **blocks: Any) -> Dealing:
        return dealing_of(tiny_recipe(tmp_path, **blocks), "train", forwarding)

    def trained(**given: Any) -> Dealing:
        return rules(train={"trainer": given})

    plain = trained(gradient_accumulation_steps=3)
    assert plain[:5] == (4, 3, 1, True, True)
    assert plain.worth_a_pass is not None
    assert plain.rows_per_pair == 1
    assert rules(Forwarding(RowPath("padded", ""), None)).rows_per_pair == 2
    # One that looks at the batch, and one that does not.
    assert not trained(loss_type=["sigmoid", "sft"]).by_length
    assert trained(loss_type="hinge").by_length
    # What makes the trainer take plain rows.
    assert not trained(torch_compile=True).shared
    dropout = {"lora": {"r": 4, "lora_dropout": 0.1}, "trainer": {"disable_dropout": False}}
    assert not rules(train=dropout).shared
    assert rules(train={**dropout, "trainer": {}}).shared
    assert rules(train={**dropout, "lora": None}).shared
    with_dropout = takes_any_mask._replace(model=torch.nn.Dropout(0.1))
    assert not rules(with_dropout, train={**dropout, "lora": None}).shared
    drops_attention = takes_any_mask._replace(model=tiny_family("qwen2", attention_dropout=0.1))
    assert not rules(drops_attention, train={**dropout, "lora": None}).shared
    assert rules(drops_attention, train={**dropout, "trainer": {}}).shared
    # Passes are for a CPU with one process; a GPU wants multiples of 8.
    assert rules(launch={"processes": 2}).worth_a_pass is None
    on_gpu = rules(takes_any_mask._replace(device="cuda"))
    assert (on_gpu.worth_a_pass, on_gpu.multiple_of) == (None, 8)
    padded = rules(Forwarding(RowPath("padded", ""), None), train={"trainer": {"pad_to_multiple_of": 16}})
    assert padded.multiple_of == 16
    # Evaluations keep the rows, and take batches as they come.
    assert plain.evaluates(7)[:5] == (7, 1, 1, True, False)
