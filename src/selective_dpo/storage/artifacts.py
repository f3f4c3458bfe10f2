"""Files that are whole or absent: atomic publishing, manifests and content keys.

A folder is written under a temporary name beside its final one, each file is flushed to disk, the
manifest goes last, and one rename makes it visible. So a manifest's presence means the folder is
complete, and a killed writer leaves only a `.partial-*` folder. The next writer removes it, under the
folder's lock: no writer can take away what another one is filling.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from selective_dpo.errors import ArtifactError, DiskError, name_some
from selective_dpo.storage.digests import digest
from selective_dpo.storage.locks import holding, lock_beside

SCHEMA_VERSION = 1

MANIFEST = "manifest.json"

_CHUNK_BYTES = 1 << 20
_DIGESTS_AT_ONCE = 8


class Manifest(NamedTuple):
    """What a published folder says of itself."""

    schema_version: int
    kind: str
    """What the folder holds, such as "pairs" or "records"."""
    key: str
    """Digest of every input it was made from (see `content_key`)."""
    files: dict[str, str]
    """Relative path -> SHA-256, for every file but the manifest."""


def content_key(**inputs: object) -> str:
    """The key of a result: SHA-256 over everything that decides it, and the schema's version.

    Values must be JSON-serializable; pass digests for files, weights and tables.
    """
    return digest({"schema_version": SCHEMA_VERSION, **inputs})


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    running = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            running.update(chunk)
    return running.hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """Relative POSIX path -> SHA-256 for each file below `folder`, but for its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    with ThreadPoolExecutor(_DIGESTS_AT_ONCE) as pool:  # hashing leaves the interpreter to others
        digests = list(pool.map(file_digest, files))
    return {path.relative_to(folder).as_posix(): found for path, found in zip(files, digests, strict=True)}


@contextlib.contextmanager
def publish_folder(folder: Path, *, kind: str, key: str) -> Iterator[Path]:
    """Fill the folder that this yields; on leaving without an error it becomes `folder`, complete.

    An existing `folder` is replaced only at that moment. On an error nothing of it is left behind, nor
    of the folders above it that were made for it. In a distributed run only the main process publishes.

    Raises:
        BusyError: another process is publishing this folder.
    """
    # The folders above are made, and removed if nothing came of them, together with the lock file.
    with holding(lock_beside(folder), what=str(folder)):
        # The name's random end is spelled out: `.partial-a-*` would be those of a folder `a-b`, too.
        for leftover in folder.parent.glob(f".partial-{glob.escape(folder.name)}-{'[0-9a-f]' * 8}"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = _partial(folder)
        partial.mkdir()
        try:
            yield partial
            files = folder_digests(partial)
            for name in files:
                _flush(partial / name)
            _write_manifest(partial, Manifest(SCHEMA_VERSION, kind, key, files))
            _replace_folder(partial, folder)
        except BaseException as error:
            _name_place(error, folder, partial)
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(_to_json(manifest._asdict()), "utf-8")
    _flush(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete folder.

    Raises:
        ArtifactError: no manifest (so not complete), not readable, or of another schema version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is not complete: it has no {MANIFEST}; run the stage that makes it")
    try:
        manifest = Manifest(**json.loads(path.read_text("utf-8")))
        manifest = manifest._replace(files=dict(manifest.files))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is not a manifest ({error}); delete {folder} and run again") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{folder} has schema version {manifest.schema_version}, this package reads {SCHEMA_VERSION}"
        )
    return manifest


def verify_folder(folder: Path) -> Manifest:
    """Check each file of a folder against its manifest, and return the manifest.

    Raises:
        ArtifactError: a file is missing, extra, or not what its digest says; each is named.
    """
    manifest = read_manifest(folder)
    found = folder_digests(folder)
    wrong = sorted(
        name for name in manifest.files.keys() | found.keys() if manifest.files.get(name) != found.get(name)
    )
    if wrong:
        raise ArtifactError(
            f"{folder}: {name_some(wrong)} differ(s) from the manifest; delete the folder and run again"
        )
    return manifest


def is_complete(folder: Path, *, key: str) -> bool:
    """Whether `folder` is published, intact and made from the inputs that `key` stands for."""
    try:
        return read_manifest(folder).key == key and verify_folder(folder).key == key
    except ArtifactError:
        return False


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace the file `path` by `content` in one step: readers see the old file or the new one."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under; on leaving without an error it becomes `path` in one step.

    Where `path` is a link, it stays, and what it points to is replaced.

    Raises:
        DiskError: there is something else than a file; a device, say, is not to be replaced by one.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise DiskError(f"{path} is {what}, which no file can take the place of: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except OSError as error:
        _name_place(error, path, partial)
        raise
    finally:
        with contextlib.suppress(OSError):  # nothing can be there that could not be written
            partial.unlink()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, indented, keys in the order given."""
    write_atomic(path, _to_json(value))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `ArtifactError` if the file is absent or holds something else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds {type(value).__name__}, not an object")
    return value


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _partial(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.parent / f".partial-{path.name}-{uuid.uuid4().hex[:8]}"


def _name_place(error: BaseException, path: Path, partial: Path) -> None:
    # A write that the system refuses does not say where, and the name aside means nothing to the user.
    if not isinstance(error, OSError) or error.errno is None:
        return
    if error.filename is None or str(error.filename).startswith(str(partial)):
        error.filename = str(path)


def _flush(path: Path) -> None:
    """Have the disk hold what was written: a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(partial: Path, folder: Path) -> None:
    # A folder cannot be renamed over a filled one, so the old one steps aside first. Its manifest goes
    # with it: at no moment does `folder` hold a manifest that speaks of other files.
    for path in sorted({entry.parent for entry in partial.rglob("*")} | {partial}):
        _flush(path)
    retired = _partial(folder)
    if folder.exists():
        folder.rename(retired)
    partial.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)
