"""When to stop: on SIGTERM, and when the command that this process works for has been killed.

SIGTERM is a scheduler's warning that the time is up: work stops at once, or at its next good moment.
SIGUSR2, which submitit and Hydra send instead, means the same. Ctrl-C is Python's own `KeyboardInterrupt`.
Nothing is changed on import; each function leaves the handler that it found when it is done. Signals reach a
process's main thread only, so in other threads they have no effect.

SIGKILL gives a command no time to take its workers with it. Left alone they would go on, or wait for ever,
with a GPU and the locks of what they make, so they watch whether it is there (`end_without_parent`). They
leave what any kill leaves: a checkpoint, and files that were not published.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

from selective_dpo.errors import Interrupted

REMEDY = "run the same command to go on"

SUPERVISOR = "SELECTIVE_DPO_SUPERVISOR"
"""Environment variable: the process that has started the launcher, and waits for it."""

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a process looks whether the one that it works for is there."""


AGAIN = "SELECTIVE_DPO_AGAIN"
"""Environment variable: a file to leave where the command has only to be repeated. A launcher of the user's
own may turn the exit code that says so into another."""

_WARNINGS = (signal.SIGTERM, signal.SIGUSR2)


class _Noted:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = True


_NOTED = _Noted()
"""Of this command or worker process. Kept, since a library may swallow the error that is raised at once."""


def note_between_jobs() -> None:
    """For a worker process: while it waits for a job, SIGTERM is noted; the next job is not begun."""
    for number in _WARNINGS:
        signal.signal(number, _NOTED)


@contextlib.contextmanager
def stopping_at_once(*, forgetting: bool = False) -> Iterator[None]:
    """Inside, SIGTERM raises `Interrupted` wherever the main thread is.

    If it came before, it is raised on entering; with `forgetting`, for the beginning of a command, it is not.
    """
    if forgetting:
        _NOTED.received = False
    with _handled_by(_note_and_raise):
        if _NOTED.received:
            raise interrupted_error()
        yield


@contextlib.contextmanager
def stopping_when_asked() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM is only noted: what this yields says whether it came.

    Raises:
        Interrupted: on leaving, it came and was not acted upon.
    """
    noted = _Noted()
    with _handled_by(noted):
        yield lambda: noted.received or _NOTED.received
    if noted.received or _NOTED.received:
        raise interrupted_error()


@contextlib.contextmanager
def passing_on(processes: Callable[[], Iterable[int]]) -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM is sent on to the processes of these ids; what this yields says whether it came.

    Ctrl-C is sent on to them as SIGTERM, before it is raised here.
    """
    noted = _Noted()

    def handler(number: int, frame: FrameType | None) -> None:
        noted.received = True
        _terminate(processes())

    with _handled_by(handler):
        try:
            yield lambda: noted.received
        except KeyboardInterrupt:
            _terminate(processes())
            raise


@contextlib.contextmanager
def starting_out_of_reach() -> Iterator[None]:
    """Inside, processes are started that Ctrl-C does not reach: a terminal sends it to a command and its
    children alike, and it is for the command to tell them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which children inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _WARNINGS}
    try:
        yield
    finally:
        for number, found in before.items():
            # None: it was set outside of Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if found is None else found)


def _terminate(processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)


def _note_and_raise(number: int, frame: FrameType | None) -> None:
    _NOTED.received = True
    raise interrupted_error()


def ask_to_be_repeated() -> None:
    """Leave the file that `AGAIN` names, if any."""
    if path := os.environ.get(AGAIN):
        with contextlib.suppress(OSError):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()


def interrupted_error() -> Interrupted:
    """What to raise when SIGTERM has come."""
    return Interrupted(f"interrupted by SIGTERM: {REMEDY}")


def end_without_parent(parent: int) -> None:
    """From now on, end this process soon after it is no longer a child of the process `parent`."""
    _watch(lambda: os.getppid() == parent)


def end_without_supervisor() -> None:
    """From now on, end this process soon after its launcher, or the command that started that, is gone.

    Where no command of this package started the launcher, nothing is done.
    """
    supervisor, launcher = os.environ.get(SUPERVISOR, ""), os.getppid()
    if supervisor.isdecimal():
        _watch(lambda: os.getppid() == launcher and _is_running(int(supervisor)))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    try:
        # A killed process whose own parent has not asked for its exit code still has its number.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):  # another system
        return True


def _watch(is_needed: Callable[[], bool]) -> None:
    def watch() -> None:
        while is_needed():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        # No handler, no clean-up: nobody is there to take an answer, and some of it would wait for one.
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
