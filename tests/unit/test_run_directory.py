"""A run's folder belongs to one recipe; a changed one is refused by name, and nothing is written for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selective_dpo.config import Recipe
from selective_dpo.config.load import load_recipe, make_recipe
from selective_dpo.difficulty.protocols import ScorerRun
from selective_dpo.errors import RunChangedError
from selective_dpo.run.folder import RunDirectory
from selective_dpo.storage.artifacts import read_json, write_json


def recipe(folder: Path, **blocks: Any) -> Recipe:
    raw = {"name": "r", "output_dir": str(folder), "model": {"path": "m"}, "data": {"train": [{"path": "x"}]}}
    return make_recipe(raw | blocks)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_asking_for_a_path_makes_nothing(tmp_path: Path) -> None:
    run = RunDirectory.of(recipe(tmp_path))
    paths = {
        name: getattr(run, name).relative_to(tmp_path / "r").as_posix()
        for name in (
            "pairs",
            "test_pairs",
            "reference",
            "test_reference",
            "curriculum",
            "policy",
            "evaluation",
        )
    }
    assert paths == {
        "pairs": "pairs",
        "test_pairs": "test-pairs",
        "reference": "reference",
        "test_reference": "test-reference",
        "curriculum": ".",
        "policy": "policy",
        "evaluation": "evaluation",
    }
    assert run.scores(ScorerRun(41, 0)) == tmp_path / "r" / "scores" / "seed41-fold0"
    assert run.control("all") == tmp_path / "r" / "controls" / "all"
    assert run.report == tmp_path / "r" / "report.html"
    run.require_same_recipe(recipe(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_is_kept_as_given_and_as_resolved(tmp_path: Path) -> None:
    given = recipe(tmp_path, select={"fraction": 0.3}, score={"trainer": {"beta": 6e-6}})
    run = RunDirectory.of(given)
    run.claim(given)
    assert sorted(contents(run.root)) == ["config.json", "recipe.yaml"]
    text = (run.root / "recipe.yaml").read_text("utf-8")
    assert "fraction: 0.3" in text
    assert "aggregate" not in text  # a default: only in config.json
    assert '"aggregate": "mean"' in (run.root / "config.json").read_text("utf-8")
    assert load_recipe(run.root / "recipe.yaml") == given


def test_claiming_again_touches_nothing(tmp_path: Path) -> None:
    run = RunDirectory.of(recipe(tmp_path))
    run.claim(recipe(tmp_path))
    before = contents(run.root)
    run.claim(recipe(tmp_path))
    assert contents(run.root) == before


def test_a_changed_recipe_is_refused_field_by_field(tmp_path: Path) -> None:
    run = RunDirectory.of(recipe(tmp_path))
    run.claim(recipe(tmp_path))
    before = contents(run.root)
    changed = recipe(tmp_path, select={"fraction": 0.3}, train={"trainer": {"beta": 0.1}})
    with pytest.raises(RunChangedError) as caught:
        run.require_same_recipe(changed)
    message = str(caught.value)
    assert "select.fraction: null -> 0.3" in message
    assert "train.trainer.beta: (absent) -> 0.1" in message
    assert "--fresh" in message
    assert contents(run.root) == before
    run.claim(changed)  # accepted afresh: from now on it is this recipe's
    run.require_same_recipe(changed)


def test_what_does_not_change_results_may_change(tmp_path: Path) -> None:
    run = RunDirectory.of(recipe(tmp_path))
    run.claim(recipe(tmp_path))
    moved = recipe(tmp_path, name="moved", output_dir="elsewhere", launch={"workers": 4})
    run.require_same_recipe(moved)


def test_a_key_that_came_later_counts_as_its_default(tmp_path: Path) -> None:
    paper = {"protocol": "paper"}
    run = RunDirectory.of(recipe(tmp_path))
    run.claim(recipe(tmp_path, score=paper))
    config = read_json(run.root / "config.json")
    del config["curriculum"], config["score"]["min_fold_prompts"]
    write_json(run.root / "config.json", config)
    run.require_same_recipe(recipe(tmp_path, score=paper))
    with pytest.raises(RunChangedError, match=r"score\.min_fold_prompts: 5 -> 1"):
        run.require_same_recipe(recipe(tmp_path, score={**paper, "min_fold_prompts": 1}))


def test_many_changes_are_counted(tmp_path: Path) -> None:
    run = RunDirectory.of(recipe(tmp_path))
    run.claim(recipe(tmp_path))
    trainer = {f"option{number}": number for number in range(11)}
    with pytest.raises(RunChangedError, match="and 3 more"):
        run.require_same_recipe(recipe(tmp_path, score={"trainer": trainer}))
