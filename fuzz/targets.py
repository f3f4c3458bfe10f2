"""One function for each parser: bytes in; it returns, or raises what no input may make the package raise.

What a user can mend (`SelectiveDPOError`) is a good answer, and is checked for being one line; anything else
that escapes is a finding. Where something was read, its counts must add up.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fixtures.tokenizers import byte_tokenizer

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.config.load import dump_config, load_recipe, make_recipe
from selective_dpo.config.schema import BenchmarkConfig
from selective_dpo.curriculum.export import export_curriculum
from selective_dpo.curriculum.import_ import import_records
from selective_dpo.curriculum.records import loss_table, read_loss_table, read_records
from selective_dpo.curriculum.table import FACTS, TABLE, Curriculum
from selective_dpo.data.prepare import prepare_pairs
from selective_dpo.data.readers import count_file
from selective_dpo.data.sources import read_prompts
from selective_dpo.data.store import load_pairs, load_tokens
from selective_dpo.data.templates import apply_template
from selective_dpo.data.tokenize import tokenize_pairs
from selective_dpo.errors import SelectiveDPOError
from selective_dpo.evaluation.benchmarks import BENCHMARKS, longest_sequence, read_questions, write_answers
from selective_dpo.evaluation.generate import encode_prompt
from selective_dpo.evaluation.judgments import judgments_from_json, read_difficulties, read_judgments
from selective_dpo.identity import prompt_id
from selective_dpo.report.judgments import judgments_text
from selective_dpo.storage.artifacts import file_digest
from selective_dpo.storage.digests import digest

Target = Callable[[bytes], None]
LIMITS: dict[str, Any] = {"max_length": 96, "max_prompt_length": 48}


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Let a user's error pass, if it is one line with words in it."""
    try:
        yield
    except SelectiveDPOError as error:
        line = " ".join(str(error).split())
        if not line:
            raise AssertionError("an error without a word") from error
        json.dumps(line)


def recipe(data: bytes) -> None:
    """A recipe's file."""
    with _file("recipe.yaml", data) as path, refusals():
        read = load_recipe(path)
        dumped = dump_config(read)
        digest(dumped)
        assert make_recipe(json.loads(json.dumps(dumped))) == read


def override(data: bytes) -> None:
    """One option of the command line: the key, `=`, the value."""
    key, _, value = data.decode("utf-8", "surrogateescape").partition("=")
    raw = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "x.jsonl"}]}}
    with refusals():
        digest(dump_config(make_recipe(raw, [(key, value)])))


def pairs_jsonl(data: bytes) -> None:
    """JSON Lines of pairs."""
    pairs("pairs.jsonl", data)


def pairs_json(data: bytes) -> None:
    """A JSON array of pairs."""
    pairs("pairs.json", data)


def pairs_csv(data: bytes) -> None:
    """A CSV of pairs."""
    pairs("pairs.csv", data)


def pairs_parquet(data: bytes) -> None:
    """A Parquet file of pairs."""
    pairs("pairs.parquet", data)


def pairs_gzip(data: bytes) -> None:
    """Gzipped JSON Lines of pairs."""
    pairs("pairs.jsonl.gz", data)


def records_csv(data: bytes) -> None:
    """Two of the original repository's files: what stands before the first NUL byte, and what after it."""
    first, _, second = data.partition(b"\0")
    parts = {"seed41_step00.csv": first, "seed42_step00.csv": second or first}
    with tempfile.TemporaryDirectory() as name, refusals():
        folder = Path(name)
        for file, content in parts.items():
            (folder / file).write_bytes(content)
        imported = import_records(folder, {"allow_partial": True})
        made = imported.curriculum
        assert [len(count.records) for count in imported.folder.evaluations] == [
            made.table[f"loss_seed{count.seed}_evaluation1"].length()
            - made.table[f"loss_seed{count.seed}_evaluation1"].null_count
            for count in imported.folder.evaluations
        ]
        check_curriculum(made, folder)


def records_parquet(data: bytes) -> None:
    """A scorer's `records.parquet`."""
    with _file("records.parquet", data) as path:
        slow = None
        with refusals():
            records = read_records(path)
            slow = loss_table(records, allow_partial=True)
        fast = None
        with refusals():
            fast = read_loss_table([path], allow_partial=True)
        if slow is not None:  # the fast way does not read columns that it has no use for
            assert fast is not None
            assert list(fast.pair_ids_P) == list(slow.pair_ids_P)
            assert int(fast.counts_P.sum()) == len(records)


def curriculum_table(data: bytes) -> None:
    """A `curriculum.parquet`, beside facts that say it is the right one."""
    facts: dict[str, Any] = {
        **{name: {} for name in ("agreement", "provenance", "cost")},
        **dict.fromkeys(("quarantined", "partial"), 0),
        "key": "k",
        "pairs": 4,
        "selected": 2,
        "select": {"fraction": 0.5},
        "seeds": [41],
        "evaluations": [1],
    }
    with _file(TABLE, data) as path:
        head = {"schema_version": 1, "table_sha256": file_digest(path), "facts_sha256": digest(facts)}
        path.with_name(FACTS).write_text(json.dumps({**head, **facts}))
        with refusals():
            check_curriculum(Curriculum.load(path), path.parent)


def curriculum_facts(data: bytes) -> None:
    """A `curriculum.json`, beside the table of `corpus`."""
    from fuzz.corpus import curriculum_bytes

    with _file(TABLE, curriculum_bytes()) as path:
        path.with_name(FACTS).write_bytes(data)
        with refusals():
            check_curriculum(Curriculum.load(path), path.parent)


def prompts(data: bytes) -> None:
    """JSON Lines of prompts to be answered."""
    with _file("prompts.jsonl", data) as path, refusals():
        read = read_prompts(path)
        assert len(read) == count_file(path)
        for prompt in read:
            prompt_id(prompt)
            with refusals():
                encode_prompt(_tokenizer(), prompt, empty_system_message=True)


def judgments(data: bytes) -> None:
    """A benchmark's judgments; what can be read can be shown, written, and read again."""
    with _file("judgments.jsonl", data) as path:
        for name in BENCHMARKS:
            with refusals():
                found = read_judgments(name, [str(path)])
                judgments_text(found)
                again = json.loads(json.dumps(found.as_json(), allow_nan=False))
                assert [score.model for score in judgments_from_json(again).scores] == [
                    score.model for score in found.scores
                ]


def questions(data: bytes) -> None:
    """A benchmark's questions; what can be read can be asked, and the answers written."""
    with _file("question.jsonl", data) as path:
        for name, benchmark in BENCHMARKS.items():
            with refusals():
                read = read_questions(name, path)
                encode = functools.partial(encode_prompt, _tokenizer())
                longest_sequence(name, read, BenchmarkConfig(source="-"), encode)
                answers = {each.identity: ["a"] * benchmark.turns for each in read}
                made = write_answers(path.parent, name, "made", read, answers)
                assert count_file(made) == len(read)


def difficulties(data: bytes) -> None:
    """A CSV file of instructions' difficulties."""
    with _file("difficulties.csv", data) as path, refusals():
        read = read_difficulties(path)
        read.of(list(read.by_instruction))


def template(data: bytes) -> None:
    """A chat template."""
    from fuzz.corpus import CHAT_PAIRS

    tokenizer = byte_tokenizer()
    with _file("chat.jinja", data) as path, refusals(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python's compiler, on odd but valid code
        apply_template(tokenizer, str(path))
        assert len(tokenize_pairs(CHAT_PAIRS, tokenizer)) == len(CHAT_PAIRS)


TARGETS: dict[str, Target] = {
    "recipe": recipe,
    "override": override,
    "pairs-jsonl": pairs_jsonl,
    "pairs-json": pairs_json,
    "pairs-csv": pairs_csv,
    "pairs-parquet": pairs_parquet,
    "pairs-gzip": pairs_gzip,
    "records-csv": records_csv,
    "records-parquet": records_parquet,
    "curriculum-table": curriculum_table,
    "curriculum-facts": curriculum_facts,
    "prompts": prompts,
    "template": template,
    "judgments": judgments,
    "questions": questions,
    "difficulties": difficulties,
}


def pairs(name: str, data: bytes, **options: Any) -> dict[str, int] | None:
    """Prepare a file of pairs; the rows by status, or None where it was refused as a whole."""
    with _file(name, data) as path:
        source = SourceConfig(path=str(path))
        config = DataConfig.model_validate({"train": [source], **LIMITS, **options})
        folder = path.parent / "made"
        with refusals():
            summary = prepare_pairs([source], config, _tokenizer(), folder, key="k", workers=0)
            table = load_pairs(folder)
            statuses = table["status"].to_pylist()
            assert summary.rows == len(table) == sum(summary.counts.values())
            assert {status: statuses.count(status) for status in statuses} == {
                status: count for status, count in summary.counts.items() if count
            }
            assert table["row"].to_pylist() == list(range(len(table)))
            ids = load_tokens(folder)["pair_id"][:]
            assert len(set(ids)) == len(ids) == summary.kept == statuses.count("kept")
            return dict(summary.counts)
        assert not folder.exists(), "a refused file left something behind"
    return None


def check_curriculum(made: Curriculum, folder: Path) -> None:
    """Its counts agree, it can be saved and read again, and be exported."""
    assert len(made.order) == made.facts["selected"] == sum(made.table["selected"].to_pylist())
    assert len(set(made.pair_ids)) == len(made.pair_ids)
    made.save(folder / "again")
    assert Curriculum.load(folder / "again").order_digest == made.order_digest
    with refusals():
        export_curriculum(made, folder / "out.csv", "csv")


@functools.cache
def _tokenizer() -> Any:
    return byte_tokenizer()


@contextlib.contextmanager
def _file(name: str, data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path
