"""Difficulty from outside: which files are read, which columns, and how ids are joined with pairs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from selective_dpo import import_curriculum
from selective_dpo.cli import main
from selective_dpo.curriculum.import_ import outside_curriculum, pairs_joined, read_outside
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import ArtifactError, ConfigError, DataError, IdentityError, SelectiveDPOError
from selective_dpo.identity import pair_id

IDS, VALUES = ["b", "a", "c"], [0.5, 0.1, 0.9]
CSV = "prompt_id,learning_order\n" + "".join(f"{i},{v}\n" for i, v in zip(IDS, VALUES, strict=True))


def write(path: Path, text: str = CSV) -> Path:
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".gz":
        inner = path.with_suffix("")
        pq.write_table(table, inner)
        path.write_bytes(gzip.compress(inner.read_bytes()))
        inner.unlink()
    else:
        pq.write_table(table, path)
    return path


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.parquet", "x.parquet.gz"])
def test_every_format_gives_the_same(tmp_path: Path, name: str) -> None:
    table = pa.table({"prompt_id": IDS, "more": [1, 2, 3], "learning_order": VALUES})
    path = tmp_path / name
    made = write_parquet(path, table) if ".parquet" in name else write(path)
    outside = read_outside(made)
    assert (outside.names, outside.ids.to_pylist()) == ("prompt_id", IDS)
    assert outside.difficulty_N.tolist() == VALUES
    facts = outside.facts
    assert (facts["name"], facts["id_column"], facts["difficulty_column"]) == (
        name,
        "prompt_id",
        "learning_order",
    )
    assert facts["nats"] is True


def test_the_first_known_column_is_taken_and_others_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "\ufeffprompt_id,pair_id,difficulty,hardness\np,q,1,-2e0\n")
    outside = read_outside(path)
    # The pair's id says more than the prompt's; nobody knows what the unit of such a number is.
    assert (outside.names, outside.ids.to_pylist(), outside.difficulty_N.tolist()) == (
        "pair_id",
        ["q"],
        [1.0],
    )
    assert outside.facts["nats"] is False
    other = read_outside(path, id_column="prompt_id", difficulty_column="hardness")
    assert (other.names, other.ids.to_pylist(), other.difficulty_N.tolist()) == ("prompt_id", ["p"], [-2.0])


def test_what_ids_of_another_column_name_has_to_be_said(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "idx,difficulty\na,1\n")
    with pytest.raises(DataError, match=r"x\.csv has columns idx, difficulty, and needs .*--id-column NAME"):
        read_outside(path)
    with pytest.raises(
        ConfigError, match="say what the ids in column 'idx' name: --names pair_id or --names prompt_id"
    ):
        read_outside(path, id_column="idx")
    assert read_outside(path, id_column="idx", names="prompt_id").names == "prompt_id"


def test_float32_is_read_as_it_is(tmp_path: Path) -> None:
    values = pa.array([0.1], type=pa.float32())
    path = write_parquet(tmp_path / "x.parquet", pa.table({"pair_id": ["a"], "difficulty": values}))
    assert read_outside(path).difficulty_N[0] == float(np.float32(0.1)) != 0.1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CSV + "d,nan\n", r"x\.csv line 5: need an id and a finite learning_order; .* 'nan'"),
        (CSV + "d,\n", r"line 5: need an id and a finite learning_order; .* ''"),
        (CSV + ",1\n", "line 5: need an id"),
        (CSV + "d,1,2\n", r"line 5: 3 column\(s\) instead of 2"),
        (CSV + "a,0.1\n", "1 ids stand more than once: a"),
        ("prompt_id,learning_order\n", "has no rows"),
        ("", "has columns none"),
        (
            "prompt_id,prompt_id,difficulty\na,b,1\n",
            "does not hold columns 'prompt_id' and 'difficulty', each once",
        ),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SelectiveDPOError, match=words):
        read_outside(write(tmp_path / "x.csv", text))


def test_what_is_no_file_has_no_columns_to_choose(tmp_path: Path) -> None:
    import_curriculum(write(tmp_path / "x.csv")).save(tmp_path / "made")
    with pytest.raises(ConfigError, match="no file with a choice of columns"):
        read_outside(tmp_path / "made", id_column="pair_id")
    with pytest.raises(DataError, match="does not exist"):
        read_outside(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match=r"holds no seed41_step00\.csv"):
        (tmp_path / "empty").mkdir()
        read_outside(tmp_path / "empty")
    (tmp_path / "made" / "curriculum.json").write_text("{}")
    with pytest.raises(ArtifactError):
        read_outside(tmp_path / "made")


def test_a_prompts_difficulty_is_that_of_all_its_pairs_and_everything_is_counted(tmp_path: Path) -> None:
    outside = read_outside(write(tmp_path / "x.csv"))
    pairs, prompts = ["4", "3", "2", "1", "0"], ["b", "a", "z", "a", "a"]
    columns = (pa.chunked_array([pairs]), pa.chunked_array([prompts]))
    joined = pairs_joined(outside, *columns)
    assert joined.difficulty_P.tolist()[:2] == [0.5, 0.1] and np.isnan(joined.difficulty_P[2])
    assert joined.counts == {
        "pairs": 5,
        "pairs_without_difficulty": 1,
        "ids": 3,
        "ids_without_pairs": 1,
        "ids_shared_by_pairs": 1,
        "pairs_sharing_an_id": 3,
    }
    curriculum = outside_curriculum(outside, *columns, {"fraction": 0.5})
    # Of the four pairs with a difficulty; those of one prompt are in the order of their ids.
    assert curriculum.order == ["0", "1"]
    assert [row["reason"] for row in curriculum.table.to_pylist()] == [
        "among the easiest 50%",
        "among the easiest 50%",
        "no difficulty in the imported curriculum",
        "harder than the easiest 50%",
        "harder than the easiest 50%",
    ]
    facts = curriculum.facts
    assert (facts["pairs"], facts["quarantined"], facts["partial"], facts["seeds"]) == (4, 0, 0, [])
    assert Curriculum.load(curriculum.save(tmp_path / "made")).facts == facts


def test_records_and_what_was_made_of_them_are_joined_by_prompt(tmp_path: Path) -> None:
    for step, shift in ((0, 0.0), (1, 0.2)):
        rows = "".join(f"{i},{v + shift}\n" for i, v in zip(IDS, VALUES, strict=True))
        (tmp_path / f"seed41_step{step:02d}.csv").write_text(rows)
    outside = read_outside(tmp_path)
    assert (outside.names, outside.facts["kind"], outside.facts["rows"]) == ("prompt_id", "records", 6)
    assert outside.difficulty_N == pytest.approx([0.2, 0.6, 1.0])
    assert main(["import-records", str(tmp_path), "--out", str(tmp_path / "made")]) == 0
    again = read_outside(tmp_path / "made")
    assert (again.names, again.facts["kind"]) == ("prompt_id", "curriculum")
    assert again.difficulty_N.tolist() == outside.difficulty_N.tolist()


def test_a_data_set_is_joined_by_its_own_prompt_ids(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no", "prompt_id": i} for i in IDS]
    data = Dataset.from_list(rows)
    path = write(tmp_path / "x.csv")
    with pytest.raises(IdentityError, match=r"its ids name prompts: .*import_curriculum\(.*pairs=dataset"):
        import_curriculum(path).apply(data)
    curriculum = import_curriculum(path, data, {"count": 2})
    assert curriculum.order == [pair_id("a?", "yes", "no"), pair_id("b?", "yes", "no")]
    assert curriculum.apply(data)["difficulty"][:] == [0.1, 0.5]


def test_the_command_joins_with_prepared_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.csv", CSV.replace("prompt_id", "idx"))
    out = tmp_path / "made"
    command = ["import-curriculum", str(path), "--out", str(out), "--select.count", "1"]
    assert main([*command, "--id-column", "idx"]) == 2
    assert "--names pair_id or --names prompt_id" in capsys.readouterr().err
    assert main([*command, "--id-column", "idx", "--names", "prompt_id"]) == 0
    told = capsys.readouterr().out
    assert (
        "file x.csv, joined by prompt_id: 3 of 3 pairs have a difficulty" in told and "; 1 selected" in told
    )
    assert Curriculum.load(out).order == ["a"]
    imported = json.loads((out / "curriculum.json").read_text())["provenance"]["imported"]
    assert (imported["id_column"], imported["joined_by"]) == ("idx", "prompt_id")
    assert main([*command, "--allow-partial", "--id-column", "idx", "--names", "prompt_id"]) == 2
    assert "allow_partial has no effect" in capsys.readouterr().err
    assert main([*command, "--pairs", str(tmp_path)]) == 2
