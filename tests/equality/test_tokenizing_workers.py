"""Pairs tokenized by several processes are the same files, byte by byte, as those made by one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data import prepare as prepare_module
from selective_dpo.data import prepare as workers_module
from selective_dpo.data import worker_main
from selective_dpo.data.prepare import prepare_pairs
from selective_dpo.data.store import PairsSummary
from selective_dpo.errors import TemplateError
from selective_dpo.storage.artifacts import read_manifest
from tests.fixtures.tokenizers import CHATML, byte_tokenizer

ROWS = 400


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


@pytest.mark.parametrize("workers", [2, 3])
def test_the_files_are_the_same_to_the_byte(tmp_path: Path, workers: int) -> None:
    alone, shared = prepare(tmp_path / "alone", 1), prepare(tmp_path / "shared", workers)
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
    for workers in (1, 2):
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
    for workers in (1, 2):
        with pytest.raises(TemplateError, match="no chat template"):
            prepare_pairs(
                [source], config, byte_tokenizer(template=None), tmp_path / "p", key="k", workers=workers
            )
    assert list(tmp_path.iterdir()) == [path]


def test_a_worker_that_dies_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    started = []

    class Dying(workers_module._Worker):
        def __init__(self, finisher) -> None:
            super().__init__(finisher)
            started.append(self._process)
            self._process.kill()

    monkeypatch.setattr(workers_module, "_Worker", Dying)
    with pytest.raises(RuntimeError, match="ended early: exit code -9"):
        prepare(tmp_path / "pairs", 2)
    assert not (tmp_path / "pairs").exists()
    assert [process.poll() for process in started] == [-9, -9]


class UnsendableError(ValueError):
    def __init__(self, one, two) -> None:
        super().__init__(one)


class Failing(NamedTuple):
    def finish(self, chunk: Any) -> Any:
        raise UnsendableError("what went wrong", lambda: None)


def test_any_other_error_comes_back_in_words(capsys) -> None:
    answer = worker_main._answer(Failing(), [])
    assert type(answer) is RuntimeError
    assert str(answer) == "UnsendableError: what went wrong"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [16 * workers_module.CHUNKS_ALONE, 10])
def test_small_data_start_no_process(tmp_path: Path, monkeypatch, rows: int) -> None:
    monkeypatch.setattr(workers_module, "_Worker", None)
    lines = [{"prompt": f"q {n}", "chosen": " a", "rejected": " b"} for n in range(rows)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    source = SourceConfig(path=str(path))
    config = DataConfig(train=(source,))
    assert prepare_pairs([source], config, byte_tokenizer(), tmp_path / "p", key="k").kept == rows


def test_tokenizers_of_other_modules_stay_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(workers_module, "_Worker", None)
    monkeypatch.setattr(workers_module, "_can_be_sent", lambda finisher: False)
    assert prepare(tmp_path / "pairs", 2).rows == 2 * ROWS


def test_workers_are_as_many_as_the_cores_but_bounded(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert workers_module._cores() == 64
    assert workers_module.MOST_WORKERS < 64
