"""Row 16 of the fault matrix: the hub fails in the middle of a push.

A small server stands in for the hub and breaks off at each of its steps; the hub's own client talks to it
over the network.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset
from huggingface_hub import close_session

from selective_dpo import Curriculum
from selective_dpo.cli import main
from selective_dpo.storage.artifacts import folder_digests, read_json, verify_folder
from tests.fixtures.models import recipe_file, tiny_recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "someone/policy"
TOKEN = "hf_notARealTokenOfAnyone"
STEPS = ("create", "preupload", "commit")
"""The requests of a push, in their order."""


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.breaks_at = ""
        self.refuses: dict[str, int] = {}
        """Step -> HTTP status."""
        self.seen: list[str] = []
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self._body()
        step = next((name for name in STEPS if name in self.path), self.path)
        self.server.seen.append(step)
        if step == self.server.breaks_at:
            self.connection.close()  # in the middle of it, without an answer
            return
        if status := self.server.refuses.get(step):
            self._answer({"error": "no"}, status)
        elif step == "create":
            self._answer({"url": f"{self.server.address}/{REPOSITORY}", "name": REPOSITORY, "id": "1"})
        elif step == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif step == "commit":
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                {
                    "commitUrl": f"{self.server.address}/{REPOSITORY}/commit/1",
                    "commitOid": "1",
                    "hookOutput": "",
                }
            )
        else:  # a check of the card's header
            self._answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        # Whoever may not create a repository may still have one.
        self._answer({"sha": "0", "id": REPOSITORY, "siblings": []}, self.server.refuses.get("create", 200))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its run, up to the policy."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny_recipe(folder, score={"evaluations": 1})
    assert main(["train", str(recipe_file(recipe, folder / "recipe.yaml"))]) == 0
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs"


class Pushed(NamedTuple):
    code: int
    out: str
    err: str


Push = Callable[[Path, str], Pushed]


def push_in_a_process(trained: Path, place: Path, address: str) -> Pushed:
    """`selective-dpo train` with the policy to be pushed, from the beginning of a process to its end."""
    settings = {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(place.parent / "hub"),
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "selective_dpo", *arguments(trained, place)],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Pushed(done.returncode, done.stdout, done.stderr)


def arguments(trained: Path, place: Path) -> list[str]:
    return [
        "train",
        str(trained / "recipe.yaml"),
        "--output_dir",
        str(place),
        "--train.hub_id",
        REPOSITORY,
        "--fresh",
    ]


@pytest.fixture
def push(
    trained: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Push]:
    """The same in this process. The client, which tries again up to five times, does not wait in between."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    close_session()

    def push(place: Path, address: str) -> Pushed:
        assert address == hub.address
        capsys.readouterr()
        code = main(arguments(trained, place))
        return Pushed(code, *capsys.readouterr())

    yield push
    close_session()


def without_token(done: Pushed, place: Path) -> bool:
    written = [path for path in place.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    return not written and TOKEN not in done.out + done.err


@pytest.mark.fault(row=16)
@pytest.mark.parametrize("step", STEPS)
def test_a_push_that_breaks_off_keeps_the_policy_and_can_be_repeated(
    place: Path, hub: Hub, push: Push, step: str
) -> None:
    run = place / "tiny"
    before, written = folder_digests(run / "policy"), (run / "policy" / "manifest.json").stat().st_mtime_ns
    hub.breaks_at = step
    failed = push(place, hub.address)
    assert failed.code == 2, failed.err
    assert "Traceback" not in failed.err
    line = failed.err.strip().splitlines()[-1]
    assert f"the policy is complete in {run / 'policy'}, but was not pushed to {REPOSITORY}" in line
    assert line.endswith("run the same command again to push it")
    assert step in hub.seen and not hub.files and not (run / "hub.json").exists()
    verify_folder(run / "policy")
    assert folder_digests(run / "policy") == before and without_token(failed, place)

    hub.breaks_at = ""
    done = push(place, hub.address)
    assert done.code == 0, done.err
    assert f"policy: pushed to {REPOSITORY}" in done.out
    # All of it arrived, and nothing was trained or written again for that.
    for name in before:
        assert hub.files[name] == (run / "policy" / name).read_bytes(), name
    assert (run / "policy" / "manifest.json").stat().st_mtime_ns == written
    assert read_json(run / "hub.json")["hub_id"] == REPOSITORY and without_token(done, place)

    hub.seen.clear()
    assert push(place, hub.address).code == 0
    assert hub.seen == []


@pytest.mark.fault(row=16)
@pytest.mark.parametrize(("step", "status"), [("create", 401), ("preupload", 404), ("commit", 500)])
def test_a_hub_that_refuses_is_one_line(place: Path, hub: Hub, push: Push, step: str, status: int) -> None:
    hub.refuses = {step: status}
    failed = push(place, hub.address)
    assert failed.code == 2 and "Traceback" not in failed.err
    line = failed.err.strip().splitlines()[-1]
    assert "was not pushed" in line and str(status) in line
    verify_folder(place / "tiny" / "policy")
    assert without_token(failed, place)


@pytest.mark.fault(row=16)
def test_no_hub_at_all_is_one_line(trained: Path, place: Path, hub: Hub) -> None:
    address = hub.address
    hub.server_close()  # its port refuses now
    failed = push_in_a_process(trained, place, address)
    assert failed.code == 2 and "Traceback" not in failed.err
    assert "but was not pushed to someone/policy" in failed.err.strip().splitlines()[-1]
    verify_folder(place / "tiny" / "policy")


# --- `push RUN`: the policy or the curriculum of a run that is there ---------------------------------------

DATASET = "someone/difficulty"


@pytest.fixture
def say(push: Push, capsys: pytest.CaptureFixture[str]) -> Callable[..., Pushed]:
    """`selective-dpo push` with these words, against the server."""

    def say(*words: object) -> Pushed:
        capsys.readouterr()
        code = main(["push", *map(str, words)])
        return Pushed(code, *capsys.readouterr())

    return say


def header_of(card: bytes) -> dict[str, Any]:
    _, header, _ = card.decode().split("---\n", 2)
    return dict(yaml.safe_load(header))


def test_a_curriculum_is_pushed_as_ids_and_numbers_and_can_be_applied_by_others(
    place: Path, hub: Hub, say: Callable[..., Pushed], tmp_path: Path
) -> None:
    run = place / "tiny"
    done = say(run, "--curriculum", "--to", DATASET)
    assert (done.code, done.out) == (0, f"pushed to {DATASET}\n"), done.err
    assert set(hub.files) == {"README.md", "curriculum.json", "curriculum.parquet"}
    got = tmp_path / "got"
    got.mkdir()
    for name, content in hub.files.items():
        (got / name).write_bytes(content)
    assert header_of(hub.files["README.md"])["configs"][0]["data_files"] == "curriculum.parquet"
    mine, theirs = Curriculum.load(run), Curriculum.load(got)
    assert theirs.order == mine.order and theirs.table.equals(mine.table)

    kept = pq.read_table(run / "pairs" / "pairs.parquet", filters=[("status", "=", "kept")]).to_pylist()
    texts = [{name: json.loads(row[name]) for name in ("prompt", "chosen", "rejected")} for row in kept]
    rows = theirs.apply(Dataset.from_list(texts))
    assert rows["pair_id"][:] == mine.order
    everything = b"".join(hub.files.values())
    assert not any(str(row["chosen"]).encode() in everything for row in texts)
    assert str(place).encode() not in everything  # no path of this machine

    hub.seen.clear()
    assert say(run, "--curriculum", "--to", DATASET).out == f"{DATASET} has it already\n"
    assert hub.seen == []


def test_texts_go_along_only_with_their_licence(
    place: Path, hub: Hub, say: Callable[..., Pushed], tmp_path: Path
) -> None:
    run = place / "tiny"
    refused = say(run, "--curriculum", "--to", DATASET, "--with-text")
    assert refused.code == 2 and "name their licence with --license" in refused.err and not hub.seen
    assert say(run, "--curriculum", "--to", DATASET, "--with-text", "--license", "mit").code == 0
    header = header_of(hub.files["README.md"])
    assert header["license"] == "mit" and header["configs"][0]["data_files"] == "selected.parquet"
    (tmp_path / "selected.parquet").write_bytes(hub.files["selected.parquet"])
    table = pq.read_table(tmp_path / "selected.parquet")
    assert table["pair_id"].to_pylist() == Curriculum.load(run).order
    assert {"prompt", "chosen", "rejected", "difficulty"} <= set(table.column_names)


def test_the_policys_card_names_the_curriculum_whichever_was_pushed_first(
    place: Path, hub: Hub, say: Callable[..., Pushed]
) -> None:
    run = place / "tiny"
    assert say(run, "--to", REPOSITORY).code == 0
    assert "datasets" not in header_of(hub.files["README.md"])
    plain = hub.files["README.md"]
    assert say(run, "--curriculum", "--to", DATASET).code == 0
    card = hub.files["README.md"]  # the server keeps a file a name: the policy's was sent last
    assert header_of(card)["datasets"] == [DATASET]
    assert f"https://huggingface.co/datasets/{DATASET}".encode() in card
    assert header_of(card) == {**header_of(plain), "datasets": [DATASET]}
    verify_folder(run / "policy")  # here it stays as it was published
    hub.seen.clear()
    assert say(run, "--to", REPOSITORY).out == f"{REPOSITORY} has it already\n" and hub.seen == []


@pytest.mark.parametrize("step", STEPS)
def test_a_curriculum_that_was_not_pushed_is_one_line(
    place: Path, hub: Hub, say: Callable[..., Pushed], step: str
) -> None:
    hub.breaks_at = step
    failed = say(place / "tiny", "--curriculum", "--to", DATASET)
    assert failed.code == 2 and "Traceback" not in failed.err
    line = failed.err.strip().splitlines()[-1]
    assert f"the curriculum is complete in {place / 'tiny'}, but was not pushed to {DATASET}" in line
    assert not (place / "tiny" / "hub-curriculum.json").exists()


def test_options_without_effect_are_refused(place: Path, say: Callable[..., Pushed]) -> None:
    refused = say(place / "tiny", "--to", REPOSITORY, "--with-text")
    assert refused.code == 2 and "have no effect without --curriculum" in refused.err
