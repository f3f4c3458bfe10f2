"""What is generated from the recipe's types is current."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "tools" / "recipe_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_and_the_schema_are_current(tool: ModuleType) -> None:
    for path, content in tool.generated().items():
        assert path.read_text("utf-8") == content, f"run python tools/recipe_reference.py for {path.name}"


def test_a_stale_file_is_named(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--check"]) == 0
    monkeypatch.setattr(tool, "HEAD", "# Other words\n")
    assert tool.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("docs/recipe.md is not current")


def test_the_reference_names_the_defaults_that_trainings_start_from(tool: ModuleType) -> None:
    from selective_dpo.training.arguments import ORIGINAL_DEFAULTS

    head = " ".join(tool.HEAD.split())
    for key, value in ORIGINAL_DEFAULTS.items():
        assert f"`{key}: {value}`" in head


def test_each_key_has_a_row(tool: ModuleType) -> None:
    page = tool.DOCS.read_text("utf-8")
    assert "| `fraction` | number > 0, ≤ 1 or null | `null` |" in page
    assert "| `seeds` | list of whole numbers ≥ 0, ≤ 4294967295 | `[41]` |" in page
    assert "| `path` | text | required |" in page
