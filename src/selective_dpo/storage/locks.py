"""One writer at a time: a lock file beside what is written, locked in the kernel, naming who holds it.

Kernel locks (`fcntl.lockf`) vanish with their process, also when it is killed, and are not inherited by
its children; on NFS the server keeps them, for all machines. What the file says of its holder is for people:
nobody trusts it to find out whether the lock is held.

| lock | held while |
| --- | --- |
| `RUN/.lock`, alone | a verb brings the run up to a stage |
| `RUN/.lock`, shared | `score --only` measures with some of the scorers, beside other such jobs |
| `.lock-NAME` beside the file or folder NAME | it is made, from before the first work to its publication |
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from selective_dpo.errors import BusyError, name_some

_REFUSED = (errno.EACCES, errno.EAGAIN)

_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_PATIENCE = 0.5
"""Seconds for a holder to write down who it is, and for a lock file that is being removed to be gone."""

_LONGEST_COMMAND = 200


class Holder(NamedTuple):
    """Who holds a lock, as it says itself."""

    host: str
    pid: int
    since: str
    """UTC."""
    command: str

    def describe(self) -> str:
        """In words."""
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


@dataclass
class _Held:
    """A lock of this process."""

    descriptor: int
    path: Path
    is_shared: bool
    pid: int
    thread: int
    made: list[Path]
    """Folders that were made for the lock file, innermost first."""
    times: int = 1
    """How often it was entered."""


_HELD: dict[Path, _Held] = {}

_REGISTRY = threading.Lock()


def run_lock(root: Path) -> Path:
    """The lock file of a whole run."""
    return root / ".lock"


def lock_beside(path: Path) -> Path:
    """The lock file of one file or folder."""
    return path.parent / f".lock-{path.name}"


@contextlib.contextmanager
def holding(lock: Path, *, what: str, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `lock` inside the block; it is there only as long as somebody does.

    A thread may enter again what it holds. Where the folder cannot be written to, nobody can write what the
    lock is for, and where the file system has no locks there is a warning: either way the block is entered.

    Args:
        what: what is locked, for the message.
        shared: let others in that share, too.

    Raises:
        BusyError: another process, or another thread of this one, holds it.
    """
    path = Path(os.path.realpath(lock.parent)) / lock.name  # `resolve` fails at links in a circle
    held = _enter(path, what, shared)
    try:
        yield
    finally:
        if held is not None:
            _leave(held)


def _enter(path: Path, what: str, shared: bool) -> _Held | None:
    with _REGISTRY:
        held = _HELD.get(path)
        if held is not None and held.pid == os.getpid():  # a forked child has the registry, and no lock
            if held.thread != threading.get_ident():
                raise _busy(what, [this_holder()])
            if held.is_shared and not shared:
                raise RuntimeError(f"{path} is held shared and asked for alone")
            held.times += 1
            return held
        if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
            return None
        held = _acquire(path, what, shared)
        if held is not None:
            _HELD[path] = held
        return held


def _leave(held: _Held) -> None:
    with _REGISTRY:
        held.times -= 1
        if held.times:
            return
        del _HELD[held.path]
        try:
            # The file goes while its lock is held alone: whoever has opened it sees that it is gone, and
            # takes the next one. The last to share it turns out the light.
            fcntl.lockf(held.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(held.descriptor, held.path):
                held.path.unlink()
        except OSError:
            pass  # others share it, or it cannot be removed: a file that nobody has locked stops nobody
        finally:
            os.close(held.descriptor)
        with contextlib.suppress(OSError):  # there is something else in it
            for folder in held.made:
                folder.rmdir()


def _acquire(path: Path, what: str, shared: bool) -> _Held | None:
    made = [folder for folder in path.parents if not folder.exists()]
    last_try = time.monotonic() + _PATIENCE
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except FileNotFoundError:  # its folder was just removed with another's lock
            if time.monotonic() > last_try:
                raise
            continue
        try:
            fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if not _is_at(descriptor, path):
                os.close(descriptor)
                continue
            if not shared:
                os.ftruncate(descriptor, 0)  # what a killed holder wrote
            os.write(descriptor, (json.dumps(this_holder()._asdict()) + "\n").encode())
        except OSError as error:
            holders = _holders(path) if error.errno in _REFUSED else []
            os.close(descriptor)
            if error.errno in _REFUSED:
                raise _busy(what, holders) from None
            if error.errno in _NOT_SUPPORTED:
                warnings.warn(
                    f"the file system of {path.parent} has no locks ({error.strerror}): a second command on "
                    "the same folder would not be noticed",
                    RuntimeWarning,
                    stacklevel=5,
                )
                return None
            error.filename = error.filename or str(path)  # a write does not say where
            raise
        return _Held(descriptor, path, shared, os.getpid(), threading.get_ident(), made)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still is what `path` names."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def this_holder() -> Holder:
    """This process. The command without the program's folder."""
    command = " ".join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
    shown = command if len(command) <= _LONGEST_COMMAND else command[:_LONGEST_COMMAND] + "..."
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return Holder(socket.gethostname(), os.getpid(), since, shown)


def _holders(path: Path) -> list[Holder]:
    """Who says that it holds the lock, but for processes of this machine that are gone."""
    until = time.monotonic() + _PATIENCE
    while True:
        found = [holder for holder in _read(path) if not _is_gone(holder)]
        if found or time.monotonic() > until:
            return found
        time.sleep(0.02)  # it has the lock, and is about to write its line


def _read(path: Path) -> list[Holder]:
    holders = []
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # half written
            holders.append(Holder(**json.loads(line)))
    return holders


def _is_gone(holder: Holder) -> bool:
    if holder.host != socket.gethostname():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, TypeError, OverflowError):
        return False
    return False


def _busy(what: str, holders: list[Holder]) -> BusyError:
    who = name_some((holder.describe() for holder in holders), limit=2) or "another process"
    return BusyError(f"{what} is in use by {who}: wait until that ends, or end it, and run this again")
