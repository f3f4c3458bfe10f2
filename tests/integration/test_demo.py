"""The demo on a shrunken world, to the end; and that its sentences say no more than its intervals."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from selective_dpo.curriculum.table import Curriculum
from selective_dpo.evaluation.results import ArmResult, EvaluationResults, from_json
from selective_dpo.run.demo import comparisons, hardest_half, truth_about_selection
from selective_dpo.stats.estimates import Estimate
from selective_dpo.storage.artifacts import read_json, verify_folder
from selective_dpo.worlds.world import load_world


@pytest.fixture(scope="module")
def printed(demo_output: str) -> list[str]:
    return demo_output.splitlines()


def test_every_stage_is_published_whole(finished_demo: Path) -> None:
    for name in ("world", "pairs", "test-pairs", "reference", "test-reference", "policy", "evaluation"):
        verify_folder(finished_demo / name)
    scorers = sorted(path.name for path in (finished_demo / "scores").iterdir())
    assert scorers == [f"seed{seed}-fold{fold}" for seed in (41, 42, 43) for fold in (0, 1)]
    assert sorted(path.name for path in (finished_demo / "controls").iterdir()) == [
        "all",
        "hardest",
        "random",
    ]
    assert [path.name for path in finished_demo.rglob(".partial-*")] == []


def test_the_table_shows_every_arm_with_its_interval(finished_demo: Path, printed: list[str]) -> None:
    results = from_json(read_json(finished_demo / "evaluation" / "results.json"))
    assert [arm.name for arm in results.arms] == ["reference", "selected", "all", "random", "hardest"]
    for arm in results.arms:
        (row,) = [line for line in printed if line.startswith(f"{arm.name} ") and "%" in line]
        assert arm.win_rate is not None
        assert f"{arm.win_rate.value:.1%} ± " in row
    table = Curriculum.load(finished_demo)
    selected = results.arm("selected")
    assert selected is not None
    assert selected.pairs == len(table.order) == (len(table.pair_ids) + 1) // 2


def test_what_is_printed_is_what_was_measured(finished_demo: Path, printed: list[str]) -> None:
    results = from_json(read_json(finished_demo / "evaluation" / "results.json"))
    sentences = [*comparisons(results), *hardest_half(results)]
    assert len(sentences) == 3
    assert set(sentences) <= set(printed)
    facts = Curriculum.load(finished_demo).facts["agreement"]
    first = facts["seeds"][0]
    assert f"{first['spearman']['value']:.2f} ± " in next(
        line for line in printed if line.startswith("seeds 41 and 42")
    )
    assert any(line.strip().startswith("flipped label") and "dropped" in line for line in printed)


def test_the_report_is_written_and_named(finished_demo: Path, demo_output: str) -> None:
    assert str(finished_demo / "report.html") in demo_output
    page = (finished_demo / "report.html").read_text("utf-8")
    results = from_json(read_json(finished_demo / "evaluation" / "results.json"))
    assert hardest_half(results)[0] in page
    assert "flipped label" in page


def test_the_truth_adds_up_over_kept_and_dropped(finished_demo: Path) -> None:
    world = load_world(finished_demo / "world")
    table = Curriculum.load(finished_demo)
    kept = len(table.order)
    dropped = len(table.pair_ids) - kept
    rows = {row.group: row for row in truth_about_selection(table, world)}
    truth = {row["pair_id"]: row for row in pq.read_table(world.truth).to_pylist()}
    for group, column in (("flipped label", "flipped"), ("tie", "tie")):
        total = rows[group].selected.value * kept + rows[group].deselected.value * dropped
        assert total == pytest.approx(sum(truth[pair_id][column] for pair_id in table.pair_ids))
    tasks = [row for group, row in rows.items() if group.startswith("task: ")]
    assert sum(row.selected.value for row in tasks) == pytest.approx(1.0)
    assert sum(row.deselected.value for row in tasks) == pytest.approx(1.0)


def estimate(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, (high - low) / 4, low, high)


def results(**measured: tuple[float, float]) -> EvaluationResults:
    """Arms with a made-up interval: of the win rate for "hardest", of the difference for the others."""
    arms = tuple(
        ArmResult(name, name, 10, 1, win_rate=estimate(*found))
        if name == "hardest"
        else ArmResult(name, name, 10, 1, difference=estimate(*found))
        for name, found in measured.items()
    )
    return EvaluationResults("embedded-world", 10, 4, arms)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.01, 0.05), ": shows in this run ("),
        ((-0.01, 0.05), ": does NOT show in this run ("),
        ((0.0, 0.05), ": does NOT show in this run ("),
        ((-0.05, 0.0), ": does NOT show in this run ("),
        ((-0.05, -0.01), ": the OPPOSITE shows in this run ("),
        ((float("nan"), float("nan")), ": does NOT show in this run ("),
    ],
)
def test_a_comparison_is_as_strong_as_its_interval(interval: tuple[float, float], verdict: str) -> None:
    against_all, against_random = comparisons(results(all=interval, random=(0.1, 0.2)))
    assert against_all.startswith("The easiest half beats all pairs" + verdict)
    assert f"95% interval {interval[0]:+.3f} to {interval[1]:+.3f}" in against_all
    assert against_random.startswith("The easiest half beats a random half: shows in this run (")


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.40, 0.49), ": shows in this run ("),
        ((0.40, 0.51), ": does NOT show in this run ("),
        ((0.51, 0.60), ": the OPPOSITE shows in this run ("),
        ((float("nan"), float("nan")), ": does NOT show in this run ("),
    ],
)
def test_the_hardest_half_hurts_where_it_is_below_one_half(
    interval: tuple[float, float], verdict: str
) -> None:
    (sentence,) = hardest_half(results(hardest=interval))
    assert sentence.startswith("Training on the hardest half hurts" + verdict)


def test_nothing_is_said_of_arms_that_were_not_run() -> None:
    assert comparisons(results(hardest=(0.4, 0.6))) == []
    assert hardest_half(results(all=(0.4, 0.6))) == []
