"""No format that runs code when it is read is published, exported, or read from outside."""

from __future__ import annotations

import ast
import io
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from selective_dpo.cli import main
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_recipe

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "selective_dpo"
KNOWN = {".parquet", ".json", ".jsonl", ".safetensors", ".md", ".yaml", ".html", ".jinja", ".csv", ".arrow"}
"""The endings of everything that is published or exported."""
RUNS_CODE = {
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".dill", ".h5", ".keras"),
    *(".py", ".pyc", ".so", ".sh", ".msgpack", ".model", ".gguf"),
}


def why_unsafe(path: Path) -> str | None:
    """What in a file could run code when somebody reads it, by its bytes; None if nothing does."""
    content = path.read_bytes()
    if path.suffix in RUNS_CODE or path.suffix not in KNOWN:
        return f"ends in {path.suffix!r}"
    if zipfile.is_zipfile(io.BytesIO(content)):
        return "is a zip archive, as torch.save makes them"
    if content.startswith(
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x93NUMPY", b"\x1f\x8b", b"\x7fELF")
    ):
        return "begins like a pickle, an array of NumPy, an archive or a program"
    if path.suffix == ".parquet":
        return None if content[:4] == content[-4:] == b"PAR1" else "is not Parquet"
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", content[:8])
        return None if content[8:9] == b"{" and length < len(content) else "is not safetensors"
    if path.suffix == ".arrow":
        return None
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "is no text"
    return "is a pickle" if is_pickle(content) else None


def is_pickle(content: bytes) -> bool:
    try:
        operations = [operation.name for operation, _, _ in pickletools.genops(content)]
    except Exception:
        return False
    return len(operations) > 1


def all_files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())


@pytest.mark.slow
def test_nothing_in_a_finished_run_runs_code(finished_demo: Path) -> None:
    unsafe = {str(path): why for path in all_files(finished_demo) if (why := why_unsafe(path))}
    assert unsafe == {}
    assert len(list(all_files(finished_demo))) > 50
    assert not (finished_demo / "checkpoints").exists(), "private, and gone with the end of the run"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "datasets"])
def test_nothing_exported_runs_code(finished_demo: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / (f"out.{kind}" if kind != "datasets" else "out")
    assert main(["export", str(finished_demo), "--format", kind, "--out", str(out)]) == 0
    files = list(all_files(tmp_path))
    assert files
    assert {str(path): why for path in files if (why := why_unsafe(path))} == {}


def test_the_scan_knows_what_it_looks_for(tmp_path: Path) -> None:
    value = {"weights": [1.0, 2.0]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / f"{protocol}.json").write_bytes(pickle.dumps(value, protocol))
    torch.save(torch.zeros(2), tmp_path / "zip.safetensors")
    torch.save(torch.zeros(2), tmp_path / "old.md", _use_new_zipfile_serialization=False)
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / "noise.json").write_bytes(b"\xff\x00")
    assert all(why_unsafe(path) for path in all_files(tmp_path))


class Bomb:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> object:
        return os.mkdir, (self._path,)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_refused_unread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str
) -> None:
    recipe = tiny_recipe(tmp_path)
    model, went_off = tmp_path / "model", tmp_path / "went-off"
    for path in model.glob("*.safetensors"):
        path.unlink()
    # As weights, and as what transformers and others keep beside them.
    for name in (weights, "training_args.bin", "optimizer.pt", "tokenizer.pkl", "adapter_model.bin"):
        (model / name).write_bytes(pickle.dumps(Bomb(went_off)))
    path = recipe_file(recipe, tmp_path / "recipe.yaml")
    capsys.readouterr()
    assert main(["score", str(path)]) == 2
    errors = capsys.readouterr().err
    assert (
        errors.startswith("selective-dpo: error: model: ")
        and ".safetensors" in errors
        and errors.count("\n") == 1
    )
    assert not went_off.exists()
    pickle.loads((model / weights).read_bytes())  # what loading it would have done
    assert went_off.exists()


def test_a_pickle_beside_sound_weights_is_not_read(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, score={"evaluations": 1})
    went_off = tmp_path / "went-off"
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "adapter_model.bin",
        "scheduler.pt",
        "rng_state.pth",
    ):
        (tmp_path / "model" / name).write_bytes(pickle.dumps(Bomb(went_off)))
    assert main(["score", str(recipe_file(recipe, tmp_path / "recipe.yaml"))]) == 0
    assert not went_off.exists()


@pytest.mark.parametrize(
    "name", ["pairs.pkl", "pairs.pickle", "pairs.pt", "pairs.npy", "pairs.jsonl", "pairs.parquet"]
)
def test_pickled_pairs_are_refused_unread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tiny_model_folder(tmp_path / "model")
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "went-off")))
    recipe = tiny_recipe(tmp_path, data={"train": [{"path": str(tmp_path / name)}]})
    capsys.readouterr()
    assert main(["score", str(recipe_file(recipe, tmp_path / "recipe.yaml"))]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "went-off").exists()


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def test_no_reader_or_writer_of_pickles_is_called() -> None:
    # ruff refuses the imports, and torch.load and torch.save (`banned-api` in pyproject.toml).
    name = re.compile(
        r"((np|numpy|torch|pd|pandas|joblib|dill|shelve)\.(loads?|dumps?|open|save\w*|fromfile|memmap)"
        r"|(^|\.)(read_pickle|to_pickle|load_pickle))$"
    )
    found = [place for place, call in calls() if name.search(ast.unparse(call.func))]
    assert found == []
    allowed = [place for place, call in calls() for each in call.keywords if each.arg == "allow_pickle"]
    assert allowed == []


def test_weights_are_loaded_from_safetensors_only() -> None:
    loading = {
        place: {each.arg: ast.unparse(each.value) for each in call.keywords}
        for place, call in calls()
        if re.search(r"AutoModel\w*\.from_pretrained$", ast.unparse(call.func))
    }
    assert len(loading) >= 2  # the policy and the reward model
    # A GGUF file holds numbers and settings, too.
    unsafe = {
        place
        for place, given in loading.items()
        if given.get("use_safetensors") != "True" and "gguf_file" not in given
    }
    assert unsafe == set()
