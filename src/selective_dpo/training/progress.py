"""A training's progress, in this package's own way."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, TrainerCallback

from selective_dpo.progress import Progress


class TrainingProgress(TrainerCallback):
    """Shows optimizer steps, rate and time left."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress = Progress(state.max_steps, self._what, unit="updates", done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.advance(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.close()


def without_printed_logs(trainer: Any) -> Any:
    """`trainer` without transformers' habit of printing each log entry; they stay in its history."""
    trainer.remove_callback(PrinterCallback)
    return trainer
