"""docs/reliability.md holds the table that tools/reliability.py makes of the tests marked with a row."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reliability", ROOT / "tools" / "reliability.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_fault_has_a_test_and_passed(tool: ModuleType) -> None:
    page = tool.PAGE.read_text("utf-8")
    assert tool.wrong_rows(page) == []
    assert tool.marked_rows() == set(tool.FAULTS)
    assert page.startswith(tool.HEAD)


def test_a_failed_or_missing_row_is_named(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tool.PAGE.read_text("utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| 5 |"))
    assert tool.wrong_rows(page.replace(row, row.replace("| passed |", "| failed |"))) == ["row 5: failed"]
    assert "not one for each fault" in tool.wrong_rows(page.replace(row + "\n", ""))[0]
    monkeypatch.setattr(tool, "marked_rows", lambda: set(tool.FAULTS) - {7})
    assert tool.wrong_rows(page) == ["row 7: no test is marked with it"]


def test_the_table_and_the_list_count_the_trials(tool: ModuleType) -> None:
    matrix = tool.Matrix()
    matrix.trials = [
        tool.Trial(1, 10, "tests/a.py::test_killed", "It ends as an undisturbed run"),
        tool.Trial(2, 1, "tests/b.py::test_stopped[0]", ""),
        tool.Trial(2, 1, "tests/b.py::test_stopped[1]", ""),
    ]
    matrix.outcomes = {trial.node: "passed" for trial in matrix.trials[:2]}
    table = matrix.table().splitlines()
    assert [line.split("|")[-3:-1] for line in table if line.startswith(("| 1 ", "| 2 ", "| 3 "))] == [
        [" 10 ", " passed "],
        [" 2 ", " not run "],
        [" 0 ", " no test "],
    ]
    assert "\n  tests/a.py::test_killed (10): It ends as an undisturbed run\n" in matrix.listing()
    assert "\n  tests/b.py::test_stopped (2)\n" in matrix.listing()
