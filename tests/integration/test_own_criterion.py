"""A run by a criterion of the user's own file: from the recipe to the curriculum's key and provenance."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from selective_dpo.cli import main
from selective_dpo.criteria import CRITERIA
from selective_dpo.curriculum.records import read_loss_table
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.storage.artifacts import file_digest
from tests.fixtures.models import recipe_file, tiny_recipe

CODE = "def last(margin):\n    return -margin[:, :, -1].mean(axis=1)\n"


def test_a_run_selects_by_it_and_notices_an_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "my_run_criteria.py"
    file.write_text(CODE)
    name = "my_run_criteria:last"
    try:
        recipe = tiny_recipe(
            tmp_path, score={"evaluations": 1, "lora": None}, train={"lora": None}, select={"aggregate": name}
        )
        path = recipe_file(recipe, tmp_path / "recipe.yaml")
        assert main(["curriculum", str(path)]) == 0
        run = tmp_path / "runs" / "tiny"
        made = Curriculum.load(run)
        records = sorted((run / "scores").rglob("records.parquet"))
        table = read_loss_table(records, columns=["margin"])
        assert made.difficulty_P == pytest.approx(-table.others["margin"][:, :, -1].mean(axis=1))
        assert np.ptp(made.difficulty_P) > 0
        assert file_digest(file) in str((run / "inputs.json").read_text())
        file.write_text(CODE.replace("mean", "min"))
        capsys.readouterr()
        assert main(["curriculum", str(path)]) == 2
        assert (
            "was made from other inputs (criterion my_run_criteria:last: SHA-256" in capsys.readouterr().err
        )
    finally:
        CRITERIA.pop(name, None)
        sys.modules.pop("my_run_criteria", None)
