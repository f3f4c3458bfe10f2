"""A tiny run from pairs to a policy with `select.action`, its issues, and what `verify` says of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from selective_dpo.cli import main
from selective_dpo.config import FLAGS
from selective_dpo.curriculum.issues import load_issues
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.identity import ids_digest
from selective_dpo.run.run import open_run, train
from selective_dpo.run.verify import verify_run
from selective_dpo.storage.artifacts import read_json
from tests.fixtures.models import recipe_file, tiny_recipe

pytestmark = pytest.mark.slow

# Which pairs of a random model look wrong is chance; these thresholds give each kind some.
ISSUES = {"suspected_flip": 0.56, "tie": 0.01}
ACTION = {"suspected_flip": "flip", "tie": "sft", "too_hard": "down-weight"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("run")
    select = {"action": ACTION, "fraction": 0.8}
    recipe = tiny_recipe(tmp, name="acted", score={"evaluations": 1}, issues=ISSUES, select=select)
    recipe_file(recipe, tmp / "recipe.yaml")
    lines: list[str] = []
    train(open_run(recipe, say=lines.append))
    folder = tmp / "runs" / "acted"
    (folder / "said.txt").write_text("\n".join(lines), "utf-8")
    return folder


def test_the_policy_was_trained_on_new_labels_with_weights_in_order(run: Path) -> None:
    curriculum = Curriculum.load(run)
    table = curriculum.table.to_pandas()
    counts = table["action"].value_counts()
    assert {"flip", "sft", "down-weight"} <= set(counts.index)
    said = (run / "said.txt").read_text("utf-8")
    assert f"actions: down-weight {counts['down-weight']}, flip {counts['flip']}, sft {counts['sft']}" in said
    assert not table.loc[table["action"] == "sft", "selected"].any()
    assert (table.loc[table["flipped"], "p_wrong"] < 0.5).all()
    weighted = table["action"] == "down-weight"
    np.testing.assert_allclose(table.loc[weighted, "weight"], 1.0 - table.loc[weighted, "p_wrong"])
    order = read_json(run / "policy" / "order.json")
    assert order["matches"] is True
    assert order["consumed_digest"] == ids_digest(curriculum.certified_order)
    assert order["consumed_digest"] != curriculum.order_digest
    lines = (run / "sft.jsonl").read_text("utf-8").splitlines()
    sent = set(table.loc[table["action"] == "sft", "pair_id"])
    assert {json.loads(line)["pair_id"] for line in lines} <= sent
    assert set(json.loads(lines[0])) == {"pair_id", "prompt_id", "prompt", "completion"}


def test_the_run_verifies_and_its_issues_are_those_that_were_acted_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = verify_run(run)
    assert found.problems == []
    assert main(["issues", str(run)]) == 0
    assert "p_wrong of 0.56 or more" in capsys.readouterr().out
    issues, curriculum = load_issues(run), Curriculum.load(run).table
    assert issues is not None
    for flag in FLAGS:
        assert issues.table[flag].to_pylist() == curriculum[flag].to_pylist()


def test_compare_says_which_labels_it_compares(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run), str(run)]) == 0
    assert (
        "pairs were flipped (select.action): their difficulty is of the new label" in capsys.readouterr().out
    )


def test_another_threshold_is_another_curriculum(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_json(run / "curriculum.json")["key"]
    recipe = str(run.parents[1] / "recipe.yaml")
    assert main(["curriculum", recipe, "--issues.suspected_flip", "0.9"]) == 2
    assert "issues.suspected_flip: 0.56 -> 0.9" in capsys.readouterr().err
    assert main(["curriculum", recipe, "--issues.suspected_flip", "0.9", "--fresh"]) == 0
    after = read_json(run / "curriculum.json")["key"]
    assert after != before
