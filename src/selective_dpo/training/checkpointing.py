"""Checkpoints on disk: sealed folders, of which only whole and fitting ones are ever read.

    RUN/checkpoints/JOB/step-000123/
      manifest.json            digests of all files, written last; the key of the job it belongs to
      progress.json            where the training stood, and how it was spread
      trainer/checkpoint-123/  transformers' own: weights, optimizer, schedule, random states
      ...                      what else the training has gathered (see `resumable.Part`)

They are private to a run, and removed when the training's result is published.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME
from typing_extensions import override

from selective_dpo.distributed.launch import ask_to_start_again, ending_with_the_others
from selective_dpo.distributed.processes import on_any_process, this_process
from selective_dpo.distributed.signals import REMEDY, stopping_when_asked
from selective_dpo.errors import (
    ArtifactError,
    BusyError,
    CheckpointError,
    ConfigError,
    DiskError,
    Interrupted,
    ModelError,
    SelectiveDPOError,
    StartAgainError,
    disk_fault,
    is_out_of_memory,
    name_some,
)
from selective_dpo.storage.artifacts import (
    content_key,
    publish_folder,
    read_json,
    verify_folder,
    write_atomic,
    write_json,
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
        """What a checkpoint must have been made under to be gone on from."""
        return content_key(kind=KIND, job=self.job, versions={name: version(name) for name in _READERS})

    def place(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.folder / f"step-{step:06d}"


class Layout(NamedTuple):
    """How a training is spread. Numbers and files of a checkpoint fit this one only."""

    processes: int
    pairs_per_update: int
    kind: str
    """accelerate's name of the way of being distributed."""

    def describe(self) -> str:
        """In words."""
        return f"{self.processes} process(es), {self.pairs_per_update} pairs an update, {self.kind}"


class Found(NamedTuple):
    """What there is to go on from."""

    folder: Path | None
    """The newest whole checkpoint of this training, if any."""
    passed_over: list[str]
    """The newer ones that are not, each with its reason."""

    @property
    def trainer_folder(self) -> Path | None:
        """Where transformers' own files are."""
        return None if self.folder is None else next((self.folder / TRAINER).iterdir())


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


def require_layout(progress: dict[str, Any], now: Layout, folder: Path) -> None:
    """Refuse to go on in another way than the checkpoint in `folder` was made.

    Another number of processes with the same settings is another number of pairs in an update, so the
    training would not come to the same end; and what was computed so far is the user's to throw away.

    Raises:
        ConfigError: both ways are named.
    """
    then = Layout(**progress["layout"])
    if then != now:
        raise ConfigError(
            f"{folder} was made by {then.describe()}; now there are {now.describe()}: start as many "
            f"processes as before to go on, or delete {folder.parent} to begin this training anew"
        )


def read_progress(folder: Path) -> dict[str, Any]:
    """The checkpoint's `progress.json`, each value of its kind.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        progress = read_json(folder / PROGRESS)
    except ArtifactError as error:
        raise unsound(folder, str(error)) from error
    wrong = [name for name, is_right in _KINDS.items() if not is_right(progress.get(name))]
    if not wrong and len(progress["loss_since_log"]) != progress["layout"]["processes"]:
        wrong = ["loss_since_log"]
    if wrong:
        raise unsound(folder, f"{PROGRESS}: {name_some(wrong)}")
    return progress


def unsound(folder: Path, reason: str) -> CheckpointError:
    """The error that says so of the checkpoint in `folder`."""
    return CheckpointError(
        f"{folder} is not what this training wrote, although its digests say so ({reason}): delete that "
        "folder, and the same command goes on from the checkpoint before it, if there is one"
    )


def is_number(value: object) -> bool:
    """Whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Whether a JSON value is a number of things."""
    return type(value) is int and value >= 0


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _is_layout(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != set(Layout._fields):
        return False
    return (
        is_count(value["processes"])
        and is_count(value["pairs_per_update"])
        and isinstance(value["kind"], str)
    )


_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "steps", "last_log"), is_count),
    **dict.fromkeys(("seconds", "trained_tokens", "loss_until_log"), is_number),
    "layout": _is_layout,
    "metrics": lambda value: isinstance(value, dict) and all(map(_are_numbers, value.values())),
    "loss_since_log": _are_numbers,
}
"""What each value of `progress.json` is."""


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


def _reason(error: Exception, folder: Path) -> str:
    # The remedy of a published folder, to delete it, is not needed here.
    text = str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder} ")
    return text.split(";")[0]


# ----------------------------------------------------------------------------------------------------
# Reading a checkpoint: what none of this training's would hold is one typed error, on all processes.
#
# Digests find damage. Somebody who replaces a file can rewrite the manifest, too, and then a checkpoint holds
# anything: weights of another model, a pickle that `weights_only` refuses, JSON of another kind. None of it
# runs. Here it is kept from ending in whatever transformers happens to stumble over, or from being taken for
# less than it should be: transformers only notes that weights are missing, and goes on with those of the
# start.
#
# Only the reading is guarded. What is raised after it is the training's own.


_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each weight, in its shape."""


class CheckedLoading(Trainer):
    """transformers' own reading of a checkpoint, guarded. To be named before a trainer class of TRL."""

    checkpoint: Path | None = None
    """The folder that is gone on from; None: guarded by nobody."""

    def _load_from_checkpoint(self, *args: Any, **others: Any) -> None:
        with reading(self.checkpoint):
            super()._load_from_checkpoint(*args, **others)

    def _init_training_state(self, *args: Any, **others: Any) -> Any:
        with reading(self.checkpoint):
            return super()._init_training_state(*args, **others)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = self.checkpoint
        has_states = checkpoint is not None and (Path(checkpoint) / OPTIMIZER_NAME).is_file()
        if folder is None or not has_states or _is_sharded(self):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with reading(folder), _whole_schedule(self.lr_scheduler), _whole_states(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(self.checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(self.checkpoint):
            super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def reading(checkpoint: Path | None) -> Iterator[None]:
    """Inside, files of `checkpoint` are read; all processes enter together. None: without any guard.

    Raises:
        CheckpointError: on all processes, where a file of any of them is not what it should be.
    """
    if checkpoint is None:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    # The others would wait for ever for a process that ends here.
    reasons = [reason for reason in gather_object([_why_unreadable(own)]) if reason]
    if own is not None and _says_enough(own):
        raise own
    if reasons:
        raise unsound(checkpoint, reasons[0]) from own


def require_sound(checkpoint: Path, progress: Mapping[str, Any], trainer: Any) -> None:
    """Check what can be checked of a checkpoint without reading its tensors; for one process.

    Raises:
        CheckpointError: files are missing, or not of this training.
        DiskError: the system refuses to read them.
    """
    try:
        folder = checkpoint / TRAINER / f"checkpoint-{progress['step']}"
        _require_state(folder / TRAINER_STATE_NAME, progress)
        if not _is_sharded(trainer):
            _require_weights(folder, trainer.model)
            if progress["step"] < progress["steps"]:
                _require_files(folder, progress["layout"]["processes"])
    except Exception as error:
        if fault := disk_fault(error):
            raise DiskError(fault) from error
        raise unsound(checkpoint, _why_unreadable(error)) from error


def _says_enough(error: Exception) -> bool:
    """Whether it is for the user as it is, or nothing of the checkpoint's."""
    return isinstance(error, CheckpointError) or is_out_of_memory(error) or bool(disk_fault(error))


def _why_unreadable(error: Exception | None) -> str:
    if error is None:
        return ""
    # PyTorch goes on to explain how to read a pickle after all.
    sentence = " ".join(str(error).split()).split(". ")[0][:200]
    is_told = isinstance(error, _UnfitError | SelectiveDPOError)
    return sentence if is_told else f"{type(error).__name__}: {sentence}".rstrip(": ")


class _UnfitError(Exception):
    """Something is there, and readable, and not what this training writes."""


def _is_sharded(trainer: Any) -> bool:
    # DeepSpeed and FSDP have files of their own.
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


# --- trainer_state.json -----------------------------------------------------------------------------------


def _require_state(path: Path, progress: Mapping[str, Any]) -> None:
    found, usual = read_json(path), vars(TrainerState())
    wrong = [name for name in found.keys() | usual.keys() if not _is_alike(found, usual, name)]
    steps = (("global_step", "step"), ("max_steps", "steps"))
    wrong += [name for name, own in steps if found.get(name) != progress[own]]
    if wrong:
        raise _UnfitError(f"{path.name}: {name_some(sorted(set(wrong)))}")


def _is_alike(found: Mapping[str, Any], usual: Mapping[str, Any], name: str) -> bool:
    if name not in found or name not in usual:
        return False
    value, example = found[name], usual[name]
    if name == "log_history":
        return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    if example is None or value is None:
        return True
    return _are_of_one_kind(value, example)


def _are_of_one_kind(value: object, example: object) -> bool:
    return (is_number(value) and is_number(example)) or type(value) is type(example)


# --- weights ----------------------------------------------------------------------------------------------


def _require_weights(folder: Path, model: Any) -> None:
    """The names and shapes of the weights that training writes, against those of the model."""
    if (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        from peft import get_peft_model_state_dict

        files = [ADAPTER_SAFE_WEIGHTS_NAME]
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        files = (
            sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [SAFE_WEIGHTS_NAME]
        )
        wanted = model.state_dict()
    found: dict[str, list[int]] = {}
    for name in files:
        with safe_open(folder / Path(name).name, framework="pt") as file:
            found |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    written = {weight.data_ptr() for name, weight in wanted.items() if name in found}
    wrong = [
        f"{name} {found.get(name, 'missing')}"
        for name, weight in wanted.items()
        # Of weights that are tied to each other, one is written.
        if found.get(name, None if weight.data_ptr() in written else "missing")
        not in (None, list(weight.shape))
    ]
    if wrong:
        raise _UnfitError(f"weights that do not fit the model: {name_some(dict.fromkeys(wrong), limit=2)}")


# --- optimizer, schedule, random states -------------------------------------------------------------------


def _require_files(folder: Path, processes: int) -> None:
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME, *states) if not (folder / name).is_file()]
    if missing:
        raise _UnfitError(f"without {name_some(missing)}")


@contextlib.contextmanager
def _whole_schedule(scheduler: Any) -> Iterator[None]:
    """Inside, the state of `scheduler` is read: on leaving, each part of it must have been there."""
    if not isinstance(scheduler, LambdaLR):
        yield
        return
    before = {name: value for name, value in scheduler.state_dict().items() if name in vars(scheduler)}
    before.pop("lr_lambdas", None)
    vars(scheduler).update(dict.fromkeys(before, _Unread))
    yield
    wrong = [name for name, value in before.items() if type(vars(scheduler)[name]) is not type(value)]
    if wrong:
        raise _UnfitError(f"{SCHEDULER_NAME}: {name_some(wrong)}")


class _Unread:
    """Stands for what a file has not brought."""


@contextlib.contextmanager
def _whole_states(optimizer: Any) -> Iterator[None]:
    """Inside, the states of `optimizer` are read: on leaving, they must fit its weights and settings."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps it
    before = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    yield
    wrong = [
        name
        for group, after in zip(before, optimizer.param_groups, strict=True)
        for name, value in group.items()
        if name not in after or not _are_of_one_kind(after[name], value)
    ]
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        wrong += [] if optimizer.state else ["no moments"]
        wrong += [
            f"{name} of a weight of shape {list(weight.shape)}"
            for weight, state in optimizer.state.items()
            for name in _MOMENTS
            if getattr(state.get(name), "shape", None) != weight.shape
        ]
        wrong += ["step" for state in optimizer.state.values() if "step" not in state]
    if wrong:
        raise _UnfitError(f"{OPTIMIZER_NAME}: {name_some(dict.fromkeys(wrong), limit=2)}")


# ----------------------------------------------------------------------------------------------------
# Writing a checkpoint: by all processes into one folder aside, sealed by the main one.
#
# What the disk refuses, on whatever process, costs the checkpoint only: all processes are told of it, nothing
# of it is left behind, and the training goes on.


Value = TypeVar("Value")

_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream error")
"""From `torch.save`'s own words for what the system refused; it does not pass on the system's."""


class _NotWrittenError(Exception):
    """On all processes alike: one of them could not write its part."""


def write_sealed(place: Path, *, key: str, write: Callable[[Path], None]) -> str:
    """Publish the checkpoint `place`; `write` fills the folder that it is given, on each process.

    Returns why there is no checkpoint, in a few words; empty: it is complete. The answer is the same on
    all processes.
    """
    problem = ""
    try:
        with _shared_folder(place, key) as folder:
            reasons = gather_object([_reason_not_to_write(lambda: write(folder))])
            if any(reasons):
                raise _NotWrittenError(next(filter(None, reasons)))
    except _NotWrittenError as error:
        problem = str(error)
    except OSError as error:  # of the main process, while sealing
        problem = in_short(error)
    return from_main(problem)


def from_main(value: Value) -> Value:
    """The main process's value, on all processes."""
    if this_process().num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def saving_to(args: Any, folder: Path, *, without_optimizer: bool) -> Iterator[None]:
    """Inside, a trainer with these arguments saves its checkpoints below `folder`."""
    before = args.output_dir, args.save_only_model
    args.output_dir, args.save_only_model = str(folder), without_optimizer
    try:
        yield
    finally:
        args.output_dir, args.save_only_model = before


@contextlib.contextmanager
def _shared_folder(place: Path, key: str) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        problem = ""
        if this_process().is_main_process:
            try:
                folder = stack.enter_context(publish_folder(place, kind=KIND, key=key))
            except (OSError, BusyError) as error:
                problem = in_short(error)
        folder, problem = from_main((folder, problem))
        if folder is None:
            raise _NotWrittenError(problem)
        yield folder


def _reason_not_to_write(write: Callable[[], None]) -> str:
    try:
        write()
    except Exception as error:
        if is_of_the_disk(error):
            return in_short(error)
        raise
    return ""


def is_of_the_disk(error: Exception) -> bool:
    """Whether writing failed because of the disk, whatever library it was that wrote."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _TORCH_SAVE)
    return isinstance(error, OSError | SafetensorError)


def in_short(error: Exception) -> str:
    """What the disk said."""
    if isinstance(error, RuntimeError):
        return "a file could not be written whole; is the disk full?"
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split())[:200] or type(error).__name__


# ----------------------------------------------------------------------------------------------------
# Out of memory with several processes: all start again from the newest checkpoint, in smaller passes.
#
# A process that fails in a backward pass leaves the others waiting in an all-reduce, with part of its
# gradient already in theirs: nothing can be repeated in place, as `micro_batches` does for one process. So
# the failed one leaves word beside the checkpoints, and ends; the others end with it.
#
#     RUN/checkpoints/JOB/passes.json     the checkpoints' key, and how many pairs a pass holds from now on
#
# Each restart at least halves what a pass holds, so there is an end to them. The file goes with the
# checkpoints
# when the training's result is published. DeepSpeed's batches cannot be parted: it decides by itself where an
# update ends.


PASSES = "passes.json"

logger = logging.getLogger(__name__)


class SmallerPasses:
    """How large the passes of a training on several processes may be; made by all of them together."""

    def __init__(self, plan: CheckpointPlan) -> None:
        self._plan = plan
        pairs = read_passes(plan) if this_process().is_main_process else None
        self.most_pairs: int | None = from_main(pairs)
        """Pairs that a pass of each process holds at most; None: as they are dealt."""
        if self.most_pairs is not None and this_process().is_main_process:
            logger.warning(
                "memory ran out before: training passes hold at most %s pair(s) (%s); each update's pairs "
                "and their weights stay the same",
                f"{self.most_pairs:,}",
                _place(plan),
            )

    def start_again(self, what: str, *, pairs: int) -> NoReturn:
        """Have the training go on in passes of half of `pairs`, which did not fit. `what` tells of it.

        Raises:
            StartAgainError: always, unless
            ModelError: the disk refuses.
        """
        half = max(1, pairs // 2)
        try:
            # Several may fail at once, each with its own number. Whichever stays is at most half of what
            # could fail, and that is all it takes to come to an end.
            write_json(_place(self._plan), {"key": self._plan.key, "pairs_per_pass": half})
        except OSError as error:
            raise ModelError(
                f"{what}, and {_place(self._plan)} cannot be written ({in_short(error)}): mend that, or "
                "lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor"
            ) from error
        how = f"from the newest checkpoint in passes of {half:,} pair(s)"
        if ask_to_start_again(f"{_place(self._plan)}: not {self.most_pairs or 'all'} pairs"):
            raise StartAgainError(f"{what}: all processes start again, and go on {how}")
        raise StartAgainError(f"{what}: run the same command to go on {how}")


def read_passes(plan: CheckpointPlan) -> int | None:
    """The pairs that a pass of this training may hold; None if nothing readable says so.

    It decides about memory, and about numbers only by rounding, so it has no digest.
    """
    try:
        found = read_json(_place(plan))
    except (ArtifactError, OSError):
        return None
    pairs = found.get("pairs_per_pass")
    fits = found.get("key") == plan.key and type(pairs) is int and pairs >= 1
    return pairs if fits else None


def _place(plan: CheckpointPlan) -> Path:
    return plan.folder / PASSES


# ----------------------------------------------------------------------------------------------------
# Trainings that survive being killed: they go on from their newest whole checkpoint.
#
# Saving and resuming are transformers' own. What is added: a checkpoint is written aside and sealed with its
# digests, it is made by time, on SIGTERM and at the end, and it also holds what transformers forgets: pending
# metrics, and what this package gathers on the way (`Part`). So a resumed training ends in the same records,
# order, log and weights as an undisturbed one.


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

    @override
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

    @override
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


def weights_of(model: Any) -> dict[str, int]:
    """How many numbers each weight holds that a trained `model` is saved with: its adapter's, or all.

    To be asked before a training, which may spread the weights over processes.
    """
    adapter_only = isinstance(model, PeftModel)
    return {
        # ZeRO-3 leaves a weight empty, with its size beside it.
        name: getattr(weight, "ds_numel", weight.numel())
        for name, weight in model.named_parameters()  # of weights tied to each other, one
        if weight.requires_grad or not adapter_only
    }
