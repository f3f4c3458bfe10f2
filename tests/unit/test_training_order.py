"""The record of the order consumed: epochs, rows that fill the last batch, and what counts as a match."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.identity import ids_digest
from selective_dpo.training.selective_trainer import OrderLog

ORDER = ["d", "a", "c", "b", "e"]


def test_an_epoch_in_order_matches() -> None:
    log = OrderLog(ORDER)
    log.start_training()
    assert [log.add([0, 1]), log.add([2, 3]), log.add([4])] == [[0, 1], [2, 3], [4]]
    order = log.result()
    assert order.matches and order.epochs == 1
    assert order[:3] == (5, 5, 0)
    assert order.consumed_digest == ids_digest(ORDER)
    assert order.to_json() == {
        "pairs": 5,
        "consumed": 5,
        "repeated_to_fill": 0,
        "expected_digest": ids_digest(ORDER),
        "consumed_digest": ids_digest(ORDER),
        "epochs": 1.0,
        "matches": True,
    }


def test_rows_after_the_end_of_an_epoch_fill_its_last_batch() -> None:
    log = OrderLog(ORDER)
    for _ in range(2):
        log.add([0, 1, 2, 3])
        assert log.add([4, 0, 1, 2]) == [4]
    order = log.result()
    assert order.matches and order.consumed == 10 and order.epochs == 2
    assert order.repeated_to_fill == 6
    assert order.consumed_digest == ids_digest(ORDER * 2)


@pytest.mark.parametrize(
    "positions",
    [[1, 0, 2, 3, 4], [0, 1, 2, 3, 3], [4, 3, 2, 1, 0], [1, 2, 3, 4, 0], [0, 0]],
)
def test_any_other_order_does_not_match(positions: list[int]) -> None:
    log = OrderLog(ORDER)
    log.add(positions)
    assert not log.result().matches


def test_a_second_epoch_in_another_order_does_not_match() -> None:
    log = OrderLog(ORDER)
    for positions in ([0, 1, 2, 3, 4], [0, 2, 1, 3, 4]):
        log.add(positions)
    assert not log.result().matches


def test_part_of_an_epoch_matches_and_says_how_much_it_is() -> None:
    log = OrderLog(ORDER)
    assert not log.result().matches  # nothing is no order
    log.add([0, 1])
    assert log.result().matches and log.result().epochs == 0.4


def test_another_training_begins_with_nothing() -> None:
    log = OrderLog(ORDER)
    log.add([3, 2, 1])
    log.start_training()
    log.add(range(5))
    assert log.result().matches and log.result().consumed == 5


@given(
    pairs=st.integers(1, 30),
    batch=st.integers(1, 5),
    processes=st.integers(1, 4),
    epochs=st.integers(1, 3),
)
def test_what_accelerate_deals_is_counted_right(pairs: int, batch: int, processes: int, epochs: int) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    log = OrderLog([str(place) for place in range(pairs)])
    dealt = 0
    for _ in range(epochs):
        shards = [
            BatchSamplerShard(BatchSampler(range(pairs), batch, False), processes, rank)
            if processes > 1
            else BatchSampler(range(pairs), batch, False)
            for rank in range(processes)
        ]
        for parts in zip(*shards, strict=True):
            everyones = [position for part in parts for position in part]
            dealt += len(everyones)
            log.add(everyones)
    order = log.result()
    assert order.matches and order.consumed == epochs * pairs
    assert order.repeated_to_fill == dealt - epochs * pairs
