"""Processes notice that those they work for are gone: small ones here, real ones in tests/faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from selective_dpo.distributed.signals import SECONDS_BETWEEN_LOOKS, SUPERVISOR
from tests.fixtures.process_tree import is_there, wait_until_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
SOON = 10 * SECONDS_BETWEEN_LOOKS
CHILD = """
import os, time
from selective_dpo.distributed.signals import {0}
{0}({1})
print("watching", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {0!r}])
print(child.pid, flush=True)
child.wait()
"""
SLEEPING = "import time; time.sleep(60)"


@pytest.fixture
def started() -> Iterator[list[int]]:
    """Ids of processes that are killed after the test."""
    ids: list[int] = []
    yield ids
    for each in ids:
        if is_there(each):
            os.kill(each, signal.SIGKILL)


def parent_of(child: str, started: list[int], **environment: str) -> tuple[subprocess.Popen[str], int]:
    """A process, and the id of its child, which runs the program `child`."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(child)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert parent.stdout is not None
    started += [parent.pid, pid := int(parent.stdout.readline())]
    parent.stdout.readline()  # the child has begun to look, or has ended
    parent.stdout.close()
    return parent, pid


def test_a_child_ends_after_its_parent(started: list[int]) -> None:
    parent, child = parent_of(CHILD.format("end_without_parent", "os.getppid()"), started)
    assert is_there(child)
    parent.kill()
    parent.wait()
    wait_until_gone([child], seconds=SOON)


def test_a_child_whose_parent_was_gone_before_it_looked_ends(started: list[int]) -> None:
    parent, child = parent_of(CHILD.format("end_without_parent", "os.getppid() + 1"), started)
    wait_until_gone([child], seconds=SOON)
    parent.wait(SOON)


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_rank_ends_after_the_command_above_its_launcher(started: list[int], is_reaped: bool) -> None:
    """The launcher lives; the command is gone, or killed and not yet waited for."""
    command = subprocess.Popen([sys.executable, "-c", SLEEPING])
    rank = CHILD.format("end_without_supervisor", "")
    launcher, pid = parent_of(rank, started, **{SUPERVISOR: str(command.pid)})
    assert is_there(pid)
    command.kill()
    if is_reaped:
        command.wait()
    wait_until_gone([pid], seconds=SOON)
    launcher.wait(SOON)
    command.wait()


def test_a_rank_ends_after_its_launcher(started: list[int]) -> None:
    rank = CHILD.format("end_without_supervisor", "")
    launcher, pid = parent_of(rank, started, **{SUPERVISOR: str(os.getpid())})
    assert is_there(pid)
    launcher.kill()
    launcher.wait()
    wait_until_gone([pid], seconds=SOON)


@pytest.mark.parametrize("named", ["", "none"])
def test_who_has_no_supervisor_goes_on(started: list[int], named: str) -> None:
    """Under the user's own launcher, or none."""
    launcher, pid = parent_of(CHILD.format("end_without_supervisor", ""), started, **{SUPERVISOR: named})
    launcher.kill()
    launcher.wait()
    time.sleep(2 * SECONDS_BETWEEN_LOOKS)
    assert is_there(pid)
