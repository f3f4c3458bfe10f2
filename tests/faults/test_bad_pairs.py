"""Whatever stands in a file of pairs: each row is kept or dropped with a reason, and the counts add up."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fuzz.corpus import (
    CHAT_ROWS,
    ODD_TEXTS,
    ODD_VALUES,
    TEXT_ROWS,
    csv_bytes,
    json_lines,
    parquet_bytes,
    seeds_of,
)
from fuzz.run import fuzz, mutated
from fuzz.targets import LIMITS, TARGETS, pairs, prompts
from hypothesis import example, given
from hypothesis import strategies as st

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data.adapters import DropReason, Pair, parse_row
from selective_dpo.data.prepare import RowChecker, RowCounts, prepare_pairs
from selective_dpo.data.readers import Malformed, count_file, read_file, rows_of_batch
from selective_dpo.data.sources import open_source
from selective_dpo.data.store import load_pairs, load_summary
from selective_dpo.data.templates import apply_template, mentions_system
from selective_dpo.data.tokenize import tokenize_pairs
from selective_dpo.errors import ConfigError, DataError, TemplateError
from selective_dpo.identity import MAX_ID_BYTES
from tests.fixtures.bad_input import CASES, FUZZED, bounded, command, generated
from tests.fixtures.models import recipe_file, tiny_recipe
from tests.fixtures.tokenizers import byte_tokenizer

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet.gz")
MANY = 100_000

texts = st.text(max_size=30) | st.sampled_from(ODD_TEXTS)
odd = st.sampled_from(ODD_VALUES)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "x", "\ud800"]) | odd},
        optional={"content": texts | odd, "tool_calls": odd},
    )
    | odd,
    max_size=4,
)
values = texts | messages | odd
rows = (
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("prompt", "chosen", "rejected"), values),
            **dict.fromkeys(("prompt_id", "score_chosen", "rejected_rating", "tools", "images"), odd),
        },
    )
    | st.sampled_from([*TEXT_ROWS, *CHAT_ROWS])
    | odd
)


good_rows = st.sampled_from([[], TEXT_ROWS, CHAT_ROWS])
"""What stands before the odd rows, and is kept whatever they are."""


# --- rows ----------------------------------------------------------------------------------------------


@pytest.mark.fault(row=14, trials=CASES["raw row"])
@generated("raw row")
@given(rows)
@example({"prompt": [], "chosen": [], "rejected": []})
@example({"chosen": [{"role": "user", "content": "a"}], "rejected": []})
@example({"prompt": "a", "chosen": "b", "rejected": "c", "prompt_id": "x" * 10**6})
@example({"prompt": "a", "chosen": "b", "rejected": "c", "prompt_id": "x\0"})
def test_any_row_is_a_pair_or_has_a_reason(raw: Any) -> None:
    if not isinstance(raw, dict):
        return
    with bounded():
        read = parse_row(raw)
    assert isinstance(read, Pair | DropReason)
    if isinstance(read, Pair):
        assert len(read.pair_id) == 32
        assert 0 < len(read.prompt_id.encode("utf-8")) <= MAX_ID_BYTES and "\0" not in read.prompt_id
        assert read.chosen != read.rejected


@pytest.mark.fault(row=14, trials=CASES["pair rows"])
@generated("pair rows")
@given(
    good_rows,
    st.lists(rows, max_size=8),
    st.sampled_from([".jsonl", ".json", ".jsonl.gz"]),
    st.sampled_from(
        [{}, {"overlong": "truncate"}, {"max_pairs": 3}, {"max_length": 8, "max_prompt_length": 4}]
    ),
)
@example(TEXT_ROWS, TEXT_ROWS, ".jsonl", {})
@example([], [{}], ".jsonl", {})
def test_json_of_any_rows(good: list[Any], odd: list[Any], suffix: str, options: dict[str, Any]) -> None:
    content = json_lines(good + odd) if ".jsonl" in suffix else json.dumps(good + odd).encode("ascii")
    content = gzip.compress(content) if suffix.endswith(".gz") else content
    with bounded():
        counts = pairs(f"pairs{suffix}", content, **options)
    if good and not options:
        assert counts is not None and counts["kept"] >= len(good) == 4


@pytest.mark.fault(row=14, trials=CASES["pair cells"])
@generated("pair cells")
@given(st.lists(st.lists(texts, min_size=3, max_size=5), max_size=6), st.sampled_from(["\n", "\r\n", "\r"]))
def test_csv_of_any_cells(drawn: list[list[str]], end: str) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator=end)
    good = [[row[name] for name in ("prompt", "chosen", "rejected")] for row in TEXT_ROWS]
    writer.writerows([["prompt", "chosen", "rejected"], *good, *drawn])
    with bounded():
        counts = pairs("pairs.csv", stream.getvalue().encode("utf-8", "surrogatepass"))
    assert counts is not None and counts["kept"] >= 4


columns = st.sampled_from(
    [
        (["a", "b", None], pa.string()),
        ([1, 2, None], pa.int64()),
        ([b"\xff", b"x", b""], pa.binary()),
        ([[1], [], None], pa.list_(pa.int64())),
        ([2**62, -(2**62), 0], pa.timestamp("us")),
        ([2**62, 1, 0], pa.timestamp("ns")),
        ([2**31 - 1, -(2**31), 0], pa.date32()),
        ([1, 2, 3], pa.duration("ns")),
        (
            [{"role": "user", "content": "x"}, None, {}],
            pa.struct({"role": pa.string(), "content": pa.string()}),
        ),
        ([[("role", "user")], [], None], pa.map_(pa.string(), pa.string())),
        ([float("nan"), 1.0, None], pa.float64()),
        (["a", "b", "c"], pa.large_string()),
        (["a", "b", "c"], pa.dictionary(pa.int32(), pa.string())),
        (
            [[{"role": "user", "content": "x"}]] * 3,
            pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        ),
    ]
)


@pytest.mark.fault(row=14, trials=CASES["pair columns"])
@generated("pair columns")
@given(st.lists(st.tuples(st.sampled_from(["prompt", "chosen", "rejected", "x", ""]), columns), max_size=5))
@example([("chosen", ([2**62, 1, 0], pa.timestamp("us"))), ("rejected", (["a", "b", "c"], pa.string()))])
def test_parquet_of_any_columns(drawn: list[tuple[str, tuple[list[Any], pa.DataType]]]) -> None:
    arrays = [pa.array(items, kind) for _, (items, kind) in drawn]
    content = parquet_bytes(pa.table(arrays, names=[name for name, _ in drawn]))
    with bounded():
        pairs("pairs.parquet", content)


@pytest.mark.fault(row=14, trials=CASES["pair bytes"])
@generated("pair bytes")
@given(
    st.sampled_from(SUFFIXES),
    st.binary(max_size=100) | st.none(),
    st.randoms(use_true_random=False),
    st.booleans(),
)
@example(".jsonl.gz", gzip.compress(b"\0" * (70 << 20)), None, False)
@example(".jsonl", b"[" * 100_000, None, False)
@example(".json", b"[" * 100_000, None, False)
@example(".csv", b'chosen,rejected\n"' + b"x," * 100_000, None, False)
@example(".jsonl", b"\xef\xbb\xbf" + json_lines(TEXT_ROWS), None, False)
@example(".jsonl", json_lines(TEXT_ROWS).decode().encode("utf-16"), None, False)
@example(".jsonl", b'{"chosen": ' + b"1" * 10_000 + b"}\n", None, False)
def test_bytes_of_any_kind(suffix: str, content: bytes | None, generator: Any, truncate: bool) -> None:
    if content is None:
        content = mutated(valid(suffix), generator)
        content = content[: generator.randrange(len(content) + 1)] if truncate else content
    with bounded():
        pairs(f"pairs{suffix}", content)


@pytest.mark.fault(row=14, trials=CASES["prompt rows"])
@generated("prompt rows")
@given(st.lists(st.fixed_dictionaries({"prompt": values}) | rows, max_size=4))
@example([{"prompt": [{"role": "user"}]}])  # was a traceback
@example([{"prompt": []}])
@example([{"prompt": "\ud800"}])
def test_prompts_of_any_kind(drawn: list[Any]) -> None:
    with bounded():
        prompts(json_lines(drawn))


def valid(suffix: str) -> bytes:
    kind = suffix.removeprefix(".").removesuffix(".gz")
    content = seeds_of(f"pairs-{kind}")[0]
    return gzip.compress(content) if suffix.endswith(".gz") else content


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    recipe_file(tiny_recipe(folder), folder / "recipe.yaml")
    return folder


@pytest.mark.fault(row=14, trials=CASES["pairs command line"])
def test_the_command_line_says_one_line(workplace: Path) -> None:
    @generated("pairs command line")
    @given(good_rows, st.lists(rows, max_size=6), st.none() | st.randoms(use_true_random=False))
    @example([], [], None)
    @example([], [{"x": "\x1b[31m\ud800"}], None)
    @example(TEXT_ROWS, [], None)
    def check(good: list[Any], odd: list[Any], generator: Any) -> None:
        content = json_lines(good + odd)
        (workplace / "pairs.jsonl").write_bytes(
            mutated(content, generator) if generator and content else content
        )
        command(["plan", str(workplace / "recipe.yaml")], inside=workplace)

    check()


# --- fuzz targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_each_fuzz_target(name: str, tmp_path: Path) -> None:
    inputs = FUZZED.get(name, FUZZED["default"])
    outcome = fuzz(TARGETS[name], seeds_of(name), seed=1, crashes=tmp_path, inputs=inputs)
    told = [path.read_text("utf-8") for path in tmp_path.glob("*.txt")]
    assert (outcome.inputs, outcome.crashes) == (inputs, 0), told[:1]


def test_a_crash_is_saved_with_its_traceback(tmp_path: Path) -> None:
    def target(data: bytes) -> None:
        if data != b"seed":
            raise KeyError(len(data))

    outcome = fuzz(target, [b"seed"], seed=0, crashes=tmp_path / "crashes", inputs=3)
    assert (outcome.inputs, outcome.crashes) == (3, 2)
    assert len(list((tmp_path / "crashes").glob("*.bin"))) == 2
    assert "KeyError" in next((tmp_path / "crashes").glob("*.txt")).read_text()


# --- row 14 of the fault matrix ------------------------------------------------------------------------


def prepared(folder: Path, drawn: list[Any], **options: Any) -> dict[str, int]:
    path = folder / "data.jsonl"
    path.write_bytes(json_lines(drawn))
    source = SourceConfig(path=str(path))
    config = DataConfig.model_validate({"train": [source], **LIMITS, **options})
    return prepare_pairs([source], config, byte_tokenizer(), folder / "pairs", key="k").counts


@pytest.mark.fault(row=14, trials=14)
def test_each_kind_of_odd_row_has_its_status(tmp_path: Path) -> None:
    long = "x" * 10**6
    drawn: list[tuple[Any, str]] = [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "kept"),
        ({"prompt": "a", "chosen": "b", "rejected": "d"}, "kept"),  # the same prompt, another pair
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "duplicate pair"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "identical"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "empty prompt"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "empty completion"),
        ({"prompt": long, "chosen": "b", "rejected": "c"}, "prompt too long"),
        ({"prompt": "a", "chosen": long, "rejected": "c"}, "too long"),
        ({"prompt": "a\ud800", "chosen": "b", "rejected": "c"}, "malformed"),
        ({"prompt": "a\0", "chosen": "b\0", "rejected": "c"}, "kept"),
        ({"prompt": "שלום \u202e", "chosen": "مرحبا", "rejected": "ب"}, "kept"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "malformed"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "malformed"),
        ("a text", "malformed"),
    ]
    counts = prepared(tmp_path, [row for row, _ in drawn])
    assert load_pairs(tmp_path / "pairs")["status"].to_pylist() == [status for _, status in drawn]
    assert sum(counts.values()) == len(drawn)
    summary = load_summary(tmp_path / "pairs")
    assert summary.first_rows["malformed"] == f"row 8 of {tmp_path / 'data.jsonl'}"
    assert f"first: row 8 of {tmp_path / 'data.jsonl'} (from 0)" in summary.describe()


@pytest.mark.slow
@pytest.mark.fault(row=14)
def test_one_bad_row_among_many_is_named(tmp_path: Path) -> None:
    bad = 77_777
    path = tmp_path / "many.jsonl"
    with path.open("w") as stream:
        good = '{"prompt": "q%d", "chosen": "a", "rejected": "b"}\n'
        stream.writelines(good % number for number in range(bad))
        stream.write('{"prompt": "bad", "chosen": "a", "rejected": 1}\n')
        stream.writelines(good % number for number in range(bad + 1, MANY))
    begun = time.process_time()  # not the wall's: other tests may share the core
    with bounded(240.0):
        assert count_file(path) == MANY
        source, checker, counts = open_source(SourceConfig(path=str(path))), RowChecker(()), RowCounts()
        for number, raw in enumerate(source.rows()):
            counts.count(checker.check(number, source, raw))
        summary = counts.summary(byte_tokenizer(), joined_prompts=checker.joined_prompts)
    assert time.process_time() - begun < 10.0  # 1.4 s where nothing else runs
    assert summary.counts == {"kept": MANY - 1, "malformed": 1}
    assert summary.first_rows == {"malformed": f"row 77,777 of {path}"}


# --- bugs that were found this way ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (b"\xff", "is not UTF-8 text"),
        (b"{% for x in y %}" * 30 + b"{% endfor %}" * 30, "cannot be compiled"),
        (b"{{ " + b"(" * 5_000 + b"1" + b")" * 5_000 + b" }}", "cannot be compiled"),
    ],
)
def test_a_template_that_python_cannot_compile(tmp_path: Path, template: bytes, words: str) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(template)
    with pytest.raises((TemplateError, ConfigError), match=words):
        apply_template(byte_tokenizer(), str(path))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        '{{ "\\ud800" }}',
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_template_that_fails_on_every_row_drops_every_row(tmp_path: Path, template: str) -> None:
    tokenizer = byte_tokenizer()
    (tmp_path / "chat.jinja").write_text(template)
    apply_template(tokenizer, str(tmp_path / "chat.jinja"))
    pair = parse_row(CHAT_ROWS[0])
    assert isinstance(pair, Pair)
    assert tokenize_pairs([pair], tokenizer) == [DropReason.TEMPLATE_REFUSES]
    assert not mentions_system(tokenizer)


def test_arrow_values_that_python_has_not_are_malformed_rows() -> None:
    # Year 292277026 of a timestamp, and a field that stands twice: each raised its own kind of error.
    far = pa.record_batch({"chosen": pa.array([0, 2**62], pa.timestamp("s")), "rejected": ["a", "b"]})
    first, second = rows_of_batch(far)
    assert isinstance(first, dict) and isinstance(second, Malformed)
    twice = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["role", "role"])
    (row,) = rows_of_batch(pa.record_batch([twice], names=["chosen"]))
    assert isinstance(row, Malformed)


def test_an_id_that_no_table_can_hold_is_made_from_the_prompt(tmp_path: Path) -> None:
    # NumPy's texts end before NULs, so two ids would be one prompt; and all are as wide as the longest.
    drawn = [
        {**row, "prompt_id": own} for row, own in zip(TEXT_ROWS, ["x", "x\0", "x" * 2_000, "y"], strict=True)
    ]
    counts = prepared(tmp_path, drawn)
    ids = load_pairs(tmp_path / "pairs")["prompt_id"].to_pylist()
    assert counts["kept"] == 4
    assert (ids[0], ids[3]) == ("x", "y")
    assert len(ids[1]) == len(ids[2]) == 32


def test_a_file_that_changes_between_counting_and_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for counted in (3, 5):
        monkeypatch.setattr("selective_dpo.data.sources.count_file", lambda _, rows=counted: rows)
        with pytest.raises(DataError, match=rf"does not give the {counted} rows that were counted"):
            prepared(tmp_path, TEXT_ROWS, max_pairs=2)


def test_csv_limits_are_put_back(tmp_path: Path) -> None:
    def limits() -> Iterator[int]:
        yield csv.field_size_limit()
        (tmp_path / "a.csv").write_bytes(csv_bytes(TEXT_ROWS))
        list(read_file(tmp_path / "a.csv"))
        yield csv.field_size_limit()

    before, after = limits()
    assert before == after < sys.maxsize
