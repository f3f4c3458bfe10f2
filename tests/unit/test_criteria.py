"""One registration of a criterion is enough: recipe, labels, figures, report and exports know it."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from selective_dpo.config import SelectConfig
from selective_dpo.config.load import make_recipe, recipe_schema
from selective_dpo.criteria import CRITERIA, by_record, criterion
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.export import export_curriculum
from selective_dpo.curriculum.records import LossTable, difficulty
from selective_dpo.curriculum.table import Curriculum, loss_column
from selective_dpo.errors import ConfigError, RecordsError
from selective_dpo.report.content import load_report_content
from selective_dpo.report.figures import difficulty_svg, length_svg
from selective_dpo.report.page import render_report
from selective_dpo.report.tables import label_for
from tests.fixtures.run_folder import EVALUATIONS, SEEDS, make_run_folder

NAN = float("nan")


@pytest.fixture
def worst() -> Iterator[str]:
    """A criterion of the user's own: a pair is as hard as its largest loss."""

    @criterion("worst")
    def _worst(loss: Any) -> Any:
        return np.nanmax(by_record(loss), axis=1)

    yield "worst"
    del CRITERIA["worst"]


def losses_of(curriculum: Curriculum) -> LossTable:
    table = curriculum.table
    columns = [[table[loss_column(seed, number)].to_numpy() for number in EVALUATIONS] for seed in SEEDS]
    names = (np.array(table[name].to_pylist()) for name in ("pair_id", "prompt_id"))
    return LossTable(*names, SEEDS, EVALUATIONS, np.array(columns).transpose(2, 0, 1))


def test_a_registered_criterion_goes_from_recipe_to_report_and_export(worst: str, tmp_path: Path) -> None:
    raw: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "x"}]}}
    select = make_recipe({**raw, "select": {"aggregate": worst}}).select
    assert worst in recipe_schema()["$defs"]["SelectConfig"]["properties"]["aggregate"]["anyOf"][0]["enum"]
    assert label_for(select) == "easiest 50%, easy to hard, by worst"

    run = make_run_folder(tmp_path / "run", pairs=60)
    losses = losses_of(Curriculum.load(run))
    made = build_curriculum(losses, select)
    made.save(run)
    expected_P = losses.losses_PSE.max(axis=(1, 2))
    assert (made.difficulty_P == expected_P).all()
    assert set(made.order) == set(losses.pair_ids_P[np.argsort(expected_P)[:30]])
    # The seeds are compared by it as well.
    own_SP = losses.losses_PSE.max(axis=2).T
    easiest = [set(np.argsort(own_P)[:30]) for own_P in own_SP[:2]]
    overlap = made.facts["agreement"]["seeds"][0]["overlap"]["value"]
    assert overlap == pytest.approx(len(easiest[0] & easiest[1]) / 30)
    # It did not say that it is a loss, so mean losses are compared with that of chance.
    above = made.facts["agreement"]["above_chance"]["value"]
    assert above == pytest.approx((losses.losses_PSE.mean(axis=(1, 2)) > np.log(2)).mean())

    content = load_report_content(run)
    page = render_report(content)
    assert "easiest 50%, easy to hard, by worst" in page
    assert "Here it is no loss itself: pairs are compared by worst." in page
    assert "A dashed line is" not in page
    for draw, words in ((difficulty_svg, "difficulty: worst"), (length_svg, "difficulty by worst")):
        svg = draw(content)
        assert svg is not None and words in svg and "ln 2" not in svg and "nats" not in svg

    with export_curriculum(made, tmp_path / "x.csv", "csv").open() as stream:
        rows = {row["pair_id"]: row for row in csv.DictReader(stream)}
    assert [float(rows[name]["difficulty"]) for name in made.pair_ids] == pytest.approx(expected_P)
    parquet = pq.read_table(export_curriculum(made, tmp_path / "x.parquet", "parquet"))
    assert (parquet["difficulty"].to_numpy() == expected_P).all()


def test_what_is_said_at_the_registration_is_said_everywhere(tmp_path: Path) -> None:
    @criterion("least", label="by its least loss", axis="least held-out loss", is_loss=True)
    def _least(loss: Any) -> Any:
        return loss.min(axis=(1, 2))

    try:
        run = make_run_folder(tmp_path / "run", pairs=60)
        losses = losses_of(Curriculum.load(run))
        made = build_curriculum(losses, {"aggregate": "least"})
        made.save(run)
        above = made.facts["agreement"]["above_chance"]["value"]
        assert above == pytest.approx((losses.losses_PSE.min(axis=(1, 2)) > np.log(2)).mean())
        assert label_for(SelectConfig(aggregate="least")) == "easiest 50%, easy to hard, by its least loss"
        svg = difficulty_svg(load_report_content(run))
        assert "difficulty: least held-out loss (nats)" in svg and "lie above ln 2" in svg
    finally:
        del CRITERIA["least"]


def test_a_pair_without_what_is_read_is_named_without_a_warning(worst: str) -> None:
    ids = np.array(["p0", "p1"])
    table = LossTable(ids, ids, (41, 42), (1,), np.array([[[0.1], [0.4]], [[NAN], [NAN]]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RecordsError, match="no record that 'worst' reads: p1"):
            difficulty(table, worst, allow_partial=True)


def test_unknown_criteria_are_refused_with_those_that_there_are() -> None:
    raw: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "x"}]}}
    with pytest.raises(
        ConfigError,
        match=r"^select\.aggregate: no criterion is called 'worst'; use mean, final, median, rank-mean, or ",
    ):
        make_recipe({**raw, "select": {"aggregate": "worst"}})
    ids = np.array(["p0"])
    with pytest.raises(ConfigError, match="no criterion is called 'worst'; use mean"):
        difficulty(LossTable(ids, ids, (41,), (1,), np.zeros((1, 1, 1))), "worst")
