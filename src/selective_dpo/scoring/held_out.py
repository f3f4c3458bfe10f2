"""Measuring the held-out half while a scorer trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import TrainerCallback

from selective_dpo.core.schedule import evaluation_steps
from selective_dpo.engine.logprobs import PairLogps
from selective_dpo.errors import ConfigError


class Measurement(NamedTuple):
    """The held-out half under the scorer as it was after `step` optimizer steps."""

    evaluation: int
    """Counted from 1."""
    step: int
    logps: PairLogps


class HeldOutEvaluations(TrainerCallback):
    """Calls `measure` after evenly spaced optimizer steps, the last one at the end of training.

    Not TRL's own evaluation, which reduces to a mean and knows no ids. Measuring draws no random
    numbers, so training does not depend on how often it is done.
    """

    def __init__(self, evaluations: int, measure: Callable[[], PairLogps]) -> None:
        self._evaluations = evaluations
        self._measure = measure
        self._steps: tuple[int, ...] = ()
        self.measurements: list[Measurement] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            self._steps = evaluation_steps(state.max_steps, self._evaluations)
        except ValueError as error:
            raise ConfigError(
                f"{error}: lower score.evaluations or the batch size "
                f"({args.per_device_train_batch_size} x {args.gradient_accumulation_steps} per process)"
            ) from error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            number = self._steps.index(state.global_step) + 1
            self.measurements.append(Measurement(number, state.global_step, self._measure()))
