"""A curriculum written for other programs, and applied to a data set."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_from_disk

from selective_dpo import identity
from selective_dpo.curriculum import export as texts_module
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.export import export_curriculum
from selective_dpo.curriculum.records import LossTable
from selective_dpo.errors import ConfigError, DataError, IdentityError

PAIRS = 6


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def make_rows(*, chat: bool = False) -> list[dict]:
    rows = [
        {"prompt": f"Question {i}?", "chosen": f' good "{i}"\n', "rejected": f" bad \u00e9 {i}"}
        for i in range(PAIRS)
    ]
    if chat:
        rows = [
            {
                "prompt": user(row["prompt"]),
                "chosen": assistant(row["chosen"]),
                "rejected": assistant(row["rejected"]),
            }
            for row in rows
        ]
    return [{**row, "prompt_id": f"q{i // 2}"} for i, row in enumerate(rows)]


def id_of(row: dict) -> str:
    return identity.pair_id(row["prompt"], row["chosen"], row["rejected"])


def curriculum_for(rows: list[dict], **select):
    """Difficulty falls with the row number: the easiest half is rows 5, 4, 3, in this order."""
    ids = np.array([id_of(row) for row in rows])
    order = np.argsort(ids)
    losses = np.array([1.0 - 0.1 * i for i in range(len(rows))])[:, None, None] + np.array(
        [[[0.0, 0.01]], [[0.02, 0.03]]]
    ).reshape(1, 2, 2)
    prompts = np.array([row["prompt_id"] for row in rows])
    table = LossTable(ids[order], prompts[order], (41, 42), (1, 2), losses[order])
    return build_curriculum(table, select)


def pairs_table(rows: list[dict]) -> pa.Table:
    columns = [
        {
            "pair_id": id_of(row),
            "prompt_id": row["prompt_id"],
            **{name: json.dumps(row[name]) for name in ("prompt", "chosen", "rejected")},
            "status": "kept",
        }
        for row in rows
    ]
    # A dropped row with the id of a kept one, and one without an id, as real tables have.
    dropped = [{**columns[5], "prompt": '"wrong"', "status": "duplicate pair"}, {"status": "malformed"}]
    return pa.Table.from_pylist([dropped[0], *columns, dropped[1]])


def test_csv_has_the_originals_columns(tmp_path) -> None:
    rows = make_rows()
    curriculum = curriculum_for(rows)
    with export_curriculum(curriculum, tmp_path / "new" / "out.csv", "csv").open() as stream:
        header, *body = csv.reader(stream)
    assert header == [
        "prompt_id",
        "loss_step00_seed41",
        "loss_step01_seed41",
        "loss_step00_seed42",
        "loss_step01_seed42",
        "learning_order",
        "pair_id",  # several pairs share a prompt here
    ]
    found = {line[-1]: [float(number) for number in line[1:-1]] for line in body}
    assert set(found) == set(curriculum.pair_ids)
    assert found[id_of(rows[0])] == pytest.approx([1.0, 1.01, 1.02, 1.03, 1.015])


def test_csv_quotes_only_ids_that_need_it(tmp_path) -> None:
    rows = make_rows()
    path = export_curriculum(curriculum_for(rows), tmp_path / "plain.csv", "csv")
    assert '"' not in path.read_text()
    rows[0]["prompt_id"] = 'a,"b'
    path = export_curriculum(curriculum_for(rows), tmp_path / "quoted.csv", "csv")
    with path.open() as stream:
        assert 'a,"b' in {line[0] for line in csv.reader(stream)}


def test_csv_of_a_partial_curriculum_averages_what_there_is(tmp_path) -> None:
    ids = np.array(["a", "b"])
    table = LossTable(ids, ids, (41,), (1, 2), np.array([[[0.2, np.nan]], [[0.4, 0.6]]]))
    path = export_curriculum(build_curriculum(table, {"allow_partial": True}), tmp_path / "x.csv", "csv")
    assert path.read_text().splitlines()[1:] == ["a,0.2,,0.2", "b,0.4,0.6,0.5"]


def test_parquet_is_the_table(tmp_path) -> None:
    curriculum = curriculum_for(make_rows())
    path = export_curriculum(curriculum, tmp_path / "x.parquet", "parquet")
    assert pq.read_table(path).equals(curriculum.table)


@pytest.mark.parametrize("chat", [False, True])
def test_jsonl_holds_the_selected_pairs_in_training_order(tmp_path, chat) -> None:
    rows = make_rows(chat=chat)
    path = export_curriculum(curriculum_for(rows), tmp_path / "x.jsonl", "jsonl", pairs=pairs_table(rows))
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["pair_id"] for row in written] == [id_of(rows[i]) for i in (5, 4, 3)]
    assert [row["prompt_id"] for row in written] == ["q2", "q2", "q1"]
    for name in ("prompt", "chosen", "rejected"):
        assert [row[name] for row in written] == [rows[i][name] for i in (5, 4, 3)]
    # Row 5: 1 - .5 plus the mean of 0, .01, .02, .03.
    assert written[0]["difficulty"] == pytest.approx(0.515)


@pytest.mark.parametrize("chat", [False, True])
def test_datasets_folder_is_what_trl_reads(tmp_path, chat) -> None:
    rows = make_rows(chat=chat)
    path = export_curriculum(curriculum_for(rows), tmp_path / "ds", "datasets", pairs=pairs_table(rows))
    loaded = load_from_disk(str(path))
    assert loaded["pair_id"][:] == [id_of(rows[i]) for i in (5, 4, 3)]
    assert loaded[0]["prompt"] == rows[5]["prompt"]
    assert loaded[2]["rejected"] == rows[3]["rejected"]
    assert loaded["difficulty"][:] == pytest.approx([0.515, 0.615, 0.715])


@pytest.mark.parametrize("as_file", [False, True])
def test_many_texts_are_written_in_training_order(tmp_path, monkeypatch, as_file) -> None:
    monkeypatch.setattr(texts_module, "_ROWS_AT_ONCE", 10)
    rows = [
        {"prompt": f"q{i}", "chosen": f" a{i}", "rejected": f" b{i}", "prompt_id": f"p{i}"}
        for i in range(100)
    ]
    ids = np.array([id_of(row) for row in rows])
    difficulty = np.random.default_rng(0).permutation(100) / 100
    difficulty[40:80] += 1.0  # whole batches without a selected pair
    order = np.argsort(ids)
    table = LossTable(ids[order], ids[order], (41,), (1,), difficulty[order][:, None, None])
    curriculum = build_curriculum(table, {"count": 45})
    pairs = pairs_table(rows)
    if as_file:
        pq.write_table(pairs, tmp_path / "pairs.parquet")
        pairs = tmp_path / "pairs.parquet"
    expected = [rows[i]["chosen"] for i in np.argsort(difficulty)[:45]]
    path = export_curriculum(curriculum, tmp_path / "x.jsonl", "jsonl", pairs=pairs)
    assert [json.loads(line)["chosen"] for line in path.read_text().splitlines()] == expected
    loaded = load_from_disk(str(export_curriculum(curriculum, tmp_path / "ds", "datasets", pairs=pairs)))
    assert loaded["chosen"][:] == expected
    assert loaded["pair_id"][:] == curriculum.order
    assert not list(tmp_path.glob(".partial*"))


def test_text_and_messages_do_not_fit_one_data_set(tmp_path) -> None:
    rows = make_rows()[:5] + make_rows(chat=True)[5:]
    with pytest.raises(DataError, match="export jsonl"):
        export_curriculum(curriculum_for(rows), tmp_path / "ds", "datasets", pairs=pairs_table(rows))
    export_curriculum(curriculum_for(rows), tmp_path / "x.jsonl", "jsonl", pairs=pairs_table(rows))
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("format", ["jsonl", "datasets"])
def test_texts_are_needed_and_must_be_the_right_ones(tmp_path, format) -> None:
    rows = make_rows()
    curriculum = curriculum_for(rows)
    with pytest.raises(ConfigError, match="--pairs"):
        export_curriculum(curriculum, tmp_path / "x", format)
    table = pairs_table(rows)
    lacking = table.filter(pc.not_equal(pc.fill_null(table["pair_id"], ""), id_of(rows[4])))
    with pytest.raises(IdentityError, match=f"1 of 3 pairs of the curriculum .* {id_of(rows[4])}"):
        export_curriculum(curriculum, tmp_path / "x", format, pairs=lacking)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["csv", "parquet", "jsonl", "datasets"])
def test_nothing_is_overwritten_unless_asked(tmp_path, format) -> None:
    rows = make_rows()
    path = tmp_path / "x"
    export_curriculum(curriculum_for(rows), path, format, pairs=pairs_table(rows))
    with pytest.raises(ConfigError, match="--overwrite"):
        export_curriculum(curriculum_for(rows), path, format, pairs=pairs_table(rows))
    export_curriculum(curriculum_for(rows, count=2), path, format, pairs=pairs_table(rows), overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_overwriting_spares_folders_that_are_not_exports(tmp_path) -> None:
    rows = make_rows()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("precious")
    for format in ("csv", "datasets"):
        with pytest.raises(ConfigError, match="choose another path"):
            export_curriculum(
                curriculum_for(rows), tmp_path / "mine", format, pairs=pairs_table(rows), overwrite=True
            )
    assert (tmp_path / "mine" / "work.txt").read_text() == "precious"


def test_unknown_format(tmp_path) -> None:
    with pytest.raises(ConfigError, match="unknown format 'xml'"):
        export_curriculum(curriculum_for(make_rows()), tmp_path / "x", "xml")


def test_apply_by_computed_ids() -> None:
    rows = make_rows(chat=True)
    applied = curriculum_for(rows).apply(Dataset.from_list(rows))
    assert applied["pair_id"][:] == [id_of(rows[i]) for i in (5, 4, 3)]
    assert applied["difficulty"][:] == pytest.approx([0.515, 0.615, 0.715])
    assert applied[0]["prompt"] == rows[5]["prompt"]
    assert applied["prompt_id"][:] == ["q2", "q2", "q1"]


def test_apply_by_the_id_column_copies_no_tokens() -> None:
    rows = make_rows()
    tokens = Dataset.from_list([{"pair_id": id_of(row), "prompt_ids": [i, i]} for i, row in enumerate(rows)])
    applied = curriculum_for(rows, order="hard-to-easy").apply(tokens)
    assert applied["prompt_ids"][:] == [[3, 3], [4, 4], [5, 5]]
    buffers = [
        table["prompt_ids"].chunk(0).values.buffers()[1].address for table in (tokens.data, applied.data)
    ]
    assert buffers[0] == buffers[1]


def test_apply_works_on_rows_that_were_picked_and_annotated_before() -> None:
    rows = make_rows()
    dataset = Dataset.from_list([{**row, "difficulty": -1.0} for row in rows]).select([5, 0, 1, 2, 3, 4])
    applied = curriculum_for(rows).apply(dataset)
    assert applied["pair_id"][:] == [id_of(rows[i]) for i in (5, 4, 3)]
    assert applied["difficulty"][0] == pytest.approx(0.515)
    twice = curriculum_for(rows, count=2).apply(applied)
    assert twice["pair_id"][:] == [id_of(rows[i]) for i in (5, 4)]


def test_apply_keeps_the_first_of_equal_rows() -> None:
    rows = make_rows()
    dataset = Dataset.from_list([{"pair_id": id_of(row), "copy": copy} for copy in (0, 1) for row in rows])
    assert curriculum_for(rows).apply(dataset)["copy"][:] == [0, 0, 0]


def test_apply_refuses_missing_and_unscored_rows() -> None:
    rows = make_rows()
    curriculum = curriculum_for(rows)
    with pytest.raises(
        IdentityError, match=f"1 of 3 selected pairs are not in the data set: {id_of(rows[4])}"
    ):
        curriculum.apply(Dataset.from_list(rows[:4] + rows[5:]))
    other = {**rows[0], "chosen": " another"}
    unusable = {**rows[0], "chosen": rows[0]["rejected"]}
    dataset = Dataset.from_list([other, *rows, unusable])
    with pytest.raises(
        IdentityError, match=f"2 of 8 rows .*1 are not usable pairs, {id_of(other)}.*allow_unscored"
    ):
        curriculum.apply(dataset)
    assert len(curriculum.apply(dataset, allow_unscored=True)) == 3


def test_apply_needs_ids_or_preference_columns() -> None:
    with pytest.raises(DataError, match="neither a pair_id column nor chosen"):
        curriculum_for(make_rows()).apply(Dataset.from_list([{"text": "x"}]))
