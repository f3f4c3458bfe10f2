"""Paths that commands are given and that cannot be: one line, exit code 2, and nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selective_dpo.cli import VERBS, main, path, verb_parser
from selective_dpo.errors import disk_fault
from tests.fixtures.bad_input import command
from tests.fixtures.models import recipe_file, tiny_recipe

RUN = "runs/tiny"
# The command, with {} for the path; what is wrong with the path; and what is said of it.
CASES = [
    ("demo --out {}", "below a file", "Not a directory"),
    ("run recipe.yaml --output_dir {}", "a file", "Not a directory"),
    ("run {}", "a folder", "cannot read the recipe"),
    ("run recipe.yaml --output_dir {}", "links in a circle", "Too many levels of symbolic links"),
    ("plan recipe.yaml --json {}", "a folder", "is a folder, which no file can take the place of"),
    ("plan {}", "not UTF-8", "no recipe at"),
    ("import-records records --out {}", "a long name", "File name too long"),
    ("import-curriculum {} --out nowhere", "below a file", "does not exist"),
    ("import-curriculum records --out {}.parquet", "a NUL byte", "it holds a NUL character"),
    (f"export {RUN} --format csv --overwrite --out {{}}", "a pipe", "is not an exported"),
    (f"export {RUN} --format datasets --overwrite --out {{}}", "a file", "is not an exported"),
    (f"export {RUN} --format jsonl --out nowhere --pairs {{}}", "a folder", "is not complete"),
    ("compare {}", "a folder", "holds no seed41_step00.csv"),
    (f"compare {RUN} {{}}", "below a file", "does not exist: give a run's folder"),
    ("compare records --page {}", "a folder", "is a folder, which no file can take the place of"),
    ("inspect {}", "a folder", "no curriculum at"),
    (f"verify {RUN} --json {{}}", "not UTF-8", "it cannot be written as UTF-8"),
]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its run up to the curriculum, and the original's records."""
    folder = tmp_path_factory.mktemp("things")
    recipe_file(tiny_recipe(folder), folder / "recipe.yaml")
    assert main(["curriculum", str(folder / "recipe.yaml")]) == 0
    (folder / "records").mkdir()
    for step in (0, 1):
        rows = "".join(f"id{number},0.{number}\n" for number in range(1, 5))
        (folder / "records" / f"seed41_step{step:02d}.csv").write_text(rows)
    return folder


def wrong_path(kind: str, folder: Path) -> str:
    """A path in `folder` that is what `kind` says."""
    place = folder / "x"
    if kind == "a folder":
        place.mkdir()
        (place / "file").touch()
    elif kind == "a pipe":
        os.mkfifo(place)
    elif kind == "links in a circle":
        place.symlink_to(place)
    elif kind in ("a file", "below a file"):
        place.write_text("x")
    return {
        "below a file": f"{place}/y",
        "a long name": str(folder / ("x" * 300)),
        "a NUL byte": f"{place}\0",
        "not UTF-8": str(folder / "\udcff"),
    }.get(kind, str(place))


@pytest.mark.parametrize(("line", "kind", "expected"), CASES)
def test_a_path_that_cannot_be_is_one_line(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, kind: str, expected: str
) -> None:
    """It says what the system refuses, and nothing is written, there or elsewhere."""
    given = wrong_path(kind, tmp_path)
    before = {each: each.lstat().st_mtime_ns for each in [*things.rglob("*"), *tmp_path.rglob("*")]}
    monkeypatch.chdir(things)
    answer = command([word.replace("{}", given) for word in line.split()], inside=tmp_path)
    assert answer.code == 2 and answer.error.count("\n") == 1, answer
    assert expected in answer.error
    assert before == {each: each.lstat().st_mtime_ns for each in [*things.rglob("*"), *tmp_path.rglob("*")]}


def test_every_option_that_is_a_path_is_checked_as_one() -> None:
    for verb in VERBS:
        for action in verb_parser(verb)._actions:
            is_path = action.metavar in ("PATH", "FOLDER", "CURRICULUM", "RUN")
            assert is_path == (action.type is path), (verb, action)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("verb", ["run", "doctor"])
def test_a_recipe_that_may_not_be_read(tmp_path: Path, verb: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.touch(mode=0o200)
    answer = command([verb, str(recipe)], inside=tmp_path)
    assert answer.code == 2 and f"cannot read the recipe {recipe}: Permission denied" in answer.error


@pytest.mark.parametrize("verb", ["doctor", "import-records"])
def test_a_current_folder_that_is_gone(things: Path, tmp_path: Path, verb: str) -> None:
    arguments = {
        "doctor": ["doctor", str(things / "recipe.yaml"), "--output_dir", "runs"],
        "import-records": ["import-records", str(things / "records"), "--out", "x"],
    }[verb]
    gone, here = tmp_path / "gone", Path.cwd()
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        answer = command(arguments, inside=tmp_path)
    finally:
        os.chdir(here)
    assert answer.code == 2 and answer.error.endswith(
        "No such file or directory; check the path, its permissions and the room on the disk\n"
    )


def test_only_a_file_whose_folder_is_there_is_ours_to_miss(tmp_path: Path) -> None:
    there, gone = str(tmp_path / "x"), str(tmp_path / "x" / "y")
    assert disk_fault(FileNotFoundError(2, "No such file", there)) is None
    assert (disk_fault(FileNotFoundError(2, "No such file", gone)) or "").startswith(f"{gone}: No such file")


# --- what is written to ----------------------------------------------------------------------------------


def test_a_device_is_left_what_it_is(things: Path, tmp_path: Path) -> None:
    """Root could put a file in the place of /dev/null, and did: the JSON was renamed over it."""
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o20666, os.makedev(1, 3))  # a character device, as /dev/null is
    except (OSError, AttributeError):
        pytest.skip("no right to make a device")
    answer = command(["verify", str(things / "runs" / "tiny"), "--json", str(device)], inside=tmp_path)
    assert answer.code == 2 and "is a device or a pipe" in answer.error
    assert device.is_char_device()


def test_a_link_stays_and_its_file_is_replaced(things: Path, tmp_path: Path) -> None:
    file, link = tmp_path / "deep" / "file.json", tmp_path / "link.json"
    file.parent.mkdir()
    file.write_text("old")
    link.symlink_to(file)
    assert main(["verify", str(things / "runs" / "tiny"), "--json", str(link)]) == 0
    assert link.is_symlink() and '"ok": true' in file.read_text()
