"""Rows come out of every kind of source, unreadable ones in their place; idle options are refused."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selective_dpo.config import SourceConfig
from selective_dpo.data.adapters import DropReason, parse_row
from selective_dpo.data.readers import Malformed
from selective_dpo.data.sources import open_source, source_digest, source_label
from selective_dpo.errors import ConfigError, DataError

ROWS = [
    {"prompt": f"question {number}\nof two lines", "chosen": f'a "{number}", b', "rejected": f"é{number}\0"}
    for number in range(5)
]
CHAT_ROWS = [
    {
        "chosen": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a"}],
        "rejected": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "b"}],
    }
    for number in range(3)
]


def write_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    kind = path.name.split(".")[1]
    plain = path.with_name(f"plain.{kind}")
    if kind == "jsonl":
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif kind == "json":
        plain.write_text(json.dumps(rows, indent=1), "utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), plain)
    else:
        with plain.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()}
                for row in rows
            )
    content = plain.read_bytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def rows_of(path: Path | str, **options: Any) -> list[Any]:
    source = open_source(SourceConfig(path=str(path), **options))
    rows = list(source.rows())
    assert source.row_count() == len(rows)
    return rows


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("rows", [ROWS, CHAT_ROWS], ids=["text", "chat"])
def test_every_format_gives_the_same_rows(
    tmp_path: Path, ending: str, packed: str, rows: list[dict[str, Any]]
) -> None:
    path = write_file(tmp_path / f"data.{ending}{packed}", rows)
    assert rows_of(path) == rows


def test_json_lines_in_a_file_called_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("\n".join(json.dumps(row) for row in ROWS), "utf-8")
    assert rows_of(path) == ROWS


def test_bad_lines_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [b'{"a": 1}', b"{broken", b"", b"[1]", b'{"a": "\xff"}', b"[" * 100_000, b'{"a": 2}']
    path.write_bytes(b"\n".join(lines))
    rows = rows_of(path)
    # The blank line is no row; the other six keep their order.
    assert [isinstance(row, Malformed) for row in rows] == [False, True, True, True, True, False]
    assert rows[-1] == {"a": 2}


def test_csv_long_cells_short_rows_and_bad_bytes(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    long = "x" * 200_000  # More than the csv module's default limit of 131,072 characters.
    path.write_bytes(
        b"\xef\xbb\xbfprompt,chosen,rejected\np," + long.encode() + b",b\np,a\np,a,b,c\np,\xff,b\n"
        b'p,[not json,"[1, 2]"\n'
    )
    default_limit = csv.field_size_limit()
    rows = rows_of(path)
    assert csv.field_size_limit() == default_limit
    assert rows[0] == {"prompt": "p", "chosen": long, "rejected": "b"}
    assert rows[1]["rejected"] is None
    assert isinstance(rows[2], Malformed)
    assert parse_row(rows[3]) is DropReason.MALFORMED
    assert rows[4] == {"prompt": "p", "chosen": "[not json", "rejected": "[1, 2]"}


def test_parquet_with_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    broken = pa.array([b"fine", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"chosen": broken, "rejected": ["b", "b"]}), path)
    rows = rows_of(path)
    assert rows[0] == {"chosen": "fine", "rejected": "b"}
    assert isinstance(rows[1], Malformed)


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.parquet", "data.parquet.gz", "data.json"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, name: str) -> None:
    path = write_file(tmp_path / name, ROWS * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"data\."):
        list(open_source(SourceConfig(path=str(path))).rows())


@pytest.mark.parametrize(
    "name", ["/none/data.jsonl", "none.jsonl.gz", "./none", "../none", "~/none", "a/b/c", "none.txt"]
)
def test_a_local_path_that_is_not_there(name: str) -> None:
    with pytest.raises(DataError, match="no file"):
        open_source(SourceConfig(path=name))


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="cannot tell its format"):
        rows_of(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="save_to_disk"):
        open_source(SourceConfig(path=str(tmp_path)))


@pytest.mark.parametrize("option", ["split", "subset", "revision"])
def test_options_without_effect_on_a_file(tmp_path: Path, option: str) -> None:
    path = write_file(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(ConfigError, match=f"{option} would have no effect"):
        open_source(SourceConfig(path=str(path), **{option: "x"}))


def test_saved_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.select([3, 1]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "many")
    assert rows_of(tmp_path / "one") == [ROWS[3], ROWS[1]]
    assert rows_of(tmp_path / "many", split="test") == [ROWS[0]]
    with pytest.raises(ConfigError, match="split would have no effect"):
        open_source(SourceConfig(path=str(tmp_path / "one"), split="train"))
    with pytest.raises(ConfigError, match="needs a split; it has train, test"):
        open_source(SourceConfig(path=str(tmp_path / "many")))
    with pytest.raises(ConfigError, match="has no split 'dev'"):
        open_source(SourceConfig(path=str(tmp_path / "many"), split="dev"))
    with pytest.raises(ConfigError, match="revision would have no effect"):
        open_source(SourceConfig(path=str(tmp_path / "many"), split="test", revision="x"))


def test_a_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked.update(path=path, **options)
        return datasets.Dataset(pa.Table.from_pylist(ROWS), fingerprint="of the commit")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = SourceConfig(path="someone/pairs-v1.0", split="train", revision="abc")
    assert list(open_source(source).rows()) == ROWS
    assert asked == {"path": "someone/pairs-v1.0", "name": None, "split": "train", "revision": "abc"}
    assert source_label(source) == "someone/pairs-v1.0 (split train, revision abc)"
    assert source_digest(source) == source_digest(source)
    with pytest.raises(ConfigError, match="needs a split"):
        open_source(SourceConfig(path="someone/pairs"))


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"does not give someone/pairs \(split train\): no route; check"):
        open_source(SourceConfig(path="someone/pairs", split="train"))


def test_a_digest_follows_the_content_and_not_the_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = write_file(tmp_path / "data.jsonl", ROWS)
    moved = write_file(tmp_path / "other" / "data.jsonl", ROWS)
    assert source_digest(SourceConfig(path=str(first))) == source_digest(SourceConfig(path=str(moved)))
    write_file(tmp_path / "other" / "data.jsonl", ROWS[:-1])
    assert source_digest(SourceConfig(path=str(first))) != source_digest(SourceConfig(path=str(moved)))
    datasets.DatasetDict({"a": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    saved = SourceConfig(path=str(tmp_path / "saved"), split="a")
    assert source_digest(saved) == source_digest(saved)
