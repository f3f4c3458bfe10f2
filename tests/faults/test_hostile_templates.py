"""A chat template that never ends, fills memory or writes without end is refused, in one line and soon."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fuzz.corpus import json_lines

from selective_dpo.config import DataConfig, ModelConfig, SourceConfig
from selective_dpo.data import prepare as prepare_module
from selective_dpo.data import processes
from selective_dpo.data.adapters import DropReason, Pair, parse_row
from selective_dpo.data.prepare import CHUNK_ROWS, prepare_pairs
from selective_dpo.data.templates import Conversation, apply_template, load_template, render
from selective_dpo.data.tokenize import tokenize_pairs
from selective_dpo.distributed.signals import stopping_at_once
from selective_dpo.errors import Interrupted, RunawayTemplateError
from selective_dpo.evaluation.generate import encode_conversation
from selective_dpo.models import load_tokenizer
from tests.fixtures.bad_input import command
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_recipe
from tests.fixtures.tokenizers import CHATML, byte_tokenizer

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
TIME = "takes more than 0.5 s, or more memory than there is"
MEMORY = "needs too much memory"
HOSTILE = {
    "nested loops": (LOOPS, TIME),
    "a loop in C": ("{{ ([[messages] * 99] * 99999) | sum(start=[]) | length }}", TIME),
    "doubled text": (DOUBLES, f"{TIME}|{MEMORY}"),
    "long text": (
        "{{ 'x' * 10 ** 7 }}",
        r"writes 10,000,0\d\d characters for 6, on the",
    ),
    "huge text": ("{% set n = 10 ** 10 %}{{ 'x' * n }}", MEMORY),
    "huge text, computed while it is compiled": ("{{ 'x' * 10 ** 10 }}", MEMORY),
}
QUESTION = [{"role": "user", "content": "hi"}]

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are limited on Linux")


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for a pair and two for a chunk, not 10 and 300; and 1 GiB for a process, not 8."""
    monkeypatch.setattr(prepare_module, "MAX_CHUNK_SECONDS", 2.0)
    monkeypatch.setattr(prepare_module, "MAX_PAIR_SECONDS", 0.5)
    monkeypatch.setattr(processes, "MAX_WORKER_MEMORY", 1 << 30)


def chat_row(number: int, text: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"{text} {number}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }


def on_bombs(template: str) -> str:
    return "{% if 'bomb' in messages[0]['content'] %}" + template + "{% endif %}" + CHATML


def prepare(folder: Path, rows: list[Any], tokenizer: Any, **options: Any) -> Any:
    path = folder / "data.jsonl"
    path.write_bytes(json_lines(rows))
    source = SourceConfig(path=str(path))
    config = DataConfig.model_validate({"train": [source], "max_length": 64, "max_prompt_length": 32})
    return prepare_pairs([source], config, tokenizer, folder / "pairs", key="k", **options)


# --- what is refused -------------------------------------------------------------------------------------


@needs_linux
@pytest.mark.fault(row=14)
@pytest.mark.parametrize(("template", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_template_without_end_is_refused(
    tmp_path: Path, template: str, words: str, in_a_hurry: None
) -> None:
    """In one line that names template and row, and nothing is published."""
    tokenizer = byte_tokenizer(template=on_bombs(template))
    tokenizer.name_or_path = "org/model"
    rows = [chat_row(number, "q" if number else "bomb") for number in range(12)]
    begun = time.monotonic()
    with pytest.raises(
        RunawayTemplateError,
        match=rf"^row 0 of {tmp_path}/data\.jsonl: the chat template of org/model (?:{words}).*; use another",
    ):
        prepare(tmp_path, rows, tokenizer)
    assert time.monotonic() - begun < 30.0
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@needs_linux
@pytest.mark.fault(row=14)
def test_the_row_is_named_in_any_chunk(tmp_path: Path, in_a_hurry: None) -> None:
    bad = 2 * CHUNK_ROWS + 5
    rows = [chat_row(number, "bomb" if number == bad else "q") for number in range(bad + 2)]
    (tmp_path / "own.jinja").write_text(on_bombs(LOOPS))
    tokenizer = byte_tokenizer()
    apply_template(tokenizer, str(tmp_path / "own.jinja"))
    with pytest.raises(
        RunawayTemplateError,
        match=rf"^row 2,053 of {tmp_path}/data\.jsonl: chat_template {tmp_path}/own\.jinja {TIME}",
    ):
        prepare(tmp_path, rows, tokenizer)
    assert not (tmp_path / "pairs").exists()


@needs_linux
@pytest.mark.fault(row=14)
def test_the_command_line_says_one_line(tmp_path: Path, in_a_hurry: None) -> None:
    """Exit code 2, the model's own template and the row by name."""
    recipe = tiny_recipe(tmp_path, data={"max_prompt_length": 32})
    model = tiny_model_folder(tmp_path / "hostile", template=on_bombs(LOOPS))
    data = Path(recipe.data.train[0].path)
    data.write_bytes(json_lines([chat_row(number, "bomb" if number == 9 else "q") for number in range(12)]))
    changed = recipe.model_copy(update={"model": ModelConfig(path=str(model), dtype="float32")})
    answer = command(["plan", str(recipe_file(changed, tmp_path / "recipe.yaml"))], inside=tmp_path)
    assert answer.code == 2
    assert answer.error.splitlines()[-1].startswith(
        f"selective-dpo: error: row 9 of {data}: the chat template of {model} {TIME}"
    )


def test_a_template_of_megabytes_is_refused_before_it_is_compiled(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("x" * 1_000_001)
    with pytest.raises(RunawayTemplateError, match=rf"^chat_template {path} has more than 1,000,000"):
        apply_template(byte_tokenizer(), str(path))
    with pytest.raises(RunawayTemplateError, match="has more than 1,000,000 characters"):
        render(byte_tokenizer(template="x" * 1_000_001), [Conversation(QUESTION)])


def test_a_template_may_write_a_million_characters_and_sixteen_for_each_that_it_gets() -> None:
    """The conversation has two; beyond that it is refused wherever the template is used."""
    template = "{{ 'x' * %d }}"
    most = 1_000_000 + 16 * 2
    assert render(byte_tokenizer(template=template % most), [Conversation(QUESTION)]) == ["x" * most]
    with pytest.raises(RunawayTemplateError, match=r"writes 1,000,033 characters for 2, .* ends in 'hi'"):
        render(byte_tokenizer(template=template % (most + 1)), [Conversation(QUESTION)])


# --- what stays as it was --------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, load_template("chatml"), load_template("gemma-system")])
def test_the_ids_are_those_of_transformers(template: str) -> None:
    tokenizer = byte_tokenizer(template=template)
    for messages in (QUESTION, [{"role": "system", "content": "Be brief.\n"}, *QUESTION]):
        for adds in (True, False):
            expected = tokenizer.apply_chat_template(
                messages, add_generation_prompt=adds, tokenize=True, return_dict=False
            )
            assert encode_conversation(tokenizer, Conversation(messages, adds)) == expected
            assert render(tokenizer, [Conversation(messages, adds)]) == [tokenizer.decode(expected)]


@pytest.mark.fault(row=2)
def test_sigterm_while_a_template_renders_drops_no_row() -> None:
    """It used to count as the template's refusal of the pair."""
    pair = parse_row(chat_row(0, "q"))
    assert isinstance(pair, Pair)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted), stopping_at_once(forgetting=True):
        timer.start()
        assert tokenize_pairs([pair], byte_tokenizer(template=LOOPS)) != [DropReason.TEMPLATE_REFUSES]
    timer.join()
    with stopping_at_once(forgetting=True):  # for the tests after this one
        pass


@needs_linux
@pytest.mark.fault(row=2)
def test_sigterm_while_another_process_renders_ends_both(tmp_path: Path) -> None:
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    begun = time.monotonic()
    with pytest.raises(Interrupted), stopping_at_once(forgetting=True):
        timer.start()
        prepare(tmp_path, [chat_row(number, "q") for number in range(4)], byte_tokenizer(template=LOOPS))
    timer.join()
    assert time.monotonic() - begun < 30.0
    assert not (tmp_path / "pairs").exists()
    with stopping_at_once(forgetting=True):
        pass


def test_a_tokenizer_keeps_its_templates_name(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    tokenizer = load_tokenizer(ModelConfig(path=str(folder), chat_template="gemma-system"))
    tokenizer.chat_template = "{{ 'x' * 10 ** 7 }}"
    with pytest.raises(
        RunawayTemplateError, match=r"^row 0 of .*: chat_template gemma-system writes 10,000,000"
    ):
        prepare(tmp_path, [chat_row(number, "q") for number in range(4)], tokenizer)
