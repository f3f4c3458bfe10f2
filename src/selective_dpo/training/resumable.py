"""Trainings that survive being killed: they go on from their newest whole checkpoint.

Saving and resuming are transformers' own. What is added: a checkpoint is written aside and sealed with its
digests, it is made by time, on SIGTERM and at the end, and it also holds what transformers forgets: pending
metrics, and what this package gathers on the way (`Part`). So a resumed training ends in the same records,
order, log and weights as an undisturbed one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import Trainer, TrainerCallback

from selective_dpo.artifacts import write_atomic
from selective_dpo.engine.processes import on_any_process, this_process
from selective_dpo.errors import ConfigError, Interrupted, SelectiveDPOError
from selective_dpo.launch.interruption import REMEDY, stopping_when_asked
from selective_dpo.launch.processes import ending_with_the_others
from selective_dpo.training.checkpoints import (
    KEPT,
    PROGRESS,
    TRAINER,
    CheckpointPlan,
    Found,
    Layout,
    find_checkpoint,
    keep_only,
    read_progress,
    require_layout,
)
from selective_dpo.training.loading import CheckedLoading, reading, require_sound
from selective_dpo.training.publish import weights_of
from selective_dpo.training.sealing import from_main, saving_to, write_sealed
from selective_dpo.training.smaller_passes import SmallerPasses


class Part(Protocol):
    """Something that a training gathers on the way, the same on every process."""

    def write_state(self, folder: Path) -> None:
        """Write what there is so far into a file of its own in `folder`."""

    def read_state(self, folder: Path) -> None:
        """Take up what was written, in place of what there is."""


class ResumableTrainer(CheckedLoading):
    """To be named before a trainer class of TRL: its checkpoints go where `train_resumably` says."""

    checkpoints: Checkpoints | None = None

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.weights = weights_of(self.model)
        """What the trained model is to be saved with."""

    def is_asked_to_stop(self) -> bool:
        """Whether SIGTERM has come and was noted, for the next checkpoint."""
        return self.checkpoints is not None and self.checkpoints.is_asked()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.checkpoints is None:
            super()._save_checkpoint(model, trial)
        else:
            # Not TRL's, which writes a model card beside it.
            self.checkpoints.seal(lambda: Trainer._save_checkpoint(self, model, trial))


def train_resumably(trainer: Any, plan: CheckpointPlan | None, parts: Sequence[Part] = ()) -> float:
    """`trainer.train()`, from the newest whole checkpoint if there is one.

    Returns the seconds that were spent up to that checkpoint, by earlier, interrupted commands. All processes
    must call this together. No plan, or one with neither minutes nor steps: no checkpoints.

    Args:
        trainer: a `ResumableTrainer`, which must not save by itself (`save_strategy="no"`).
        parts: what else goes into the checkpoints.

    Raises:
        Interrupted: SIGTERM came, and a checkpoint was made after the update at that moment.
        StartAgainError: memory ran out on one of several processes (see `smaller_passes`).
        ConfigError: the checkpoint was made by another number of processes, or the order of the pairs could
            not be found again.
        CheckpointError: the checkpoint's digests are right, and what is in it is not this training's.
    """
    if plan is None or not (plan.minutes or plan.steps):
        trainer.train()
        return 0.0
    _require_repeatable_order(trainer.args)
    with stopping_when_asked() as is_asked, ending_with_the_others():
        trainer.checkpoints = Checkpoints(trainer, plan, parts, is_asked)
        trainer.add_callback(trainer.checkpoints)
        found = trainer.checkpoints.find()
        trainer.checkpoint = found.folder
        if this_process().num_processes > 1:
            trainer.restart_in(SmallerPasses(plan))
        trainer.train(resume_from_checkpoint=str(found.trainer_folder) if found.folder else None)
    return float(trainer.checkpoints.earlier_seconds)


class Checkpoints(TrainerCallback):
    """When checkpoints are made, and what is in them besides transformers' files.

    To be the last of a trainer's callbacks: what the others do at the end of a step belongs into the
    checkpoint, and what they do at the beginning of a training is undone by what is read from it.
    """

    def __init__(
        self, trainer: Any, plan: CheckpointPlan, parts: Sequence[Part], is_asked: Callable[[], bool]
    ) -> None:
        self._trainer, self._plan, self._parts, self.is_asked = trainer, plan, parts, is_asked
        self._process = this_process()
        self._started = self._last = time.monotonic()
        self.earlier_seconds = 0.0
        self._resumed: Path | None = None
        self._in_first_epoch = True
        self._is_stopping = False
        self._good: list[Path] = []

    # --- going on ------------------------------------------------------------------------------------

    def find(self) -> Found:
        """What to go on from; the main process looks, and says so.

        Raises:
            ConfigError, CheckpointError: on all processes; see `require_layout` and `require_sound`.
        """
        found, refusal = Found(None, []), None
        if self._process.is_main_process:
            found = find_checkpoint(self._plan)
            for line in found.passed_over:
                _say(line)
            try:
                if found.folder is not None:
                    progress = read_progress(found.folder)
                    require_layout(progress, self._layout(), found.folder)
                    require_sound(found.folder, progress, self._trainer)
                    _say(f"going on from {found.folder}, step {progress['step']:,} of {progress['steps']:,}")
            except SelectiveDPOError as error:
                refusal = error
        found, refusal = from_main((found, refusal))
        if refusal is not None:
            raise refusal
        self._resumed = found.folder
        self._good = [] if found.folder is None else [found.folder]
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._resumed is None:
            return
        with reading(self._resumed):
            found = read_progress(self._resumed)
        trainer = self._trainer
        self.earlier_seconds = found["seconds"]
        trainer._metrics["train"].update(found["metrics"])
        trainer._total_train_tokens = found["trained_tokens"]
        trainer._tr_loss += found["loss_since_log"][self._process.process_index]
        trainer._total_loss_scalar = found["loss_until_log"]
        trainer._globalstep_last_logged = found["last_log"]
        trainer._initial_global_step = 0  # the last log entry's loss is the mean over all steps
        # As after a step, even if none is left: to TRL, a log entry in evaluation mode is an evaluation's.
        trainer.model.train()
        self._read_parts()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._resumed is not None and self._in_first_epoch:
            self._read_parts()  # the others take it for the beginning of an epoch, which it need not be
        self._in_first_epoch = False

    def _read_parts(self) -> None:
        assert self._resumed is not None
        with reading(self._resumed):
            for part in self._parts:
                part.read_state(self._resumed)

    # --- when ----------------------------------------------------------------------------------------

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After an epoch's last step, evaluations and log entries of the epoch's end come first.
        if not float(state.epoch).is_integer():
            control.should_save = self._is_due(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = self._is_due(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Of an evaluation by the trainer itself. Its log entry comes at its end only, so it is repeated.
        if on_any_process(self.is_asked()):
            raise Interrupted(
                f"interrupted by SIGTERM in the evaluation at step {state.global_step:,}: {REMEDY}"
            )

    def _is_due(self, state: Any) -> bool:
        """Whether to make a checkpoint now; the same on all processes."""
        by_time = 0 < self._plan.minutes * 60 <= time.monotonic() - self._last
        is_time = on_any_process(by_time and self._process.is_main_process)
        self._is_stopping = on_any_process(self.is_asked())
        by_steps = self._plan.steps > 0 and state.global_step % self._plan.steps == 0
        return is_time or by_steps or self._is_stopping or _is_last(state)

    # --- sealing -------------------------------------------------------------------------------------

    def seal(self, save: Callable[[], None]) -> None:
        """Make a checkpoint; `save` has transformers write its files.

        Raises:
            Interrupted: SIGTERM came.
        """
        state = self._trainer.state
        place = self._plan.place(state.global_step)
        loss_R: list[float] = self._trainer.accelerator.gather(
            self._trainer._tr_loss.detach().view(1)
        ).tolist()

        def write(folder: Path) -> None:
            with saving_to(self._trainer.args, folder / TRAINER, without_optimizer=self._only_weights()):
                save()
            if self._process.is_main_process:
                for pickled in folder.rglob("training_args.bin"):
                    pickled.unlink()  # transformers' arguments as a pickle; nobody needs them
                write_atomic(folder / PROGRESS, json.dumps(self._progress(loss_R)))
                for part in self._parts:
                    part.write_state(folder)

        problem = write_sealed(place, key=self._plan.key, write=write)
        if not problem:
            self._good = [*self._good, place][-KEPT:]
        if self._process.is_main_process:
            if problem:
                newest = self._good[-1].name if self._good else "none"
                _say(f"{place} not written ({problem}); the newest whole one is {newest}; training goes on")
            else:
                keep_only(self._plan.folder, self._good)
        self._last = time.monotonic()
        if self._is_stopping:
            raise Interrupted(
                f"interrupted by SIGTERM at step {state.global_step:,} of {state.max_steps:,}: {REMEDY}"
            )

    def _only_weights(self) -> bool:
        # After the last step only the result is needed; sharded trainings save weights in their own way.
        sharded = self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled
        return _is_last(self._trainer.state) and not sharded

    def _progress(self, loss_R: list[float]) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "step": trainer.state.global_step,
            "steps": trainer.state.max_steps,
            "seconds": self.earlier_seconds + time.monotonic() - self._started,
            "layout": self._layout()._asdict(),
            "metrics": dict(trainer._metrics["train"]),
            "trained_tokens": trainer._total_train_tokens,
            "loss_since_log": loss_R,
            "loss_until_log": trainer._total_loss_scalar,
            "last_log": trainer._globalstep_last_logged,
        }

    def _layout(self) -> Layout:
        args, process = self._trainer.args, self._process
        in_update = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * process.num_processes
        )
        return Layout(process.num_processes, in_update, process.distributed_type.value)


def _is_last(state: Any) -> bool:
    return bool(state.global_step >= state.max_steps)


def _require_repeatable_order(args: Any) -> None:
    if args.train_sampling_strategy != "sequential" and not args.accelerator_config.use_seedable_sampler:
        raise ConfigError(
            "accelerator_config.use_seedable_sampler=False: a resumed training could not find the order of "
            "its pairs again; leave it out, or set launch.checkpoint_minutes and launch.checkpoint_steps to 0"
        )


def _say(line: str) -> None:
    sys.stderr.write(f"checkpoint: {line}\n")
    sys.stderr.flush()
