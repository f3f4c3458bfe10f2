from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.errors import ModelError, is_out_of_memory
from selective_dpo.logprobs import memory
from selective_dpo.logprobs.compute import pair_logps
from selective_dpo.logprobs.memory import Budget, bounded_batches, budget_for, run_within_memory
from tests.fixtures.families import tiny_family

OUT_OF_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 2000), st.integers(1, 100_000), st.sampled_from([1, 2]))
def test_every_batch_is_within_both_bounds_whatever_the_lengths(
    lengths: list[int], tokens: int, cells: int, rows_per_pair: int
) -> None:
    lengths_P = np.array(lengths)
    batches = bounded_batches(lengths_P, Budget(tokens, cells), rows_per_pair=rows_per_pair)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for rows in batches:
        count, longest = len(rows) * rows_per_pair, lengths_P[rows].max()
        assert len(rows) == 1 or (count * longest <= tokens and count * longest**2 <= cells)


def test_batches_are_as_large_as_the_bounds_allow() -> None:
    lengths_P = np.array([10, 2, 2, 10, 2, 2])
    # Two rows of 10 are 20 tokens; four of 2 are 8.
    assert [len(rows) for rows in bounded_batches(lengths_P, Budget(20, 10_000))] == [2, 4]
    # 100 cells allow one row of 10, and 25 rows of 2.
    assert [len(rows) for rows in bounded_batches(lengths_P, Budget(20, 100))] == [1, 1, 4]
    # Each pair is two rows: 2 * 10 tokens a batch.
    assert [len(rows) for rows in bounded_batches(lengths_P, Budget(20, 10_000), rows_per_pair=2)] == [
        1,
        1,
        4,
    ]


def test_the_costliest_batch_comes_first() -> None:
    # 1 x 30 against 3 x 19 = 57 of 60 tokens: the longest row is not the largest batch.
    batches = bounded_batches(np.array([30, 31, 19, 19, 19]), Budget(60, 10**9))
    costs = [len(rows) * np.array([30, 31, 19, 19, 19])[rows].max() for rows in batches]
    assert costs == sorted(costs, reverse=True)


def test_a_halved_budget_is_used_from_the_failure_on(caplog: pytest.LogCaptureFixture) -> None:
    lengths_P = np.full(32, 10)
    sizes: list[int] = []
    done: list[int] = []

    def run(rows: Any) -> None:
        sizes.append(len(rows))
        if len(rows) * 10 > 40 and len(done) >= 16:
            raise OUT_OF_MEMORY
        done.extend(rows.tolist())

    budget = Budget(160, 10**9)
    with caplog.at_level(logging.WARNING):
        left = run_within_memory(run, bounded_batches(lengths_P, budget), lengths_P, budget)
    # 16 pairs are done; the second 16 fail, so do 8, then 4 at a time go through.
    assert sizes == [16, 16, 8, 4, 4, 4, 4]
    assert sorted(done) == list(range(32))
    assert left.tokens == 40
    assert caplog.messages == [
        "out of memory with 160 tokens a batch: going on with 80",
        "out of memory with 80 tokens a batch: going on with 40",
    ]


def test_a_failing_batch_below_the_budget_becomes_smaller_too() -> None:
    sizes: list[int] = []

    def run(rows: Any) -> None:
        sizes.append(len(rows))
        if len(rows) > 1:
            raise OUT_OF_MEMORY

    budget = Budget(10**6, 10**9)  # the two pairs use 20 tokens of it
    run_within_memory(run, [np.array([0, 1])], np.array([10, 10]), budget)
    assert sizes == [2, 1, 1]


def _fails(error: BaseException) -> Any:
    def run(rows: Any) -> None:
        raise error

    return run


def test_a_pair_that_does_not_fit_alone_is_the_users_to_mend() -> None:
    with pytest.raises(ModelError, match=r"1 pairs and 10 tokens: lower data\.max_length"):
        run_within_memory(_fails(OUT_OF_MEMORY), [np.array([0])], np.array([10]), Budget(10, 100))


def test_shared_weights_allow_no_second_try() -> None:
    with pytest.raises(ModelError, match="lower tokens_per_batch"):
        run_within_memory(
            _fails(OUT_OF_MEMORY), [np.array([0, 1])], np.array([5, 5]), Budget(10, 100), recover=False
        )


def test_other_errors_are_not_taken_for_missing_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run_within_memory(
            _fails(RuntimeError("shapes")), [np.array([0, 1])], np.array([5, 5]), Budget(10, 100)
        )


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert is_out_of_memory(OUT_OF_MEMORY)
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_cells_may_cost_as_much_as_a_batchs_activations() -> None:
    model = tiny_family("llama")
    # Hidden 32, inner 48, float32: (10 * 32 + 3 * 48) * 4 = 1,856 bytes a token; 4 + 2 a cell.
    assert budget_for(model, 100) == Budget(100, 100 * 1856 // 6)
    # Eager attention writes scores for each of 4 heads: 6 + 4 * (3 * 4 + 4) = 70 bytes.
    assert budget_for(tiny_family("gemma2"), 100).cells == 100 * 1856 // 70
    half = tiny_family("llama").to(torch.bfloat16)
    assert budget_for(half, 100).cells == 100 * 928 // 4


def test_the_automatic_budget_follows_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family("llama")
    # A quarter of it, by 2 * 1,856 + 16 * 50 (vocabulary) = 4,512 bytes a token.
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 4 * 4512 * 1000)
    # 1,000, rounded down to a power of two.
    assert budget_for(model, "auto").tokens == 512
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 2**40)
    assert budget_for(model, "auto").tokens == 4096
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 1)
    assert budget_for(model, "auto").tokens == 1


@pytest.mark.parametrize("path", ["shared", "padded"])
def test_log_probs_are_complete_after_running_out_of_memory(path: Any) -> None:
    rows = [
        {"pair_id": str(n), "prompt_ids": [1, 2], "chosen_ids": [3] * (n + 1), "rejected_ids": [4] * 3}
        for n in range(12)
    ]
    model = tiny_family("llama")

    def measure() -> Any:
        return pair_logps(
            model,
            Dataset.from_list(rows),
            tokens_per_batch="auto",
            pad_token_id=0,
            autocast_dtype=None,
            what="test",
            path=path,
        )

    plain = measure()
    calls: list[int] = []

    def limited(module: Any, inputs: Any, options: Any) -> None:
        calls.append(options["input_ids"].numel())
        if calls[-1] > 60:
            raise torch.OutOfMemoryError("injected")

    model.base_model.register_forward_pre_hook(limited, with_kwargs=True)
    again = measure()
    assert max(calls) > 60 and len(calls) > 3
    assert again.pair_ids == plain.pair_ids
    np.testing.assert_allclose(again.chosen_P, plain.chosen_P, atol=1e-4)
    np.testing.assert_allclose(again.rejected_P, plain.rejected_P, atol=1e-4)
