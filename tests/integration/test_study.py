"""`study` on the demo's world: its arms, resumed, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selective_dpo.cli import main
from selective_dpo.config.load import dump_config, make_recipe
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.evaluation.results import from_json
from selective_dpo.run import run as run_module
from selective_dpo.run.run import open_run, study
from selective_dpo.run.verify import verify_run
from selective_dpo.storage.artifacts import read_json
from selective_dpo.worlds.recipe import world_recipe
from selective_dpo.worlds.world import load_world
from tests.fixtures.models import recipe_file

ARMS = ["selected", "easiest-30", "from-demo", "random-30", "random-50"]


def study_recipe(world_run: Path, folder: Path) -> Any:
    """Difficulty by one step, and the finished run's own difficulty as that of another model."""
    given = dump_config(
        world_recipe(load_world(world_run / "world"), name="s", output_dir=folder, controls={})
    )
    optimizer = {key: given["score"]["trainer"][key] for key in ("beta", "bf16", "activation_checkpointing")}
    given["score"] = {"protocol": "one-step", "lora": None, "trainer": optimizer}
    given["train"]["trainer"] |= {"num_train_epochs": 1}
    given["evaluate"]["generation"] |= {"prompts": 12, "samples": 2}
    return make_recipe({**given, "study": {"fractions": [0.3], "sources": [str(world_run)]}})


@pytest.fixture(scope="module")
def made(finished_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    folder = tmp_path_factory.mktemp("study")
    recipe, lines = study_recipe(finished_demo, folder), []
    study(open_run(recipe, say=lines.append))
    return recipe, folder / "s", "\n".join(map(str, lines))


def test_every_arm_is_trained_and_beside_its_random_control(made: tuple[Any, Path, str]) -> None:
    _, folder, printed = made
    results = from_json(read_json(folder / "evaluation" / "results.json"))
    assert [arm.name for arm in results.arms] == ["reference", *ARMS]
    found = {arm["name"]: arm for arm in read_json(folder / "study.json")["arms"]}
    for name, control in {
        "selected": "random-50",
        "easiest-30": "random-30",
        "from-demo": "random-50",
    }.items():
        assert found[name]["control"] == control
        assert found[name]["pairs"] == found[control]["pairs"]
        low, value, high = (found[name]["above_control"][end] for end in ("low", "value", "high"))
        assert low <= value <= high
    assert found["easiest-30"]["fraction"] == 0.3
    assert "minus random of its size" in printed
    assert str(folder / "study.json") in printed


def test_an_arm_by_another_runs_difficulty_has_its_order(
    made: tuple[Any, Path, str], finished_demo: Path
) -> None:
    other, own = Curriculum.load(finished_demo), Curriculum.load(made[1])
    arm = Curriculum.load(made[1] / "controls" / "from-demo")
    assert arm.order == other.order != own.order
    assert arm.facts["provenance"]["imported"]["name"] == "demo"
    assert str(finished_demo) not in str(arm.facts)


def test_the_report_shows_win_rate_by_fraction(made: tuple[Any, Path, str]) -> None:
    page = (made[1] / "report.html").read_text("utf-8")
    assert 'id="figure-fractions"' in page
    assert "by demo" in page


def test_a_study_goes_on_where_it_was(made: tuple[Any, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, folder, _ = made
    kept = (folder / "controls" / "easiest-30" / "policy" / "manifest.json").stat().st_mtime_ns
    (folder / "controls" / "random-30" / "policy" / "manifest.json").unlink()
    lines: list[str] = []
    monkeypatch.setattr(run_module, "run_all", lambda run: run_module.train(run))
    study(open_run(recipe, say=lines.append))
    assert [line for line in lines if line.startswith("training:")] == ["training: random 30%, shuffled"]
    assert (folder / "controls" / "easiest-30" / "policy" / "manifest.json").stat().st_mtime_ns == kept


def test_the_study_verifies(made: tuple[Any, Path, str]) -> None:
    found = verify_run(made[1])
    assert found.problems == []
    assert "compared with demo" in found.text()


def test_a_dry_run_prints_the_price_and_trains_nothing(
    finished_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file(study_recipe(finished_demo, tmp_path / "runs"), tmp_path / "r.yaml")
    assert main(["study", str(recipe), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for name in ARMS[1:]:
        assert f"controls/{name}/policy" in printed
    assert not (tmp_path / "runs").exists()
    assert main(["study", str(recipe), "--dry-run", "--fresh"]) == 2
    assert "--fresh has no effect with --dry-run" in capsys.readouterr().err


def test_nothing_to_study_is_refused(finished_demo: Path, tmp_path: Path) -> None:
    recipe = world_recipe(load_world(finished_demo / "world"), name="s", output_dir=tmp_path, controls={})
    run = open_run(recipe, say=lambda line: None)
    with pytest.raises(Exception, match="nothing to study: give the recipe a study block"):
        study(run)
