"""No network that the recipe did not ask for: whole runs where every connection is an error, and noted."""

from __future__ import annotations

from pathlib import Path

import pytest

from selective_dpo.run.verify import verify_run
from tests.fixtures import confined
from tests.fixtures.finished import without_network
from tests.fixtures.fork_server import FORKED_WORKERS, ForkServer
from tests.fixtures.models import recipe_file, tiny_recipe

IMPORTS_AND_CHECKS = """
    import urllib.request
    import selective_dpo, selective_dpo.run.run, selective_dpo.run.verify
    from selective_dpo import SelectiveDPOTrainer
    assert not attempts.exists(), attempts.read_text()

    from selective_dpo.cli import main
    assert [main([verb, sys.argv[2]]) for verb in ("doctor", "plan")] == [0, 0]
    assert not attempts.exists(), attempts.read_text()

    for ask in (
        lambda: urllib.request.urlopen("https://huggingface.co"),
        lambda: socket.socket(socket.AF_INET).connect(("127.0.0.1", 9)),
    ):
        try:
            ask()
        except OSError as error:
            assert "cut off" in str(error)
"""


@pytest.mark.slow
def test_imports_and_checks_of_a_recipe_of_local_files_ask_nobody(tmp_path: Path) -> None:
    """And the guard notes what is tried, in the same process."""
    recipe = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    done = without_network(IMPORTS_AND_CHECKS, tmp_path / "attempts", recipe)
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "attempts").read_text().splitlines()
    assert "huggingface.co" in first and "127.0.0.1" in second


@pytest.mark.slow
def test_the_whole_demo_asks_nobody(finished_demo: Path) -> None:
    assert not (finished_demo.parent / "attempts").exists(), (finished_demo.parent / "attempts").read_text()
    assert verify_run(finished_demo).problems == []


@pytest.mark.slow
def test_a_run_in_a_namespace_without_a_network(tmp_path: Path, server: ForkServer) -> None:
    """Where the system refuses, whoever asks: also worker processes, and code that is not Python."""
    recipe = recipe_file(tiny_recipe(tmp_path, launch={"workers": 2}), tmp_path / "recipe.yaml")
    command = ("-m", confined.MODULE, "without-network", "run", recipe)
    started = server.start(*command, environment=FORKED_WORKERS)
    if started.wait() == confined.NOT_HERE:
        pytest.skip("no network namespaces here")
    assert started.returncode == 0, started.communicate()
    assert verify_run(tmp_path / "runs" / "tiny").problems == []
