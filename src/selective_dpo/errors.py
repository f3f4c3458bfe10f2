"""The mistakes a user can mend. Each is one clear line with the remedy; the command line exits with 2,
or with 75 where the same command has only to be run again.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path


class SelectiveDPOError(Exception):
    """Base of every error that the user, not this package, has to mend."""

    exit_code: int = 2
    """What the command line returns."""


class ConfigError(SelectiveDPOError):
    """A recipe, flag or argument is wrong, unknown, contradictory or without effect."""


class DataError(SelectiveDPOError):
    """Preference data cannot be read, or too little of it is left to work with."""


class TemplateError(DataError):
    """The chat template and the tokenizer do not give a usable prompt/completion boundary."""


class RunawayTemplateError(TemplateError):
    """A chat template takes more time or memory, or writes more, than any template needs."""


class ModelError(SelectiveDPOError):
    """The model or tokenizer cannot be loaded, or cannot do what the recipe asks of it."""


class ArtifactError(SelectiveDPOError):
    """A published file is missing, incomplete, of another schema, or not what its digest says."""


class IdentityError(SelectiveDPOError):
    """Ids that should match one to one do not: missing, extra or repeated ones are named."""


class RecordsError(SelectiveDPOError):
    """Held-out records are incomplete or not finite where a complete set is needed."""


class NotFiniteError(SelectiveDPOError):
    """A training came upon a loss or a gradient that is not finite, and stopped before learning from it."""


class DiskError(SelectiveDPOError):
    """The system refused to write or read: the disk is full, read-only, or not allowed."""


class RunChangedError(SelectiveDPOError):
    """The recipe differs from the one that the run directory was made with."""


class BusyError(SelectiveDPOError):
    """Another process is at work on the same run or artifact; it is named."""


class SlurmError(SelectiveDPOError):
    """Slurm is not there, or refuses."""


class PublishError(SelectiveDPOError):
    """The result is complete on disk but could not be sent to where the recipe wants it."""


class Interrupted(SelectiveDPOError):  # noqa: N818 (nothing is wrong)
    """SIGTERM came, and the work stopped where it can be taken up again."""

    exit_code = 75
    """The system's EX_TEMPFAIL: try again. A scheduler can queue the same command again on it."""


_DISK_FAULTS = frozenset(  # not of this package
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.ESTALE,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    )
)

_OS_ERROR = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")
"""How libraries written in Rust tell an error's number."""


def disk_fault(error: BaseException | None) -> str | None:
    """What the system refused, in one line, if `error` or its cause is a fault of a disk or a path."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (told := _OS_ERROR.search(str(error))):
            number = int(told[1] or told[2])
        place = getattr(error, "filename", None)
        if number in _DISK_FAULTS or (number == errno.ENOENT and _is_nowhere(place)):
            where = f"{place}: " if place else ""
            return f"{where}{os.strerror(number)}; check the path, its permissions and the room on the disk"
        error = error.__cause__
    return None


def _is_nowhere(place: object) -> bool:
    """Whether the folder of a path is not there, or the current one is gone.

    Where it is there and only the file is not, somebody looked for a file that nobody wrote: ours to mend.
    """
    try:
        here = Path.cwd()
        return isinstance(place, str | bytes) and not (here / os.fsdecode(place)).parent.is_dir()
    except OSError:
        return True


def name_some(items: Iterable[object], limit: int = 5) -> str:
    """The first `limit` items, comma-separated, and how many more there are."""
    listed = [str(item) for item in items]
    shown = ", ".join(listed[:limit])
    more = len(listed) - limit
    return f"{shown} and {more:,} more" if more > 0 else shown


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, on any device."""
    import torch  # here, since `selective-dpo --help` imports this module

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
