"""For every test: one thread for tiny models, no network; and what several files of tests need once."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch and the hub's client are imported: both read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Generated cases are the same ones each time, unless others are asked for.
settings.register_profile(
    "tests",
    derandomize=not os.environ.get("RANDOM_CASES"),
    database=None,
    print_blob=True,
    deadline=10_000,  # milliseconds: of a hang, and not of a busy machine's pauses
)
settings.load_profile("tests")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--no-first-run",
)


def pytest_collection_finish() -> None:
    """Save each test half a second or more.

    What the libraries made at import stays, so no garbage collection needs to look through it: a Trainer
    collects at the end of each training.
    """
    gc.collect()
    gc.freeze()
    # A plan measures the model's speed for a second, and each test that makes one would wait for it.
    if costs := sys.modules.get("selective_dpo.run.costs"):
        costs._MEASURED_SECONDS = 0.01  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `ForkServer`: commands in processes of their own, without waiting for torch each time."""
    from tests.fixtures.fork_server import ForkServer

    with ForkServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer; to be read only."""
    from tests.fixtures.models import tiny_model_folder

    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of every stage (see `tests/fixtures/finished.py`); to be read only."""
    from tests.fixtures.finished import make_finished_demo

    base = tmp_path_factory.getbasetemp()
    # The processes of pytest-xdist have a folder each, in one that they share.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return make_finished_demo(shared / "finished-demo") / "demo"


@pytest.fixture(scope="session")
def demo_output(finished_demo: Path) -> str:
    """What the demo printed."""
    return (finished_demo.parent / "output.txt").read_text("utf-8")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real browser, as playwright drives it."""
    playwright_api = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with playwright_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=list(BROWSER_OPTIONS))
        yield running
        running.close()
