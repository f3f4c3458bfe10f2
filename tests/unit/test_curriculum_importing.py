"""The original repository's CSVs: both layouts, repeated ids, and bad files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from selective_dpo.curriculum.import_ import import_records, read_numbers
from selective_dpo.errors import DataError, RecordsError, SelectiveDPOError

ROWS = {"b": 0.5, "a": 0.1, "c": 0.9, "d": 0.7}


def write(path: Path, rows: list[tuple[str, float]]) -> None:
    text = "".join(f"{name},{loss}\n" for name, loss in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def loss_of(name: str, seed: int, step: int) -> float:
    return ROWS[name] + seed / 100 + step / 1000


def rows_for(seed: int, step: int, names: str = "bacd") -> list[tuple[str, float]]:
    return [(name, loss_of(name, seed, step)) for name in names]


def make_whole(folder: Path, suffix: str = ".csv") -> Path:
    for seed in (41, 42):
        for step in (0, 1):
            write(folder / f"seed{seed}_step{step:02d}{suffix}", rows_for(seed, step))
    return folder


def make_halves(folder: Path) -> Path:
    for seed in (41, 42):
        for step in (0, 1):
            name = f"learning_record-seed{seed}-step{step}"
            write(folder / f"{name}-first.csv", rows_for(seed, step, "cd"))
            write(folder / f"{name}-second.csv.gz", rows_for(seed, step, "ba"))
    return folder


@pytest.mark.parametrize("make", [make_whole, lambda folder: make_whole(folder, ".csv.gz"), make_halves])
def test_both_layouts_give_the_same_losses(tmp_path, make) -> None:
    imported = import_records(make(tmp_path), {"fraction": 0.5})
    rows = imported.curriculum.table.to_pylist()
    assert [row["pair_id"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["prompt_id"] for row in rows] == ["a", "b", "c", "d"]
    # The original's step 0 is our evaluation 1.
    assert rows[2]["loss_seed42_evaluation2"] == pytest.approx(loss_of("c", 42, 1))
    assert rows[0]["difficulty"] == pytest.approx(0.1 + 0.415 + 0.0005)
    assert imported.curriculum.order == ["a", "b"]
    assert [(count.seed, count.evaluation, count.rows) for count in imported.folder.evaluations] == [
        (41, 1, 4),
        (41, 2, 4),
        (42, 1, 4),
        (42, 2, 4),
    ]
    assert imported.folder.provenance["repeated_ids"] == 0
    assert "prompt ids, taken for both" in imported.curriculum.facts["provenance"]["ids"]


def test_first_of_repeated_rows_is_used_and_all_are_counted(tmp_path) -> None:
    make_whole(tmp_path)
    again = [("a", loss_of("a", 41, 0)), ("b", 77.0), ("b", loss_of("b", 41, 0))]
    write(tmp_path / "seed41_step00.csv", rows_for(41, 0) + again)
    imported = import_records(tmp_path)
    first = imported.folder.evaluations[0]
    assert (first.rows, len(first.records)) == (7, 4)
    assert sorted(first.repeated_ids) == ["a", "b"]
    assert first.conflicting_ids == ("b",)
    table = imported.curriculum.table
    assert table["loss_seed41_evaluation1"].to_pylist()[1] == pytest.approx(loss_of("b", 41, 0))
    told = imported.describe()
    assert "4 to 7 rows each: 4 distinct ids" in told
    assert "0 to 3 rows in each repeat an id" in told
    assert "2 ids are repeated in some evaluation, 1 of them with different losses" in told


def test_a_repetition_in_the_other_half_counts(tmp_path) -> None:
    make_halves(tmp_path)
    write(tmp_path / "learning_record-seed41-step0-second.csv.gz", [*rows_for(41, 0, "ba"), ("c", 5.0)])
    imported = import_records(tmp_path)
    assert imported.folder.evaluations[0].conflicting_ids == ("c",)
    assert imported.curriculum.table["loss_seed41_evaluation1"].to_pylist()[2] == pytest.approx(
        loss_of("c", 41, 0)
    )


def test_missing_ids_are_named_unless_partial_is_allowed(tmp_path) -> None:
    make_whole(tmp_path)
    write(tmp_path / "seed42_step01.csv", rows_for(42, 1, "bad"))
    with pytest.raises(
        RecordsError, match=r"1 of 4 ids are missing in seed42_step01\.csv: c; .*--allow-partial"
    ):
        import_records(tmp_path)
    imported = import_records(tmp_path, {"allow_partial": True})
    assert imported.curriculum.facts["partial"] == 1
    row = imported.curriculum.table.to_pylist()[2]
    assert row["loss_seed42_evaluation2"] is None
    assert row["count"] == 3
    assert "1 ids lack some" in imported.describe()


def test_missing_files_are_named_unless_partial_is_allowed(tmp_path) -> None:
    (make_whole(tmp_path) / "seed42_step00.csv").unlink()
    with pytest.raises(DataError, match=r"lacks seed 42 step 0; .*--allow-partial"):
        import_records(tmp_path)
    imported = import_records(tmp_path, {"allow_partial": True})
    assert imported.curriculum.facts["partial"] == 4
    assert np.isfinite(imported.curriculum.difficulty_P).all()


def test_a_missing_half_is_named(tmp_path) -> None:
    (make_halves(tmp_path) / "learning_record-seed41-step1-second.csv.gz").unlink()
    with pytest.raises(DataError, match="lacks the second half of seed 41 step 1"):
        import_records(tmp_path)


@pytest.mark.parametrize(
    "other", ["seed41_step0.csv", "seed41_step00.csv.gz", "learning_record-seed41-step0-first.csv"]
)
def test_two_files_for_one_evaluation_are_refused(tmp_path, other) -> None:
    write(make_whole(tmp_path) / other, rows_for(41, 0))
    with pytest.raises(DataError, match="hold the same evaluation"):
        import_records(tmp_path)


def test_other_files_are_reported_not_read(tmp_path) -> None:
    (make_whole(tmp_path) / "learning_order.csv").write_text("prompt_id,learning_order\n")
    imported = import_records(tmp_path)
    assert imported.folder.ignored == ("learning_order.csv",)
    assert "not read: learning_order.csv" in imported.describe()


def test_no_files_at_all(tmp_path) -> None:
    with pytest.raises(DataError, match=r"holds no seed41_step00\.csv"):
        import_records(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        import_records(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,0.1\nb,0.2,0.3\n", "line 2: 3 column"),
        (b"a,0.1\nb\n", "line 2: 1 column"),
        (b"prompt_id,loss\na,0.1\n", "line 1: .*no header.* 'loss'"),
        (b"a,0.1\nb,nan\n", "line 2: .* 'nan'"),
        (b"a,0.1\nb,inf\n", "line 2: .* 'inf'"),
        (b"a,0.1\n\nb,\n", "line 3: .* ''"),
        (b"a,0.1\n,0.2\n", "line 2: need an id"),
        (b"a,0.1\nb,1_0\n", "line 2: .* '1_0'"),
        (b"", "cannot be read as CSV"),
        (b"\n", "has no rows"),
        (b"\xff\xfe,0.1\n", "line 1 is not UTF-8 text"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, content, words) -> None:
    path = tmp_path / "seed41_step00.csv"
    path.write_bytes(content)
    with pytest.raises(SelectiveDPOError, match=words) as caught:
        import_records(tmp_path)
    assert "seed41_step00.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_gzip_is_named(tmp_path) -> None:
    path = tmp_path / "seed41_step00.csv.gz"
    path.write_bytes(gzip.compress(b"a,0.1\n" * 1000)[:-20])
    with pytest.raises(DataError, match="cannot be read as CSV"):
        import_records(tmp_path)


def test_blank_lines_and_spaces_do_no_harm(tmp_path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"a, 0.1\r\n\r\nb,2e-1 \r\n\r\n")
    losses = read_numbers(path)
    assert losses.ids.to_pylist() == ["a", "b"]
    assert losses.values_N.tolist() == [0.1, 0.2]
