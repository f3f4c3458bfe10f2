"""Whatever stands in records, the original repository's or our own: what is wrong is counted and named."""

from __future__ import annotations

import gzip
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fuzz.corpus import ODD_TEXTS, parquet_bytes, records_bytes, records_rows, seeds_of
from fuzz.run import mutated
from fuzz.targets import check_curriculum, records_csv, records_parquet, refusals
from hypothesis import example, given
from hypothesis import strategies as st

from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.import_ import import_records
from selective_dpo.curriculum.records import MAX_LOSS, SCHEMA, LossTable, read_loss_table, read_records
from selective_dpo.errors import ArtifactError, DataError, IdentityError, RecordsError, SelectiveDPOError
from tests.fixtures.bad_input import CASES, bounded, command, generated
from tests.fixtures.bad_rows import Damage, damages

ids = st.sampled_from(["a", "b", "c", "d"]) | st.sampled_from(ODD_TEXTS).filter(lambda text: len(text) < 50)
good_losses = st.sampled_from(["0.5", "0.7", "1e-320", "-3", " 2 "])
losses = good_losses | st.sampled_from(
    [
        "0.5",
        "1e-320",
        "-3",
        " 2 ",
        "nan",
        "inf",
        "-inf",
        "1e308",
        "1e31",
        "",
        "x",
        "1_0",
        "0x1",
        "١",
    ]
)
good_file = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "d"]), good_losses), min_size=2, unique_by=lambda row: row[0]
)
csv_file = good_file | st.lists(st.tuples(ids, losses), max_size=6)
NAMES = (
    "seed41_step00.csv",
    "seed42_step00.csv",
    "seed42_step01.csv.gz",
    "learning_record-seed43-step0-first.csv",
    "learning_record-seed43-step0-second.csv",
    "seed99999999999999999999_step00.csv",
    "notes.txt",
)


# --- the original repository's files ---------------------------------------------------------------------


@pytest.mark.fault(row=13, trials=CASES["csv records"])
@generated("csv records")
@given(
    st.dictionaries(st.sampled_from(NAMES), csv_file, min_size=1, max_size=4),
    st.sampled_from(["mean", "final", "median", "rank-mean"]),
    st.booleans(),
)
@example({NAMES[0]: [("a", "0.5"), ("b", "0.7")], NAMES[1]: [("c", "0.5"), ("d", "0.7")]}, "mean", True)
@example({NAMES[0]: [("a", "0.5")]}, "mean", False)
@example({NAMES[0]: [("a", "1e308"), ("b", "1e308")], NAMES[1]: [("a", "1e308"), ("b", "1")]}, "mean", False)
@example({NAMES[0]: [("a", "0.5"), ("a\0", "0.7")]}, "mean", False)
def test_any_records(
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[str, list[tuple[str, str]]],
    aggregate: str,
    allow_partial: bool,
) -> None:
    folder = tmp_path_factory.mktemp("records")
    for name, rows in files.items():
        text = "".join(f"{item},{loss}\n" for item, loss in rows).encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with bounded(), refusals():
        imported = import_records(folder, {"aggregate": aggregate, "allow_partial": allow_partial})
        for count in imported.folder.evaluations:
            read = [row for name in count.files for row in files[name]]
            held = [item for item, loss in read if item or loss.strip()]
            assert count.rows == len(held)
            assert len(count.records) == len(set(held))
        assert imported.describe()
        check_curriculum(imported.curriculum, folder)


@pytest.mark.fault(row=13, trials=CASES["csv bytes"])
@generated("csv bytes")
@given(st.binary(max_size=60) | st.none(), st.randoms(use_true_random=False))
@example(b"\xff\na,0.5\nb,0.6\n", None)
@example(b"a,0.5\nb,0.6\n\xff\xfe,1,2\n", None)
@example(b"a,0.5\n" + b"x" * 2_000_000 + b",0.6\n", None)
@example(b'"a,0.5\n' * 1_000, None)
@example(b"\xef\xbb\xbfa,0.5\n", None)
def test_any_bytes_as_csv(content: bytes | None, generator: Any) -> None:
    with bounded():
        records_csv(mutated(seeds_of("records-csv")[0], generator) if content is None else content)


def test_a_row_that_is_not_text_is_not_left_out(tmp_path: Path) -> None:
    # A row of the wrong width that is not UTF-8 used to vanish: Arrow could not hand it over to be named.
    (tmp_path / "seed41_step00.csv").write_bytes(b"a,0.5\n\xff,1,2\nb,0.6\n")
    with pytest.raises(DataError, match=r"seed41_step00\.csv line 2 is not UTF-8 text; save it as UTF-8"):
        import_records(tmp_path)


@pytest.mark.parametrize("loss", ["1e308", "-1e308", "1e31"])
def test_a_loss_beyond_all_measure_is_named(tmp_path: Path, loss: str) -> None:
    (tmp_path / "seed41_step00.csv").write_text(f"a,0.5\nb,{loss}\n")
    with pytest.raises(DataError, match=f"line 2: need an id and a finite loss .* '{loss}'"):
        import_records(tmp_path)


@pytest.mark.parametrize("name", ["a\0", "x" * 1_025])
def test_an_id_that_no_table_can_hold_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "seed41_step00.csv").write_text(f"a,0.5\n{name},0.6\n")
    with pytest.raises(
        DataError, match="ids: 1 are missing, hold a NUL character or have more than 1024 bytes"
    ):
        import_records(tmp_path)


def test_seeds_without_a_common_pair_make_a_partial_curriculum(tmp_path: Path) -> None:
    (tmp_path / "seed41_step00.csv").write_text("a,0.5\nb,0.7\n")
    (tmp_path / "seed42_step00.csv").write_text("c,0.5\nd,0.7\n")
    made = import_records(tmp_path, {"allow_partial": True}).curriculum
    assert (made.facts["pairs"], made.facts["partial"]) == (4, 4)
    assert made.facts["agreement"]["pairs"] == 0
    assert made.facts["agreement"]["seeds"][0]["spearman"]["value"] is None


@pytest.mark.fault(row=13, trials=CASES["records command line"])
def test_the_command_line_says_one_line(tmp_path: Path) -> None:
    @generated("records command line")
    @given(
        st.dictionaries(st.sampled_from(NAMES), csv_file, max_size=3),
        st.lists(
            st.sampled_from(
                ["--allow-partial", "--select.fraction=0.6", "--select.count=9", "--select.x=1", "--y"]
            ),
            max_size=2,
        ),
    )
    @example({}, [])
    @example({NAMES[0]: [("a", "0.5"), ("b", "0.7")]}, [])
    def check(files: dict[str, list[tuple[str, str]]], options: list[str]) -> None:
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, rows in files.items():
            text = "".join(f"{item},{loss}\n" for item, loss in rows)
            (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        out = tmp_path / "out" / str(next(numbers))
        arguments = ["import-records", str(folder), "--out", str(out), *options]
        answer = command(arguments, inside=tmp_path, may_write=("out",))
        codes.update([answer.code])
        assert out.exists() == (answer.code == 0)

    numbers, codes = itertools.count(), Counter[int]()
    check()
    assert min(codes[0], codes[2]) >= 3, codes  # both are tried


# --- our own records --------------------------------------------------------------------------------------

record_values: dict[str, Any] = {
    "pair_id": st.sampled_from(["0" * 32, "1" * 32, "", "a\0", "x" * 2_000, "é"]),
    "prompt_id": st.sampled_from(["p", "", "p\0", "q" * 2_000]),
    **dict.fromkeys(("seed", "fold", "evaluation", "step"), st.sampled_from([0, 1, 41, -1, 2**63 - 1])),
    **dict.fromkeys(
        ("loss", "margin", "policy_chosen_logp"),
        st.sampled_from([0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e308, 1e31]),
    ),
}


@pytest.mark.fault(row=13, trials=CASES["record rows"])
@generated("record rows")
@given(damages(record_values, rows=8, most=3))
@example(Damage([(0, "pair_id", "a\0")]))
@example(Damage([(0, "loss", float("nan"))]))
@example(Damage([(0, "loss", 1e308), (1, "loss", 1e308)]))
def test_records_with_missing_repeated_unsorted_and_changed_rows(damage: Damage) -> None:
    with bounded():
        records_parquet(records_bytes(damage.of(records_rows())))


@pytest.mark.fault(row=13, trials=CASES["record bytes"])
@generated("record bytes")
@given(st.binary(max_size=60) | st.none(), st.randoms(use_true_random=False))
def test_any_bytes_as_records(content: bytes | None, generator: Any) -> None:
    with bounded():
        records_parquet(mutated(seeds_of("records-parquet")[0], generator) if content is None else content)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_bytes(records_bytes(rows))
    return path


@pytest.mark.fault(row=13, trials=5)
def test_each_fault_of_records_is_counted_and_named(tmp_path: Path) -> None:
    rows = records_rows()
    path = tmp_path / "records.parquet"
    first = rows[0]["pair_id"]
    faults: list[tuple[list[dict[str, Any]], type[SelectiveDPOError], str]] = [
        (rows[1:], RecordsError, f"1 of 4 pairs lack some of their 2 records: {first}"),
        ([*rows, rows[0]], RecordsError, f"1 pairs have two records for one seed and evaluation: {first}"),
        (
            [{**rows[0], "loss": np.nan}, *rows[1:]],
            RecordsError,
            f"1 pairs have a loss that is not finite: {first}",
        ),
        (
            [{**rows[0], "fold": 1}, *rows[1:]],
            RecordsError,
            f"1 pairs have records of both folds .*: {first}",
        ),
        ([{**rows[0], "pair_id": "a\0"}, *rows[1:]], IdentityError, "1 are missing, hold a NUL character"),
    ]
    for changed, kind, words in faults:
        with pytest.raises(kind, match=words):
            read_loss_table([written(path, changed)])
    # The order of the rows has no meaning: everything is joined by id.
    turned, straight = (read_loss_table([written(path, some)]) for some in (rows[::-1], rows))
    np.testing.assert_array_equal(turned.losses_PSE, straight.losses_PSE)


def test_tables_that_are_no_records(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(records_rows(), schema=SCHEMA)
    twice = pa.table([*table.columns, table["loss"]], names=[*table.column_names, "loss"])
    not_text = pa.array([b"\xff"] * len(table), pa.binary()).view(pa.string())
    for changed in (twice, table.drop_columns(["loss"]), table.append_column("x", table["loss"])):
        path = tmp_path / "records.parquet"
        path.write_bytes(parquet_bytes(changed))
        with pytest.raises(ArtifactError, match="missing, extra, repeated or mistyped"):
            read_records(path)
    path.write_bytes(parquet_bytes(table.set_column(0, SCHEMA.field("pair_id"), not_text)))
    for read in (read_records, lambda one: read_loss_table([one])):
        with pytest.raises((ArtifactError, IdentityError), match="UTF"):
            read(path)


def test_losses_up_to_the_limit_give_finite_numbers() -> None:
    names = np.array(["a", "b", "c"])
    losses_PSE = np.array([MAX_LOSS, -MAX_LOSS, 0.5]).reshape(3, 1, 1).repeat(2, axis=2)
    made = build_curriculum(LossTable(names, names, (1,), (1, 2), losses_PSE))
    assert np.isfinite(made.difficulty_P).all()
    assert np.isfinite(made.table["spread"].to_numpy()).all()
