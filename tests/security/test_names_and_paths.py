"""Names from recipes and data never become paths: nothing is written outside the run's own folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from selective_dpo.cli import main
from selective_dpo.config import Recipe
from selective_dpo.run.verify import verify_run
from tests.fixtures.models import recipe_file, tiny_recipe

HOSTILE = [
    "../x",
    "..",
    ".",
    "",
    "a/b",
    "/tmp/x",
    "a\\b",
    "..\\x",
    "~",
    "~root",
    "C:x",
    "-rf",
    ".hidden",
    "a b",
]
HOSTILE += ["$(id)", "a;b", "x\n", "x\x00", "é", "\ud800", "a" * 101]
RESERVED = ["CON", "nul", "Com1", "lpt9.txt", "aux.", "prn.a.b", "a."]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("names"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("selective-dpo: error: ") and errors.count("\n") == 1
    return errors


@pytest.mark.parametrize("name", [*HOSTILE, *RESERVED], ids=ascii)
def test_a_run_cannot_be_named_like_a_path(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = recipe_file(recipe, tmp_path / "in" / "recipe.yaml")
    assert "name" in refused(
        capsys, "score", str(path), f"--name={name}", "--output_dir", str(tmp_path / "out")
    )
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", [*HOSTILE, *RESERVED, "selected", "reference"], ids=ascii)
def test_a_control_cannot_be_named_like_a_path(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = recipe_file(recipe, tmp_path / "in" / "recipe.yaml")
    controls = json.dumps({name: {"rule": "all"}})
    refused(
        capsys, "run", str(path), f"--evaluate.controls={controls}", "--output_dir", str(tmp_path / "out")
    )
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["../seed41-fold0", "/seed41-fold0", "seed41-fold0/../../x", "seed41-fold2"])
def test_a_scorer_is_one_of_the_recipes(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = recipe_file(recipe, tmp_path / "recipe.yaml")
    message = refused(capsys, "score", str(path), "--only", name, "--output_dir", str(tmp_path / "out"))
    assert "no scorer named" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_names_in_the_data_stay_in_the_data(tmp_path: Path) -> None:
    """Ids, roles and file names of pairs as hostile as they can be: the run writes what every run writes."""
    names = [
        "../../escaped",
        "/escaped",
        "..",
        "\x00",
        "CON",
        "a/../../escaped",
        ".partial-x",
        "manifest.json",
    ]
    rows = [
        {"prompt": f"{number}: {names[number % 8]}?", "chosen": f"+{number}", "rejected": f"-{number}"}
        | {"prompt_id": f"{names[number % 8]}{number // 16}"}
        for number in range(24)
    ]
    hostile, plain = tmp_path / "hostile", tmp_path / "plain"
    for folder, file in ((hostile, "$(touch escaped);..;`x` .jsonl"), (plain, "pairs.jsonl")):
        folder.mkdir()
        given = rows if folder == hostile else [{**row, "prompt_id": f"p{n}"} for n, row in enumerate(rows)]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in given), "utf-8")
        made = tiny_recipe(
            folder,
            data={"train": [{"path": str(folder / file)}]},
            select={"fraction": 0.5},
            score={"evaluations": 1},
        )
        assert main(["run", str(recipe_file(made, folder / "recipe.yaml"))]) == 0
    written = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (hostile, plain)
    ]
    assert [name for name in written[0] if not name.endswith(".jsonl")] == [
        name for name in written[1] if not name.endswith(".jsonl")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile", "plain"]
    assert verify_run(hostile / "runs" / "tiny").problems == []


@pytest.mark.slow
def test_a_tampered_run_cannot_send_verify_elsewhere(finished_demo: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_demo, tmp_path / "run"))
    outside = tmp_path / "outside"
    outside.mkdir()
    os.mkfifo(outside / "curriculum.json")  # whoever opens it waits for ever
    config = json.loads((run / "config.json").read_text())
    config["evaluate"]["controls"] = {"../../outside": {"rule": "all"}}
    (run / "config.json").write_text(json.dumps(config))
    found = verify_run(run)
    assert any(
        problem.startswith("config.json: ") and "cannot be a name" in problem for problem in found.problems
    )
