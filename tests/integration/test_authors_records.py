"""The original authors' own records: what their script makes of them, ours makes too."""

from __future__ import annotations

import csv
import gzip
import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from selective_dpo.curriculum.export import export_curriculum
from selective_dpo.curriculum.import_ import Imported, import_records

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "learning_records"
MODELS = ("qwen-2.5-1.5b-argilla", "qwen-2.5-7b-argilla", "qwen-2.5-14b-argilla")
# Ids with different losses in the first seed's first evaluation.
CONFLICTING = {MODELS[0]: 63, MODELS[1]: 63, MODELS[2]: 67}

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the authors' records (../shared/data) are not here"
)


@cache
def imported_of(model: str) -> Imported:
    return import_records(FOLDER / model)


def read_csv(text: str) -> tuple[list[str], dict[str, list[float]]]:
    header, *rows = csv.reader(io.StringIO(text))
    found = {row[0]: [float(number) for number in row[1:]] for row in rows}
    assert len(found) == len(rows)
    return header, found


@pytest.mark.parametrize("model", MODELS)
def test_export_equals_the_authors_file(model, tmp_path) -> None:
    path = export_curriculum(imported_of(model).curriculum, tmp_path / "out.csv", "csv")
    header, ours = read_csv(path.read_text())
    with gzip.open(FOLDER / f"{model}_learning_order.csv.gz", "rt") as stream:
        their_header, theirs = read_csv(stream.read())
    assert set(header) == set(their_header)
    assert (header[0], header[-1]) == ("prompt_id", "learning_order")
    assert set(ours) == set(theirs)
    assert len(ours) == 6_668
    # Theirs lists seed 43 before 42; columns are compared by name.
    column_of = [their_header.index(name) - 1 for name in header[1:]]
    ids = sorted(ours)
    difference = np.array([ours[i] for i in ids]) - np.array([theirs[i] for i in ids])[:, column_of]
    assert np.abs(difference).max() < 1e-12


@pytest.mark.parametrize("model", MODELS)
def test_repeated_ids_are_counted(model) -> None:
    imported = imported_of(model)
    assert len(imported.folder.evaluations) == 15
    for count in imported.folder.evaluations:
        assert count.rows == 6_784
        assert len(count.records) == 6_668
        assert count.rows - len(count.records) == 116
    assert len(imported.folder.evaluations[0].conflicting_ids) == CONFLICTING[model]
    assert "116 rows in each repeat an id" in imported.describe()
    assert imported.curriculum.facts["partial"] == 0


@pytest.mark.parametrize("model", MODELS)
def test_seeds_agree_at_the_last_evaluation(model) -> None:
    agreement = imported_of(model).curriculum.facts["agreement"]
    last = [index for index, column in enumerate(agreement["columns"]) if column["evaluation"] == 5]
    assert len(last) == 3
    for a in last:
        for b in last:
            if a < b:
                value = agreement["spearman"][a][b]
                assert 0.94 <= value <= 0.995
                assert agreement["spearman_low"][a][b] < value < agreement["spearman_high"][a][b]
    for between in agreement["seeds"]:
        assert between["overlap"]["low"] < between["overlap"]["value"] < between["overlap"]["high"]
        assert between["overlap"]["value"] > 0.9


@pytest.mark.parametrize("model", MODELS)
def test_one_seeds_last_evaluation_selects_nearly_the_same_half(model) -> None:
    # Known of these records: overlap of the easiest half with the full mean's is 0.949 to 0.976.
    curriculum = imported_of(model).curriculum
    table, half = curriculum.table, len(curriculum.pair_ids) // 2
    chosen = set(np.argsort(curriculum.difficulty_P)[:half].tolist())
    for seed in (41, 42, 43):
        one = set(np.argsort(table[f"loss_seed{seed}_evaluation5"].to_numpy())[:half].tolist())
        assert 0.93 <= len(chosen & one) / half <= 0.985
