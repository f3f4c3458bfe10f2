"""Checkpoints: a training that was killed resumes from the newest whole one.

    RUN/checkpoints/JOB/step-000123/
      manifest.json            digests of all files, written last; the key of the job it belongs to
      progress.json            where the training stood, and how it was distributed
      trainer/checkpoint-123/  transformers' own: weights, optimizer, schedule, random states
      ...                      what else the training has gathered (see `Part`)

Saving and resuming are transformers' own. This file adds: a checkpoint is written aside and published whole
with its digests; it is made by time, on SIGTERM and at the end; and it also holds what transformers forgets:
pending metrics, and the parts. So a resumed training ends in the same records, order, log and weights as an
undisturbed one. Checkpoints are private to a run, and removed when the training's result is published.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
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

_NAME = re.compile(r"step-(\d{6,})")

_READERS = ("accelerate", "peft", "torch", "transformers", "trl")
"""Libraries whose version a checkpoint belongs to: another one may read it otherwise."""

_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream error")
"""From `torch.save`'s messages when the system refuses to write; it does not pass on the system's error."""

Value = TypeVar("Value")


class CheckpointPlan(NamedTuple):
    """Where and when a training makes checkpoints; it can be sent to another process."""

    folder: Path
    """Of this training alone."""
    job: str
    """Key of the result that the training is for."""
    minutes: float
    """Between two checkpoints; 0: none by time."""
    steps: int
    """Optimizer steps between two checkpoints; 0: by time only."""

    @property
    def key(self) -> str:
        """What a checkpoint must have been made under to be resumed from."""
        return content_key(kind=KIND, job=self.job, versions={name: version(name) for name in _READERS})

    def place(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.folder / f"step-{step:06d}"


class Layout(NamedTuple):
    """How a training is distributed. Numbers and files of a checkpoint fit this one only."""

    processes: int
    pairs_per_update: int
    kind: str
    """accelerate's name of the distributed type."""

    def describe(self) -> str:
        """In words."""
        return f"{self.processes} process(es), {self.pairs_per_update} pairs an update, {self.kind}"


class Found(NamedTuple):
    """What there is to resume from."""

    folder: Path | None
    """The newest whole checkpoint of this training, if any."""
    passed_over: list[str]
    """The newer ones that are not, each with its reason."""

    @property
    def trainer_folder(self) -> Path | None:
        """Where transformers' own files are."""
        return None if self.folder is None else next((self.folder / TRAINER).iterdir())


class Part(Protocol):
    """Something that a training gathers on the way, the same on every process."""

    def write_state(self, folder: Path) -> None:
        """Write what there is so far into a file of its own in `folder`."""

    def read_state(self, folder: Path) -> None:
        """Take up what was written, in place of what there is."""


# --- checkpoints on disk ----------------------------------------------------------------------------------


def find_checkpoint(plan: CheckpointPlan) -> Found:
    """The newest checkpoint that is whole, undamaged and of this training. Every file's digest is checked."""
    passed_over = []
    for folder in reversed(checkpoints_in(plan.folder)):
        try:
            manifest = verify_folder(folder)
        except (ArtifactError, OSError) as error:
            passed_over.append(f"{folder} passed over: {_reason(error, folder)}")
            continue
        if (manifest.kind, manifest.key) == (KIND, plan.key):
            return Found(folder, passed_over)
        passed_over.append(f"{folder} passed over: made with other settings, inputs or library versions")
    return Found(None, passed_over)


def _reason(error: Exception, folder: Path) -> str:
    # The remedy for a published folder, to delete it, does not apply here.
    text = str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder} ")
    return text.split(";")[0]


def require_layout(progress: dict[str, Any], now: Layout, folder: Path) -> None:
    """Refuse to resume in another layout than that of the checkpoint in `folder`.

    Another number of processes with the same settings is another number of pairs in an update, so the
    training would not come to the same end; and what was computed so far is the user's to throw away.

    Raises:
        ConfigError: both layouts are named.
    """
    then = Layout(**progress["layout"])
    if then != now:
        raise ConfigError(
            f"{folder} was made by {then.describe()}; now there are {now.describe()}: start as many "
            f"processes as before to go on, or delete {folder.parent} to begin this training anew"
        )


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of that name, whole or not, the oldest first."""
    with contextlib.suppress(FileNotFoundError):
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
    return []


def keep_only(folder: Path, kept: Collection[Path]) -> None:
    """Remove every other checkpoint of a training, and what killed writers left of any."""
    leftovers = folder.glob(".partial-*") if folder.is_dir() else ()
    for path in [*checkpoints_in(folder), *leftovers]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def discard_checkpoints(folder: Path) -> None:
    """Remove a training's checkpoints, and the folder above if nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


# --- writing: by all processes into one folder aside, published by the main one ---------------------------


class _NotWrittenError(Exception):
    """On all processes alike: one of them could not write its part."""


def write_checkpoint(place: Path, *, key: str, write: Callable[[Path], None]) -> str:
    """Publish the checkpoint `place`; `write` fills the folder that it is given, on each process.

    What the disk refuses, on whatever process, costs the checkpoint only: nothing of it is left behind, and
    the training goes on. Returns why there is no checkpoint, in a few words; empty: it is complete. The
    answer is the same on all processes.
    """
    problem = ""
    try:
        with _shared_folder(place, key) as folder:
            reasons = gather_object([_reason_not_written(lambda: write(folder))])
            if any(reasons):
                raise _NotWrittenError(next(filter(None, reasons)))
    except _NotWrittenError as error:
        problem = str(error)
    except OSError as error:  # of the main process, while publishing
        problem = disk_reason(error)
    return from_main(problem)


@contextlib.contextmanager
def _shared_folder(place: Path, key: str) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        problem = ""
        if this_process().is_main_process:
            try:
                folder = stack.enter_context(publish_folder(place, kind=KIND, key=key))
            except (OSError, BusyError) as error:
                problem = disk_reason(error)
        folder, problem = from_main((folder, problem))
        if folder is None:
            raise _NotWrittenError(problem)
        yield folder


def _reason_not_written(write: Callable[[], None]) -> str:
    try:
        write()
    except Exception as error:
        if is_disk_error(error):
            return disk_reason(error)
        raise
    return ""


def is_disk_error(error: Exception) -> bool:
    """Whether writing failed because of the disk, whatever library wrote."""
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in _TORCH_SAVE)
    return isinstance(error, OSError | SafetensorError)


def disk_reason(error: Exception) -> str:
    """The system's message, on one line."""
    if isinstance(error, RuntimeError):
        return "a file could not be written whole; is the disk full?"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def from_main(value: Value) -> Value:
    """The main process's value, on all processes."""
    if this_process().num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def _saving_to(args: Any, folder: Path, *, without_optimizer: bool) -> Iterator[None]:
    """Inside, a trainer with these arguments saves its checkpoints below `folder`."""
    before = args.output_dir, args.save_only_model
    args.output_dir, args.save_only_model = str(folder), without_optimizer
    try:
        yield
    finally:
        args.output_dir, args.save_only_model = before


# --- the training ------------------------------------------------------------------------------------------


class ResumableTrainer(Trainer):
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
            self.checkpoints.save(lambda: Trainer._save_checkpoint(self, model, trial))


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
    _require_repeatable_order(trainer.args)
    with stopping_when_asked() as is_asked:
        trainer.checkpoints = Checkpoints(trainer, plan, parts, is_asked)
        trainer.add_callback(trainer.checkpoints)
        found = trainer.checkpoints.find()
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

    # --- resuming ------------------------------------------------------------------------------------

    def find(self) -> Found:
        """What to resume from; the main process looks, and says so.

        Raises:
            ConfigError: on all processes; see `require_layout`.
        """
        found, refusal = Found(None, []), None
        if self._process.is_main_process:
            found = find_checkpoint(self._plan)
            for line in found.passed_over:
                _say(line)
            try:
                if found.folder is not None:
                    progress = read_json(found.folder / PROGRESS)
                    require_layout(progress, self._layout(), found.folder)
                    _say(f"going on from {found.folder}, step {progress['step']:,} of {progress['steps']:,}")
            except ConfigError as error:
                refusal = error
        found, refusal = from_main((found, refusal))
        if refusal is not None:
            raise refusal
        self._resumed = found.folder
        self._good = [] if found.folder is None else [found.folder]
        return found

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._resumed is None:
            return
        found = read_json(self._resumed / PROGRESS)
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

    @override
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._resumed is not None and self._in_first_epoch:
            self._read_parts()  # the others take it for the beginning of an epoch, which it need not be
        self._in_first_epoch = False

    def _read_parts(self) -> None:
        assert self._resumed is not None
        for part in self._parts:
            part.read_state(self._resumed)

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
        by_time = 0 < self._plan.minutes * 60 <= time.monotonic() - self._last
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
        state = self._trainer.state
        place = self._plan.place(state.global_step)
        loss_R: list[float] = self._trainer.accelerator.gather(
            self._trainer._tr_loss.detach().view(1)
        ).tolist()

        def write(folder: Path) -> None:
            with _saving_to(self._trainer.args, folder / TRAINER, without_optimizer=self._only_weights()):
                write_files()
            if self._process.is_main_process:
                for pickled in folder.rglob("training_args.bin"):
                    pickled.unlink()  # transformers' arguments as a pickle; nobody needs them
                write_atomic(folder / PROGRESS, json.dumps(self._progress(loss_R)))
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
        if self._is_stopping:
            raise Interrupted(
                f"interrupted by SIGTERM at step {state.global_step:,} of {state.max_steps:,}: {REMEDY}"
            )

    def _only_weights(self) -> bool:
        # After the last step only the result is needed; sharded trainings save weights in files of their own.
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
