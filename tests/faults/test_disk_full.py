"""Row 5 of the fault matrix: the disk fills up while something is published, exported or reported.

On a small disk of its own (a tmpfs) where the test may mount one; else files are limited in size.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from selective_dpo.cli import main
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import ArtifactError, ConfigError, disk_fault
from selective_dpo.storage.artifacts import folder_digests, read_json, verify_folder
from tests.fixtures import confined
from tests.fixtures.fork_server import FORKED_WORKERS, ForkServer
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_pairs_file, tiny_recipe

pytestmark = pytest.mark.slow

PAGE = 4096
"""Bytes that a tmpfs gives at a time."""
DISK = 4 << 20
FULL = "No space left on device"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its run, up to the report, as it is where nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model_folder(folder / "model")
    tiny_pairs_file(folder / "pairs.jsonl")
    recipe = tiny_recipe(folder, score={"evaluations": 1}, launch={"checkpoint_minutes": 0.0})
    path = recipe_file(recipe, folder / "recipe.yaml")
    assert main(["train", str(path)]) == 0
    assert main(["report", str(path)]) == 0
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    if (
        sys.platform != "linux"
        or shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no right to mount a disk")
    yield place
    # Lazily: this process may still have tables of it in its memory map.
    subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def nearly_full(disk: Path, *, pages: int) -> Iterator[None]:
    """Inside, only so many pages are free."""
    filler = disk / "filler"
    filler.touch()
    free = os.statvfs(disk).f_bavail * PAGE
    with filler.open("wb") as stream:
        stream.write(bytes(max(0, free - pages * PAGE)))
    try:
        yield
    finally:
        filler.unlink()


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def contents(run: Path) -> dict[str, object]:
    """What must come out the same, to the last bit: records, the curriculum's order, the policy."""
    return {
        "records": [
            (path.parent.name, path.read_bytes()) for path in sorted(run.glob("scores/*/records.parquet"))
        ],
        "reference": (run / "reference" / "logps.parquet").read_bytes(),
        "order": Curriculum.load(run).order_digest,
        "consumed": read_json(run / "policy" / "order.json"),
        "policy": (run / "policy" / "adapter_model.safetensors").read_bytes(),
    }


def results_in(run: Path) -> dict[str, str]:
    """Digest of each file, but of those that name the run's folder."""
    return {
        name: value
        for name, value in folder_digests(run).items()
        if name not in ("recipe.yaml", "config.json")
    }


LATER = ("pairs", "reference", "scores", "curriculum.parquet", "curriculum.json", "policy")
"""Results in the order that they are made in."""


def without(run: Path, first: str) -> None:
    for name in LATER[LATER.index(first) :]:
        place = run / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()


@pytest.mark.fault(row=5)
@pytest.mark.parametrize("pages", [0, 2, 5])
@pytest.mark.parametrize("stage", ["pairs", "reference", "scores", "curriculum.parquet", "policy"])
def test_what_is_there_stays_and_what_is_not_is_made_when_there_is_room(
    whole: Path, disk: Path, capsys: pytest.CaptureFixture[str], stage: str, pages: int
) -> None:
    shutil.copytree(whole / "runs", disk / "runs")
    run = disk / "runs" / "tiny"
    without(run, stage)
    before = results_in(run)
    command = ["train", str(whole / "recipe.yaml"), "--output_dir", str(disk / "runs")]
    with nearly_full(disk, pages=pages):
        assert main(command) == 2
    line = last_line(capsys)
    assert line.startswith("selective-dpo: error: ") and FULL in line and "room on the disk" in line
    assert str(run) in line
    # Nothing that was there has changed; nothing that is there is half of something.
    after = results_in(run)
    assert {name: after.get(name) for name in before} == before
    assert not list(disk.rglob(".partial-*"))
    for folder in (path.parent for path in run.rglob("manifest.json")):
        verify_folder(folder)
    assert not (run / "policy").exists()
    # With room, the same command finishes, with the same result.
    assert main(command) == 0
    assert contents(run) == contents(whole / "runs" / "tiny")


@pytest.mark.fault(row=5)
@pytest.mark.parametrize("pages", [0, 3])
@pytest.mark.parametrize(
    ("verb", "changed"),
    [
        ("curriculum", ["--fresh", "--select.fraction", "0.25"]),
        ("train", ["--fresh", "--train.trainer.learning_rate", "5e-3"]),
        ("report", []),
    ],
)
def test_an_old_result_stays_whole_while_its_successor_does_not_fit(
    whole: Path, disk: Path, capsys: pytest.CaptureFixture[str], verb: str, changed: list[str], pages: int
) -> None:
    shutil.copytree(whole / "runs", disk / "runs")
    run = disk / "runs" / "tiny"
    before = results_in(run)
    command = [verb, str(whole / "recipe.yaml"), "--output_dir", str(disk / "runs"), *changed]
    with nearly_full(disk, pages=pages):
        assert main(command) == 2
    assert FULL in last_line(capsys)
    old = results_in(run)
    assert {name: old.get(name) for name in before} == before
    assert not list(disk.rglob(".partial-*"))
    assert Curriculum.load(run).order_digest == Curriculum.load(whole / "runs" / "tiny").order_digest
    verify_folder(run / "policy")
    assert main(command) == 0


@pytest.mark.fault(row=5)
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl", "datasets"])
def test_an_export_is_whole_or_absent(
    whole: Path, disk: Path, capsys: pytest.CaptureFixture[str], form: str, existing: bool
) -> None:
    target = disk / "exported"
    command = ["export", str(whole / "runs" / "tiny"), "--format", form, "--out", str(target)]
    if existing:
        assert main(command) == 0
    before = digests(target)
    with nearly_full(disk, pages=0):
        assert main([*command, *(["--overwrite"] if existing else [])]) == 2
    assert FULL in last_line(capsys)
    assert digests(target) == before
    assert {path.name for path in disk.iterdir()} <= {"exported", ".exported.lock"}
    assert main([*command, *(["--overwrite"] if existing else [])]) == 0


def digests(target: Path) -> object:
    if target.is_dir():
        return folder_digests(target)
    return target.read_bytes() if target.exists() else None


@pytest.mark.fault(row=5)
@pytest.mark.parametrize("stage", ["pairs", "scores", "policy"])
def test_a_limit_on_the_size_of_files_is_told_as_one_line(
    whole: Path, tmp_path: Path, server: ForkServer, stage: str
) -> None:
    shutil.copytree(whole / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / "tiny"
    without(run, stage)
    command = ["train", str(whole / "recipe.yaml"), "--output_dir", str(tmp_path / "runs")]
    started = server.start("-m", confined.MODULE, "small-files", *command)
    _, errors = started.communicate()
    assert started.returncode == 2 and "Traceback" not in errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith("selective-dpo: error: ") and "File too large" in line
    assert not list(run.rglob(".partial-*")) and not (run / "policy").exists()


@pytest.mark.fault(row=5)
def test_a_worker_process_that_finds_the_disk_full_is_one_line_too(
    whole: Path, disk: Path, server: ForkServer
) -> None:
    shutil.copytree(whole / "runs", disk / "runs")
    without(disk / "runs" / "tiny", "scores")
    command = ["score", whole / "recipe.yaml", "--output_dir", disk / "runs", "--launch.workers", "2"]
    with nearly_full(disk, pages=6):
        started = server.start(*command, environment=FORKED_WORKERS)
        _, errors = started.communicate()
    assert started.returncode == 2 and "Traceback" not in errors
    line = errors.strip().splitlines()[-1]
    assert "seed41-fold" in line and FULL in line


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x"), f"/data/x: {FULL}"),
        (lambda: OSError(errno.EDQUOT, "over quota"), os.strerror(errno.EDQUOT)),
        (lambda: PermissionError(errno.EACCES, "no", "x"), "x: Permission denied"),
        (lambda: SafetensorError("I/O error: No space left on device (os error 28)"), FULL),
        (lambda: SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "" })'), FULL),
    ],
)
def test_faults_of_the_disk_are_known_by_their_number(raised: Callable[[], Exception], expected: str) -> None:
    error = raised()
    assert expected in (disk_fault(error) or "")
    wrapped = RuntimeError("seed41-fold0 failed")
    wrapped.__cause__ = error
    assert expected in (disk_fault(wrapped) or "")


def test_other_errors_are_not_faults_of_the_disk() -> None:
    for error in (
        ValueError("28"),
        OSError(errno.ECONNRESET, "reset"),
        ArtifactError("x"),
        ConfigError("(28)"),
    ):
        assert disk_fault(error) is None
