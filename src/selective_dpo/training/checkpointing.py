"""Checkpoints: a training that was killed resumes from the newest whole one.

    RUN/checkpoints/JOB/step-000123/
      manifest.json            digests of all files, written last; the key of the job it belongs to
      progress.json            where the training stood: what transformers forgets, and how it was distributed
      trainer/checkpoint-123/  transformers' own: weights, optimizer, schedule, random states
      ...                      what else the training has gathered (see `Part`)

A resumed training ends in the same records, order, log and weights as an undisturbed one. Checkpoints are
private to a run, and removed when the training's result is published.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback
from typing_extensions import override

from selective_dpo.distributed.processes import on_any_process, this_process
from selective_dpo.distributed.signals import REMEDY, stopping_when_asked
from selective_dpo.errors import ArtifactError, BusyError, ConfigError, Interrupted
from selective_dpo.storage.artifacts import (
    content_key,
    publish_folder,
    read_json,
    verify_folder,
    write_atomic,
)

KIND = "checkpoint"

PROGRESS = "progress.json"

TRAINER = "trainer"
"""Folder of transformers' own files."""

KEPT = 2
"""Complete checkpoints of a training, the newest ones: if a fault of the disk takes one, there is another."""

_FORMAT = 2
"""1: the order consumed was beside transformers' files."""

_READERS = ("accelerate", "peft", "torch", "transformers", "trl")
"""Libraries whose version a checkpoint belongs to: another one may read it otherwise."""

_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream error")
"""From `torch.save`'s messages when the system refuses to write; it does not pass on the system's error."""

MAX_SHARE = 0.05
"""Of a training's time that checkpoints by time may take: those of large models are written for minutes."""

Value = TypeVar("Value")


class CheckpointPlan(NamedTuple):
    """Where and when a training makes checkpoints; it can be sent to another process."""

    folder: Path
    """Of this training alone."""
    job: str
    """Key of the result that the training is for."""
    minutes: float
    """Between two checkpoints, or more (see `MAX_SHARE`); 0: none by time."""
    steps: int
    """Optimizer steps between two checkpoints; 0: by time only."""

    @property
    def key(self) -> str:
        """What a checkpoint must have been made under to be resumed from."""
        versions = {name: version(name) for name in _READERS}
        return content_key(kind=KIND, job=self.job, versions=versions, format=_FORMAT)

    def place(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.folder / f"step-{step:06d}"


class Part(Protocol):
    """Something that a training gathers on the way, the same on every process."""

    def write_state(self, folder: Path) -> None:
        """Write what there is so far into a file of its own in `folder`."""

    def read_state(self, folder: Path) -> None:
        """Take up what was written, in place of what there is."""


# --- checkpoints on disk ------------------------------------------------------------------------------------


def newest_checkpoint(plan: CheckpointPlan) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, undamaged and of this training, if any.

    Every file's digest is checked. With it come the newer ones that are not, each with its reason.
    """
    passed_over: list[str] = []
    for folder in reversed(checkpoints_in(plan.folder)):
        reason = "made with other settings, inputs or library versions"
        try:
            manifest = verify_folder(folder)
            if (manifest.kind, manifest.key) == (KIND, plan.key):
                return folder, passed_over
        except (ArtifactError, OSError) as error:
            # The remedy for a published folder, to delete it, does not apply here.
            reason = str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder} ").split(";")[0]
        passed_over.append(f"{folder} passed over: {reason}")
    return None, passed_over


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of that name, whole or not, the oldest first."""
    numbers = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    found = [path for path, number in numbers.items() if number.isdecimal()]
    return sorted(found, key=lambda path: int(numbers[path]))


def keep_only(folder: Path, kept: Collection[Path]) -> None:
    """Remove every other checkpoint of a training, and what killed writers left of any."""
    for path in [*checkpoints_in(folder), *folder.glob(".partial-*")]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def discard_checkpoints(folder: Path) -> None:
    """Remove a training's checkpoints, and the folder above if nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


# --- writing: by all processes into one folder aside, published by the main one -----------------------------


def write_checkpoint(place: Path, *, key: str, write: Callable[[Path], None]) -> str:
    """Publish the checkpoint `place`; `write` fills the folder that it is given, on each process.

    What the disk refuses, on whatever process, costs the checkpoint only: nothing of it is left behind, and
    the training goes on. Returns why there is no checkpoint, in a few words; empty: it is complete. The
    answer is the same on all processes.
    """
    problem = ""
    try:
        with contextlib.ExitStack() as stack:
            folder: Path | None = None
            if this_process().is_main_process:
                try:
                    folder = stack.enter_context(publish_folder(place, kind=KIND, key=key))
                except (OSError, BusyError) as error:
                    problem = disk_reason(error) or str(error)
            folder, problem = from_main((folder, problem))
            if folder is not None:
                try:
                    write(folder)
                except Exception as error:
                    problem = disk_reason(error)
                    if not problem:
                        raise
                problem = next(filter(None, gather_object([problem])), "")
            if problem:
                raise OSError(problem)
    except OSError as error:  # this one, or that of the main process while publishing
        problem = disk_reason(error)
    return from_main(problem)


def disk_reason(error: Exception) -> str:
    """Why the disk refused, whatever library wrote, on one line; empty: it was not the disk."""
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH_SAVE):
        return "a file could not be written whole; is the disk full?"
    if not isinstance(error, OSError | SafetensorError):
        return ""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def from_main(value: Value) -> Value:
    """The main process's value, on all processes."""
    if this_process().num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


# --- the training -------------------------------------------------------------------------------------------


class ResumableTrainer(Trainer):
    """To be named before a trainer class of TRL: its checkpoints go where `train_resumably` says."""

    checkpoints: Checkpoints | None = None

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.remove_callback(PrinterCallback)  # log entries stay in the trainer's history
        self.weights = weights_of(self.model)
        """What the trained model is to be saved with."""

    def is_asked_to_stop(self) -> bool:
        """Whether SIGTERM has come and was noted, for the next checkpoint."""
        return self.checkpoints is not None and self.checkpoints.is_asked()

    def create_model_card(self, *args: Any, **others: Any) -> None:
        """None of TRL's beside a checkpoint."""

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints.saving_to if self.checkpoints is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save = super()._save_checkpoint
        if self.checkpoints is None:
            save(model, trial)
        else:
            self.checkpoints.save(lambda: save(model, trial))


def train_resumably(trainer: Any, plan: CheckpointPlan | None, parts: Sequence[Part] = ()) -> float:
    """`trainer.train()`, from the newest whole checkpoint if there is one.

    Returns the seconds that were spent up to that checkpoint, by earlier, interrupted commands. All processes
    must call this together. No plan, or one with neither minutes nor steps: no checkpoints.

    Args:
        trainer: a `ResumableTrainer`, which must not save by itself (`save_strategy="no"`).
        parts: what else goes into the checkpoints.

    Raises:
        Interrupted: SIGTERM came, and a checkpoint was made after the update at that moment.
        ConfigError: the checkpoint was made by another number of processes, or the order of the pairs could
            not be found again.
    """
    if plan is None or not (plan.minutes or plan.steps):
        trainer.train()
        return 0.0
    args = trainer.args
    if args.train_sampling_strategy != "sequential" and not args.accelerator_config.use_seedable_sampler:
        raise ConfigError(
            "accelerator_config.use_seedable_sampler=False: a resumed training could not find the order of "
            "its pairs again; leave it out, or set launch.checkpoint_minutes and launch.checkpoint_steps to 0"
        )
    with stopping_when_asked() as is_asked:
        trainer.checkpoints = Checkpoints(trainer, plan, parts, is_asked)
        trainer.add_callback(trainer.checkpoints)
        found = trainer.checkpoints.find()
        trainer.train(resume_from_checkpoint=found and str(next((found / TRAINER).iterdir())))
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
        self._took = 0.0
        self.earlier_seconds = 0.0
        self._is_stopping = False
        self.saving_to: str = trainer.args.output_dir
        self._good: list[Path] = []
        args, processes = trainer.args, self._process.num_processes
        pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        kind = self._process.distributed_type.value
        self._layout = f"{processes} process(es), {pairs} pairs an update, {kind}"

    # --- resuming ------------------------------------------------------------------------------------

    def find(self) -> Path | None:
        """What to resume from; the main process looks, and says so.

        Another number of processes with the same settings is another number of pairs in an update, so the
        training would not come to the same end; and what was computed so far is the user's to throw away.

        Raises:
            ConfigError: on all processes: the checkpoint was made in another layout. Both are named.
        """
        found, problem = None, ""
        if self._process.is_main_process:
            found, passed_over = newest_checkpoint(self._plan)
            for line in passed_over:
                _say(line)
            progress = read_json(found / PROGRESS) if found is not None else {}
            if progress and progress["layout"] != self._layout:
                problem = (
                    f"{found} was made by {progress['layout']}; now there are {self._layout}: start as many "
                    f"processes as before to go on, or delete {self._plan.folder} to begin this training anew"
                )
            elif progress:
                _say(f"going on from {found}, step {progress['step']:,} of {progress['steps']:,}")
        found, problem = from_main((found, problem))
        if problem:
            raise ConfigError(problem)
        self._good = [] if found is None else [found]
        return found

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._good:
            return
        found = read_json(self._good[0] / PROGRESS)
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
        for part in self._parts:
            part.read_state(self._good[0])

    # --- when ----------------------------------------------------------------------------------------

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After an epoch's last step, evaluations and log entries of the epoch's end come first.
        if not float(state.epoch).is_integer():
            control.should_save = self._is_due(state)

    @override
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = self._is_due(state)

    @override
    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Of an evaluation by the trainer itself. Its log entry comes at its end only, so it is repeated.
        if on_any_process(self.is_asked()):
            raise Interrupted(
                f"interrupted by SIGTERM in the evaluation at step {state.global_step:,}: {REMEDY}"
            )

    def _is_due(self, state: Any) -> bool:
        """Whether to make a checkpoint now; the same on all processes."""
        interval = max(self._plan.minutes * 60, self._took / MAX_SHARE)
        by_time = self._plan.minutes > 0 and time.monotonic() - self._last >= interval
        is_time = on_any_process(by_time and self._process.is_main_process)
        self._is_stopping = on_any_process(self.is_asked())
        by_steps = self._plan.steps > 0 and state.global_step % self._plan.steps == 0
        return is_time or by_steps or self._is_stopping or _is_last(state)

    # --- saving --------------------------------------------------------------------------------------

    def save(self, write_files: Callable[[], None]) -> None:
        """Make a checkpoint; `write_files` has transformers write its files.

        Raises:
            Interrupted: SIGTERM came.
        """
        started, trainer, state = time.monotonic(), self._trainer, self._trainer.state
        place = self._plan.place(state.global_step)
        # After the last step only the result is needed; sharded trainings save weights in files of their own.
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        progress = {
            "step": state.global_step,
            "steps": state.max_steps,
            "seconds": self.earlier_seconds + time.monotonic() - self._started,
            "layout": self._layout,
            "metrics": dict(trainer._metrics["train"]),
            "trained_tokens": trainer._total_train_tokens,
            "loss_since_log": trainer.accelerator.gather(trainer._tr_loss.detach().view(1)).tolist(),
            "loss_until_log": trainer._total_loss_scalar,
            "last_log": trainer._globalstep_last_logged,
        }

        def write(folder: Path) -> None:
            self.saving_to = str(folder / TRAINER)
            trainer.args.save_only_model = _is_last(state) and not sharded
            write_files()
            if self._process.is_main_process:
                for pickled in folder.rglob("training_args.bin"):
                    pickled.unlink()  # transformers' arguments as a pickle; nobody needs them
                write_atomic(folder / PROGRESS, json.dumps(progress))
                for part in self._parts:
                    part.write_state(folder)

        problem = write_checkpoint(place, key=self._plan.key, write=write)
        if not problem:
            self._good = [*self._good, place][-KEPT:]
        if self._process.is_main_process:
            if problem:
                newest = self._good[-1].name if self._good else "none"
                _say(f"{place} not written ({problem}); the newest whole one is {newest}; training goes on")
            else:
                keep_only(self._plan.folder, self._good)
        self._last = time.monotonic()
        self._took = self._last - started
        if self._is_stopping:
            raise Interrupted(
                f"interrupted by SIGTERM at step {state.global_step:,} of {state.max_steps:,}: {REMEDY}"
            )


def _is_last(state: Any) -> bool:
    return bool(state.global_step >= state.max_steps)


def _say(line: str) -> None:
    sys.stderr.write(f"checkpoint: {line}\n")
    sys.stderr.flush()


def weights_of(model: Any) -> dict[str, int]:
    """How many numbers each saved weight of a trained `model` holds: those of its adapter, or all.

    To be called before a training, which may shard the weights.
    """
    adapter_only = isinstance(model, PeftModel)
    return {
        # ZeRO-3 leaves a weight empty, with its size beside it.
        name: getattr(weight, "ds_numel", weight.numel())
        for name, weight in model.named_parameters()  # of weights tied to each other, one
        if weight.requires_grad or not adapter_only
    }
