"""SIGTERM in the middle of an evaluation: it ends after the batch, and the repeated command makes it up."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from selective_dpo.cli.main import main
from selective_dpo.engine import logprobs
from selective_dpo.training.pair_trainer import PairTrainer
from tests.fixtures.models import TRAINER, recipe_file, tiny_pairs_file, tiny_recipe
from tests.fixtures.results import differences, results_of

pytestmark = pytest.mark.slow

EXIT_CODE = 75


class Batches:
    """Counts the batches of each measurement of log-probs, and sends SIGTERM after the one of a number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_each: list[int] = []
        self.last = 0
        within_memory = logprobs.run_within_memory

        def counted(run: Callable[[NDArray[np.int64]], None], *args: Any, **others: Any) -> Any:
            self.of_each.append(0)
            return within_memory(lambda rows: self._run(run, rows), *args, **others)

        monkeypatch.setattr(logprobs, "run_within_memory", counted)

    def _run(self, run: Callable[[NDArray[np.int64]], None], rows: NDArray[np.int64]) -> None:
        run(rows)
        self.of_each[-1] += 1
        if sum(self.of_each) == self.last:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("measurement", [1, 2])
def test_a_scorers_evaluation_ends_after_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measurement: int
) -> None:
    """In the first measurement of two, and in the one at the end of the training."""
    recipe = tiny_recipe(tmp_path, score={"tokens_per_batch": 128})
    command = ["train", str(recipe_file(recipe, tmp_path / "recipe.yaml"))]
    run, batches = tmp_path / "runs" / "tiny", Batches(monkeypatch)
    assert main(command) == 0
    undisturbed, of_each = results_of(run), batches.of_each
    assert (
        len(of_each) == 2 + 2 * 2 and min(of_each) > 1
    )  # some pairs tried, the reference's, two of each scorer
    before = measurement + 1
    shutil.rmtree(run)

    batches.of_each, batches.last = [], sum(of_each[:before]) + 1
    assert main(command) == EXIT_CODE
    assert batches.of_each == [*of_each[:before], 1]
    assert "seed41-fold0: interrupted by SIGTERM at step" in capsys.readouterr().err
    assert list((run / "checkpoints" / "seed41-fold0").glob("step-*"))
    assert main(command) == 0
    # That measurement was begun anew, and nothing of what there was before it.
    assert batches.of_each == [*of_each[:before], 1, *of_each[before:]]
    assert not differences(run, undisturbed)


def test_the_trainers_own_evaluation_ends_after_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of `eval_strategy`: the training goes on from the checkpoint before it."""
    test = tiny_pairs_file(tmp_path / "test.jsonl", 6, seed=5)
    trainer = {**TRAINER, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    recipe = tiny_recipe(
        tmp_path,
        data={"test": [{"path": str(test)}]},
        score={"evaluations": 1},
        train={"trainer": {**trainer, "per_device_eval_batch_size": 2}},
        launch={"checkpoint_steps": 1},
    )
    command = ["train", str(recipe_file(recipe, tmp_path / "recipe.yaml"))]
    run = tmp_path / "runs" / "tiny"
    assert main(command) == 0
    undisturbed = results_of(run)
    shutil.rmtree(run)

    step, batches = PairTrainer.prediction_step, []

    def struck(self: Any, *args: Any, **others: Any) -> Any:
        batches.append(self.state.global_step)
        if len(batches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **others)

    monkeypatch.setattr(PairTrainer, "prediction_step", struck)
    assert main(command) == EXIT_CODE
    assert batches == [2]
    assert "selected: interrupted by SIGTERM in the evaluation at step 2" in capsys.readouterr().err
    assert main(command) == 0
    assert batches == [2, *(2, 2, 2), *(3, 3, 3)]  # three batches of two pairs, also at the end
    assert not differences(run, undisturbed)
