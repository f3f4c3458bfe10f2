"""Scoring with two CPU processes gives the rows that one gives, and its numbers but for rounding.

37 pairs make halves of 18 and 19. With 4 pairs an update their last updates hold 2 and 3 pairs, which
neither two processes nor two accumulated batches can share evenly.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selective_dpo.config import Recipe
from selective_dpo.curriculum.records import Records
from selective_dpo.difficulty.scorer import collect_records
from selective_dpo.logprobs.reference import load_reference
from selective_dpo.run.keys import Run
from selective_dpo.run.run import open_run, score
from selective_dpo.storage.artifacts import read_json, verify_folder
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_pairs_file, tiny_recipe

pytestmark = pytest.mark.slow

PAIRS = 37
ROOT = Path(__file__).resolve().parents[2]
# The same pairs make each update, so gradients differ by the order of float32 additions only: about 1e-7 of
# their size. Adam divides a gradient by its own size, so after an update weights differ by about 1e-7 of the
# learning rate 0.01, and sums of up to 160 nats by a few units in their last place, 1.5e-5 each.
LOGP_TOLERANCE = 2e-4
# beta 0.1 times the four log-probs that a margin is made of.
LOSS_TOLERANCE = 4 * 0.1 * LOGP_TOLERANCE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model_folder(folder / "model")
    tiny_pairs_file(folder / "pairs.jsonl", PAIRS)
    return folder


def recipe_for(inputs: Path, name: str, *, batch: int, accumulated: int = 1, **blocks: Any) -> Recipe:
    """Updates of 4 pairs over all processes, LoRA with a log entry for each."""
    trainer = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulated,
        "logging_steps": 1,
    }
    # Small batches, so that the number of evaluation batches is uneven too.
    score_block = {"trainer": trainer, "tokens_per_batch": 128}
    return tiny_recipe(inputs, name=name, score=score_block, **blocks)


@pytest.fixture(scope="module")
def alone(inputs: Path) -> Run:
    """The same scoring in one process, four pairs at a time."""
    run = open_run(recipe_for(inputs, "alone", batch=4), say=lambda line: None)
    score(run)
    return run


def launch(recipe: Path, *, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of the score verb."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `--cpu` would start a single process; without a GPU `--multi_gpu` starts several on the CPU.
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", str(port)]
    command = [sys.executable, "-m", *launcher, "-m", "selective_dpo", "score", str(recipe)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def records_of(run: Run) -> Records:
    return collect_records([run.folder.scores(scorer) for scorer in run.scorer_runs])


def require_the_same(run: Run, alone: Run, *, processes: int) -> None:
    """The rows of `alone`, each once, and its numbers within the tolerances."""
    records, wanted = records_of(run), records_of(alone)
    assert len(records) == 2 * PAIRS and len(set(records.pair_id.tolist())) == PAIRS
    for name in ("pair_id", "prompt_id", "seed", "fold", "evaluation", "step"):
        assert (getattr(records, name) == getattr(wanted, name)).all(), name
    for name in ("policy_chosen_logp", "policy_rejected_logp"):
        np.testing.assert_allclose(getattr(records, name), getattr(wanted, name), rtol=0, atol=LOGP_TOLERANCE)
    for name in ("reference_chosen_logp", "reference_rejected_logp"):
        # No training in between: the same batches, so the same numbers.
        assert (getattr(records, name) == getattr(wanted, name)).all()
    np.testing.assert_allclose(records.loss, wanted.loss, rtol=0, atol=LOSS_TOLERANCE)
    # The tolerance is far below what training does.
    assert np.abs(wanted.loss - np.log(2.0)).max() > 500 * LOSS_TOLERANCE
    for scorer in run.scorer_runs:
        folder = run.folder.scores(scorer)
        verify_folder(folder)
        assert read_json(folder / "cost.json")["processes"] == processes
        np.testing.assert_allclose(_losses(folder), _losses(alone.folder.scores(scorer)), atol=2e-5)


def _losses(folder: Path) -> list[float]:
    """Training loss of each update."""
    entries = read_json(folder / "trainer_log.json")["log_history"]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_two_processes_and_accumulation_under_accelerate_launch(inputs: Path, alone: Run) -> None:
    recipe = recipe_for(inputs, "launched", batch=1, accumulated=2)
    launched = launch(recipe_file(recipe, inputs / "launched.yaml"))
    assert launched.returncode == 0, launched.stderr
    run = open_run(recipe, say=lambda line: None)
    require_the_same(run, alone, processes=2)
    cached, wanted = load_reference(run.folder.reference), load_reference(alone.folder.reference)
    assert cached.pair_ids == wanted.pair_ids
    # Each stage is announced once, by the main process.
    assert launched.stdout.count("reference: 37 pairs") == 1
    assert launched.stdout.count("2 of 2 scorers to train") == 1
    assert launched.stdout.count("seed41-fold1: 19 pairs trained, 18 measured 2 times") == 1


def test_accumulated_batches_make_the_same_updates(inputs: Path, alone: Run) -> None:
    run = open_run(recipe_for(inputs, "accumulated", batch=2, accumulated=2), say=lambda line: None)
    score(run)
    require_the_same(run, alone, processes=1)
