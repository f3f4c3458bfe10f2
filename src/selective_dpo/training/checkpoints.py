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
import re
import shutil
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from selective_dpo.artifacts import content_key, read_json, verify_folder
from selective_dpo.errors import ArtifactError, CheckpointError, ConfigError, name_some

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
