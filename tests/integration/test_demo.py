"""The demo on a shrunken world, to the end; and that its sentences say no more than its intervals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
import torch

from selective_dpo.curriculum.table import Curriculum
from selective_dpo.evaluation.results import ArmResult, EvaluationResults, from_json
from selective_dpo.run.demo import comparisons, demo, hardest_half, truth_about_selection
from selective_dpo.run.run import curriculum, open_run
from selective_dpo.stats.estimates import Estimate
from selective_dpo.storage.artifacts import read_json, verify_folder
from selective_dpo.worlds.recipe import world_recipe
from selective_dpo.worlds.world import PairsConfig, SFTConfig, WorldConfig, build_world, load_world

# Enough prompts, less those with two equal answers, for halves of five batches of 32 (five evaluations).
SMALL = WorldConfig(
    sft=SFTConfig(hidden_size=16, layers=1, heads=2, feed_forward_size=32, steps=60, batch_size=32),
    pairs=PairsConfig(prompts=400, test_pair_prompts=24, test_prompts=24),
)


class Demo(NamedTuple):
    root: Path
    report: Path
    lines: list[str]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    lines: list[str] = []
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        # One core: no worker processes, whose start would take longer than what they do here.
        patch.setattr(os, "cpu_count", lambda: 1)
        report = demo(folder, seed=5, config=SMALL, say=lambda line: lines.extend(str(line).split("\n")))
    torch.set_num_threads(threads)
    return Demo(folder / "demo", report, lines)


def test_every_stage_is_published_whole(shown: Demo) -> None:
    for name in ("world", "pairs", "test-pairs", "reference", "test-reference", "policy", "evaluation"):
        verify_folder(shown.root / name)
    scorers = sorted(path.name for path in (shown.root / "scores").iterdir())
    assert scorers == [f"seed{seed}-fold{fold}" for seed in (41, 42, 43) for fold in (0, 1)]
    assert sorted(path.name for path in (shown.root / "controls").iterdir()) == ["all", "hardest", "random"]
    assert [path.name for path in shown.root.rglob(".partial-*")] == []


def test_the_table_shows_every_arm_with_its_interval(shown: Demo) -> None:
    results = from_json(read_json(shown.root / "evaluation" / "results.json"))
    assert [arm.name for arm in results.arms] == ["reference", "selected", "all", "random", "hardest"]
    for arm in results.arms:
        (row,) = [line for line in shown.lines if line.startswith(f"{arm.name} ") and "%" in line]
        assert arm.win_rate is not None
        assert f"{arm.win_rate.value:.1%} ± " in row
    table = Curriculum.load(shown.root)
    selected = results.arm("selected")
    assert selected is not None
    assert selected.pairs == len(table.order) == (len(table.pair_ids) + 1) // 2


def test_what_is_printed_is_what_was_measured(shown: Demo) -> None:
    results = from_json(read_json(shown.root / "evaluation" / "results.json"))
    sentences = [*comparisons(results), *hardest_half(results)]
    assert len(sentences) == 3
    assert set(sentences) <= set(shown.lines)
    facts = Curriculum.load(shown.root).facts["agreement"]
    first = facts["seeds"][0]
    assert f"{first['spearman']['value']:.2f} ± " in next(
        line for line in shown.lines if line.startswith("seeds 41 and 42")
    )
    assert any(line.strip().startswith("flipped label") and "dropped" in line for line in shown.lines)


def test_the_report_is_written_and_named(shown: Demo) -> None:
    assert shown.report == shown.root / "report.html"
    assert any(str(shown.report) in line for line in shown.lines)
    page = shown.report.read_text("utf-8")
    results = from_json(read_json(shown.root / "evaluation" / "results.json"))
    assert hardest_half(results)[0] in page
    assert "flipped label" in page


def test_the_truth_adds_up_over_kept_and_dropped(shown: Demo) -> None:
    world = load_world(shown.root / "world")
    table = Curriculum.load(shown.root)
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


def test_the_same_seed_gives_the_same_curriculum(shown: Demo, tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", seed=5, config=SMALL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the demo does: sums depend on how they are split
    again = curriculum(
        open_run(world_recipe(world, name="again", output_dir=tmp_path), say=lambda line: None)
    )
    torch.set_num_threads(threads)
    first = Curriculum.load(shown.root)
    assert again.table.equals(first.table)
    assert again.order_digest == first.order_digest


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
