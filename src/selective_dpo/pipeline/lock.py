"""Who may work on a run at the same time: one command alone, or several `score --only`.

Each artifact has a lock of its own besides (`engine.processes.making`). `docs/cluster.md` says what that
means for users, `locks` how it is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from selective_dpo.engine.processes import held_by_main, this_process
from selective_dpo.locks import run_lock

_LEFTOVERS = (".partial-*", "scores/.partial-*", "controls/*/.partial-*")
"""Where single files of a run are written, other than within published folders."""


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """The run in `root` belongs to this command (in a distributed run: to all its processes).

    Raises:
        BusyError: another command is at work on it.
    """
    with held_by_main(run_lock(root), what=f"the run {root}"):
        if this_process().is_main_process:
            _remove_leftovers(root)
        yield


@contextlib.contextmanager
def beside_others(root: Path) -> Iterator[None]:
    """As `alone`, but other commands of this kind may work on the run, too: `score --only` on other scorers.

    Raises:
        BusyError: a command that needs the run for itself is at work on it.
    """
    with held_by_main(run_lock(root), what=f"the run {root}", shared=True):
        yield


def _remove_leftovers(root: Path) -> None:
    """Single files that a killed process was writing. Folders have their own locks, and are left alone."""
    for path in [path for pattern in _LEFTOVERS for path in root.glob(pattern)]:
        if path.is_file():
            path.unlink(missing_ok=True)
