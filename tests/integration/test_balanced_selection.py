"""Selections that hold length or a source still, in a run: built, told, shown, verified."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from selective_dpo import Curriculum
from selective_dpo.cli import main
from selective_dpo.config.load import load_recipe
from selective_dpo.curriculum.audit import GroupShare, audit, script_of
from selective_dpo.curriculum.balance import read_attributes
from selective_dpo.stats.estimates import Estimate
from tests.fixtures.models import recipe_file, tiny_pairs_file, tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 pairs of `a.jsonl` and 12 of `b.jsonl`, whose own selection is the plain one."""
    folder = tmp_path_factory.mktemp("balanced")
    files = [
        tiny_pairs_file(folder / f"{name}.jsonl", size, seed=size) for name, size in (("a", 24), ("b", 12))
    ]
    recipe = tiny_recipe(
        folder,
        data={"train": [{"path": str(file)} for file in files], "max_length": 64, "max_prompt_length": 32},
        score={"evaluations": 1},
        evaluate={
            "controls": {
                "balanced": {"balance": ["length", "source"]},
                "less": {"residual": "length"},
                "quota": {"quota": {str(files[1]): 0.5}},
            }
        },
    )
    path = recipe_file(recipe, folder / "recipe.yaml")
    assert main(["score", str(path)]) == 0
    assert main(["curriculum", str(path)]) == 0
    return folder


def arm(folder: Path, name: str) -> Curriculum:
    return Curriculum.load(folder / "runs" / "tiny" / "controls" / name)


def test_each_arm_holds_what_it_says(run: Path) -> None:
    pairs = run / "runs" / "tiny" / "pairs" / "pairs.parquet"
    plain = Curriculum.load(run / "runs" / "tiny")
    assert len(plain.order) == 18
    known = read_attributes(pairs, plain.pair_ids)
    is_b = dict(
        zip(plain.pair_ids, (name.endswith("b.jsonl") for name in known.source_P.tolist()), strict=True)
    )
    balanced, quota, less = (arm(run, name) for name in ("balanced", "quota", "less"))
    assert sum(is_b[name] for name in balanced.order) == pytest.approx(6, abs=2)  # a third of 18, by strata
    assert len(balanced.order) == len(quota.order) == len(less.order) == 18
    assert sum(is_b[name] for name in quota.order) == 9
    assert balanced.table["difficulty"].equals(plain.table["difficulty"])
    assert not less.table["difficulty"].equals(plain.table["difficulty"])
    assert np.mean(less.difficulty_P) == pytest.approx(np.mean(plain.difficulty_P))
    # Length says nothing of what is left: each length's pairs have the same mean but for pooled neighbours.
    left = np.polyfit(known.length_P, less.difficulty_P, 1)[0]
    assert abs(left) < 0.5 * abs(np.polyfit(known.length_P, plain.difficulty_P, 1)[0]) + 1e-3


def test_they_are_verified_and_a_changed_table_of_pairs_makes_them_anew(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(run / "runs" / "tiny")]) == 0
    facts = arm(run, "balanced").facts
    assert set(facts["provenance"]["inputs"]) > {"attributes"} and facts["select"]["balance"] == [
        "length",
        "source",
    ]
    assert "attributes" not in Curriculum.load(run / "runs" / "tiny").facts["provenance"]["inputs"]


def test_the_audit_stands_in_terminal_and_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = run / "recipe.yaml"
    again = [str(recipe), "--name", "again", "--select.fraction", "0.25"]
    assert main(["curriculum", *again]) == 0
    out = capsys.readouterr().out
    assert f"source {run / 'b.jsonl'}, 12 pairs: " in out and "chosen minus rejected tokens: " in out
    assert main(["report", *again]) == 0
    page = (run / "runs" / "again" / "report.html").read_text("utf-8")
    assert "What the selection kept and dropped" in page


def test_shares_and_means_are_those_of_the_table(run: Path) -> None:
    root = run / "runs" / "tiny"
    curriculum = Curriculum.load(root)
    found = audit(curriculum, root / "pairs" / "pairs.parquet")
    known = read_attributes(root / "pairs" / "pairs.parquet", curriculum.pair_ids)
    kept_P = np.isin(curriculum.pair_ids, curriculum.order)
    assert found.average == 0.5
    shares = {group.name: group for group in found.groups if group.what == "source"}
    for name, group in shares.items():
        in_P = known.source_P == name
        assert group.pairs == in_P.sum() and group.kept.value == pytest.approx(kept_P[in_P].mean())
    (length,) = [mean for mean in found.means if mean.what == "chosen minus rejected tokens"]
    assert length.kept.value == pytest.approx(known.length_P[kept_P].mean())
    assert length.dropped.value == pytest.approx(known.length_P[~kept_P].mean())


def test_a_group_that_surely_loses_twice_the_average_is_named() -> None:
    def group(value: float, high: float) -> GroupShare:
        return GroupShare("source", "x", 9, Estimate(value, 0.01, value - (high - value), high))

    assert group(0.20, 0.24).loses_more(0.5)  # keeps less than half of what all keep
    assert not group(0.20, 0.26).loses_more(0.5)
    assert group(0.70, 0.78).loses_more(0.9)  # loses 22% at least, where all lose 10%
    assert not group(0.75, 0.82).loses_more(0.9)


def test_scripts_are_told_by_most_letters() -> None:
    texts = {"one два three": "LATIN", "привет!": "CYRILLIC", "123 ...": "none", "漢字かな漢字": "CJK"}
    assert {text: script_of(text) for text in texts} == texts
    assert script_of([{"role": "assistant", "content": "αβγ"}]) == "GREEK"


def test_a_study_has_arms_of_them(run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        run / "recipe.yaml",
        [("study.balance", "[[length]]"), ("study.residual", "[length]"), ("study.orders", "[]")],
    )
    controls = recipe.evaluate.controls
    assert controls["balanced-length"].balance == ("length",) and controls["less-length"].residual == "length"
    assert controls["random-50"].rule == "random"
    assert json.dumps(controls["less-length"].identity())
