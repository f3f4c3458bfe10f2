"""A run of every stage, killed again and again on its way from pairs to report."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from selective_dpo.config import LaunchConfig
from selective_dpo.worlds.recipe import world_recipe
from selective_dpo.worlds.world import load_world
from tests.fixtures.fork_server import ForkServer, Moment, Outcome
from tests.fixtures.models import recipe_file
from tests.fixtures.results import differences, results_of

KILLS = 10
SEED = 20261122
KINDS = ("seconds", "step", "write", "flush", "rename")
MAX_SHARE = 0.2
"""Of the run, until an attempt is killed: on average half of it, so that the kills are spread over the run,
less what each attempt does again."""


def moment_of(kill: int, undisturbed: Outcome) -> Moment:
    """Seeded."""
    generator = random.Random(SEED + kill)
    kind, share = KINDS[kill % len(KINDS)], generator.uniform(0.0, MAX_SHARE)
    if kind == "seconds":
        return Moment(kind, share * undisturbed.seconds)
    return Moment(kind, 1 + round(share * undisturbed.events[kind]))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on a quiet machine
@pytest.mark.fault(row=1, trials=KILLS)
def test_a_run_of_every_stage_killed_ten_times_ends_as_an_undisturbed_one(
    server: ForkServer, finished_demo: Path, tmp_path: Path
) -> None:
    """Row 1. All stages of the demo on a small world: six scorers, the curriculum, the policy, three
    controls, the evaluation, the report. One run is killed after a random time or before a random step,
    write, flush or rename, and ends with the same bytes as one that nobody killed."""
    world = load_world(finished_demo / "world")
    recipe = world_recipe(world, name="demo", output_dir=tmp_path / "runs")
    settings = {**recipe.train.trainer, "num_train_epochs": 1}
    recipe = recipe.model_copy(
        update={
            "launch": LaunchConfig(checkpoint_steps=2),
            "train": recipe.train.model_copy(update={"trainer": settings}),
        }
    )
    command = ["run", recipe_file(recipe, tmp_path / "recipe.yaml")]
    run = tmp_path / "runs" / "demo"
    whole = server.run(command)
    assert whole.code == 0, whole.output
    undisturbed = results_of(run)
    assert {name.split("/")[0] for name in undisturbed} >= {"scores", "policy", "controls", "evaluation"}
    shutil.rmtree(run)

    kills = 0
    while kills < KILLS:
        outcome = server.run(command, moment_of(kills, whole))
        if outcome.code == 0:
            # It came to its end before the moment did: the other kills strike the next run.
            assert not differences(run, undisturbed)
            shutil.rmtree(run)
            continue
        assert outcome.code == -signal.SIGKILL, outcome.output
        kills += 1
    last = server.run(command)
    assert last.code == 0, last.output
    assert not differences(run, undisturbed)
    assert (run / "report.html").is_file() and not (run / "checkpoints").exists()
