"""One writer at a time: a lock file beside what is written, which also says who holds it.

The locks are `filelock`'s, kept by the kernel: they vanish with their process, also when it is killed, and a
forked child does not inherit them. What the file says of its holder is for people only.

| lock | held while |
| --- | --- |
| `RUN/.lock` | a command brings the run up to a stage |
| `RUN/.lock-shared-*`, one a command | `score --only` measures with some scorers, beside others like it |
| `.lock-NAME` beside the file or folder NAME | it is made, from before the first work to its publication |
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import uuid
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from selective_dpo.errors import BusyError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks answers."""

_PATIENCE = 0.5
"""Seconds for a lock that is held for a moment only: while its file is removed, or to look for others."""

_MAX_COMMAND = 200
"""Characters of a command in a message."""


def run_lock(root: Path) -> Path:
    """The lock file of a whole run."""
    return root / ".lock"


def lock_beside(path: Path) -> Path:
    """The lock file of one file or folder."""
    return path.parent / f".lock-{path.name}"


@contextlib.contextmanager
def holding(lock: Path, *, what: str, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `lock` inside the block; it is there only as long as somebody does.

    A thread may enter again what it holds alone. Where the folder cannot be written to, nobody can write what
    the lock is for, and where the file system has no locks there is a warning: either way the block is
    entered.

    Args:
        what: what is locked, for the message.
        shared: let others in that share, too.

    Raises:
        BusyError: another process, or another thread of this one, holds it.
    """
    made = [folder for folder in lock.parents if not folder.exists()]
    try:
        with contextlib.ExitStack() as stack:
            if shared:
                with _held(lock, what):
                    own = lock.parent / f"{lock.name}-shared-{uuid.uuid4().hex[:8]}"
                    stack.enter_context(_held(own, what))
            else:
                stack.enter_context(_held(lock, what))
                for other in sorted(lock.parent.glob(f"{lock.name}-shared-*")):
                    with _held(other, what):  # left by a killed process: leaving removes it
                        pass
            yield
    finally:
        with contextlib.suppress(OSError):  # there is something else in them
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _held(lock: Path, what: str) -> Iterator[None]:
    """Hold one lock file alone."""
    if lock.parent.is_dir() and not os.access(lock.parent, os.W_OK):
        yield
        return
    path = Path(os.path.realpath(lock.parent)) / lock.name  # one folder by two names is one
    # One object a path, which counts how often its thread has entered.
    file_lock = FileLock(path, timeout=_PATIENCE, is_singleton=True, fallback_to_soft=False)
    try:
        _acquire(file_lock, path)
    except Timeout:
        raise BusyError(
            f"{what} is in use by {_holder(path)}: wait until that ends, or end it, and run this again"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            error.filename = error.filename or str(path)
            raise
        warnings.warn(
            f"the file system of {path.parent} has no locks ({error.strerror}): a second command on the same "
            "folder would not be noticed",
            RuntimeWarning,
            stacklevel=5,
        )
        yield
        return
    is_outermost = file_lock.lock_counter == 1
    try:
        if is_outermost:
            _write_holder(path)
        yield
    finally:
        if is_outermost:
            # While the lock is held: whoever has opened the file meanwhile sees that it is gone, and retries.
            with contextlib.suppress(OSError):  # a file that nobody has locked stops nobody
                path.unlink()
        file_lock.release()


def _acquire(file_lock: FileLock, path: Path) -> None:
    for attempt in range(100):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file_lock.acquire(poll_interval=0.02)
            return
        except (FileNotFoundError, FileExistsError):
            # The folder was just removed with another's lock: before it was used, or between two looks at it.
            if attempt == 99 or any(folder.is_file() for folder in path.parents):
                raise


def _write_holder(path: Path) -> None:
    """This process in words. The command without the program's folder."""
    command = " ".join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])[:_MAX_COMMAND]
    since = datetime.now(UTC).isoformat(timespec="seconds")
    line = f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})\n"
    try:
        path.write_text(line, "utf-8", errors="backslashreplace")
    except OSError as error:
        error.filename = error.filename or str(path)  # a write does not say where
        raise


def _holder(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"
