"""A study's arms, spelled out; and what is made of their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selective_dpo.config import Recipe, SelectConfig
from selective_dpo.config.load import dump_config, load_recipe, make_recipe
from selective_dpo.config.trainer_options import check_recipe_options
from selective_dpo.curriculum.build import resolved_selection
from selective_dpo.curriculum.import_ import Outside, outside_curriculum
from selective_dpo.errors import ConfigError
from selective_dpo.evaluation.results import ArmResult, EvaluationResults, to_json
from selective_dpo.report.study import study_findings, study_text, sweep
from selective_dpo.report.tables import label_for
from selective_dpo.stats.estimates import Estimate
from selective_dpo.storage.artifacts import write_json


def recipe_with(study: dict[str, Any] | None, **blocks: Any) -> Recipe:
    base = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "p"}]}}
    return make_recipe({**base, **blocks, **({} if study is None else {"study": study})})


def test_each_arm_and_a_random_control_of_its_size() -> None:
    recipe = recipe_with(
        {
            "fractions": [0.3, 0.5, 1],
            "orders": ["shuffled", "easy-to-hard"],
            "criteria": ["final"],
            "sources": ["runs/weak"],
        },
        train={"lora": {"r": 8}},
        evaluate={"generation": {"prompts": 4, "source": "q.jsonl"}},
    )
    assert recipe.study.is_empty
    # 50% and easy to hard are the run's own; of all pairs a random choice is no control.
    easiest = {"rule": "easiest"}
    assert recipe.evaluate.controls == {
        "easiest-30": SelectConfig(**easiest, fraction=0.3),
        "easiest-100": SelectConfig(**easiest, fraction=1.0),
        "shuffled": SelectConfig(**easiest, fraction=0.5, order="shuffled"),
        "by-final": SelectConfig(**easiest, fraction=0.5, aggregate="final"),
        "from-weak": SelectConfig(**easiest, fraction=0.5, source="runs/weak"),
        "random-30": SelectConfig(rule="random", fraction=0.3, order="shuffled"),
        "random-50": SelectConfig(rule="random", fraction=0.5, order="shuffled"),
    }
    # What is written down is a recipe without a study, and the same one when it is read again.
    assert make_recipe(dump_config(recipe)) == recipe


def test_controls_of_the_recipe_stay_and_are_not_doubled() -> None:
    random = {"rule": "random", "fraction": 0.5, "order": "shuffled"}
    evaluate = {"controls": {"all": {"rule": "all"}, "chance": random}}
    recipe = recipe_with({"fractions": [0.4]}, evaluate=evaluate)
    assert list(recipe.evaluate.controls) == ["all", "chance", "easiest-40", "random-40"]
    with pytest.raises(
        ConfigError, match=r"study makes an arm 'random-40', and evaluate\.controls has another"
    ):
        recipe_with({"fractions": [0.4]}, evaluate={"controls": {"random-40": {"rule": "all"}}})


def test_training_seeds_are_those_of_the_evaluation() -> None:
    blocks = {"train": {"lora": {"r": 8}}, "data": {"train": [{"path": "p"}], "test": [{"path": "t"}]}}
    recipe = recipe_with({"training_seeds": [1, 2]}, **blocks)
    assert recipe.evaluate.training_seeds == (1, 2)
    assert list(recipe.evaluate.controls) == ["random-50"]
    with pytest.raises(ConfigError, match="training_seeds stand in study and in evaluate"):
        recipe_with({"training_seeds": [1]}, **blocks, evaluate={"training_seeds": [2]})


@pytest.mark.parametrize(
    ("study", "select", "message"),
    [
        ({"fractions": [0.3, 0.3]}, {}, "fractions holds one value twice"),
        ({"fractions": [0.3]}, {"rule": "all"}, "give select.rule easiest and select.fraction, not all"),
        ({"fractions": [0.3]}, {"count": 5}, "not select.count"),
        ({"fractions": [0]}, {}, "study.fractions.0"),
        ({"arms": 3}, {}, "study.arms"),
    ],
)
def test_a_study_that_cannot_be_is_refused(
    study: dict[str, Any], select: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_with(study, select=select)


def test_a_study_that_is_not_spelled_out_is_not_ignored() -> None:
    recipe = recipe_with(None).model_dump() | {"study": {"fractions": [0.3]}}
    with pytest.raises(ConfigError, match="its arms are not spelled out"):
        check_recipe_options(Recipe.model_validate(recipe))


def test_criteria_have_no_effect_beside_an_imported_difficulty() -> None:
    with pytest.raises(ConfigError, match=r"evaluate.controls.by-final.aggregate has no effect"):
        recipe_with({"criteria": ["final"]}, curriculum="c.csv")


# --- select.from -------------------------------------------------------------------------------------------


def test_from_is_for_controls() -> None:
    with pytest.raises(
        ConfigError, match="the run's own difficulty comes from elsewhere by curriculum: runs/w"
    ):
        recipe_with(None, select={"from": "runs/w"})
    with pytest.raises(ConfigError, match="aggregate has no effect beside from"):
        recipe_with(None, evaluate={"controls": {"weak": {"from": "runs/w", "aggregate": "final"}}})
    with pytest.raises(ConfigError, match="from and source are two names of one key"):
        recipe_with(None, evaluate={"controls": {"weak": {"from": "runs/w", "source": "runs/w"}}})
    with pytest.raises(ConfigError, match=r"select.from has no effect here"):
        resolved_selection({"from": "runs/w"})
    weak = recipe_with(None, evaluate={"controls": {"weak": {"from": "runs/w"}}}).evaluate.controls["weak"]
    assert label_for(weak) == "easiest 50%, easy to hard, by w"
    # A path decides nothing: its content does.
    assert weak.identity() == SelectConfig().identity()


def test_a_source_beside_the_recipe_is_found(tmp_path: Path) -> None:
    (tmp_path / "weak").mkdir()
    base = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "p"}]}}
    controls = {"evaluate": {"controls": {"other": {"from": "weak"}}}}
    (tmp_path / "r.yaml").write_text(json.dumps({**base, **controls, "study": {"sources": ["weak", "far"]}}))
    found = load_recipe(tmp_path / "r.yaml").evaluate.controls
    assert found["other"].source == str(tmp_path / "weak")
    assert found["from-far"].source == "far"


# --- What the arms came to ---------------------------------------------------------------------------------


def test_a_sweep_holds_what_differs_by_its_share_alone() -> None:
    selects = {
        "selected": SelectConfig(),
        "more": SelectConfig(fraction=0.7),
        "all": SelectConfig(rule="all"),
        "shuffled": SelectConfig(fraction=0.3, order="shuffled"),
        "final": SelectConfig(fraction=0.4, aggregate="final"),
        "weak": SelectConfig(fraction=0.4, source="runs/w"),
        "counted": SelectConfig(count=9),
        "random": SelectConfig(rule="random", order="shuffled"),
        "hardest": SelectConfig(rule="hardest"),
    }
    assert sweep(selects) == {
        "easiest": {0.5: "selected", 0.7: "more", 1.0: "all"},
        "random": {0.5: "random"},
    }


def test_arms_stand_beside_the_random_control_of_their_size(tmp_path: Path) -> None:
    half = Estimate(0.5, 0.1, 0.3, 0.7)
    arms = (
        ArmResult("reference", "starting model", 0, 0, win_rate=half),
        ArmResult("selected", "easiest 50%", 5, 2, win_rate=half),
        ArmResult("more", "easiest 70%", 7, 3, win_rate=half, length_controlled=half._replace(value=0.45)),
        ArmResult("random", "random 50%", 5, 2, win_rate=half),
    )
    write_json(tmp_path / "evaluation" / "results.json", to_json(EvaluationResults("judge", 2, 1, arms)))
    controls = {"more": {"fraction": 0.7}, "random": {"rule": "random", "fraction": 0.5}}
    write_json(tmp_path / "config.json", {"select": {}, "evaluate": {"controls": controls}})
    # The selected arm wins on both prompts, the random one on the first.
    scores = {"selected": (1.0, 1.0), "more": (0.0, 0.0), "random": (1.0, 0.0)}
    rows = [
        {"arm": arm, "prompt_id": f"q{at}", "sample": 0, "opponent_sample": 0, "score": score}
        for arm, found in scores.items()
        for at, score in enumerate(found)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "evaluation" / "verdicts.parquet")
    found = study_findings(tmp_path)
    by_name = {arm.name: arm for arm in found.arms}
    assert by_name["selected"].control == "random"
    assert by_name["selected"].above_control is not None
    assert by_name["selected"].above_control.value == pytest.approx(0.5)
    assert {name: arm.fraction for name, arm in by_name.items()} == {
        "reference": None,
        "selected": 0.5,
        "more": 0.7,
        "random": 0.5,
    }
    # Seven random pairs were not trained on, so nothing is beside "more".
    assert (by_name["more"].control, by_name["random"].control, by_name["reference"].control) == ("",) * 3
    assert "+50.0" in next(line for line in study_text(found).splitlines() if line.startswith("selected"))
    header, _, *lines = study_text(found).splitlines()
    assert header.endswith("at equal length")
    assert "45.0%" in next(line for line in lines if line.startswith("more"))
    assert json.loads(json.dumps(found.as_json()))["arms"][1]["above_control"]["value"] == pytest.approx(0.5)


def test_a_foreign_difficulty_makes_a_curriculum_without_its_path() -> None:
    ids = pa.array(["a", "b", "c", "d"])
    outside = Outside(
        "pair_id",
        ids,
        np.array([4.0, 1.0, 2.0, 3.0]),
        "digest",
        {"name": "weak", "kind": "file", "nats": True},
    )  # type: ignore[arg-type]
    select = SelectConfig(fraction=0.5, source="runs/weak").model_copy(update={"source": ""})
    made = outside_curriculum(outside, pa.chunked_array([ids]), pa.chunked_array([ids]), select)
    assert made.order == ["b", "c"]
    assert "source" not in made.facts["select"]
