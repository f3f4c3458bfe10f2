"""A run folder is read as it stands, joined by pair_id, with parts that may be missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selective_dpo.errors import ArtifactError, IdentityError
from selective_dpo.report.content import (
    Curve,
    DropCount,
    TruthRow,
    load_report_content,
    save_findings,
)
from selective_dpo.report.inspect import borderline
from selective_dpo.report.page import render_report
from selective_dpo.stats.estimates import Estimate
from tests.fixtures.run_folder import DROPPED, HOSTILE, LONG_ANSWER, make_run_folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run_folder(tmp_path / "run", pairs=40)


def test_a_complete_run(run_folder: Path) -> None:
    content = load_report_content(run_folder)
    assert content.title == "qwen-small-alpaca"
    assert content.subtitle == "models/qwen-small on alpaca_pairs.jsonl"
    assert [log.arm for log in content.training_logs] == ["selected", "all", "hardest", "random"]
    assert len(content.training_logs[0].loss.steps) == 100
    assert content.training_logs[0].held_out_loss.steps == (25, 50, 75, 100)
    assert content.results is not None
    assert [arm.name for arm in content.results.arms][:2] == ["selected", "reference"]
    assert content.findings == ("Dropping the hardest half kept 92% of the pairs whose label is right.",)
    assert content.truth[0].group == "flipped label"
    assert content.provenance["pairs"]["boundary_mismatch_share"] == 0.01


def test_every_input_row_is_counted(run_folder: Path) -> None:
    drops = load_report_content(run_folder).drops
    assert drops[0] == DropCount("alpaca_pairs.jsonl", "kept", 40)
    assert {drop.status: drop.rows for drop in drops[1:]} == DROPPED
    assert (
        sum(drop.rows for drop in drops) == pq.read_metadata(run_folder / "pairs" / "pairs.parquet").num_rows
    )


def test_lengths_and_texts_are_joined_by_pair_id(run_folder: Path) -> None:
    path = run_folder / "pairs" / "pairs.parquet"
    before = load_report_content(run_folder)
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    after = load_report_content(run_folder)
    assert before.lengths is not None
    assert after.lengths is not None
    np.testing.assert_array_equal(after.lengths.pair_P, before.lengths.pair_P)
    assert after.examples == before.examples
    row = next(row for row in table.to_pylist() if row["pair_id"] == before.curriculum.pair_ids[7])
    assert before.lengths.chosen_P[7] == row["chosen_tokens"]


def test_examples_are_easiest_borderline_hardest(run_folder: Path) -> None:
    easiest, edge, hardest = load_report_content(run_folder).examples
    assert easiest.pairs[0].prompt == HOSTILE
    assert easiest.pairs[0].rejected == "\ud800 no & <b>no</b>\x07"
    assert [pair.rank for pair in easiest.pairs] == [0, 1, 2, 3, 4]
    assert edge.title.startswith("Borderline")
    assert [(pair.rank, pair.selected) for pair in edge.pairs] == [
        (rank, rank < 20) for rank in (17, 18, 19, 20, 21, 22)
    ]
    assert hardest.pairs[0].chosen == LONG_ANSWER
    assert [pair.rank for pair in hardest.pairs] == [39, 38, 37, 36, 35]


@pytest.mark.parametrize(
    ("selected", "rule", "centre"),
    [
        ([1, 1, 1, 0, 0, 0], "easiest", 3),
        ([0, 0, 0, 0, 1, 1], "hardest", 4),
        ([0, 1, 1, 1, 0, 0], "band", 4),
        ([1, 0, 1, 0, 1, 0], "random", 3),
        ([1, 1, 1, 1, 1, 1], "all", 3),
        ([1, 1, 1, 1, 1, 1], "below", 3),
    ],
)
def test_where_the_borderline_is(selected: list[int], rule: str, centre: int) -> None:
    title, found = borderline(np.array(selected, dtype=bool), rule)
    assert found == centre
    assert title.startswith("Pairs of median") == (rule in ("random", "all") or all(selected))


def test_only_pairs_and_the_curriculum_are_needed(run_folder: Path) -> None:
    for name in ("policy", "controls", "evaluation"):
        shutil.rmtree(run_folder / name)
    for name in ("config.json", "findings.json", "pairs/summary.json"):
        (run_folder / name).unlink()
    content = load_report_content(run_folder)
    assert content.title == "run"
    assert content.results is None
    assert content.training_logs == ()
    assert content.findings == ()
    assert content.truth == ()


def test_pairs_that_were_not_tokenized_have_no_lengths(run_folder: Path) -> None:
    path = run_folder / "pairs" / "pairs.parquet"
    table = pq.read_table(path)
    for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens"):
        zeros = pa.array(np.zeros(len(table)), type=pa.int32())
        table = table.set_column(table.column_names.index(name), name, zeros)
    pq.write_table(table, path)
    assert load_report_content(run_folder).lengths is None


def test_a_curriculum_for_other_pairs_is_refused(run_folder: Path) -> None:
    path = run_folder / "pairs" / "pairs.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(IdentityError, match="1 of 40 ids are missing"):
        load_report_content(run_folder)


def test_missing_or_broken_files_are_named(run_folder: Path) -> None:
    (run_folder / "policy" / "trainer_log.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no log_history"):
        load_report_content(run_folder)
    (run_folder / "findings.json").write_text('{"truth": [{"group": "ties"}]}')
    with pytest.raises(ArtifactError, match=r"findings\.json"):
        load_report_content(run_folder)
    (run_folder / "pairs" / "pairs.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"pairs\.parquet does not exist"):
        load_report_content(run_folder)


def test_values_that_are_not_finite_are_not_drawn(run_folder: Path) -> None:
    log = '{"log_history": [{"step": 1, "loss": NaN}, {"step": 2, "loss": 0.5}, {"loss": 1.0}, {"step": 3}]}'
    (run_folder / "policy" / "trainer_log.json").write_text(log)
    assert load_report_content(run_folder).training_logs[0].loss == Curve((2,), (0.5,))


def test_findings_are_kept(run_folder: Path) -> None:
    nan = float("nan")
    truth = TruthRow("tie", Estimate(0.25, 0.01, 0.23, 0.27), Estimate(0.4, 0.02, 0.36, 0.44))
    save_findings(run_folder, ["One.", "Two."], [truth])
    content = load_report_content(run_folder)
    assert content.findings == ("One.", "Two.")
    assert content.truth == (truth,)
    save_findings(run_folder, [], [TruthRow("tie", Estimate(0.5, nan, nan, nan), truth.deselected)])
    assert np.isnan(load_report_content(run_folder).truth[0].selected.low)


def test_the_first_answers_of_each_policy_are_there_with_what_they_win(tmp_path: Path) -> None:
    run = make_run_folder(tmp_path / "run", pairs=60)
    folder = run / "evaluation"
    prompts = [f"p{number}" for number in range(8)]
    pq.write_table(
        pa.table(
            {
                "arm": ["reference"] * 16 + ["selected"] * 16,
                "prompt_id": [name for _ in range(2) for name in prompts for _ in range(2)],
                "prompt": ['[{"content": "Say <b>it</b>.", "role": "user"}]'] * 32,
                "sample": [0, 1] * 16,
                "answer": [f"answer {number}" for number in range(32)],
            }
        ),
        folder / "generations.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "arm": ["selected"] * 4,
                "prompt_id": ["p0", "p0", "p0", "p1"],
                "sample": [0, 0, 1, 0],
                "opponent_sample": [0, 1, 0, 0],
                "score": [1.0, 0.5, 0.0, 0.0],
            }
        ),
        folder / "verdicts.parquet",
    )
    answered = load_report_content(run).answered
    assert [each.answers[0].answer for each in answered] == [f"answer {2 * number}" for number in range(6)]
    (reference, selected) = answered[0].answers
    assert (reference.arm, reference.score) == ("reference", None)
    assert (selected.arm, selected.score) == ("selected", 0.75)  # of its first sample: 1 and .5
    assert answered[2].answers[1].score is None  # nobody judged it
    page = render_report(load_report_content(run))
    assert "Answers to read" in page and "Say &lt;b&gt;it&lt;/b&gt;." in page
