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

RUNS, KILLS = 12, 3
"""How many runs are killed, and how often each of them."""
SEED = 20261122
KINDS = ("step", "write", "flush", "rename", "remove", "seconds")


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


def moments_of(trial: int, undisturbed: Outcome) -> list[Moment]:
    """One kill for each attempt at a run, spread evenly over it; each kind six times in all trials.

    Seeded: the same trial strikes at the same events, wherever it is run.
    """
    generator = random.Random(SEED + trial)
    kinds = [KINDS[(trial * KILLS + kill) % len(KINDS)] for kill in range(KILLS)]
    places = sorted(generator.uniform(0.0, 1.0) for _ in kinds)
    moments = []
    for kind, place, before in zip(kinds, places, [0.0, *places], strict=False):
        share = place - before  # an attempt goes on where the one before was killed
        if kind == "seconds":
            moments.append(Moment(kind, 0.05 + share * undisturbed.seconds))
        else:
            moments.append(Moment(kind, 1 + int(share * undisturbed.events[kind])))
    return moments


@pytest.mark.slow
@pytest.mark.fault(row=1, trials=KILLS)
@pytest.mark.parametrize("trial", range(RUNS))
def test_a_pipeline_killed_three_times_ends_as_an_undisturbed_one(
    trial: int, server: ForkServer, undisturbed: Undisturbed
) -> None:
    """Row 1. SIGKILL before a random optimizer step, file write, flush, rename or removal, or after a random
    time, of scoring, selection, training and publishing: 36 in 12 runs. The repeated command leaves the same
    bytes: records, curriculum, trainers' logs, order digest, policy; and no checkpoint."""
    command, run = undisturbed.command("train"), undisturbed.run
    for moment in moments_of(trial, undisturbed.outcome):
        killed = server.run(command, moment)
        while killed.code == 0:
            # It came to its end before the moment did: the moment strikes an earlier place of a new run.
            assert not differences(run, undisturbed.results), f"{moment}: {killed.output}"
            shutil.rmtree(run)
            moment = moment._replace(at=moment.at / 2 if moment.kind == "seconds" else (moment.at + 1) // 2)
            killed = server.run(command, moment)
        assert killed.code == -signal.SIGKILL, f"{moment}: {killed.output}"
    again = server.run(command)
    assert again.code == 0, again.output
    assert not differences(run, undisturbed.results), again.output
    left = [path.name for path in run.rglob("*")]
    assert not [name for name in left if name.startswith((".partial-", "step-", "training_args"))]
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.fault(row=1)
def test_a_pipeline_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    server: ForkServer, undisturbed: Undisturbed
) -> None:
    """Row 1. Killed before the sixth optimizer step of each attempt: it comes to its end all the same, since
    each attempt goes on from a checkpoint."""
    attempts, code = 0, -1
    while code != 0:
        attempts += 1
        assert attempts < 10
        outcome = server.run(undisturbed.command("train"), Moment("step", 6))
        code = outcome.code
        assert code in (0, -signal.SIGKILL), outcome.output
    # 6 + 6 + 8 updates. An attempt makes 5, of which the last is lost if no checkpoint was made after it.
    assert attempts > 3
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
