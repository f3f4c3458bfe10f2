"""`benchmarks/certified.py` is one command; here with a few runs, to see what the lower end is good for."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "certified.py"


@pytest.fixture(scope="module")
def certified() -> ModuleType:
    spec = importlib.util.spec_from_file_location("certified_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_by_the_lower_end_few_stopped_runs_are_below_the_target(certified: ModuleType) -> None:
    # 40 runs, at a correlation at which two to six seeds have their true overlap just below .95 to above it.
    # Where seeds share nothing, a third of those that the prediction stopped are below the target (15% for
    # luck); of those that the lower end stopped nominally 2.5%, so that more than 2 are a chance of 1 in 80.
    alone = certified.measure(0.96, certified.SHARED["independent"], 400, 40, replicates=60)
    assert alone["point"]["wrong"] >= 0.15 * alone["point"]["stopped"] > 3
    assert alone["bound"]["stopped"] >= 8
    assert alone["bound"]["wrong"] <= 2
    # What all pairs of a seed share is in no interval: of 40 it should hold 38.
    shared = certified.measure(0.96, certified.SHARED["shared taste"], 400, 40, replicates=60)
    assert shared["held"] <= 33 < 36 <= alone["held"]


def test_the_command_prints_and_writes_its_counts(
    certified: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "certified.json"
    monkeypatch.setattr(certified, "RHOS", (0.97,))
    monkeypatch.setattr(sys, "argv", ["certified.py", "--runs", "2", "--pairs", "60", "--json", str(path)])
    certified.main()
    written = json.loads(path.read_text("utf-8"))
    printed = capsys.readouterr().out
    for name in certified.SHARED:
        assert written["noise"][name]["0.97"]["runs"] == 2
        assert f"| {name} | all |" in printed
