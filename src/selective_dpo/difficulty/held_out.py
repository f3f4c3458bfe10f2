"""Measuring the held-out half while a scorer trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import TrainerCallback
from typing_extensions import override

from selective_dpo.errors import ConfigError
from selective_dpo.logprobs.compute import MeasurementStopped, PairLogps

_STATE = "measurements.parquet"


class Measurement(NamedTuple):
    """The held-out half under the scorer as it was after `step` optimizer steps."""

    evaluation: int
    """Counted from 1."""
    step: int
    logps: PairLogps


class HeldOutEvaluations(TrainerCallback):
    """Calls `measure` after evenly spaced optimizer steps, the last one at the end of training.

    Not TRL's own evaluation, which reduces to a mean and knows no ids. Measuring draws no random
    numbers, so training does not depend on how often it is done. What SIGTERM has kept from being measured is
    measured first when the training goes on from the checkpoint that is made then.
    """

    def __init__(self, evaluations: int, measure: Callable[[], PairLogps]) -> None:
        self._evaluations = evaluations
        self._measure = measure
        self._steps: tuple[int, ...] = ()
        self.measurements: list[Measurement] = []

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            self._steps = evaluation_steps(state.max_steps, self._evaluations)
        except ValueError as error:
            raise ConfigError(
                f"{error}: lower score.evaluations or the batch size "
                f"({args.per_device_train_batch_size} x {args.gradient_accumulation_steps} per process)"
            ) from error

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with contextlib.suppress(MeasurementStopped):  # which makes a checkpoint be made
            self._measure_if_due(state.global_step)

    @override
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure_if_due(state.global_step)

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure_if_due(state.global_step)

    def _measure_if_due(self, step: int) -> None:
        if step in self._steps and all(step != measured.step for measured in self.measurements):
            self.measurements.append(Measurement(self._steps.index(step) + 1, step, self._measure()))

    def write_state(self, folder: Path) -> None:
        """Write the measurements so far into a checkpoint: a row for each pair and measurement."""
        tables = [
            pa.table(
                {
                    "evaluation": np.full(len(logps.pair_ids), evaluation),
                    "step": np.full(len(logps.pair_ids), step),
                    "pair_id": pa.array(logps.pair_ids, pa.string()),
                    "chosen": logps.chosen_P,
                    "rejected": logps.rejected_P,
                }
            )
            for evaluation, step, logps in self.measurements
        ]
        pq.write_table(pa.concat_tables(tables) if tables else pa.table({}), folder / _STATE)

    def read_state(self, folder: Path) -> None:
        """Go on from the measurements in a checkpoint."""
        table = pq.read_table(folder / _STATE)
        self.measurements = []
        for evaluation in sorted(set(table["evaluation"].to_pylist())) if table.num_rows else []:
            rows = table.filter(pc.equal(table["evaluation"], evaluation))
            logps = PairLogps(
                rows["pair_id"].to_pylist(), rows["chosen"].to_numpy(), rows["rejected"].to_numpy()
            )
            self.measurements.append(Measurement(evaluation, rows["step"][0].as_py(), logps))


# ----------------------------------------------------------------------------------------------------
# When a scorer is evaluated on its way.


def evaluation_steps(total_steps: int, evaluations: int) -> tuple[int, ...]:
    """The optimizer steps (counted from 1) after which the held-out pairs are scored.

    Exactly `evaluations` distinct steps, evenly spaced, the last one `total_steps`.

    Raises:
        ValueError: fewer steps than evaluations, or not positive.
    """
    if evaluations < 1 or total_steps < evaluations:
        raise ValueError(f"{total_steps} optimizer steps have no room for {evaluations} evaluations")
    # Integer arithmetic, rounding half up: neighbours differ by at least floor(total / evaluations) >= 1.
    return tuple(
        (2 * total_steps * number + evaluations) // (2 * evaluations) for number in range(1, evaluations + 1)
    )
