"""Values too large to handle are dropped or refused, by row or by line, before they fill the memory."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz.corpus import TEXT_ROWS, csv_bytes, json_lines, parquet_bytes

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.curriculum import import_ as number_files
from selective_dpo.curriculum.import_ import import_records
from selective_dpo.data import adapters, prepare, readers
from selective_dpo.data.adapters import KEPT, DropReason, Pair, parse_row
from selective_dpo.data.prepare import ChunkTokenizer
from selective_dpo.data.readers import read_file
from selective_dpo.data.sources import read_prompts
from selective_dpo.data.store import PAIRS, TOKENS, RowOutcome, load_pairs
from selective_dpo.errors import DataError
from tests.fixtures.bad_input import bounded
from tests.fixtures.tokenizers import byte_tokenizer

LONG = {"prompt": "q", "chosen": "x" * 2_000, "rejected": "no"}


def made(folder: Path, rows: list[Any], name: str = "pairs") -> dict[str, int]:
    path = folder / "data.jsonl"
    path.write_bytes(json_lines(rows))
    source = SourceConfig(path=str(path))
    config = DataConfig.model_validate({"train": [source], "max_length": 96, "max_prompt_length": 48})
    return prepare.prepare_pairs([source], config, byte_tokenizer(), folder / name, key="k").counts


# --- texts -----------------------------------------------------------------------------------------------


@pytest.mark.fault(row=14)
def test_a_pair_of_megabytes_is_dropped_before_it_is_tokenized(tmp_path: Path) -> None:
    """8,000,000 characters are looked at, one more is not; and its texts are not carried along."""
    most = {"prompt": "q", "chosen": "x" * (8_000_000 - 3), "rejected": "no"}
    more = {**most, "chosen": most["chosen"] + "x"}
    assert parse_row(more) is DropReason.TOO_LARGE
    assert not isinstance(parse_row(most), DropReason)
    begun = time.process_time()
    counts = made(tmp_path, [*TEXT_ROWS, more, more])
    assert time.process_time() - begun < 5.0  # tokenized, it takes a minute
    assert counts == {"kept": 4, "too large": 2}
    row = load_pairs(tmp_path / "pairs").to_pylist()[4]
    assert (row["row"], row["status"], row["pair_id"], row["chosen"]) == (4, "too large", None, None)


def test_messages_count_as_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MAX_CHARACTERS", 9)
    row = {
        "prompt": [{"role": "system", "content": "ab"}, {"role": "user", "content": "cd"}],
        "chosen": [{"role": "assistant", "content": "efg"}],
        "rejected": [{"role": "assistant", "content": "hi"}],
    }
    assert not isinstance(parse_row(row), DropReason)  # 2 + 2 + 3 + 2
    row["rejected"] = [{"role": "assistant", "content": "hij"}]
    assert parse_row(row) is DropReason.TOO_LARGE


def test_long_texts_are_tokenized_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"q{number}", "chosen": "yes" * 5, "rejected": "no"} for number in range(50)]
    made(tmp_path, rows, "at once")
    monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 100)  # a pair has 19 or 20
    made(tmp_path, rows, "in parts")
    for name in (PAIRS, TOKENS):
        assert pq.read_table(tmp_path / "in parts" / name) == pq.read_table(tmp_path / "at once" / name)
    # 10 pairs of 19 characters, then 40 of 20; a part ends with the pair that makes 100 of them: at 6 * 19,
    # at 4 * 19 + 2 * 20, then at each 5 * 20, and 3 pairs are left: 6 + 6 + 7 * 5 + 3 = 50.
    assert pq.ParquetFile(tmp_path / "in parts" / PAIRS).num_row_groups == 10
    assert pq.ParquetFile(tmp_path / "at once" / PAIRS).num_row_groups == 1


# --- files -----------------------------------------------------------------------------------------------


def file_of(folder: Path, suffix: str) -> Path:
    """Four short rows, then a long one."""
    rows = [*({name: row[name] for name in LONG} for row in TEXT_ROWS), LONG]
    content = {
        ".jsonl": lambda: json_lines(rows),
        ".json": lambda: json.dumps(rows).encode(),
        ".csv": lambda: csv_bytes(rows),
        ".parquet": lambda: parquet_bytes(pa.Table.from_pylist(rows)),
    }[suffix.removesuffix(".gz")]()
    path = folder / f"data{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    return path


@pytest.mark.fault(row=14)
@pytest.mark.parametrize(
    ("suffix", "limit", "words"),
    [
        (".jsonl", "MAX_LINE", "line 5 has more than 1,000 bytes"),
        (".jsonl.gz", "MAX_LINE", "line 5 has more than 1,000 bytes"),
        (".csv", "MAX_LINE", "line 6 has more than 1,000 characters"),  # the first is the header
        (".csv.gz", "MAX_LINE", "line 6 has more than 1,000 characters"),
        (".json", "MAX_WHOLE_FILE", "more than 1,000 bytes, which would have to be read at once"),
        (".parquet.gz", "MAX_WHOLE_FILE", "more than 1,000 bytes, which would have to be read at once"),
    ],
)
def test_what_is_too_large_to_read_is_refused(
    tmp_path: Path, suffix: str, limit: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lower limits than there are: the file and the line are named."""
    path = file_of(tmp_path, suffix)
    rows = list(read_file(path))
    assert [row["rejected"] for row in rows if isinstance(row, dict)] == [" no"] * 4 + ["no"]
    monkeypatch.setattr(readers, limit, 1_000)
    with pytest.raises(DataError, match=f"data{suffix} cannot be read .{words}"):
        list(read_file(path))


def test_a_cell_of_many_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 1_000)
    path = tmp_path / "data.csv"
    path.write_bytes(csv_bytes([{"chosen": "x\n" * 1_000, "rejected": "no"}]))
    default = csv.field_size_limit()
    with pytest.raises(DataError, match="field larger than field limit"):
        list(read_file(path))
    assert csv.field_size_limit() == default


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    for name, unit in (("bomb.jsonl.gz", "MiB"), ("bomb.csv.gz", "characters")):
        path = tmp_path / name
        with gzip.open(path, "wb", compresslevel=1) as stream:
            for _ in range(80):
                stream.write(b" " * (1 << 20))
        assert path.stat().st_size < 1 << 20
        with bounded(), pytest.raises(DataError, match=rf"line 1 has more than [0-9,]+ {unit}"):
            list(read_file(path))


def test_large_rows_of_parquet_are_unpacked_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"chosen": f"{number:04}" * 250, "rejected": "no"} for number in range(40)]  # 1,000 bytes a row
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=15, compression="none")
    sizes: list[int] = []
    unpack = readers.rows_of_batch
    monkeypatch.setattr(
        readers, "rows_of_batch", lambda batch: sizes.append(batch.num_rows) or list(unpack(batch))
    )
    assert list(read_file(path)) == rows
    assert sizes == [15, 15, 10]
    sizes.clear()
    monkeypatch.setattr(readers, "BATCH_BYTES", 5_000)
    assert list(read_file(path)) == rows
    assert len(sizes) >= 9 and max(sizes) <= 5 and sum(sizes) == 40
    sizes.clear()
    monkeypatch.setattr(readers, "BATCH_BYTES", 1)
    assert list(read_file(path)) == rows
    assert sizes == [1] * 40


@pytest.mark.fault(row=14)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_records_that_unpack_without_end(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"a,0.5\n" * 1_000
    path = tmp_path / f"seed41_step00.csv{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    monkeypatch.setattr(number_files, "MAX_BYTES", 5_999)
    with pytest.raises(DataError, match=r"seed41_step00\.csv.* has more than 0 MiB; is it a file of records"):
        import_records(tmp_path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b'{"prompt": [{"role": "user"}]}', "needs a prompt, as text or as messages of role and content"),
        (b'{"prompt": [{"x": 1}]}', "needs a prompt"),
        (b'{"prompt": []}', "needs a prompt"),
        (b'{"prompt": ""}', "needs a prompt"),
        (b"[1]", "needs a prompt"),
        (b'{"prompt": "\\ud800"}', "holds half of a character"),
        (b'{"prompt": [{"role": "user", "content": "\\ud800"}]}', "holds half of a character"),
        (b'{"prompt": "' + b"x" * 8_000_001 + b'"}', "has more than 8,000,000 characters"),
    ],
)
def test_prompts_that_nobody_can_answer(tmp_path: Path, row: bytes, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "q"}\n{"prompt": [{"role": "user", "content": "q", "name": "x"}]}\n')
    assert read_prompts(path) == ["q", [{"role": "user", "content": "q"}]]
    path.write_bytes(b'{"prompt": "q"}\n' + row + b"\n")
    with pytest.raises(DataError, match=rf"^{path}, row 1: .*{words}"):
        read_prompts(path)


# --- memory ----------------------------------------------------------------------------------------------


@pytest.mark.fault(row=14)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are Linux's")
def test_a_row_that_memory_does_not_hold_is_one_line(tmp_path: Path) -> None:
    """A line of 48 MiB, where 64 MiB are left: line and text need twice as much."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "q", "chosen": "' + b"x" * (48 << 20) + b'", "rejected": "no"}\n')
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from selective_dpo.data.readers import read_file\n"
        "from selective_dpo.errors import DataError\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))\n"
        "try:\n"
        "    list(read_file(Path(sys.argv[1])))\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, timeout=60)
    assert done.stdout.decode().startswith(f"{path} cannot be read (memory ran out)"), done.stderr


def test_memory_that_runs_out_while_tokenizing_names_the_rows() -> None:
    class Full:
        chat_template = ""
        eos_token = "x"

        def __call__(self, *args: object, **options: object) -> object:
            raise MemoryError

    pairs = [pair for pair in map(parse_row, TEXT_ROWS) if isinstance(pair, Pair)]
    rows = [RowOutcome(7 + number, "data", KEPT, pair) for number, pair in enumerate(pairs)]
    tokenizer = ChunkTokenizer(Full(), DataConfig.model_construct())  # type: ignore[arg-type]
    with pytest.raises(
        DataError, match="memory ran out on row 7 of data to row 10 of data; leave the longest texts out"
    ):
        tokenizer.tokenize(rows)
