"""docs/reliability.md is what tools/reliability.py makes of the tests that carry a row of the matrix."""

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


def test_the_page_names_each_marked_test_and_each_fault_passed(tool: ModuleType) -> None:
    assert tool.faults_of(tool.PAGE.read_text("utf-8")) == []


def test_another_page_is_found_out(tool: ModuleType) -> None:
    page = tool.PAGE.read_text("utf-8")
    test = min(tool.marked_tests())
    assert tool.faults_of(page.replace(f"`{test}`", "")) == [f"{test}: not as the page has it"]
    row = next(line for line in page.splitlines() if line.startswith("| 5 |"))
    assert tool.faults_of(page.replace(row, row.replace("| passed |", "| failed |"))) == ["row 5: failed"]
    assert "not one for each fault" in tool.faults_of(page.replace(row + "\n", ""))[0]
