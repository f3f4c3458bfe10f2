"""A source's own column names and its own adapter: the pairs they make, what is refused, and the key."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data.adapters import ADAPTERS, DropReason, Pair, adapter, parse_row, read_pair
from selective_dpo.data.prepare import pairs_key, prepare_pairs
from selective_dpo.data.sources import open_source
from selective_dpo.data.store import PairsSummary, load_pairs
from selective_dpo.errors import ConfigError, DataError
from selective_dpo.identity import pair_id, prompt_id
from tests.fixtures.tokenizers import byte_tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder as the user's, whose modules and adapters are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = dict(ADAPTERS)
    yield
    sys.modules.pop("my_data", None)
    ADAPTERS.clear()
    ADAPTERS.update(known)


def source_of(rows: list[Any], name: str = "data.jsonl", **options: Any) -> SourceConfig:
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return SourceConfig(path=name, **options)


def prepare(*sources: SourceConfig) -> PairsSummary:
    config = DataConfig(train=sources)
    return prepare_pairs(sources, config, byte_tokenizer(), Path("pairs"), key="k")


def texts() -> list[tuple[str, str, str]]:
    rows = load_pairs(Path("pairs")).to_pylist()
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


# --- columns ---------------------------------------------------------------------------------------------

QUESTIONS = [{"question": f"q{n}", "good": " a", "bad": " b", "chosen": "?", "id": n} for n in range(3)]
NAMES = {"prompt": "question", "chosen": "good", "rejected": "bad"}


def test_columns_are_renamed() -> None:
    summary = prepare(source_of(QUESTIONS, columns=NAMES))
    assert summary.counts == {"kept": 3}
    assert texts() == [(f'"q{n}"', '" a"', '" b"') for n in range(3)]


def test_columns_may_change_places() -> None:
    rows = [{"prompt": f"q{n}", "chosen": " a", "rejected": " b"} for n in range(2)]
    prepare(source_of(rows, columns={"chosen": "rejected", "rejected": "chosen"}))
    assert texts() == [(f'"q{n}"', '" b"', '" a"') for n in range(2)]


def test_messages_in_csv_may_stand_in_any_column() -> None:
    cell = json.dumps([{"role": "user", "content": "q"}]).replace('"', '""')
    Path("data.csv").write_text(f'asked,good,bad\n"{cell}",a,b\n')
    (row,) = open_source(SourceConfig(path="data.csv", columns={"prompt": "asked"})).rows()
    assert isinstance(row, dict)
    assert row["prompt"] == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (
            {**NAMES, "prompt": "qestion"},
            DataError,
            "no row has the column 'qestion'.* found are question",
        ),
        (
            {**NAMES, "promt": "question"},
            ConfigError,
            "columns.promt would have no effect; names to give are prompt",
        ),
        ({"prompt": "question", "chosen": "good"}, DataError, "no row has the columns of a pair"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    columns: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(source_of(QUESTIONS, columns=columns))
    assert not Path("pairs").exists()


def test_a_row_that_lacks_a_renamed_column_is_dropped() -> None:
    summary = prepare(source_of([*QUESTIONS, {"question": "q", "bad": " b"}], columns=NAMES))
    assert summary.counts == {"kept": 3, "malformed": 1}


# --- adapters --------------------------------------------------------------------------------------------


def ranked_row(question: str, *scores: int) -> dict[str, Any]:
    return {"question": question, "answers": [{"text": f" {score}", "score": score} for score in scores]}


def test_the_example_of_the_documentation() -> None:
    """By dotted name, beside a source of the usual shape; counts and reasons are by source."""
    section = DOCS.read_text().split("\n## A data adapter\n")[1].split("\n## ")[0]
    code, recipe, _ = re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)
    assert "adapter: my_data:ranked " in recipe
    Path("my_data.py").write_text(code)
    rows = [
        ranked_row("q0", 3, 9, 1),
        ranked_row("q1", 5, 6),
        ranked_row("q2", 2, 7),
        ranked_row("q0", 1, 3, 9),
    ]
    usual = [{"prompt": "q3", "chosen": " a", "rejected": " b"}]
    summary = prepare(source_of(rows, adapter="my_data:ranked"), source_of(usual, "usual.jsonl"))
    assert summary.sources == {
        "data.jsonl": {"kept": 2, "duplicate pair": 1, "left out by the adapter": 1},
        "usual.jsonl": {"kept": 1},
    }
    assert summary.first_rows["left out by the adapter"] == "row 1 of data.jsonl"
    assert texts()[0] == ('"q0"', '" 9"', '" 1"')
    assert load_pairs(Path("pairs"))["pair_id"][0].as_py() == pair_id("q0", " 9", " 1")
    assert prepare(source_of(rows, adapter="ranked")).kept == 2  # by its own name, once it is imported


def test_columns_are_renamed_before_the_adapter() -> None:
    @adapter("swapped")
    def swapped(row: Any) -> Pair | DropReason:
        return read_pair({"prompt": row["prompt"], "chosen": row["good"], "rejected": row["bad"]})

    source = open_source(source_of(QUESTIONS, columns={"prompt": "question"}, adapter="swapped"))
    (pair, *_) = (parse_row(row, source.adapter) for row in source.rows() if isinstance(row, dict))
    assert isinstance(pair, Pair)
    assert pair[:3] == ("q0", " a", " b")


def test_ids_and_types_are_made_sure_of() -> None:
    """Whatever ids an adapter gives, and whether its parts are of one kind."""

    @adapter("careless")
    def careless(row: Any) -> Pair | DropReason:
        return Pair("p", row["chosen"], " b", row["prompt_id"], "no id")

    source = open_source(source_of([{}], adapter="careless"))
    pair = source.adapter({"chosen": " a", "prompt_id": "own"})
    assert pair == Pair("p", " a", " b", "own", pair_id("p", " a", " b"))
    assert source.adapter({"chosen": [], "prompt_id": ""}) is DropReason.MALFORMED
    made = source.adapter({"chosen": " a", "prompt_id": ""})
    assert isinstance(made, Pair)
    assert made.prompt_id == prompt_id("p")


def test_prompts_of_an_adapter_are_joined_and_its_pairs_checked() -> None:
    @adapter("numbered")
    def numbered(row: Any) -> Pair | DropReason:
        return read_pair(
            {
                "prompt": "same" if row["n"] < 2 else "other",
                "chosen": f" {row['n']}",
                "rejected": " 3",
                "prompt_id": f"own {row['n']}",
            }
        )

    summary = prepare(source_of([{"n": n} for n in range(4)], adapter="numbered"))
    assert summary.counts == {"kept": 3, "identical": 1}
    assert (summary.prompts, summary.joined_prompts) == (2, 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return row['missing']",
            r"^row 0 of data\.jsonl: adapter my_data:make: KeyError: 'missing'; ",
        ),
        (
            "return None",
            r"^row 0 of data\.jsonl: adapter my_data:make: TypeError: NoneType is neither Pair nor",
        ),
    ],
)
def test_an_adapter_that_fails_is_one_line(body: str, message: str) -> None:
    Path("my_data.py").write_text(f"def make(row):\n    {body}\n")
    with pytest.raises(DataError, match=message):
        prepare(source_of([{"a": 1}], adapter="my_data:make"))
    assert not Path("pairs").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "no adapter is called 'nobody'"),
        ("my_data:nothing", "my_data:nothing cannot be imported"),
        ("my_data:NUMBER", "adapter 'my_data:NUMBER' is no function of a row"),
    ],
)
def test_an_adapter_that_is_not_there_is_refused(name: str, message: str) -> None:
    Path("my_data.py").write_text("NUMBER = 3\n")
    with pytest.raises(ConfigError, match=message):
        open_source(source_of([{}], adapter=name))


def test_the_key_follows_columns_and_the_adapters_code() -> None:
    def key(**options: Any) -> str:
        source = source_of(QUESTIONS, **options)
        return pairs_key([source], DataConfig(train=(source,)), byte_tokenizer())

    keys = [key(), key(columns=NAMES), key(columns={"prompt": "question"})]
    for body in ("return read_pair(row)", "return read_pair(dict(row))"):
        Path("my_data.py").write_text(
            f"from selective_dpo.data.adapters import read_pair\ndef f(row):\n    {body}\n"
        )
        keys += [key(adapter="my_data:f"), key(adapter="my_data:f", columns=NAMES)]
    assert len(set(keys)) == len(keys) == 7
    assert key() == keys[0]
