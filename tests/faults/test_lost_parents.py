"""A command that is killed takes its worker processes with it, although it can do nothing for that."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from selective_dpo.distributed.signals import SECONDS_BETWEEN_LOOKS
from selective_dpo.storage.locks import holding, lock_beside, run_lock
from tests.fixtures import sleeping
from tests.fixtures.fork_server import FORKED_WORKERS, Forked, ForkServer
from tests.fixtures.models import recipe_file, tiny_recipe
from tests.fixtures.process_tree import descendants, is_there, wait_until_gone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]
SOON = 10 * SECONDS_BETWEEN_LOOKS
"""On a busy machine."""


def wait_for(folder: Path, pattern: str, count: int, command: Forked) -> None:
    until = time.monotonic() + 100
    while len({path.parent for path in folder.glob(pattern)}) < count:
        assert command.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def kill(command: Forked) -> set[int]:
    """SIGKILL to the command alone; whom it leaves behind."""
    children = descendants(command.pid)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    return children


@pytest.mark.fault(row=1)
def test_scorers_of_a_killed_command_end_and_free_their_locks(tmp_path: Path, server: ForkServer) -> None:
    """Row 1. SIGKILL to the command while two scorers train in its two workers: all processes are gone within
    seconds, nobody holds a lock, and each scorer's checkpoints are there to go on from."""
    recipe = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    words = ["score", str(recipe), "--launch.workers", "2", "--launch.checkpoint_steps", "1"]
    # Some minutes, if it were left alone.
    words += ["--score.trainer.num_train_epochs", "3000"]
    command = server.start(*words, environment=FORKED_WORKERS)
    run = tmp_path / "runs" / "tiny"
    wait_for(run / "checkpoints", "*/step-*", 2, command)
    children = kill(command)
    assert len(children) >= 2
    wait_until_gone(children, seconds=SOON)
    for name in ("seed41-fold0", "seed41-fold1"):
        assert list((run / "checkpoints" / name).glob("step-*"))
        with holding(run_lock(run), what="run"), holding(lock_beside(run / "scores" / name), what=name):
            pass


@pytest.mark.fault(row=1)
def test_processes_of_a_killed_command_end_and_free_their_locks(tmp_path: Path, server: ForkServer) -> None:
    """Row 1. The same with two data-parallel processes below a launcher, which knows nothing of it."""
    recipe = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    words = ["score", str(recipe), "--launch.processes", "2", "--launch.checkpoint_steps", "1"]
    command = server.start(*words, "--score.trainer.num_train_epochs", "3000")
    run = tmp_path / "runs" / "tiny"
    wait_for(run / "checkpoints", "*/step-*", 1, command)
    children = kill(command)
    assert len(children) == 3  # the launcher, and what it started
    wait_until_gone(children, seconds=SOON)
    assert list((run / "checkpoints").glob("*/step-*"))
    with holding(run_lock(run), what="run"):
        pass


def sleepers(server: ForkServer, *jobs: str) -> Forked:
    """Two workers, under way, that sleep as long as their jobs say."""
    return server.start("-m", sleeping.MODULE, *jobs, environment=FORKED_WORKERS)


@pytest.mark.fault(row=1)
def test_a_worker_that_waits_for_a_job_ends_too(tmp_path: Path, server: ForkServer) -> None:
    """Row 1. One of two workers has nothing to do when the command is killed: it would wait for ever."""
    command = sleepers(server, f"{tmp_path}/long 600", f"{tmp_path}/short 0")
    until = time.monotonic() + 100
    while len(list(tmp_path.iterdir())) < 2:
        assert command.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.2)  # the short job's answer is on its way
    children = kill(command)
    assert len(children) >= 2
    wait_until_gone(children, seconds=SOON)


def test_workers_whose_parent_lives_go_on(tmp_path: Path, server: ForkServer) -> None:
    """And a worker is not ended by anything else that looks like it: here its job takes several looks."""
    seconds = 3 * SECONDS_BETWEEN_LOOKS
    command = sleepers(server, f"{tmp_path}/one {seconds}", f"{tmp_path}/other {seconds}")
    assert command.wait(100) == 0 and not is_there(command.pid)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]
