"""The curves in a trainer's log: loss, held-out loss and difficulty by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selective_dpo.artifacts import read_json
from selective_dpo.core.results import SELECTED
from selective_dpo.errors import ArtifactError

TRAINER_LOG = "trainer_log.json"


class Curve(NamedTuple):
    """Values of one logged quantity; both tuples have one entry a logged step."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


class TrainingLog(NamedTuple):
    """What is drawn of one arm's training. A curve that was not logged is empty."""

    arm: str
    loss: Curve
    held_out_loss: Curve
    difficulty: Curve


def read_training_logs(run_folder: Path) -> tuple[TrainingLog, ...]:
    """The logs of the run's policy and of each control, those that are there, the run's own first.

    Raises:
        ArtifactError: a log is not what the training stage writes.
    """
    policies = {SELECTED: run_folder / "policy"}
    controls = run_folder / "controls"
    if controls.is_dir():
        policies |= {folder.name: folder / "policy" for folder in sorted(controls.iterdir())}
    paths = {arm: folder / TRAINER_LOG for arm, folder in policies.items()}
    return tuple(_read(arm, path) for arm, path in paths.items() if path.is_file())


def _read(arm: str, path: Path) -> TrainingLog:
    history = read_json(path).get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ArtifactError(f"{path} holds no log_history; run `train` again")
    return TrainingLog(
        arm, _curve(history, "loss"), _curve(history, "eval_loss"), _curve(history, "difficulty")
    )


def _curve(history: Sequence[Mapping[str, Any]], name: str) -> Curve:
    points = [
        (int(entry["step"]), float(entry[name]))
        for entry in history
        if "step" in entry and isinstance(entry.get(name), int | float) and math.isfinite(entry[name])
    ]
    return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))
