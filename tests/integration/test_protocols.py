"""Protocols `fast` and `certified` on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from selective_dpo.config import Recipe
from selective_dpo.config.load import make_recipe
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import ConfigError
from selective_dpo.run.keys import Run
from selective_dpo.run.run import curriculum, open_run, score
from selective_dpo.storage.artifacts import read_json
from tests.fixtures.models import tiny_recipe


def recipe(tmp: Path, **changes: object) -> Recipe:
    """The tiny recipe with another protocol."""
    base = tiny_recipe(tmp).model_dump(mode="json")
    kept = {name: base["score"][name] for name in ("lora", "trainer", "tokens_per_batch")}
    return make_recipe({**base, "score": {**kept, **changes}})


def opened(recipe: Recipe, *, fresh: bool = False) -> tuple[Run, list[str]]:
    """The run and what it says."""
    lines: list[str] = []
    return open_run(recipe, fresh=fresh, say=lines.append), lines


def scorers(run: Run) -> list[str]:
    """Names of the scorers that have been published."""
    return sorted(path.name for path in (run.folder.root / "scores").iterdir() if path.is_dir())


def test_fast_is_one_seed_measured_in_the_middle_and_at_the_end(tmp_path: Path) -> None:
    run, _ = opened(recipe(tmp_path, protocol="fast"))
    made = curriculum(run)
    assert scorers(run) == ["seed41-fold0", "seed41-fold1"]
    assert [name for name in made.table.column_names if name.startswith("loss_")] == [
        "loss_seed41_evaluation1",
        "loss_seed41_evaluation2",
    ]
    assert made.facts["certificate"] is None


def test_certified_stops_at_two_seeds_where_they_suffice(tmp_path: Path) -> None:
    run, lines = opened(recipe(tmp_path, protocol="certified", target_overlap=0.01))
    made = curriculum(run)
    assert scorers(run) == ["seed41-fold0", "seed41-fold1", "seed42-fold0", "seed42-fold1"]
    certificate = made.facts["certificate"]
    assert certificate["reached"] and certificate["seeds"] == 2 and certificate["target"] == 0.01
    assert certificate["prediction"]["seeds"] == 2
    assert "taste for length" in certificate["assumes"]
    (told,) = (line for line in lines if "2 seeds: a fresh repetition is predicted" in line)
    assert certificate["assumes"] in told
    # The prediction alone is not enough: with a target between it and its lower end a third seed is scored.
    found = certificate["prediction"]["repetition"]
    between = (found["low"] + found["value"]) / 2
    wanted = recipe(tmp_path, protocol="certified", target_overlap=between, seeds=[41, 42, 43])
    run, _ = opened(wanted, fresh=True)
    assert curriculum(run).facts["certificate"]["seeds"] == 3


def test_certified_adds_seeds_and_says_when_they_did_not_suffice(tmp_path: Path) -> None:
    wanted = recipe(tmp_path, protocol="certified", target_overlap=0.999999, seeds=[1, 2, 3])
    run, lines = opened(wanted)
    made = curriculum(run)
    assert len(scorers(run)) == 6
    assert made.facts["seeds"] == [1, 2, 3]
    assert not made.facts["certificate"]["reached"] and made.facts["certificate"]["seeds"] == 3
    assert any("NOT certified" in line for line in lines)
    before = {path: path.stat().st_mtime_ns for path in (run.folder.root / "scores").rglob("*")}
    again, lines = opened(wanted)
    score(again)
    assert {path: path.stat().st_mtime_ns for path in (run.folder.root / "scores").rglob("*")} == before
    assert not any("to train" in line for line in lines)


def test_records_of_fast_serve_certified(tmp_path: Path) -> None:
    run, _ = opened(recipe(tmp_path, protocol="fast"))
    score(run)
    before = read_json(run.folder.root / "scores" / "seed41-fold0" / "manifest.json")
    run, lines = opened(recipe(tmp_path, protocol="certified", target_overlap=0.01), fresh=True)
    score(run)
    assert read_json(run.folder.root / "scores" / "seed41-fold0" / "manifest.json") == before
    assert any(line.startswith("scores: 2 of 4 scorers") for line in lines)


def test_a_certificate_of_other_records_is_not_believed(tmp_path: Path) -> None:
    run, _ = opened(recipe(tmp_path, protocol="certified", target_overlap=0.01))
    score(run)
    path = run.folder.certificate
    path.write_text(path.read_text("utf-8").replace('"seeds": 2', '"seeds": 3', 1), "utf-8")
    path.write_text(path.read_text("utf-8").replace('"key": "', '"key": "0', 1), "utf-8")
    run, _ = opened(recipe(tmp_path, protocol="certified", target_overlap=0.01))
    curriculum(run)
    assert read_json(path)["seeds"] == 2
    assert Curriculum.load(run.folder.root).facts["seeds"] == [41, 42]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "fast", "seeds": [1]}, "protocol 'fast' is seeds"),
        ({"protocol": "fast", "evaluations": 5}, "protocol 'fast' is seeds"),
        ({"protocol": "certified", "seeds": [1]}, "at least two seeds"),
        ({"protocol": "paper", "target_overlap": 0.9}, "only with protocol 'certified'"),
        ({"protocol": "certified", "target_overlap": 1.0}, "target_overlap"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, **changes)
