"""Training on two CPU processes: the same pairs, each once an epoch, in the curriculum's order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from selective_dpo.cli import main
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.identity import ids_digest
from selective_dpo.storage.artifacts import read_json, verify_folder
from tests.fixtures.fork_server import ForkServer
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_recipe
from tests.fixtures.training import curriculum_of, sequence_names, text_rows, tokens_of

REPOSITORY = Path(__file__).resolve().parents[2]
PAIRS = 9
DIFFICULTIES = [0.3, 0.6, 0.8, 0.1, 0.9, 0.5, 0.7, 0.2, 0.4]


@pytest.mark.slow
def test_the_model_sees_the_curriculum_in_order_on_two_processes(tmp_path: Path, server: ForkServer) -> None:
    rows = text_rows(PAIRS)
    curriculum = curriculum_of(rows, DIFFICULTIES, count=7)
    tiny_model_folder(tmp_path / "model")
    curriculum.save(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows[::-1]), "utf-8")
    settings: dict[str, Any] = {
        "lora": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "dataloader_num_workers": 1,
    }
    ended = server.run_ranks(2, "-m", "tests.fixtures.processes", tmp_path, json.dumps(settings))
    assert [each.code for each in ended] == [0, 0], ended

    names = sequence_names(tokens_of(rows))
    seen = [
        [names.get(tuple(ids)) for ids in json.loads((tmp_path / f"inputs-{rank}.json").read_text("utf-8"))]
        for rank in range(2)
    ]
    # A round is two pairs for each process. 7 pairs: a full round, then a round whose last pair, repeated
    # from the epoch's beginning, is blanked. Two rounds are an update, inside which each process deals its
    # own pairs by length. Two epochs.
    order = curriculum.order
    for epoch in (0, 1):
        own = [seen[rank][4 * epoch : 4 * epoch + 4] for rank in (0, 1)]
        assert sorted(own[0]) == sorted([*order[0:2], *order[4:6]])
        assert own[1][3] is None and sorted(own[1][:3]) == sorted([*order[2:4], order[6]])
    facts = read_json(tmp_path / "order.json")
    assert facts["matches"] and facts["pairs"] == 7 and facts["consumed"] == 14
    assert facts["repeated_to_fill"] == 2
    assert facts["consumed_digest"] == ids_digest(2 * order)
    # One update an epoch; the repeated pair is no part of the mean of .1 ... .7.
    logged = [entry["difficulty"] for entry in facts["log_history"] if "loss" in entry]
    assert logged == pytest.approx([0.4, 0.4], abs=1e-12)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its curriculum of 11 of 24 pairs, some of which weigh less, and no policy yet."""
    folder = tmp_path_factory.mktemp("scored")
    recipe = tiny_recipe(
        folder,
        score={"evaluations": 1},
        issues={"suspected_flip": 0.9, "tie": 0.35},
        select={"count": 11, "action": {"tie": "down-weight"}},
        train={"lora": None, "trainer": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
    )
    assert main(["curriculum", str(recipe_file(recipe, folder / "recipe.yaml"))]) == 0
    return folder


@pytest.mark.slow
def test_the_train_stage_on_two_processes_equals_one(
    scored: Path, tmp_path: Path, server: ForkServer
) -> None:
    run = scored / "runs" / "tiny"
    shutil.copytree(run, tmp_path / "runs" / "tiny")
    recipe = str(scored / "recipe.yaml")
    assert main(["train", recipe, "--output_dir", str(tmp_path / "runs")]) == 0
    # The same number of pairs in an update: half as many accumulated batches on twice the processes.
    both = ["--launch.processes", "2", "--output_dir", str(scored / "runs")]
    halved = [*both, "--train.trainer.gradient_accumulation_steps", "1"]
    ended = server.run_ranks(2, "train", recipe, *halved, "--fresh")
    assert [each.code for each in ended] == [0, 0], ended

    policy = run / "policy"
    verify_folder(policy)
    order, curriculum = read_json(policy / "order.json"), Curriculum.load(run)
    assert read_json(policy / "cost.json")["processes"] == 2
    assert order["matches"] and order["consumed"] == order["pairs"] == 11
    assert order["consumed_digest"] == ids_digest(curriculum.certified_order)
    weights = curriculum.table["weight"].to_numpy()[curriculum.table["position"].to_numpy() >= 0]
    assert 0 < (weights < 1.0).sum() < 11
    # Rounds of 4 pairs: 4 + 4 + 3, so one is repeated.
    assert order["repeated_to_fill"] == 1
    alone = tmp_path / "runs" / "tiny" / "policy"
    trained, expected = load_file(policy / "model.safetensors"), load_file(alone / "model.safetensors")
    assert trained.keys() == expected.keys()
    for name, weight in trained.items():
        assert (weight - expected[name]).abs().max() < 1e-4, name
