"""House rules that a program can check: what imports what, what is documented, what is never used."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "selective_dpo"
MODULES = sorted(PACKAGE.rglob("*.py"))

GROUND = {"artifacts", "config", "digests", "errors", "locks"}
RECIPES = {"pass_through", "option_rules", "option_types", "recipe_errors", "recipe_io", "recipe_yaml"}
ENGINE = GROUND | RECIPES | {"core", "curriculum", "data", "engine", "launch"}
MAY_IMPORT: dict[str, set[str]] = {
    "digests": set(),
    "errors": set(),
    "locks": {"errors"},
    "artifacts": {"digests", "errors", "locks"},
    "config": {"core", "errors"},
    **dict.fromkeys(RECIPES, RECIPES | {"config", "core", "digests", "errors"}),
    "core": {"artifacts", "digests", "errors"},
    "data": GROUND | {"core"},
    "curriculum": GROUND | {"core", "data", "recipe_errors"},
    "launch": GROUND,
    "engine": GROUND | {"core", "curriculum", "data"},
    "training": ENGINE | {"training"},
    "scoring": ENGINE | {"training"},
    "evaluation": ENGINE,
    "reporting": GROUND | RECIPES | {"core", "curriculum", "data"},
    "worlds": GROUND | {"core"},
    "pipeline": ENGINE | {"training", "scoring", "evaluation", "reporting", "worlds"},
    "cli": ENGINE | {"training", "scoring", "evaluation", "reporting", "worlds", "pipeline"},
    "__main__": {"cli"},
    "__init__": GROUND | {"curriculum", "pipeline", "training"},
}
"""Part of the package -> parts that it may import, besides itself: the arrows of the design.

`EXCEPTIONS`: the embedded world's judge asks the world."""
EXCEPTIONS = {("evaluation", "worlds.tasks")}
PART_OF = {"progress": "engine"}
"""Modules beside the folders that belong to one of them."""

FORBIDDEN = {
    "pickle": "a file of it runs whatever code it likes when it is read",
    "dill": "as pickle",
    "cloudpickle": "as pickle",
    "joblib": "it pickles",
    "shelve": "it pickles",
    "marshal": "as pickle",
}
FORBIDDEN_CALLS = {"torch.save", "torch.load", "np.load", "numpy.load", "eval", "exec"}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")


def imports_of(path: Path) -> Iterator[str]:
    """Every module that is imported anywhere in the file, inside functions and for type checks, too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            # `from selective_dpo.reporting import tables` names a module, too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str:
    first = module.split(".")[0]
    return PART_OF.get(first, first)


def own_imports(path: Path) -> set[str]:
    found = {
        name.removeprefix("selective_dpo.") for name in imports_of(path) if name.startswith("selective_dpo.")
    }
    return {name for name in found if is_module(name)}


def is_module(name: str) -> bool:
    place = PACKAGE / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    part = part_of(name_of(path))
    allowed = MAY_IMPORT[part] | {part}
    wrong = {
        name
        for name in own_imports(path)
        if part_of(name) not in allowed
        and not any(part == which and name in (what, what.split(".")[0]) for which, what in EXCEPTIONS)
    }
    assert not wrong, f"{name_of(path)} imports {sorted(wrong)}"


def test_the_arrows_have_no_way_back() -> None:
    def below(part: str, seen: frozenset[str]) -> Iterator[str]:
        for other in sorted(MAY_IMPORT[part] - {part} - RECIPES):
            assert other not in seen, f"{other} can be reached from itself"
            yield other
            yield from below(other, seen | {other})

    for part in MAY_IMPORT:
        list(below(part, frozenset({part})))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_format_that_runs_code_is_read_or_written(path: Path) -> None:
    found = {name.split(".")[0] for name in imports_of(path)} & set(FORBIDDEN)
    calls = {ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)}
    assert not found
    assert not calls & FORBIDDEN_CALLS


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_public_says_what_it_is(path: Path) -> None:
    tree = tree_of(path)
    if tree.body:
        assert ast.get_docstring(tree), "the module has no docstring"
    silent = [
        node.name
        for node in public_definitions(tree.body)
        if not ast.get_docstring(node) and not overrides(node)
    ]
    assert not silent, f"{name_of(path)}: no docstring on {silent}"


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Public functions and classes, and the public methods of public classes."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def overrides(node: Definition) -> bool:
    # Hooks of other libraries are described where they are defined.
    return isinstance(node, ast.FunctionDef) and bool(
        re.match(r"on_|compute_loss$|training_step$|evaluate$|log$|error$|get_.*dataloader$", node.name)
    )


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: nobody says which files are part of it")
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_place_on_some_machine() -> None:
    # Spelled in parts, so that this file does not name them.
    places = re.compile("|".join(f"/{top}/" for top in ("wor" + "k", "op" + "t", "roo" + "t", "Users")))
    homes = re.compile("/" + r"home/(?!someone|ann)")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        lines = text.splitlines()
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if places.search(line)]
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if homes.search(line)]
    assert not found


def test_nothing_large_or_made_on_the_way_is_tracked() -> None:
    paths = [path.relative_to(ROOT) for path in tracked_files()]
    assert not [path for path in paths if path.suffix in (".pyc", ".safetensors", ".bin", ".pt", ".pkl")]
    assert not [path for path in paths if path.parts[0] in ("runs", ".venv", "build", "dist")]
    assert not [path for path in paths if (ROOT / path).stat().st_size > 2_000_000]
