"""SIGTERM, as a scheduler sends it before the time is up: a checkpoint, exit code 75, and going on later."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from selective_dpo.errors import Interrupted
from tests.fixtures.fork_server import FORKED_WORKERS, ForkServer, Moment
from tests.fixtures.results import differences, results_of
from tests.fixtures.resuming import STEPS, resuming_recipe

SEED = 20261122
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
LINE = re.compile(r"selective-dpo: (?:(\S.*): )?interrupted by SIGTERM at step (\d+) of (\d+): run the same")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipe and its run are. Checkpoints by time only: here, each is SIGTERM's or the end's."""
    folder = tmp_path_factory.mktemp("sigterm")
    resuming_recipe(folder, launch={"checkpoint_minutes": 600})
    return folder


@pytest.fixture(scope="module")
def undisturbed(server: ForkServer, place: Path) -> tuple[dict[str, bytes], dict[str, int]]:
    """The results of a run that nothing happened to, and how often each kind of event happened in it."""
    outcome = server.run(["train", place / "recipe.yaml"])
    assert outcome.code == 0, outcome.output
    results = results_of(place / "runs" / "tiny")
    return results, outcome.events


@pytest.fixture(autouse=True)
def _nothing_there(undisturbed: tuple[dict[str, bytes], dict[str, int]], place: Path) -> None:
    shutil.rmtree(place / "runs" / "tiny", ignore_errors=True)


def test_the_exit_code_is_the_documented_one() -> None:
    assert Interrupted.exit_code == EXIT_CODE == os.EX_TEMPFAIL


@pytest.mark.slow
@pytest.mark.fault(row=2)
@pytest.mark.parametrize("training", range(3))
@pytest.mark.parametrize("trial", range(2))
def test_a_training_makes_a_checkpoint_and_leaves(
    server: ForkServer,
    place: Path,
    undisturbed: tuple[dict[str, bytes], dict[str, int]],
    training: int,
    trial: int,
) -> None:
    """Row 2. SIGTERM in a random optimizer step of each training: exit code 75, one line that says where, a
    checkpoint after that very step; the repeated command makes the remaining steps only, and comes to the
    same end."""
    step = random.Random(SEED + 3 * trial + training).randint(1, STEPS[training])
    at = sum(STEPS[:training]) + step
    outcome = server.run(["train", place / "recipe.yaml"], Moment("step", at, signal.SIGTERM))
    assert outcome.code == EXIT_CODE, outcome.output
    name = ("seed41-fold0", "seed41-fold1", "selected")[training]
    found = LINE.search(outcome.output)
    assert found is not None and found.groups() == (name, str(step), str(STEPS[training])), outcome.output
    checkpoints = place / "runs" / "tiny" / "checkpoints"
    assert [path.name for path in checkpoints.rglob("step-*")] == [f"step-{step:06d}"]
    again = server.run(["train", place / "recipe.yaml"])
    assert again.code == 0, again.output
    assert again.events.get("step", 0) == sum(STEPS) - at
    assert not differences(place / "runs" / "tiny", undisturbed[0])


@pytest.mark.slow
@pytest.mark.fault(row=2, trials=3)
@pytest.mark.parametrize("kind", ["write", "flush", "rename", "remove"])
def test_sigterm_at_any_moment_is_one_line_and_no_loss(
    server: ForkServer, place: Path, undisturbed: tuple[dict[str, bytes], dict[str, int]], kind: str
) -> None:
    """Row 2. SIGTERM three times on the way, each at a random file write, flush, rename or removal, in and
    between the trainings: exit code 75 and one line, and the repeated command comes to the same end."""
    results, events = undisturbed
    generator = random.Random(f"{SEED} {kind}")
    places = sorted(generator.uniform(0.0, 0.9) for _ in range(3))
    for share, before in zip(places, [0.0, *places], strict=False):
        at = 1 + int((share - before) * events[kind])
        outcome = server.run(["train", place / "recipe.yaml"], Moment(kind, at, signal.SIGTERM))
        assert outcome.code == EXIT_CODE, outcome.output
        assert outcome.output.count("interrupted by SIGTERM") == 1 and "Traceback" not in outcome.output
    again = server.run(["train", place / "recipe.yaml"])
    assert again.code == 0, again.output
    assert not differences(place / "runs" / "tiny", results)


@pytest.mark.slow
@pytest.mark.fault(row=2)
def test_sigterm_is_passed_on_to_worker_processes(
    server: ForkServer, place: Path, undisturbed: tuple[dict[str, bytes], dict[str, int]]
) -> None:
    """Row 2. Two scorers in two worker processes, SIGTERM to the command alone: both make a checkpoint, the
    command leaves with 75, and the repeated one comes to the same end."""
    run = place / "runs" / "tiny"
    # Long enough to be met in the middle by a signal from outside.
    command = ["score", str(place / "recipe.yaml"), "--score.trainer.num_train_epochs", "8"]
    with_workers = (*command, "--launch.workers", "2", "--launch.checkpoint_steps", "1")
    started = server.start(*with_workers, environment=FORKED_WORKERS)
    names = ("seed41-fold0", "seed41-fold1")
    until = time.monotonic() + 100
    while not all(list((run / "checkpoints" / name).glob("step-*")) for name in names):
        assert started.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    output = "".join(started.communicate(timeout=60))
    assert started.returncode == EXIT_CODE, output
    assert "interrupted by SIGTERM" in output and "Traceback" not in output
    reached = {
        name: max(int(path.name[5:]) for path in (run / "checkpoints" / name).glob("step-*"))
        for name in names
    }
    assert all(0 < step < 24 for step in reached.values())
    again = server.run(command)
    assert again.code == 0, again.output
    assert again.events["step"] == 2 * 24 - sum(reached.values())
    records = {name: (run / "scores" / name / "records.parquet").read_bytes() for name in names}
    shutil.rmtree(run)
    assert server.run(command).code == 0
    assert records == {name: (run / "scores" / name / "records.parquet").read_bytes() for name in names}
