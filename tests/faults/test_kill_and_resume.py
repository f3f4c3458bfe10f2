"""Killing a pipeline at any moment, and running the same command again."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fixtures.fork_server import ForkServer, Moment, Outcome
from tests.fixtures.results import differences, results_of
from tests.fixtures.resuming import STEPS, resuming_recipe

BY_EVENT, BY_TIME = 24, 12
SEED = 20261122
KINDS = {"step": 5, "write": 5, "flush": 6, "rename": 6, "remove": 2}
"""Kind of event -> of how many trials."""


class Undisturbed(NamedTuple):
    """A run that nobody has killed. It is gone; the others take its place, as their recipes name it."""

    recipe: Path
    run: Path
    outcome: Outcome
    results: dict[str, bytes]

    def command(self, verb: str) -> list[str | Path]:
        """`selective-dpo VERB`."""
        return [verb, self.recipe]


@pytest.fixture(scope="module")
def undisturbed(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe, run = resuming_recipe(folder), folder / "runs" / "tiny"
    outcome = server.run(["train", recipe])
    assert outcome.code == 0, outcome.output
    results = results_of(run)
    shutil.rmtree(run)
    return Undisturbed(recipe, run, outcome, results)


@pytest.fixture(autouse=True)
def _empty_place(undisturbed: Undisturbed) -> Iterator[None]:
    yield
    shutil.rmtree(undisturbed.run, ignore_errors=True)


def moment_of(trial: int, undisturbed: Outcome) -> Moment:
    """Seeded: the same trial strikes at the same event, wherever it is run."""
    generator = random.Random(SEED + trial)
    if trial >= BY_EVENT:
        return Moment("seconds", generator.uniform(0.05, 0.95) * undisturbed.seconds)
    kind = [name for name, times in KINDS.items() for _ in range(times)][trial]
    return Moment(kind, generator.randint(1, undisturbed.events[kind]))


@pytest.mark.slow
@pytest.mark.fault(row=1)
@pytest.mark.parametrize("trial", range(BY_EVENT + BY_TIME))
def test_a_killed_pipeline_ends_as_an_undisturbed_one(
    trial: int, server: ForkServer, undisturbed: Undisturbed
) -> None:
    """Row 1. SIGKILL before a random optimizer step, file write, flush, rename or removal (24 trials), or
    after a random time (12), of scoring, selection, training and publishing. The repeated command leaves the
    same bytes: records, curriculum, trainers' logs, order digest, policy; and no checkpoint."""
    command, run = undisturbed.command("train"), undisturbed.run
    moment = moment_of(trial, undisturbed.outcome)
    killed = server.run(command, moment)
    while killed.code == 0 and moment.kind == "seconds":
        # Faster than the undisturbed run, which was the first: the moment comes earlier.
        shutil.rmtree(run)
        moment = moment._replace(at=moment.at / 2)
        killed = server.run(command, moment)
    assert killed.code == -signal.SIGKILL, f"{moment}: {killed.output}"
    again = server.run(command)
    assert again.code == 0, f"{moment}: {again.output}"
    assert not differences(run, undisturbed.results), f"{moment}: {again.output}"
    left = [path.name for path in run.rglob("*")]
    assert not [name for name in left if name.startswith((".partial-", "step-", "training_args"))], moment
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.fault(row=1)
def test_a_pipeline_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    server: ForkServer, undisturbed: Undisturbed
) -> None:
    """Row 1. Killed before the fourth optimizer step of each attempt: it comes to its end all the same, since
    each attempt goes on from a checkpoint."""
    attempts, code = 0, -1
    while code != 0:
        attempts += 1
        assert attempts < 15
        outcome = server.run(undisturbed.command("train"), Moment("step", 4))
        code = outcome.code
        assert code in (0, -signal.SIGKILL), outcome.output
    # 6 + 6 + 8 updates. An attempt makes 3, of which the last is lost if no checkpoint was made after it.
    assert attempts > 5
    assert not differences(undisturbed.run, undisturbed.results)


@pytest.mark.fault(row=6)
@pytest.mark.parametrize("training", range(3))
def test_after_the_last_step_only_the_publishing_is_repeated(
    training: int, server: ForkServer, undisturbed: Undisturbed
) -> None:
    """Row 6. SIGKILL between a training's last checkpoint and the publication of its result, for each of the
    three trainings: the repeated command makes no further step of it, and publishes the same bytes."""
    steps = sum(STEPS[: training + 1])
    # The first publication by all processes is the reference's.
    killed = server.run(undisturbed.command("train"), Moment("publication", 2 + training))
    assert killed.code == -signal.SIGKILL, killed.output
    again = server.run(undisturbed.command("train"))
    assert again.code == 0, again.output
    assert again.events.get("step", 0) == sum(STEPS) - steps
    assert not differences(undisturbed.run, undisturbed.results)
