"""A chat template that never ends, fills memory or writes without end is refused, in one line and soon."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz.corpus import json_lines

from selective_dpo.config import DataConfig, ModelConfig, SourceConfig
from selective_dpo.data import templates as render_limits
from selective_dpo.data.adapters import DropReason, Pair, parse_row
from selective_dpo.data.prepare import CHUNK_ROWS, CHUNKS_ALONE, Finisher, finish_chunks, prepare_pairs
from selective_dpo.data.templates import Conversation, apply_template, load_template, mentions_system, render
from selective_dpo.data.tokenize import tokenize_pairs
from selective_dpo.distributed.signals import stopping_at_once
from selective_dpo.errors import Interrupted, RunawayTemplateError
from selective_dpo.evaluation.generate import encode_conversation, encode_prompt, turn_end_id
from selective_dpo.models import load_tokenizer
from tests.fixtures.bad_input import command
from tests.fixtures.hasty import SECONDS, HastyFinisher, outcomes
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_recipe
from tests.fixtures.tokenizers import CHATML, byte_tokenizer

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")

GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
UNSTOPPABLE = "{{ ([[messages] * 99] * 99999) | sum(start=[]) | length }}"
"""Python's `sum` adds lists for minutes without a look at signals."""
TIME = r"takes more than 0\.4 s"
MEMORY = "needs more than 2 GiB of memory"
EITHER = f"{TIME}|{MEMORY}|writes [0-9,]+ characters for 2,"
HOSTILE = {
    "nested loops": (LOOPS, TIME),
    "endless output": (LOOPS.replace("{% endfor %}{%", "x{{ a }}{% endfor %}{%", 1), EITHER),
    "doubled text": (GROW % ("'x'", "ns.x ~ ns.x"), EITHER),
    "doubled list": (GROW % ("[1]", "ns.x + ns.x"), EITHER),
    "squared text": (GROW % ("'xx'", "ns.x.replace('x', ns.x)"), EITHER),
    "nested lists as JSON": (GROW % ("[1]", "[ns.x, ns.x]") + "{{ ns.x | tojson }}", EITHER),
    "long text": ("{{ 'x' * 10 ** 7 }}", "writes 10,000,000 characters for 2,"),
    "huge text": ("{% set n = 10 ** 10 %}{{ 'x' * n }}", MEMORY),
    "huge text, folded": ("{{ 'x' * 10 ** 10 }}", MEMORY),
    "wide text": ("{{ '{:9999999999}'.format(1) }}", MEMORY),
    "large power": ("{% set n = 10 ** 9 %}{{ 10 ** n }}", TIME),
    "large sort": ("{{ (range(99999) | list * 10 ** 5) | sort | length }}", EITHER),
    "empty slices": ("{{ range(99999) | slice(10 ** 9) | list | length }}", EITHER),
    "words without sense": ("{{ lipsum(n=10 ** 8) }}", EITHER),
    "a template of megabytes": ("x" * 1_000_001, "has more than 1,000,000 characters"),
}
WHEN_BOMB = "{% if 'bomb' in messages[0]['content'] %}" + "{{ 'x' * 10 ** 7 }}{% endif %}" + CHATML
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """0.4 seconds instead of 10; and whatever happens, timers, handlers and limits are put back.

    This process is not to be ended: copying a gigabyte may take 3 times 0.4 seconds, and hardly 3 times 10.
    """
    monkeypatch.setattr(render_limits, "MOST_SECONDS", 0.4)
    monkeypatch.setattr(render_limits, "_HARD", 100)
    before = _settings()
    yield
    assert _settings() == before


def _settings() -> list[Any]:
    return [
        sys.unraisablehook,
        [signal.getsignal(number) for number in (signal.SIGVTALRM, signal.SIGPROF)],
        [signal.getitimer(timer) for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)],
        resource.getrlimit(resource.RLIMIT_AS),
    ]


def chat_row(number: int, text: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"{text} {number}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.fault(row=14)
@pytest.mark.parametrize(("template", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_template_without_end_is_refused(template: str, words: str, in_a_hurry: None) -> None:
    """Within the stated time, memory and length, and by name."""
    tokenizer = byte_tokenizer(template=template)
    tokenizer.name_or_path = "org/model"
    begun = time.process_time()
    with pytest.raises(RunawayTemplateError, match=rf"^the chat template of org/model (?:{words})") as caught:
        render(tokenizer, [Conversation(QUESTION)])
    # A tick of the timer may come late: what allocates memory spends its time in the system.
    assert time.process_time() - begun < 8.0
    assert "on the conversation that ends in 'hi'" in str(caught.value) or len(template) > 1_000_000


@pytest.mark.parametrize("use", [mentions_system, turn_end_id, lambda made: encode_prompt(made, QUESTION)])
def test_it_is_refused_wherever_it_is_used(use: Any, in_a_hurry: None) -> None:
    with pytest.raises(RunawayTemplateError, match=TIME):
        use(byte_tokenizer(template=LOOPS))


def test_a_named_template_is_tried_at_once(tmp_path: Path, in_a_hurry: None) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(LOOPS)
    with pytest.raises(RunawayTemplateError, match=rf"^chat_template {path} {TIME}, .* in 'text'"):
        apply_template(byte_tokenizer(), str(path))
    path.write_text("x" * 1_000_001)
    with pytest.raises(RunawayTemplateError, match=rf"^chat_template {path} has more than 1,000,000"):
        apply_template(byte_tokenizer(), str(path))


@pytest.mark.fault(row=14)
def test_what_puts_the_limits_back_is_not_interrupted(
    in_a_hurry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer ticks on while a template's gigabytes are freed, and then nobody waits for its error."""
    put_back: list[float] = []

    @contextlib.contextmanager
    def slow_to_leave() -> Iterator[None]:
        try:
            yield
        finally:
            spin(0.3)
            put_back.append(time.thread_time())

    def spin(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    monkeypatch.setattr(render_limits, "_limited_memory", slow_to_leave)
    with pytest.raises(RunawayTemplateError, match=TIME):
        render_limits.within_limits(lambda: spin(60.0))
    spin(0.3)
    assert len(put_back) == 1


def test_the_limits_of_a_real_run() -> None:
    assert render_limits.MOST_SECONDS == 10.0
    assert render_limits.MOST_MEMORY == 2 * 1024**3
    render_limits.check_written(1_000_000 + 16 * 2, QUESTION)  # 2 characters are given
    with pytest.raises(RunawayTemplateError, match="writes 1,000,033 characters for 2"):
        render_limits.check_written(1_000_000 + 16 * 2 + 1, QUESTION)


# --- rows and processes ----------------------------------------------------------------------------------


def prepare(folder: Path, rows: list[Any], tokenizer: Any, workers: int = 1) -> Any:
    path = folder / "data.jsonl"
    path.write_bytes(json_lines(rows))
    source = SourceConfig(path=str(path))
    config = DataConfig.model_validate({"train": [source], "max_length": 64, "max_prompt_length": 32})
    return prepare_pairs([source], config, tokenizer, folder / "pairs", key="k", workers=workers)


@pytest.mark.fault(row=14)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_row_is_named(tmp_path: Path, workers: int) -> None:
    """Also where another process renders it; and nothing is published."""
    bad = CHUNKS_ALONE * CHUNK_ROWS + 5  # after the chunks that no worker gets
    drawn = [chat_row(number, "bomb" if number == bad else "q") for number in range(bad + 2)]
    template = tmp_path / "own.jinja"
    template.write_text(WHEN_BOMB)
    tokenizer = byte_tokenizer()
    apply_template(tokenizer, str(template))
    with pytest.raises(
        RunawayTemplateError,
        match=rf"^row 4,101 of {tmp_path}/data\.jsonl: chat_template {template} writes 10,000,\d+ characters",
    ):
        prepare(tmp_path, drawn, tokenizer, workers)
    assert not (tmp_path / "pairs").exists()


@pytest.mark.fault(row=14)
def test_a_worker_that_cannot_be_interrupted_is_ended(in_a_hurry: None) -> None:
    """It has three times the time; the rows it had are named."""
    chunks = [outcomes([chat_row(7, "q")], first=number) for number in range(CHUNKS_ALONE)]
    chunks += [outcomes([chat_row(100, "bomb"), chat_row(101, "q")], first=100), outcomes([], first=102)]
    template = WHEN_BOMB.replace("{{ 'x' * 10 ** 7 }}", UNSTOPPABLE)
    finisher = HastyFinisher(byte_tokenizer(template=template), DataConfig.model_construct())
    with pytest.raises(
        RunawayTemplateError, match=r"^rows 100 of data to 101 of data: the chat template takes"
    ):
        list(finish_chunks(finisher, chunks, workers=2))


@pytest.mark.fault(row=14)
def test_a_process_that_cannot_be_interrupted_ends() -> None:
    """By the system's hand, and not by a word of ours; but it does not hang."""
    script = (
        "from tests.fixtures.tokenizers import byte_tokenizer\n"
        "from selective_dpo.data import templates as render_limits, templates\n"
        f"render_limits.MOST_SECONDS = {SECONDS}\n"
        f"tokenizer = byte_tokenizer(template={UNSTOPPABLE!r})\n"
        f"templates.render(tokenizer, [templates.Conversation({QUESTION!r})])\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGPROF, done.stderr


@pytest.mark.fault(row=14)
@pytest.mark.parametrize("is_the_models_own", [True, False])
def test_the_command_line_says_one_line(tmp_path: Path, is_the_models_own: bool, in_a_hurry: None) -> None:
    """Exit code 2, the template by name, and the row where it is one's."""
    bomb = WHEN_BOMB.replace("{{ 'x' * 10 ** 7 }}", LOOPS)
    (tmp_path / "own.jinja").write_text(LOOPS)
    recipe = tiny_recipe(tmp_path, data={"max_prompt_length": 32})
    model = tiny_model_folder(tmp_path / "hostile", template=bomb)
    own = "" if is_the_models_own else str(tmp_path / "own.jinja")
    data = Path(recipe.data.train[0].path)
    data.write_bytes(json_lines([chat_row(number, "bomb" if number == 9 else "q") for number in range(12)]))
    changed = recipe.model_copy(
        update={"model": ModelConfig(path=str(model), dtype="float32", chat_template=own)}
    )
    answer = command(["plan", str(recipe_file(changed, tmp_path / "recipe.yaml"))], inside=tmp_path)
    expected = (
        f"row 9 of {data}: the chat template of {model} takes more than 0.4 s, on the conversation"
        if is_the_models_own
        else f"chat_template {own} takes more than 0.4 s, on the conversation that ends in 'text'"
    )
    assert answer.code == 2
    assert answer.error.splitlines()[-1].startswith(f"selective-dpo: error: {expected}")


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


def test_a_tick_that_is_lost_in_a_callback_comes_again(in_a_hurry: None, capfd: Any) -> None:
    """Python only prints what is raised while garbage is collected."""
    lost = 0

    def collected(phase: str, info: object) -> None:
        nonlocal lost
        begun = time.thread_time()
        try:
            while phase == "stop" and lost == 0 and time.thread_time() - begun < 5.0:
                pass
        except BaseException:
            lost += 1
            raise

    gc.callbacks.append(collected)
    try:
        with pytest.raises(RunawayTemplateError, match=TIME):
            render(byte_tokenizer(template=GROW % ("[]", "ns.x + [[i]]") + LOOPS), [Conversation(QUESTION)])
    finally:
        gc.callbacks.remove(collected)
    assert lost == 1
    assert capfd.readouterr().err == ""


def test_timers_and_handlers_of_others_are_put_back(in_a_hurry: None) -> None:
    def others(number: int, frame: object) -> None:
        raise AssertionError("rendering let somebody else's timer run")

    before = signal.signal(signal.SIGVTALRM, others)
    signal.setitimer(signal.ITIMER_VIRTUAL, 500.0, 7.0)
    real = signal.getitimer(signal.ITIMER_REAL)
    try:
        with pytest.raises(RunawayTemplateError):
            render(byte_tokenizer(template=LOOPS), [Conversation(QUESTION)])
        left, interval = signal.getitimer(signal.ITIMER_VIRTUAL)
        assert 499.0 < left < 500.1 and interval == 7.0
        assert signal.getsignal(signal.SIGVTALRM) is others
        assert real[0] - 60.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= real[0]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def test_a_profilers_timer_is_left_alone(in_a_hurry: None) -> None:
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_PROF, 500.0)
    try:
        with pytest.raises(RunawayTemplateError):
            render(byte_tokenizer(template=LOOPS), [Conversation(QUESTION)])
        assert signal.getitimer(signal.ITIMER_PROF)[0] > 490.0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def test_in_another_thread_templates_are_rendered_without_a_timer() -> None:
    texts: list[list[str]] = []
    tokenizer = byte_tokenizer()
    thread = threading.Thread(target=lambda: texts.append(render(tokenizer, [Conversation(QUESTION)])))
    thread.start()
    thread.join()
    assert texts == [["<|im_start|>user\nhi<|im_end|>\n"]]


def test_a_limit_that_stands_already_is_kept() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        with pytest.raises(RunawayTemplateError, match="memory"):
            render(byte_tokenizer(template="{{ 'x' * (3 * 10 ** 9 // 2) }}"), [Conversation(QUESTION)])
        assert resource.getrlimit(resource.RLIMIT_AS) == (used + (1 << 30), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


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


def test_a_tokenizer_keeps_its_templates_name(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    tokenizer = load_tokenizer(ModelConfig(path=str(folder), chat_template="gemma-system"))
    finisher = Finisher(tokenizer, DataConfig.model_construct())
    tokenizer.chat_template = "{{ 'x' * 10 ** 7 }}"
    with pytest.raises(
        RunawayTemplateError, match=r"row 3 of data: chat_template gemma-system writes 10,000,000"
    ):
        finisher.finish(outcomes([chat_row(0, "q")], first=3))
