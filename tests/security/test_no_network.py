"""No network that the recipe did not ask for: whole runs where every connection is an error, and noted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selective_dpo.run.verify import verify_run
from tests.fixtures.finished import QUIET, without_network
from tests.fixtures.models import recipe_file, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = """
    from selective_dpo.cli import main
    sys.exit(max(main([verb, sys.argv[2]]) for verb in ("doctor", "plan")))
"""
ASKING = """
    import urllib.request
    for ask in (
        lambda: urllib.request.urlopen("https://huggingface.co"),
        lambda: socket.socket(socket.AF_INET).connect(("127.0.0.1", 9)),
    ):
        try:
            ask()
        except OSError as error:
            assert "cut off" in str(error)
"""
IMPORT = """
    import selective_dpo, selective_dpo.run.run, selective_dpo.run.verify
    from selective_dpo import SelectiveDPOTrainer
"""


@pytest.mark.slow
def test_importing_asks_nobody(tmp_path: Path) -> None:
    done = without_network(IMPORT, tmp_path / "attempts")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "attempts").exists()


@pytest.mark.slow
def test_the_whole_demo_asks_nobody(finished_demo: Path) -> None:
    assert not (finished_demo.parent / "attempts").exists(), (finished_demo.parent / "attempts").read_text()
    assert verify_run(finished_demo).problems == []


@pytest.mark.slow
def test_checks_of_a_recipe_of_local_files_ask_nobody(tmp_path: Path) -> None:
    recipe = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    done = without_network(COMMANDS, tmp_path / "attempts", recipe)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()


def test_the_guard_notes_what_is_tried(tmp_path: Path) -> None:
    done = without_network(ASKING, tmp_path / "attempts")
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "attempts").read_text().splitlines()
    assert "huggingface.co" in first and "127.0.0.1" in second


@pytest.mark.slow
def test_a_run_in_a_namespace_without_a_network(tmp_path: Path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("no network namespaces here")
    recipe = recipe_file(tiny_recipe(tmp_path, launch={"workers": 2}), tmp_path / "recipe.yaml")
    done = subprocess.run(
        [*unshare, sys.executable, "-m", "selective_dpo", "run", str(recipe)],
        env={name: value for name, value in os.environ.items() if name not in QUIET},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert verify_run(tmp_path / "runs" / "tiny").problems == []
