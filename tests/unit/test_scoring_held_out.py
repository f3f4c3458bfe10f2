from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from selective_dpo.difficulty.held_out import HeldOutEvaluations
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
