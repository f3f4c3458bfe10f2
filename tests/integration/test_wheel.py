"""The wheel by itself, in an environment that has the dependencies and nothing of this checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import selective_dpo
from tests.fixtures.models import tiny_model_folder, tiny_pairs_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def call(*words: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", cwd=source)
    (made,) = (source / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`selective-dpo` of a new environment, whose only package of its own is the wheel."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    # A path in a .pth file is searched, but .pth files there are not read: no editable install comes along.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    call(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder.parent)
    where = call(python, "-c", "import selective_dpo; print(selective_dpo.__file__)", cwd=folder.parent)
    assert Path(where.strip()).is_relative_to(site)
    return folder / "bin" / "selective-dpo"


def test_it_holds_each_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "src" / "selective_dpo"
    files = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        assert files <= set(archive.namelist())
    assert f"selective_dpo-{selective_dpo.__version__}-" in wheel.name


def test_a_first_recipe_is_written_and_run_from_an_empty_folder(command: Path, tmp_path: Path) -> None:
    tiny_model_folder(tmp_path / "model")
    tiny_pairs_file(tmp_path / "pairs.jsonl", 24, chat=True)
    assert selective_dpo.__version__ in call(command, "--version", cwd=tmp_path)
    call(command, "init", "copy.yaml", "--from", "local-small", cwd=tmp_path)
    call(command, "init", "mine.yaml", "--model", "model", "--data", "pairs.jsonl", cwd=tmp_path)
    call(command, "run", "mine.yaml", cwd=tmp_path)
    report = (tmp_path / "runs" / "mine" / "report.html").read_text("utf-8")
    assert "<svg" in report and "font-family" in report  # figures and the style sheet
