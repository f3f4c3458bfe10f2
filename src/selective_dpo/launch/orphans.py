"""Processes that end when the command that they work for has been killed.

SIGKILL gives a command no time to take its workers with it. Left alone they would go on, or wait for ever,
with a GPU and the locks of what they make. What they leave half done is what any kill leaves: a checkpoint,
and files that were not published.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 1.0
SUPERVISOR = "SELECTIVE_DPO_SUPERVISOR"
"""Environment variable: the process that has started the launcher, and waits for it."""


def end_without_parent(parent: int) -> None:
    """From now on, end this process soon after it is no longer a child of the process `parent`."""
    _watch(lambda: os.getppid() == parent)


def end_without_supervisor() -> None:
    """From now on, end this process soon after its launcher, or the command that started that, is gone.

    Where no command of this package started the launcher, nothing is done.
    """
    supervisor, launcher = os.environ.get(SUPERVISOR, ""), os.getppid()
    if supervisor.isdecimal():
        _watch(lambda: os.getppid() == launcher and _is_there(int(supervisor)))


def _is_there(process: int) -> bool:
    try:
        # A killed process whose own parent has not asked for its exit code still has its number.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):  # gone; or another system
        pass
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _watch(has_someone: Callable[[], bool]) -> None:
    def watch() -> None:
        while has_someone():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        # No handler, no clean-up: nobody is there to take an answer, and some of it would wait for one.
        os._exit(1)

    threading.Thread(target=watch, name="orphan watch", daemon=True).start()
