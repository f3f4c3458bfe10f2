"""Pairs tokenized by several processes are the same files, byte by byte, as those made by one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data import prepare as prepare_module
from selective_dpo.data import processes
from selective_dpo.data.prepare import ChunkTokenizer, prepare_pairs
from selective_dpo.data.processes import map_in_processes
from selective_dpo.data.store import PairsSummary
from selective_dpo.errors import DataError, TemplateError
from selective_dpo.storage.artifacts import read_manifest
from tests.fixtures.tokenizers import CHATML, byte_tokenizer

ROWS = 400
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(prepare_module, "CHUNK_ROWS", 16)


def row_of(number: int) -> Any:
    """Every kind of row: text and chat, repeated, shared prompts, too long, refused, malformed."""
    prompt, chosen, rejected = f"question {number // 4}", f" yes {number}", " no"
    kinds: dict[int, Any] = {
        3: "{broken",
        5: {"prompt": "question 0", "chosen": " yes 0", "rejected": " no"},
        7: {"prompt": "q" * 200, "chosen": chosen, "rejected": rejected},
        9: {"prompt": prompt, "chosen": chosen, "rejected": chosen},
        11: {
            "prompt": [{"role": "user", "content": "refuse"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        },
    }
    chat = {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": "\u00e9" * (number % 40 + 1)}],
        "prompt_id": f"own {number % 3}",
    }
    text = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "score_chosen": number / 7}
    return kinds.get(number % 13, chat if number % 2 else text)


def prepare(folder: Path, workers: int | None, *, template: str = CHATML, **options: Any) -> PairsSummary:
    sources = []
    for name in ("first", "second"):
        path = folder.parent / f"{name}.jsonl"
        rows = [row_of(number if name == "first" else number + 1) for number in range(ROWS)]
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        sources.append(SourceConfig(path=str(path), fraction=0.8))
    config = DataConfig.model_validate(
        {"train": sources, "max_length": 120, "max_prompt_length": 100, "max_boundary_mismatch": 1.0}
        | options
    )
    refusing = "{% if 'refuse' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + template
    tokenizer = byte_tokenizer(template=refusing)
    seen: list[int] = []
    summary = prepare_pairs(
        sources, config, tokenizer, folder, key="k", progress=seen.append, workers=workers
    )
    assert sum(seen) == summary.rows
    return summary


@pytest.mark.parametrize("workers", [1, 3])
def test_the_files_are_the_same_to_the_byte(tmp_path: Path, workers: int) -> None:
    alone, shared = prepare(tmp_path / "alone", 0), prepare(tmp_path / "shared", workers)
    assert shared == alone
    assert set(alone.counts) == {
        "kept",
        "malformed",
        "identical",
        "duplicate pair",
        "not sampled",
        "refused by the template",
        "prompt too long",
    }
    assert alone.joined_prompts > 0
    assert list(alone.sources) == list(shared.sources)
    assert read_manifest(tmp_path / "shared").files == read_manifest(tmp_path / "alone").files


def test_boundary_mismatches_are_counted_alike(tmp_path: Path) -> None:
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    messages = []
    for workers in (0, 2):
        with pytest.raises(TemplateError, match="first") as caught:
            prepare(tmp_path / "pairs", workers, template=thinking, max_boundary_mismatch=0.1)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.jsonl", "second.jsonl"]


def test_an_error_in_a_worker_is_raised_as_it_is(tmp_path: Path, monkeypatch) -> None:
    # The first chunks hold text only; the chat template is missed in a worker.
    rows = [{"prompt": f"q {n}", "chosen": f" a{n}", "rejected": " b"} for n in range(200)]
    rows += [
        {
            "prompt": [{"role": "user", "content": f"q {n}"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
        for n in range(100)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = SourceConfig(path=str(path))
    config = DataConfig(train=(source,))
    for workers in (0, 2):
        with pytest.raises(TemplateError, match="no chat template"):
            prepare_pairs(
                [source], config, byte_tokenizer(template=None), tmp_path / "p", key="k", workers=workers
            )
    assert list(tmp_path.iterdir()) == [path]


@needs_linux
def test_a_process_that_the_system_ends_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def ended(chunk_tokenizer: ChunkTokenizer, chunk: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ChunkTokenizer, "tokenize", ended)
    with pytest.raises(
        DataError,
        match=r"tokenizing row 0 of .*first\.jsonl to row 15 of .* takes more than 300 s, or more memory",
    ):
        prepare(tmp_path / "pairs", 2)
    assert not (tmp_path / "pairs").exists()
    assert multiprocessing.active_children() == []


@needs_linux
def test_processes_end_with_the_error_or_where_nobody_wants_more() -> None:
    items = map_in_processes(abs, [-1, -2, -3] * 9, workers=2, seconds=60.0, stopped=lambda items: OSError())
    assert next(items) == 1
    assert len(multiprocessing.active_children()) == 2
    items.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(TypeError, match="bad operand"):
        list(map_in_processes(abs, [-1, "x"], workers=2, seconds=60.0, stopped=lambda items: OSError()))
    assert multiprocessing.active_children() == []


@needs_linux
def test_processes_end_with_their_parent() -> None:
    script = (
        "import os, time\n"
        "from selective_dpo.data.processes import map_in_processes\n"
        "def work(item):\n"
        "    os.write(1, b'%d ' % os.getpid())\n"
        "    time.sleep(600)\n"
        "list(map_in_processes(work, [1, 2], workers=2, seconds=600, stopped=OSError))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        try:
            written = b""
            while written.count(b" ") < 2:
                written += os.read(parent.stdout.fileno(), 64)
        finally:
            parent.kill()
        assert parent.stdout.read() == b""  # ends when both have ended, since they could write as well


def test_the_signals_and_the_tokenizers_of_this_process_are_left_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    prepare(tmp_path / "pairs", None)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_there_are_as_many_processes_as_cores_but_bounded(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert processes._cores() == 64
    assert processes.MAX_WORKERS < 64
