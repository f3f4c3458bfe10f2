"""One recipe gives the same bytes in another process, place and hash seed; a run says how to repeat it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selective_dpo.cli import main
from selective_dpo.storage.artifacts import read_json
from tests.fixtures.results import differences, results_of
from tests.fixtures.resuming import resuming_recipe


def run_in_a_process(recipe: Path, out: Path) -> Path:
    # The model card holds the command, so that is the same, too.
    command = [sys.executable, "-m", "selective_dpo", "run", str(recipe), "--output_dir", "runs"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run(command, cwd=out, env=environment, check=True, capture_output=True, timeout=300)
    return out / "runs" / "tiny"


def run_here(recipe: Path, out: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        patch.setattr(sys, "argv", ["selective-dpo", "run", str(recipe), "--output_dir", "runs"])
        assert main(sys.argv[1:]) == 0
    return out / "runs" / "tiny"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one recipe, LoRA with dropout, random and sequential order, two epochs."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe = resuming_recipe(folder)
    places = [tmp_path_factory.mktemp(name) / "deeper" / name for name in ("one", "other")]
    for place in places:
        place.mkdir(parents=True)
    return [run_in_a_process(recipe, places[0]), run_here(recipe, places[1])]


def test_two_runs_of_one_recipe_are_equal_byte_by_byte(runs: list[Path]) -> None:
    first = results_of(runs[0])
    assert {"pairs/pairs.parquet", "reference/logps.parquet", "policy/order.json"} <= set(first)
    assert any(name.endswith(".safetensors") for name in first)
    assert differences(runs[1], first) == []


def test_a_run_says_what_is_needed_to_repeat_it(runs: list[Path]) -> None:
    facts = [json.loads((run / "curriculum.json").read_text("utf-8")) for run in runs]
    origin = facts[0]["provenance"]
    assert {"python", "torch", "transformers", "trl", "peft"} <= set(origin["versions"])
    assert origin["hardware"]["cpus"] == os.cpu_count()
    assert "git" in origin
    # The inputs by content: weights and records, the same in both places.
    assert {"model", "seed41-fold0", "seed41-fold1"} <= set(origin["inputs"])
    assert origin["inputs"] == facts[1]["provenance"]["inputs"]
    assert facts[0]["cost"]["scorers"]["seed41-fold0"]["seconds"] > 0
    # The recipe itself, with all its defaults; and what it names, by digest.
    assert read_json(runs[0] / "config.json")["score"]["seeds"] == [41]
    assert (runs[0] / "recipe.yaml").is_file() and (runs[0] / "inputs.json").is_file()
