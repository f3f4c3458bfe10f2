"""Row 15 of the fault matrix: a run's clock, place and permissions change, and its contents decide."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selective_dpo.artifacts import folder_digests, verify_folder
from selective_dpo.cli.main import main
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.pipeline import curriculum_stage, pairs_stage, stages
from selective_dpo.scoring import score as score_module
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_pairs_file, tiny_recipe

pytestmark = pytest.mark.slow

MAKERS = (
    (pairs_stage, "prepare_pairs"),
    (stages, "publish_reference"),
    (curriculum_stage, "build_curriculum"),
    (stages, "train_policy"),
    (score_module, "run_scorer"),
)
"""What makes each stage's result."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, pairs, recipe and a run up to the policy."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", str(recipe_in(folder))]) == 0
    return folder


def recipe_in(folder: Path) -> Path:
    if not (folder / "model").exists():
        tiny_model_folder(folder / "model")
        tiny_pairs_file(folder / "pairs.jsonl")
    recipe = tiny_recipe(folder, score={"evaluations": 1}, launch={"checkpoint_minutes": 0.0})
    return recipe_file(recipe, folder / "recipe.yaml")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The same at another place, its recipe naming that place."""
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "recipe.yaml").unlink()
    recipe_in(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with the name of whatever makes a result."""
    names: list[str] = []

    def noting(name: str, make: Any) -> Any:
        def maker(*args: Any, **others: Any) -> Any:
            names.append(name)
            return make(*args, **others)

        return maker

    for module, name in MAKERS:
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    return names


def results(run: Path) -> dict[str, str]:
    own = ("recipe.yaml", "config.json", "inputs.json")  # they name folders
    return {name: value for name, value in folder_digests(run).items() if name not in own}


# --- clocks ---------------------------------------------------------------------------------------------


@pytest.mark.fault(row=15)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_times_of_files_decide_nothing(copy: Path, made: list[str], seed: int) -> None:
    before = results(copy / "runs" / "tiny")
    draw = random.Random(seed)
    for path in copy.rglob("*"):
        moment = draw.choice((0, 1e9, time.time() + 1e9)) + draw.random() * 1e6
        os.utime(path, (moment, moment))
    assert main(["train", str(copy / "recipe.yaml"), "--fresh"]) == 0
    assert made == [] and results(copy / "runs" / "tiny") == before


@pytest.mark.fault(row=15)
@pytest.mark.parametrize(
    ("changed", "makes"),
    [
        ("pairs/tokens.parquet", "prepare_pairs"),
        ("reference/logps.parquet", "publish_reference"),
        ("scores/seed41-fold1/records.parquet", "run_scorer"),
        ("policy/adapter_model.safetensors", "train_policy"),
    ],
)
def test_a_file_of_the_same_size_and_time_with_one_other_bit_is_found_out(
    copy: Path, made: list[str], changed: str, makes: str
) -> None:
    run = copy / "runs" / "tiny"
    before = results(run)
    path = run / changed
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(["train", str(copy / "recipe.yaml"), "--fresh"]) == 0
    # It alone is made again, and comes out as before; so nothing after it has to be.
    assert made == [makes]
    assert {name: results(run)[name] for name in before if _is_number(name)} == {
        name: value for name, value in before.items() if _is_number(name)
    }


def _is_number(name: str) -> bool:
    """Files of results; the others say how long it took, or where the data were."""
    is_table = name.endswith((".parquet", ".safetensors")) and name != "pairs/pairs.parquet"
    return is_table or name == "policy/order.json"


@pytest.mark.fault(row=15)
def test_a_clock_that_runs_backwards_changes_no_number(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path)
    moment = [2e9]

    def backwards() -> float:
        moment[0] -= 3600.0
        return moment[0]

    monkeypatch.setattr(time, "time", backwards)
    assert main(["train", str(recipe)]) == 0
    run, other = tmp_path / "runs" / "tiny", whole / "runs" / "tiny"
    verify_folder(run / "policy")
    ours, theirs = results(run), results(other)
    assert moment[0] < 2e9
    for name in theirs:
        if _is_number(name):
            assert ours[name] == theirs[name], name
    assert Curriculum.load(run).order_digest == Curriculum.load(other).order_digest


# --- places ---------------------------------------------------------------------------------------------


@pytest.mark.fault(row=15)
@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_run_at_another_place_is_the_same_run(
    copy: Path, made: list[str], tmp_path: Path, how: str
) -> None:
    place = copy
    if how == "moved":
        place = tmp_path / "elsewhere with a space" / "é"
        place.parent.mkdir()
        copy.rename(place)
        (place / "recipe.yaml").unlink()
        recipe_in(place)
    before = results(place / "runs" / "tiny")
    # The recipe now names data and model at their new place, which `--fresh` accepts; contents are the same.
    assert main(["train", str(place / "recipe.yaml"), "--fresh"]) == 0
    assert made == [] and results(place / "runs" / "tiny") == before
    # From then on it is this recipe's folder.
    assert main(["train", str(place / "recipe.yaml")]) == 0
    assert made == []


@pytest.mark.fault(row=15)
def test_only_the_run_folder_elsewhere_needs_no_word(whole: Path, made: list[str], tmp_path: Path) -> None:
    shutil.copytree(whole / "runs", tmp_path / "archive")
    assert main(["train", str(whole / "recipe.yaml"), "--output_dir", str(tmp_path / "archive")]) == 0
    assert made == []


@pytest.mark.fault(row=15)
def test_other_data_at_the_old_place_are_other_data(copy: Path, made: list[str]) -> None:
    assert main(["train", str(copy / "recipe.yaml"), "--fresh"]) == 0
    file, times = copy / "pairs.jsonl", (copy / "pairs.jsonl").stat()
    text = file.read_text("utf-8")
    changed = text.replace('"+3', '"+x', 1)
    assert len(changed) == len(text) and changed != text
    file.write_text(changed, "utf-8")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(["train", str(copy / "recipe.yaml"), "--fresh"]) == 0
    assert set(made) == {name for _, name in MAKERS}


# --- permissions ----------------------------------------------------------------------------------------


@pytest.fixture
def read_only(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """The run on a file system that refuses to be written to."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("mounts as Linux does")
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    shutil.copytree(whole / "runs", place / "runs")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    yield place / "runs"
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.fault(row=15)
@pytest.mark.parametrize(
    "command",
    [
        ["score"],
        ["train", "--fresh", "--train.trainer.learning_rate", "5e-3"],
        ["curriculum", "--fresh", "--select.fraction", "0.2"],
        ["report"],
    ],
)
def test_a_folder_that_cannot_be_written_to_is_one_line(
    whole: Path, read_only: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    before = folder_digests(read_only)
    verb, *options = command
    assert main([verb, str(whole / "recipe.yaml"), "--output_dir", str(read_only), *options]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1]
    assert line.startswith("selective-dpo: error: ") and "Read-only file system" in line
    assert str(read_only) in line
    assert folder_digests(read_only) == before


@pytest.mark.fault(row=15, trials=3)
def test_reading_from_it_works(whole: Path, read_only: Path, tmp_path: Path) -> None:
    run = read_only / "tiny"
    assert main(["inspect", str(run)]) == 0
    for form in ("csv", "jsonl"):
        assert main(["export", str(run), "--format", form, "--out", str(tmp_path / form)]) == 0
