"""When a scorer is measured on its way, and what that asks of the number of updates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.difficulty.held_out import HeldOutEvaluations, evaluation_steps
from selective_dpo.errors import ConfigError
from selective_dpo.logprobs.compute import PairLogps

ARGUMENTS = SimpleNamespace(per_device_train_batch_size=8, gradient_accumulation_steps=2)


def train(callback: HeldOutEvaluations, steps: int) -> list[int]:
    """Call `callback` as a training of `steps` updates would; the updates done at each measurement."""
    state: Any = SimpleNamespace(max_steps=steps, global_step=0)
    callback.on_train_begin(ARGUMENTS, state, None)
    for step in range(1, steps + 1):
        state.global_step = step
        callback.on_step_end(ARGUMENTS, state, None)
    return [measurement.step for measurement in callback.measurements]


def test_it_measures_after_evenly_spaced_steps_and_counts_from_1() -> None:
    made = [PairLogps([str(number)], np.zeros(1), np.zeros(1)) for number in range(3)]
    rest = iter(made)
    callback = HeldOutEvaluations(3, lambda: next(rest))
    # 10 * k / 3 = 3.3, 6.7, 10
    assert train(callback, 10) == [3, 7, 10]
    assert [measurement.evaluation for measurement in callback.measurements] == [1, 2, 3]
    assert [measurement.logps for measurement in callback.measurements] == made


def test_too_few_updates_say_what_to_change() -> None:
    callback = HeldOutEvaluations(5, lambda: PairLogps([], np.zeros(0), np.zeros(0)))
    message = (
        r"4 optimizer steps have no room for 5 evaluations: lower score\.evaluations or the batch size "
        r"\(8 x 2 per process\)"
    )
    with pytest.raises(ConfigError, match=message):
        train(callback, 4)


@pytest.mark.parametrize(
    ("total", "evaluations", "steps"),
    [
        (100, 5, (20, 40, 60, 80, 100)),
        # 7 * k / 5 = 1.4, 2.8, 4.2, 5.6, 7
        (7, 5, (1, 3, 4, 6, 7)),
        # 3 * 1 / 2 = 1.5 is rounded up
        (3, 2, (2, 3)),
        (5, 5, (1, 2, 3, 4, 5)),
        (9, 1, (9,)),
    ],
)
def test_steps_by_hand(total: int, evaluations: int, steps: tuple[int, ...]) -> None:
    assert evaluation_steps(total, evaluations) == steps


@given(st.integers(1, 10_000), st.integers(1, 60))
def test_exactly_so_many_distinct_steps_evenly_spaced_the_last_at_the_end(
    total: int, evaluations: int
) -> None:
    if total < evaluations:
        with pytest.raises(ValueError, match=f"{total} optimizer steps have no room for {evaluations}"):
            evaluation_steps(total, evaluations)
        return
    steps = evaluation_steps(total, evaluations)
    assert len(set(steps)) == evaluations and steps[-1] == total and steps[0] >= 1
    gaps = [after - before for before, after in zip((0, *steps), steps, strict=False)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("evaluations", [0, -1])
def test_there_is_at_least_one_evaluation(evaluations: int) -> None:
    with pytest.raises(ValueError, match="no room"):
        evaluation_steps(10, evaluations)
