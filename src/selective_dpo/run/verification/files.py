"""Every published folder is what its manifest says, and nothing that should have a manifest lacks one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from selective_dpo.curriculum.table import FACTS, TABLE
from selective_dpo.errors import ArtifactError, name_some
from selective_dpo.run.verification.check import Check, Checks
from selective_dpo.storage.artifacts import MANIFEST, file_digest, folder_digests, read_json, read_manifest

PARTIAL = ".partial-"

_PRIVATE = ("checkpoints", "tracking")
"""Folders of a run that hold no results."""

_KINDS = {
    "pairs": "pairs",
    "test-pairs": "pairs",
    "reference": "reference",
    "test-reference": "reference",
    "scores/*": "records",
    "policy": "policy",
    "controls/*/policy": "policy",
    "training-seeds/*/policy": "policy",
    "evaluation": "evaluation",
    "world": "world",
}
"""Where results are published -> the kind in their manifest."""


def check_files(checks: Checks, root: Path) -> None:
    """Digests of all published folders and of the curricula."""
    with checks.of("digests", str(root)) as check:
        folders = dict(_published(root))
        files = sum(_check_folder(check, root, folder, kind) for folder, kind in folders.items())
        curricula = sorted(path.parent for path in [*root.glob(FACTS), *root.glob(f"controls/*/{FACTS}")])
        for folder in curricula:
            _check_curriculum(check, root, folder)
        check.counted = f"{files:,} files in {len(folders):,} folders, {len(curricula):,} curricula"
        leftovers = [
            path for path in root.rglob(f"{PARTIAL}*") if path.relative_to(root).parts[0] not in _PRIVATE
        ]
        if leftovers:
            check.counted += f"; {len(leftovers):,} unfinished, which the next command removes"


def artifact_name(root: Path, path: Path) -> str:
    """A path as it is named in problems: below the run's folder."""
    return path.relative_to(root).as_posix()


def _published(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Folders that are, or should be, published, and their kind as far as it is known."""
    known = {
        folder: kind
        for pattern, kind in _KINDS.items()
        for folder in sorted(root.glob(pattern))
        if _holds_files(folder)
    }
    yield from known.items()
    for manifest in sorted(root.rglob(MANIFEST)):
        parts = manifest.relative_to(root).parts
        is_result = parts[0] not in _PRIVATE and not any(part.startswith(PARTIAL) for part in parts)
        if is_result and manifest.parent not in known:
            yield manifest.parent, None


def _holds_files(folder: Path) -> bool:
    is_hidden = folder.name.startswith(".")
    return folder.is_dir() and not is_hidden and any(path.is_file() for path in folder.rglob("*"))


def _check_folder(check: Check, root: Path, folder: Path, kind: str | None) -> int:
    """The number of its files."""
    name = artifact_name(root, folder)
    found = folder_digests(folder)
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        check.wrong(name, str(error))
        return len(found)
    listed = manifest.files
    for files, problem in (
        (sorted(listed.keys() - found.keys()), "missing"),
        (sorted(found.keys() - listed.keys()), "not in the manifest"),
        (sorted(file for file in listed.keys() & found.keys() if listed[file] != found[file]), "changed"),
    ):
        if files:
            check.wrong(name, f"{name_some(files)}: {problem}")
    if kind is not None:
        check.equal(f"{name}/{MANIFEST}", "kind", manifest.kind, kind)
    return len(found)


def _check_curriculum(check: Check, root: Path, folder: Path) -> None:
    name = artifact_name(root, folder / TABLE)
    table = folder / TABLE
    if not table.is_file():
        check.wrong(name, "missing")
        return
    try:
        wanted = read_json(folder / FACTS).get("table_sha256")
    except ArtifactError as error:
        check.wrong(artifact_name(root, folder / FACTS), str(error))
        return
    check.require(wanted == file_digest(table), name, f"not the table that {FACTS} was written for")
