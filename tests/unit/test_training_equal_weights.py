from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from selective_dpo.training.batching import PairBatch, PairRow, weigh_equally


def dealt(pairs: int, batch_size: int, processes: int) -> list[list[list[int]]]:
    """Row numbers of each batch of each process, as accelerate's data loader deals one epoch."""
    if processes == 1:
        return [list(BatchSampler(range(pairs), batch_size, drop_last=False))]
    return [
        list(BatchSamplerShard(BatchSampler(range(pairs), batch_size, drop_last=False), processes, process))
        for process in range(processes)
    ]


def collated(rows: list[int]) -> PairBatch:
    return PairBatch([PairRow({"pair_id": str(row)}, ([1], [2], [3])) for row in rows])


def test_a_last_update_by_hand() -> None:
    # 5 pairs, one process, batches of 2, two accumulated: the second update is the single pair 4.
    (batch,) = weigh_equally([collated([4])], first=2, pairs=5, batch_size=2, processes=1, process=0)
    assert batch.weight == 1.0 and batch.blanks == 0
    # 6 pairs, two processes, batches of 2: the last update has pairs 4 and 5, both of process 0. Process 1
    # would repeat pairs 0 and 1; it gets nothing to train on, and process 0 twice its weight, since the step
    # divides by two processes.
    for process, rows, blanks in ((0, [4, 5], 0), (1, [0, 1], 2)):
        (batch,) = weigh_equally(
            [collated(rows)], first=1, pairs=6, batch_size=2, processes=2, process=process
        )
        assert batch.weight == 2.0 and batch.blanks == blanks
        assert [pair.lengths for pair in batch.pairs] == 2 * [(0, 0, 0) if blanks else (1, 1, 1)]


def test_an_update_that_is_full_is_left_alone() -> None:
    batches = [collated([0, 1]), collated([4, 5])]
    assert weigh_equally(batches, first=0, pairs=9, batch_size=2, processes=2, process=0) == batches


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_each_pair_of_an_update_weighs_the_same_and_once_an_epoch(
    pairs: int, batch_size: int, processes: int, accumulated: int
) -> None:
    epochs = dealt(pairs, batch_size, processes)
    rounds = len(epochs[0])
    seen: list[int] = []
    for first in range(0, rounds, accumulated):
        weights: dict[int, Fraction] = defaultdict(Fraction)
        for process in range(processes):
            rows_of = epochs[process][first : first + accumulated]
            batches = [collated(rows) for rows in rows_of]
            weighed = weigh_equally(
                batches,
                first=first,
                pairs=pairs,
                batch_size=batch_size,
                processes=processes,
                process=process,
            )
            for rows, batch in zip(rows_of, weighed, strict=True):
                in_step = Fraction(batch.weight).limit_denominator(10_000) / (
                    len(rows) * processes * len(batches)
                )
                for row, pair in zip(rows, batch.pairs, strict=True):
                    if not pair.is_blank:
                        weights[row] += in_step
        assert set(weights.values()) == {Fraction(1, len(weights))}
        seen += sorted(weights)
    # In the order of the data loader's rows, each exactly once.
    assert seen == list(range(pairs))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_updates_hold_the_same_pairs_whatever_the_number_of_processes(processes: int) -> None:
    # 12 pairs an update each time: 12 x 1, 6 x 2, 4 x 3.
    epochs = dealt(31, 12 // processes, processes)
    updates = [
        sorted({row for process in epochs for row in process[number] if row >= 12 * number})
        for number in range(len(epochs[0]))
    ]
    assert updates == [list(range(12)), list(range(12, 24)), list(range(24, 31))]
