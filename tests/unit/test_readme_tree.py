"""The README's tree names each file of the package, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "selective_dpo"


def tree() -> dict[str, str]:
    """Path in the repository -> what the README says of it; a folder ends in a slash."""
    block = (ROOT / "README.md").read_text("utf-8").split("## What is where")[1].split("```")[1]
    found, above = {}, {-1: ""}
    for line in block.strip("\n").splitlines():
        indent, name, says = re.fullmatch(r"( *)(\S+)(?: +(.*))?", line).groups()  # type: ignore[union-attr]
        parent = above[max(level for level in above if level < len(indent))]
        above = {level: path for level, path in above.items() if level < len(indent)}
        found[parent + name] = says or ""
        if name.endswith("/"):
            above[len(indent)] = parent + name
    return found


def test_each_named_file_is_there_and_says_what_it_is() -> None:
    named = tree()
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name, says in named.items() if not says] == ["src/selective_dpo/"]


def test_each_module_is_named_itself_or_by_its_folder() -> None:
    named = tree()
    # A folder none of whose files is named stands for all of them.
    whole = [
        name
        for name in named
        if name.endswith("/") and not any(other != name and other.startswith(name) for other in named)
    ]
    modules = [path for path in sorted(PACKAGE.rglob("*.py")) if not path.name.startswith("__")]
    paths = [path.relative_to(ROOT).as_posix() for path in modules]
    assert [path for path in paths if path not in named and not path.startswith(tuple(whole))] == []
