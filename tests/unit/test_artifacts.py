"""Folders and files are whole or absent: also after an error, a kill, a flipped bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selective_dpo.errors import ArtifactError
from selective_dpo.storage import artifacts
from selective_dpo.storage.artifacts import (
    MANIFEST,
    content_key,
    file_digest,
    folder_digests,
    is_complete,
    publish_folder,
    read_json,
    read_manifest,
    verify_folder,
    write_atomic,
    write_json,
)

# SHA-256 of the empty text and of "abc", from FIPS 180-2's examples.
OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def publish(folder: Path, content: str = "abc", key: str = "k") -> Path:
    with publish_folder(folder, kind="test", key=key) as partial:
        (partial / "a.txt").write_text(content)
        (partial / "deep").mkdir()
        (partial / "deep" / "empty").touch()
    return folder


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_published_folder_says_what_it_holds(tmp_path: Path) -> None:
    folder = publish(tmp_path / "runs" / "x" / "pairs")
    manifest = read_manifest(folder)
    assert manifest == (1, "test", "k", {"a.txt": OF_ABC, "deep/empty": OF_NOTHING})
    assert verify_folder(folder) == manifest
    assert hidden(folder.parent) == []
    assert is_complete(folder, key="k")
    assert not is_complete(folder, key="other")
    assert not is_complete(tmp_path / "absent", key="k")


def test_digests_are_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    assert file_digest(file) == OF_ABC
    monkeypatch.setattr(artifacts, "_CHUNK_BYTES", 2)  # two chunks, "ab" and "c"
    assert file_digest(file) == OF_ABC
    assert folder_digests(tmp_path) == {"x": OF_ABC}


def test_a_content_key_depends_on_every_input_and_not_on_their_order() -> None:
    assert content_key(a=1, b="x") == content_key(b="x", a=1)
    assert len({content_key(a=1), content_key(a=2), content_key(b=1), content_key(a=1, b=None)}) == 4


def test_a_content_key_depends_on_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_key(a=1)
    monkeypatch.setattr(artifacts, "SCHEMA_VERSION", 2)
    assert content_key(a=1) != before


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    write = artifacts._write_manifest

    def spying(folder: Path, manifest: artifacts.Manifest) -> None:
        seen.append({entry.name for entry in folder.iterdir()})
        write(folder, manifest)

    monkeypatch.setattr(artifacts, "_write_manifest", spying)
    folder = publish(tmp_path / "pairs")
    assert seen == [{"a.txt", "deep"}]
    assert {entry.name for entry in folder.iterdir()} == {"a.txt", "deep", MANIFEST}


def test_an_error_leaves_nothing_not_even_the_folders_above(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        publish_folder(tmp_path / "a" / "b" / "c", kind="t", key="k") as partial,
    ):
        (partial / "half").write_text("written")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_folders_that_were_there_or_are_used_by_others(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError), publish_folder(tmp_path / "mine" / "b" / "c", kind="t", key="k"):
        (tmp_path / "mine" / "b" / "somebody's").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "mine" / "b").iterdir()] == ["somebody's"]


def test_an_error_keeps_the_folder_that_was_to_be_replaced(tmp_path: Path) -> None:
    folder = publish(tmp_path / "pairs")
    with pytest.raises(KeyboardInterrupt), publish_folder(folder, kind="test", key="new") as partial:
        (partial / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert verify_folder(folder).key == "k"
    assert hidden(tmp_path) == []


def test_a_folder_is_replaced_with_all_it_held(tmp_path: Path) -> None:
    folder = publish(tmp_path / "pairs")
    with publish_folder(folder, kind="test", key="new") as partial:
        assert read_manifest(folder).key == "k"  # until the very end
        (partial / "other").touch()
    assert verify_folder(folder).files == {"other": OF_NOTHING}
    assert hidden(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from selective_dpo.storage.artifacts import publish_folder
from selective_dpo.storage import artifacts

folder, moment = Path(sys.argv[1]), sys.argv[2]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the manifest":
    artifacts._write_manifest = die
elif moment == "before the rename":
    artifacts._replace_folder = die
with publish_folder(folder, kind="test", key="new") as partial:
    (partial / "a.txt").write_text("half of it")
    if moment == "while filling":
        die()
"""


@pytest.mark.parametrize("moment", ["while filling", "before the manifest", "before the rename"])
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "replacing"])
def test_a_killed_writer_leaves_what_was_there_and_the_next_one_cleans_up(
    tmp_path: Path, moment: str, is_there: bool
) -> None:
    folder = tmp_path / "pairs"
    if is_there:
        publish(folder, key="old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not is_complete(folder, key="new")
    assert is_complete(folder, key="old") == is_there
    lock, partial = hidden(tmp_path)  # the lock file is there, and nobody holds it
    assert lock == ".lock-pairs" and partial.startswith(".partial-pairs-")
    publish(folder, key="new")
    assert is_complete(folder, key="new")
    assert hidden(tmp_path) == []


def test_only_the_folders_own_leftovers_are_removed(tmp_path: Path) -> None:
    names = [f".partial-{folder}-0123abcd" for folder in ("a", "a-b", "a1", "a[1]")]
    for name in names:
        (tmp_path / name).mkdir()
    publish(tmp_path / "a")
    assert hidden(tmp_path) == names[1:]
    publish(tmp_path / "a[1]")  # the brackets are no pattern
    assert hidden(tmp_path) == names[1:3]


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    folder = publish(tmp_path / "pairs")
    content = bytearray((folder / "a.txt").read_bytes())
    content[1] ^= 1
    (folder / "a.txt").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"pairs: a\.txt differ.* delete the folder and run again"):
        verify_folder(folder)
    assert not is_complete(folder, key="k")


def test_missing_and_extra_files_are_named(tmp_path: Path) -> None:
    folder = publish(tmp_path / "pairs")
    (folder / "deep" / "empty").unlink()
    (folder / "new").touch()
    with pytest.raises(ArtifactError, match=r": deep/empty, new differ"):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, f"is not complete: it has no {MANIFEST}"),
        ("{", "is not a manifest"),
        ("[]", "is not a manifest"),
        ('{"key": "k"}', "is not a manifest"),
        ('{"schema_version": 1, "kind": "t", "key": "k", "files": 7}', "is not a manifest"),
        (
            '{"schema_version": 2, "kind": "t", "key": "k", "files": {}}',
            "schema version 2, this package reads 1",
        ),
    ],
)
def test_what_is_no_manifest_is_said(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        read_manifest(tmp_path)
    assert not is_complete(tmp_path, key="k")


def test_files_are_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "facts.json"
    write_json(path, {"b": 1, "a": "é"})
    assert path.read_text("utf-8") == '{\n  "b": 1,\n  "a": "\\u00e9"\n}\n'
    assert read_json(path) == {"b": 1, "a": "é"}

    def fail(_: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(artifacts.os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        write_atomic(path, b"half")
    assert read_json(path) == {"b": 1, "a": "é"}
    assert [entry.name for entry in path.parent.iterdir()] == ["facts.json"]


def test_json_without_a_word_for_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[1]", "holds list, not an object"),
        ("\xff", "not JSON"),
    ],
)
def test_json_that_cannot_be_read_is_an_error_of_one_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError, match=message):
        read_json(path)


def test_the_manifest_itself_is_json(tmp_path: Path) -> None:
    value = json.loads((publish(tmp_path / "x") / MANIFEST).read_text("utf-8"))
    assert list(value) == ["schema_version", "kind", "key", "files"]
