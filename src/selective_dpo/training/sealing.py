"""Writing a checkpoint: by all processes into one folder aside, sealed by the main one.

What the disk refuses, on whatever process, costs the checkpoint only: all processes are told of it, nothing
of it is left behind, and the training goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from selective_dpo.artifacts import publish_folder
from selective_dpo.engine.processes import this_process
from selective_dpo.errors import BusyError
from selective_dpo.training.checkpoints import KIND

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
