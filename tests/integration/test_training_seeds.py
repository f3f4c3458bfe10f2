"""`evaluate.training_seeds`: the run's own training with other seeds, and how far the results lie apart."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from selective_dpo.errors import ConfigError
from selective_dpo.evaluation.results import ArmResult, EvaluationResults, from_json, training_spread
from selective_dpo.report.tables import seeds_note
from selective_dpo.run.plan import make_plan
from selective_dpo.run.run import open_run, run_all
from selective_dpo.run.verify import verify_run
from selective_dpo.stats.estimates import Estimate
from selective_dpo.storage.artifacts import read_json, read_manifest
from tests.fixtures.models import TRAINER, tiny_pairs_file, tiny_recipe


def recipe(tmp: Path, **blocks: Any) -> Any:
    if not (tmp / "test.jsonl").exists():
        tiny_pairs_file(tmp / "test.jsonl", pairs=12, seed=5)
    evaluate = {"training_seeds": [7, 8], **blocks.pop("evaluate", {})}
    data = {"test": [{"path": str(tmp / "test.jsonl")}]}
    return tiny_recipe(tmp, score={"evaluations": 1}, data=data, evaluate=evaluate, **blocks)


def test_each_seed_is_a_training_of_its_own_and_their_spread_is_shown(tmp_path: Path) -> None:
    lines: list[str] = []
    wanted = recipe(tmp_path)
    planned = {job.name for job in make_plan(wanted).jobs}
    assert {"policy", "training-seeds/7/policy", "training-seeds/8/policy"} <= planned
    run = open_run(wanted, say=lines.append)
    page = run_all(run).read_text("utf-8")
    root = run.folder.root
    folders = [root / "policy", *(root / "training-seeds" / seed / "policy" for seed in ("7", "8"))]
    first, *others = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    for other in others:
        assert any(not np.array_equal(first[name], other[name]) for name in first)
    orders = [read_json(folder / "order.json") for folder in folders]
    assert orders[0]["matches"] and orders[0] == orders[1] == orders[2]

    results = from_json(read_json(root / "evaluation" / "results.json"))
    assert [arm.name for arm in results.arms] == ["reference", "selected"]
    assert [arm.name for arm in results.repeats] == ["selected-seed7", "selected-seed8"]
    spread = training_spread(results)
    trained = (results.arm("selected"), *results.repeats)
    accuracies = [arm.held_out.accuracy.value for arm in trained if arm and arm.held_out]
    assert spread is not None and list(spread.values) == accuracies
    assert spread.deviation == statistics.stdev(accuracies)
    note = seeds_note(results)
    assert note.startswith("3 trainings of selected that differ by their seed alone: held-out accuracy ")
    assert f"standard deviation of {100 * spread.deviation:.1f} points" in note
    assert note in page and any(note in line for line in lines)

    assert not verify_run(root).problems
    assert all(job.cached for job in make_plan(wanted).jobs)
    # A seed more keeps what is there.
    before = [read_manifest(folder) for folder in folders]
    run_all(open_run(recipe(tmp_path, evaluate={"training_seeds": [7, 8, 9]}), fresh=True, say=lines.append))
    assert [read_manifest(folder) for folder in folders] == before
    assert (root / "training-seeds" / "9" / "policy" / "manifest.json").is_file()


def test_a_seed_gives_what_the_recipes_own_seed_would(tmp_path: Path) -> None:
    repeated = open_run(recipe(tmp_path, evaluate={"training_seeds": [7]}), say=lambda line: None)
    run_all(repeated)
    own = recipe(tmp_path, name="own", train={"trainer": {"seed": 7}}, evaluate={"training_seeds": []})
    run_all(open_run(own, say=lambda line: None))
    one, other = (
        load_file(folder / "policy" / "adapter_model.safetensors")
        for folder in (repeated.folder.repeat(7), tmp_path / "runs" / "own")
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"train": {"lora": None}}, "training_seeds would change nothing: full fine-tuning without dropout"),
        ({"evaluate": {"training_seeds": [7, 7]}}, "must be distinct"),
        ({"evaluate": {"training_seeds": [42]}}, "not the training's own, 42"),
        ({"train": {"trainer": {"seed": 7}}}, "not the training's own, 7"),
    ],
)
def test_seeds_that_show_nothing_are_refused(tmp_path: Path, blocks: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe(tmp_path, **blocks)


def test_without_anything_to_measure_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no effect without data\.test or evaluate\.generation\.prompts"):
        tiny_recipe(tmp_path, evaluate={"training_seeds": [7]})


def test_a_control_of_a_repeats_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'selected-seed7' is taken"):
        open_run(recipe(tmp_path, evaluate={"controls": {"selected-seed7": {"rule": "all"}}}))


def test_trainings_that_came_out_equal_are_not_shown_as_a_spread(tmp_path: Path) -> None:
    # The model has no dropout that could be left on, which no recipe says.
    train = {"lora": None, "trainer": {**TRAINER, "disable_dropout": False}}
    run = open_run(recipe(tmp_path, train=train), say=lambda line: None)
    with pytest.raises(ConfigError, match="different seeds gave equal weights"):
        run_all(run)
    assert not run.folder.evaluation.exists()


def test_spread_by_hand() -> None:
    def arm(name: str, rate: float) -> ArmResult:
        return ArmResult(name, name, 10, 5, win_rate=Estimate(rate, 0.01, rate - 0.02, rate + 0.02))

    arms = (arm("reference", 0.5), arm("selected", 0.58))
    one = EvaluationResults("j", 10, 1, arms)
    assert training_spread(one) is None
    assert "0.6 to 1.4 points" in seeds_note(one) and "evaluate.training_seeds" in seeds_note(one)
    # 58, 60 and 62%: mean 60, deviations -2, 0, 2, standard deviation sqrt(8 / 2) = 2 points.
    note = seeds_note(one._replace(repeats=(arm("selected-seed7", 0.60), arm("selected-seed8", 0.62))))
    assert "win rate 60.0% on average, with a standard deviation of 2.0 points (58.0%, 60.0%, 62.0%)" in note
