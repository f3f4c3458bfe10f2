"""The curriculum's table and facts: saved together, loaded together, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.table import COLUMNS, FACTS, TABLE, Curriculum, curriculum_losses, loss_column
from selective_dpo.errors import ArtifactError, IdentityError
from selective_dpo.identity import ids_digest

ROWS: dict[str, list[Any]] = {
    "pair_id": ["a", "b", "c", "d"],
    "prompt_id": ["p", "p", "q", "r"],
    "difficulty": [0.9, 0.1, 0.5, 0.3],
    "spread": [0.0, 0.1, 0.2, 0.3],
    "count": [2, 2, 2, 1],
    "rank": [3, 0, 2, 1],
    "selected": [False, True, True, True],
    "reason": ["harder", "easy", "easy", "easy"],
    "position": [-1, 0, 2, 1],
}
FACTS_OF_ROWS: dict[str, Any] = {
    "key": "k",
    "pairs": 4,
    "selected": 3,
    "select": {"rule": "below", "threshold": 0.6},
    "seeds": [41],
    "evaluations": [1],
    "quarantined": 0,
    "partial": 1,
    "agreement": {},
    "provenance": {},
    "cost": {},
}


def curriculum(facts: dict[str, Any] | None = None, **columns: list[Any]) -> Curriculum:
    values = {**ROWS, **columns}
    table = pa.table({name: pa.array(values[name], type=kind) for name, kind in COLUMNS.items()})
    losses = pa.array([0.8, 0.2, 0.4, None], type=pa.float64())
    complete = {**FACTS_OF_ROWS, "selected": sum(values["selected"]), **(facts or {})}
    return Curriculum(table.append_column(loss_column(41, 1), losses), complete)


def test_the_order_is_that_of_the_positions() -> None:
    made = curriculum()
    assert made.order == ["b", "d", "c"]
    assert made.order_digest == ids_digest(["b", "d", "c"])
    assert made.pair_ids == ["a", "b", "c", "d"]
    assert made.difficulty_P.tolist() == [0.9, 0.1, 0.5, 0.3]


def test_nothing_selected_is_an_empty_order() -> None:
    assert curriculum(position=[-1] * 4, selected=[False] * 4).order == []


@pytest.mark.parametrize("place", ["folder", "folder/mine.parquet"])
def test_what_is_saved_is_loaded(tmp_path: Path, place: str) -> None:
    made = curriculum()
    path = made.save(tmp_path / place)
    assert path == tmp_path / (place if place.endswith(".parquet") else f"{place}/{TABLE}")
    for source in (tmp_path / place, path):
        loaded = Curriculum.load(source)
        assert loaded.table.equals(made.table)
        assert loaded.facts == made.facts
    assert {entry.suffix for entry in path.parent.iterdir()} == {".parquet", ".json"}


def test_saving_again_replaces_both_files(tmp_path: Path) -> None:
    curriculum().save(tmp_path)
    curriculum({"key": "other"}, position=[0, 1, 2, 3], selected=[True] * 4).save(tmp_path)
    loaded = Curriculum.load(tmp_path)
    assert (loaded.facts["key"], loaded.order) == ("other", ["a", "b", "c", "d"])


def test_an_error_while_writing_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    curriculum({"key": "old"}).save(tmp_path)
    monkeypatch.setattr("selective_dpo.curriculum.table.write_json", full)
    with pytest.raises(OSError, match="full"):
        curriculum({"key": "new"}).save(tmp_path)
    assert Curriculum.load(tmp_path).facts["key"] == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curriculum.json", "curriculum.parquet"]


def test_a_table_without_its_own_facts_is_not_complete(tmp_path: Path) -> None:
    # A kill between the two renames: the table is the new one, the facts are the old ones.
    old, new = (curriculum().save(tmp_path / name) for name in ("old", "new"))
    pq.write_table(pq.read_table(new).slice(1), old)
    with pytest.raises(ArtifactError, match=r"is not the table that curriculum\.json was written for"):
        Curriculum.load(tmp_path / "old")
    old.with_suffix(".json").unlink()
    with pytest.raises(ArtifactError, match=r"curriculum\.json does not exist"):
        Curriculum.load(tmp_path / "old")


def test_an_absent_curriculum_is_said_to_be_absent(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"^no curriculum at .*{TABLE}$"):
        Curriculum.load(tmp_path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = curriculum().save(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"is not the table that curriculum\.json was written for"):
        Curriculum.load(tmp_path)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    curriculum().save(tmp_path)
    text = (tmp_path / FACTS).read_text()
    (tmp_path / FACTS).write_text(text.replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ArtifactError, match="is not of schema version 1"):
        Curriculum.load(tmp_path)


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    table = curriculum().table
    with pytest.raises(ArtifactError, match="column 'rank' of type int64 is missing"):
        Curriculum(table.drop_columns(["rank"]), {})
    whole = table.set_column(0, "pair_id", pa.array([1, 2, 3, 4]))
    with pytest.raises(ArtifactError, match="column 'pair_id' of type string is missing"):
        Curriculum(whole, {})
    pq.write_table(table, tmp_path / "bare.parquet")
    with pytest.raises(ArtifactError, match=r"bare\.json does not exist"):
        Curriculum.load(tmp_path / "bare.parquet")


def test_a_pair_that_stands_twice_is_refused() -> None:
    with pytest.raises(IdentityError, match=r"^curriculum: 1 ids stand more than once: a$"):
        curriculum(pair_id=["a", "b", "a", "d"])


def loss_table_of(pairs: int = 6) -> LossTable:
    ids = np.array([f"p{index}" for index in range(pairs)])
    prompts = np.array([f"q{index // 2}" for index in range(pairs)])
    losses = np.random.default_rng(0).uniform(size=(pairs, 2, 3))
    losses[1, 0, 2] = np.nan
    return LossTable(ids, prompts, (41, 43), (1, 2, 3), losses)


def test_losses_come_back() -> None:
    table = loss_table_of()
    curriculum = build_curriculum(table, {"allow_partial": True})
    back = curriculum_losses(curriculum)
    assert (back.seeds_S, back.evaluations_E) == (table.seeds_S, table.evaluations_E)
    np.testing.assert_array_equal(back.pair_ids_P, table.pair_ids_P)
    np.testing.assert_array_equal(back.prompt_ids_P, table.prompt_ids_P)
    np.testing.assert_array_equal(back.losses_PSE, table.losses_PSE)


def test_a_missing_column_is_named() -> None:
    curriculum = build_curriculum(loss_table_of(), {"allow_partial": True})
    name = loss_column(43, 2)
    lacking = Curriculum(curriculum.table.drop_columns([name]), curriculum.facts)
    with pytest.raises(ArtifactError, match=name):
        curriculum_losses(lacking)
