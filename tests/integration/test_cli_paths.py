"""Every path that a command takes, given everything that a path can wrongly be: one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from selective_dpo.cli import main as cli
from selective_dpo.cli import VERBS, main
from selective_dpo.errors import disk_fault
from tests.fixtures.bad_input import command
from tests.fixtures.models import recipe_file, tiny_recipe

NOT_THERE = ("no curriculum at", "is not complete", "no pairs at", "is not a run's folder", "is not a folder")
# What is said of each; where there are several, each of another kind of option.
SAID = {
    "a folder": ("is a folder, which no file can take", "is not an exported file", "cannot read the recipe"),
    "an empty folder": (*NOT_THERE, "holds no seed41_step00.csv"),
    "a file": (
        *NOT_THERE,
        "File exists",
        "Not a directory",
        "not an exported data set",
        "not a recipe's keys",
        "and needs one of ids",
    ),
    "below a file": (*NOT_THERE, "does not exist", "File exists", "Not a directory"),
    "a long name": ("File name too long", "is longer than 255 bytes between two slashes"),
    "a NUL byte": ("it holds a NUL character", "U+0000", "null byte"),
    "not UTF-8": ("it cannot be written as UTF-8", "U+DCFF", "no recipe at"),
    "a pipe": ("a device or a pipe", "File exists", "Not a directory", "is not an exported"),
    "not to be written to": ("Read-only file system", "Permission denied"),
    "links in a circle": (*NOT_THERE, "Too many levels of symbolic links", "File exists", "Not a directory"),
}
FILE = (
    "a folder",
    "below a file",
    "a long name",
    "a NUL byte",
    "not UTF-8",
    "a pipe",
    "not to be written to",
)
FOLDER = ("a file", *FILE[1:], "links in a circle")
READ = ("an empty folder", "a file", "below a file", "a long name", "a NUL byte", "not UTF-8")
RECIPE = ("a folder", *READ[1:], "links in a circle")


class Option(NamedTuple):
    """One of a command's paths."""

    verb: str
    name: str
    """As the parser knows it; or a recipe's key."""
    wrong: tuple[str, ...]
    """What it cannot be."""
    command: Callable[[Path, str], list[str]]
    """The command line with that path, for the folder `things`."""
    suffix: str = ""


def with_recipe(*words: str) -> Callable[[Path, str], list[str]]:
    return lambda things, path: [words[0], str(things / "recipe.yaml"), *words[1:], path]


def of_run(*words: str) -> Callable[[Path, str], list[str]]:
    return lambda things, path: [words[0], str(things / "runs" / "tiny"), *words[1:], path]


def of_records(*words: str) -> Callable[[Path, str], list[str]]:
    return lambda things, path: [words[0], str(things / "records"), *words[1:], path]


def first(verb: str, *words: str) -> Callable[[Path, str], list[str]]:
    return lambda things, path: [verb, path, *words]


IMPORTING = ("import-curriculum", "import-records")
RUNNING = ("run", "score", "curriculum", "train", "evaluate", "report")
OPTIONS = (
    Option("demo", "out", FOLDER, lambda t, p: ["demo", "--out", p]),
    *(Option(verb, "recipe", RECIPE, first(verb)) for verb in (*RUNNING, "plan", "doctor")),
    *(Option(verb, "output_dir", FOLDER, with_recipe(verb, "--output_dir")) for verb in RUNNING),
    Option("plan", "json", FILE, with_recipe("plan", "--json")),
    *(Option(verb, "source", READ, first(verb, "--out", "nowhere")) for verb in IMPORTING),
    *(Option(verb, "pairs", READ, of_records(verb, "--out", "nowhere", "--pairs")) for verb in IMPORTING),
    *(Option(verb, "out", FOLDER, of_records(verb, "--out")) for verb in IMPORTING),
    Option("import-curriculum", "out", FILE, of_records("import-curriculum", "--out"), ".parquet"),
    Option("export", "curriculum", READ, first("export", "--format", "csv", "--out", "nowhere")),
    *(
        Option("export", "out", FILE, of_run("export", "--format", form, "--overwrite", "--out"))
        for form in ("csv", "parquet", "jsonl")
    ),
    Option("export", "out", FOLDER, of_run("export", "--format", "datasets", "--overwrite", "--out")),
    Option("export", "pairs", READ, of_run("export", "--format", "jsonl", "--out", "nowhere", "--pairs")),
    Option("inspect", "curriculum", READ, first("inspect")),
    Option("inspect", "pairs", READ, of_run("inspect", "--pairs")),
    Option("verify", "run", READ, first("verify")),
    Option("verify", "json", FILE, of_run("verify", "--json")),
)
CASES = [(option, kind) for option in OPTIONS for kind in option.wrong]


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


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A folder that refuses to be written to, by its file system or by its permissions."""
    place = tmp_path / "unwritable"
    place.mkdir()
    if os.geteuid():
        place.chmod(0o500)
        yield place
        place.chmod(0o700)
        return
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("root may write everywhere, and mounts as Linux does are not to be had")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def wrong_path(kind: str, folder: Path, suffix: str) -> str:
    """A path in `folder` that is what `kind` says."""
    place = folder / f"x{suffix}"
    if kind in ("a folder", "an empty folder"):
        place.mkdir()
        if kind == "a folder":
            (place / "file").touch()
    elif kind == "a pipe":
        os.mkfifo(place)
    elif kind == "links in a circle":
        place.symlink_to(place)
    elif kind in ("a file", "below a file"):
        place.write_text("x")
    return {
        "below a file": f"{place}/y{suffix}",
        "a long name": str(folder / f"{'x' * 300}{suffix}"),
        "a NUL byte": f"{place}\0{suffix}",
        "not UTF-8": str(folder / f"\udcff{suffix}"),
    }.get(kind, str(place))


@pytest.mark.parametrize(
    ("option", "kind"), CASES, ids=lambda each: each if isinstance(each, str) else f"{each.verb} {each.name}"
)
def test_a_path_that_cannot_be_is_one_line(
    things: Path, tmp_path: Path, request: pytest.FixtureRequest, option: Option, kind: str
) -> None:
    """Each path of each command, given what it cannot be: exit code 2, one line that says what the
    system refuses, and nothing is written, there or elsewhere."""
    is_unwritable = kind == "not to be written to"
    folder = request.getfixturevalue("unwritable") if is_unwritable else tmp_path
    before = {path: path.lstat().st_mtime_ns for path in things.rglob("*")}
    path = wrong_path(kind, folder, option.suffix)
    listed = sorted(tmp_path.rglob("*"))
    answer = command(option.command(things, path), inside=tmp_path)
    assert answer.code == 2 and answer.error.count("\n") == 1, answer
    assert any(words in answer.error for words in SAID[kind]), answer
    assert sorted(tmp_path.rglob("*")) == listed
    assert before == {path: path.lstat().st_mtime_ns for path in things.rglob("*")}


def test_no_path_of_any_command_is_left_out() -> None:
    """Who adds an option that is a path adds it here; by then it goes through `path_text`, or is a recipe."""
    found = set()
    for verb in VERBS:
        parser = argparse.ArgumentParser()
        import_module(f"selective_dpo.cli.{cli._MODULES.get(verb, verb)}").add_options(parser, verb)
        for action in parser._actions:
            is_path = action.metavar in ("PATH", "FOLDER", "DIR", "CURRICULUM", "RUN")
            assert is_path == (getattr(action.type, "__name__", "") == "path_text"), (verb, action)
            if is_path or action.metavar == "RECIPE":
                found.add((verb, action.dest))
    assert found == {(option.verb, option.name) for option in OPTIONS if option.name != "output_dir"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("verb", [*RUNNING, "plan", "doctor"])
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
