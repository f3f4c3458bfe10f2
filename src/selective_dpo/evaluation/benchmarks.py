"""Benchmarks that official programs judge: their questions are read, and answers written as they read them.

AlpacaEval (https://github.com/tatsu-lab/alpaca_eval), Arena-Hard (https://github.com/lmarena/arena-hard-auto)
and MT-Bench (https://github.com/lm-sys/FastChat, `fastchat/llm_judge`). Nothing of theirs comes with this
package: the recipe names a checkout or a question file. `judgments` takes their verdicts back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from selective_dpo.config import GenerationConfig
from selective_dpo.config.schema import BenchmarkConfig, BenchmarkName
from selective_dpo.data.readers import Malformed, read_file
from selective_dpo.errors import DataError
from selective_dpo.evaluation.generate import Encode, Prompt, generate_answers
from selective_dpo.identity import require_unique
from selective_dpo.storage.digests import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Question(NamedTuple):
    """One question of a benchmark, of one turn or several."""

    identity: str
    """Its own id; AlpacaEval has none, and goes by the instruction itself."""
    turns: tuple[str, ...]
    row: Mapping[str, Any]
    """As it stands in the file."""


class Benchmark(NamedTuple):
    """What differs between the benchmarks, beside the shape of an answer."""

    places: tuple[str, ...]
    """Where a checkout has the questions, as patterns."""
    identity: str
    """The column of the ids."""
    suffix: str
    max_new_tokens: int
    temperature: float
    """Unless the category of a question has its own."""
    turns: int = 1


BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    # A checkout has the questions only in the baseline's answers.
    "alpaca-eval": Benchmark(
        ("alpaca_eval.json", "results/gpt4_1106_preview/model_outputs.json"),
        "instruction",
        ".json",
        2048,
        0.7,
    ),
    "arena-hard": Benchmark(
        ("question.jsonl", "data/arena-hard-v*/question.jsonl"), "uid", ".jsonl", 4096, 0.0
    ),
    "mt-bench": Benchmark(
        ("question.jsonl", "fastchat/llm_judge/data/mt_bench/question.jsonl"),
        "question_id",
        ".jsonl",
        1024,
        0.7,
        turns=2,
    ),
}

MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""FastChat's, by category of the question; others have 0.7."""


def question_file(name: BenchmarkName, source: str) -> Path:
    """The question file that `source` is, or that is in the checkout `source`.

    Raises:
        DataError: there is none, or several.
    """
    place = Path(source).expanduser()
    if place.is_file():
        return place
    patterns = BENCHMARKS[name].places
    found = sorted(path for pattern in patterns for path in place.glob(pattern) if path.is_file())
    key = f"evaluate.benchmarks.{name}.source"
    if not found:
        raise DataError(f"{key}: {source} is no question file, and has none at {' or '.join(patterns)}")
    if len(found) > 1:
        raise DataError(f"{key}: {source} has several question files, name one: {', '.join(map(str, found))}")
    return found[0]


def read_questions(name: BenchmarkName, path: Path) -> list[Question]:
    """The questions of a file, in its order.

    Raises:
        DataError: a row has not the benchmark's shape, or there is none.
        IdentityError: an id stands twice.
    """
    questions = []
    for number, row in enumerate(read_file(path)):
        where = f"{path}, row {number:,}"
        if isinstance(row, Malformed):
            raise DataError(f"{where}: {row.problem}")
        identity, turns = row.get(BENCHMARKS[name].identity), _turns(name, row)
        if not isinstance(identity, str | int) or not turns or not all(turns):
            raise DataError(f"{where}: no question of {name}: it needs {_SHAPES[name]}")
        questions.append(Question(str(identity), turns, row))
    if not questions:
        raise DataError(f"{path} holds no questions of {name}")
    require_unique([question.identity for question in questions], what=f"questions of {path}")
    return questions


_SHAPES: dict[BenchmarkName, str] = {
    "alpaca-eval": "`instruction`",
    "arena-hard": "`uid` and `prompt`, as in arena-hard-auto since April 2025",
    "mt-bench": "`question_id`, `category` and two `turns`",
}


def _turns(name: BenchmarkName, row: Mapping[str, Any]) -> tuple[str, ...]:
    column = {"alpaca-eval": "instruction", "arena-hard": "prompt", "mt-bench": "turns"}[name]
    value = row.get(column)
    turns = [turn for turn in (value if isinstance(value, list) else [value]) if isinstance(turn, str)]
    return tuple(turns) if len(turns) == BENCHMARKS[name].turns else ()


def temperature_of(name: BenchmarkName, question: Question, config: BenchmarkConfig) -> float:
    """At which the question is answered; 0: greedily."""
    own = BENCHMARKS[name].temperature if config.temperature is None else config.temperature
    if name != "mt-bench":
        return own
    return MT_BENCH_TEMPERATURES.get(str(question.row.get("category")), own)


def answer_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    name: BenchmarkName,
    questions: Sequence[Question],
    config: BenchmarkConfig,
    generation: GenerationConfig,
    *,
    stream: str,
    encode: Encode | None = None,
) -> dict[str, tuple[str, ...]]:
    """An answer to each turn of each question, by the question's id.

    Each turn is asked after the answers to the turns before it. Of `generation` the batch size and the seed
    count; `stream` and `encode` are those of `generate_answers`.

    Raises:
        SelectiveDPOError: see `generate_answers`.
    """
    longest = config.max_new_tokens or BENCHMARKS[name].max_new_tokens
    answers: dict[str, list[str]] = {question.identity: [] for question in questions}
    for turn in range(BENCHMARKS[name].turns):
        for temperature, asked in _by_temperature(name, questions, config):
            settings = GenerationConfig(
                prompts=len(asked),
                max_new_tokens=longest,
                temperature=temperature,
                batch_size=generation.batch_size,
                seed=generation.seed,
            )
            prompts = [Prompt(each.identity, _messages(each, answers[each.identity])) for each in asked]
            of_turn = f"{stream}, {name}, turn {turn + 1}"
            found = generate_answers(model, tokenizer, prompts, settings, stream=of_turn, encode=encode)
            for identity, (answer,) in found.items():
                answers[identity].append(answer.text)
    return {identity: tuple(turns) for identity, turns in answers.items()}


def _by_temperature(
    name: BenchmarkName, questions: Sequence[Question], config: BenchmarkConfig
) -> Iterator[tuple[float, list[Question]]]:
    temperatures = [temperature_of(name, question, config) for question in questions]
    for temperature in sorted(set(temperatures)):
        yield (
            temperature,
            [each for each, own in zip(questions, temperatures, strict=True) if own == temperature],
        )


def _messages(question: Question, answers: Sequence[str]) -> list[dict[str, Any]]:
    """The conversation up to the turn that comes after `answers`."""
    messages = []
    for turn, text in enumerate(question.turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": text})
        messages += [{"role": "assistant", "content": answers[turn]}] if turn < len(answers) else []
    return messages


def model_name(run: str, arm: str) -> str:
    """What a benchmark calls an arm of a run: answers of several runs come together in one folder."""
    return f"{run}-{arm}"


def write_answers(
    folder: Path,
    name: BenchmarkName,
    model: str,
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[str]],
) -> Path:
    """Write the answers of `model` as the official program reads them: `MODEL.json` or `MODEL.jsonl`.

    The ids of answers are digests of question, model and answer.
    """
    now = time.time()
    rows = [_row(name, model, question, answers[question.identity], now) for question in questions]
    path = folder / f"{model}{BENCHMARKS[name].suffix}"
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def _row(
    name: BenchmarkName, model: str, question: Question, answers: Sequence[str], now: float
) -> dict[str, Any]:
    answer_id = digest([question.identity, model, list(answers)])[:22]
    if name == "alpaca-eval":
        # The set that an instruction comes from, by which AlpacaEval can break results down.
        kept = {key: question.row[key] for key in ("dataset",) if key in question.row}
        return {"instruction": question.turns[0], "output": answers[0], "generator": model, **kept}
    if name == "arena-hard":
        # Without `metadata` of style, which their own script counts.
        messages = [*_messages(question, ()), {"role": "assistant", "content": {"answer": answers[0]}}]
        return {
            "uid": question.row["uid"],
            "ans_id": answer_id,
            "model": model,
            "messages": messages,
            "tstamp": now,
        }
    return {
        "question_id": question.row["question_id"],
        "answer_id": answer_id,
        "model_id": model,
        "choices": [{"index": 0, "turns": list(answers)}],
        "tstamp": now,
    }
