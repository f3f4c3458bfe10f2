"""`init`: a first recipe from a model and a file of pairs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from selective_dpo.cli import main
from selective_dpo.config.load import SHIPPED, load_recipe
from selective_dpo.data.adapters import CHAT, parse_row
from selective_dpo.data.sources import open_source
from tests.fixtures.models import tiny_model_folder, tiny_pairs_file


def table(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


ROWS = [[f"Count to {number}.", "1 2 3", "no"] for number in range(100)]


def test_a_csv_with_other_names_becomes_a_recipe_that_works_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model_folder(tmp_path / "models" / "sft")
    table(
        tmp_path / "pairs.csv", ["id", "instruction", "accepted", "rejected"], [["x", *row] for row in ROWS]
    )
    asked = ["init", "recipes/mine.yaml", "--model", "models/sft", "--data", "pairs.csv"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "100 rows, 100 looked at" in out and "next: selective-dpo plan recipes/mine.yaml" in out

    monkeypatch.chdir("/")
    recipe = load_recipe(tmp_path / "recipes" / "mine.yaml")
    assert recipe.name == "mine" and Path(recipe.model.path) == tmp_path / "models" / "sft"
    (source,) = recipe.data.train
    assert source.columns == {"prompt": "instruction", "chosen": "accepted"} and source.adapter == CHAT
    opened = open_source(source)
    pair = parse_row(next(iter(opened.rows())), opened.adapter)
    assert pair.prompt == [{"role": "user", "content": "Count to 0."}]
    assert pair.chosen == [{"role": "assistant", "content": "1 2 3"}]
    # 100 pairs: updates of two would make twenty on the easy half; four is the least.
    settings = recipe.train.trainer
    update = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    assert update == 4 and recipe.score.protocol == "one-step"
    assert main(["plan", str(tmp_path / "recipes" / "mine.yaml")]) == 0
    assert "100 pairs kept" in capsys.readouterr().out


def test_lengths_hold_all_but_the_longest_pairs_and_the_model_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model_folder(tmp_path / "m", template=None)
    # A byte a token: prompt 10, answers 50 and 60 with their end; two of 300 have answers of 3,000.
    rows = [["p" * 10, "c" * 50, "r" * 60] for _ in range(298)] + [["p" * 10, "c" * 3000, "r"]] * 2
    table(tmp_path / "pairs.csv", ["prompt", "chosen", "rejected"], rows)
    assert main(["init", "a.yaml", "--model", "m", "--data", "pairs.csv"]) == 0
    data = load_recipe("a.yaml").data
    assert (data.max_length, data.max_prompt_length) == (128, 64)  # 71 and 10, in steps of 64
    assert data.train[0].adapter == ""  # no template: text stays text
    long = [["p" * 10, "c" * 3000, "r"]] * 5
    table(tmp_path / "long.csv", ["prompt", "chosen", "rejected"], long)
    assert main(["init", "b.yaml", "--model", "m", "--data", "long.csv"]) == 0
    assert load_recipe("b.yaml").data.max_length == 512  # max_position_embeddings


def test_what_is_dropped_is_said_in_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model_folder(tmp_path / "m")
    lines = tiny_pairs_file(tmp_path / "pairs.jsonl", 20, chat=True).read_text().splitlines()
    same = json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"})
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, same, "{"]) + "\n")
    assert main(["init", "a.yaml", "--model", "m", "--data", "pairs.jsonl"]) == 0
    assert "these are no usable pairs: 1 identical, 1 malformed." in Path("a.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.yaml"], "init needs --model and --data"),
        (["a.txt", "--model", "m", "--data", "pairs.csv"], "let it end in .yaml"),
        (["there.yaml", "--model", "m", "--data", "pairs.csv"], "there.yaml exists"),
        (
            ["a.yaml", "--model", "m", "--data", "odd.csv"],
            "no columns known as chosen and rejected (it has left",
        ),
        (
            ["a.yaml", "--model", "m", "--data", "empty.csv"],
            "none of the first 2 rows of empty.csv is a usable pair",
        ),
        (["a.yaml", "--model", "m", "--data", "absent.csv"], "no file or folder absent.csv"),
        (
            ["a.yaml", "--from", "qwen"],
            "there is no shipped recipe 'qwen'; there are gemma-2-9b-dpo-mix-7k, ",
        ),
        (["a.yaml", "--from", "local-small", "--model", "m"], "--from copies a recipe as it is"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model_folder(tmp_path / "m")
    table(tmp_path / "pairs.csv", ["prompt", "chosen", "rejected"], ROWS)
    table(tmp_path / "odd.csv", ["left", "right"], [["a", "b"]])
    table(tmp_path / "empty.csv", ["prompt", "chosen", "rejected"], [["a", "b", "b"], ["c", "d", "d"]])
    (tmp_path / "there.yaml").touch()
    capsys.readouterr()
    assert main(["init", *words]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert expected in line
    assert not (tmp_path / "a.yaml").exists()


def test_shipped_recipes_are_copied_and_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine.yaml", "--from", "qwen2.5-7b-ultrafeedback"]) == 0
    assert Path("mine.yaml").read_bytes() == (SHIPPED / "qwen2.5-7b-ultrafeedback.yaml").read_bytes()
    assert (
        load_recipe("qwen2.5-7b-ultrafeedback").name == yaml.safe_load(Path("mine.yaml").read_text())["name"]
    )
