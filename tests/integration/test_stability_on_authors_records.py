"""Predictions of stability on the original authors' records, against seeds they were not made from."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from selective_dpo.curriculum.import_ import import_records
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.select import Rule, select
from selective_dpo.curriculum.stability import Prediction, is_stable, predict_overlap, seeds_needed
from selective_dpo.curriculum.table import curriculum_losses

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "learning_records"
MODELS = ("qwen-2.5-1.5b-argilla", "qwen-2.5-7b-argilla", "qwen-2.5-14b-argilla")
COUPLES = tuple(itertools.combinations(range(3), 2))
FIVE, LATE = (1, 2, 3, 4, 5), (3, 5)
# Largest errors allowed: .02 at the easiest half and .025 at the easiest 30% are what the method was
# known to reach.
ALLOWED = {0.5: 0.02, 0.3: 0.025}

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the authors' records (../shared/data) are not here"
)


@cache
def losses_of(model: str) -> LossTable:
    return curriculum_losses(import_records(FOLDER / model).curriculum)


def part(model: str, seeds: tuple[int, ...], evaluations: tuple[int, ...]) -> LossTable:
    table = losses_of(model)
    columns = [evaluation - 1 for evaluation in evaluations]
    losses = table.losses_PSE[:, seeds][:, :, columns]
    return LossTable(
        table.pair_ids_P, table.prompt_ids_P, tuple(table.seeds_S[s] for s in seeds), evaluations, losses
    )


@cache
def predicted(model: str, couple: tuple[int, int], evaluations: tuple[int, ...], rule: Rule) -> Prediction:
    return predict_overlap(part(model, couple, evaluations), rule=rule, replicates=300)


def observed(model: str, couple: tuple[int, int], evaluations: tuple[int, ...], rule: Rule) -> float:
    """Overlap of the set selected by the mean of two seeds with that of the third."""
    third = (3 - sum(couple),)
    chosen = [
        select(table.losses_PSE.mean(axis=(1, 2)), table.pair_ids_P, rule).selected_P
        for table in (part(model, couple, evaluations), part(model, third, evaluations))
    ]
    return float((chosen[0] & chosen[1]).sum() / chosen[0].sum())


@pytest.mark.parametrize("evaluations", [FIVE, LATE])
@pytest.mark.parametrize("fraction", sorted(ALLOWED))
@pytest.mark.parametrize("couple", COUPLES)
@pytest.mark.parametrize("model", MODELS)
def test_two_seeds_predict_the_third(model, couple, fraction, evaluations) -> None:
    rule = Rule(fraction=fraction)
    single = predicted(model, couple, evaluations, rule).single
    overlap = observed(model, couple, evaluations, rule)
    assert abs(single.value - overlap) < ALLOWED[fraction] / 1.8  # what is reached, with little to spare
    assert single.low < single.value < single.high
    assert single.high - single.low < 0.04


def test_intervals_hold_the_third_seed() -> None:
    # 95% of them should: of 36, at least 32 but once in a hundred times, if they were independent. Seeds
    # are shared between the cases, so they are not.
    held = []
    for model, couple, evaluations, fraction in itertools.product(MODELS, COUPLES, (FIVE, LATE), ALLOWED):
        rule = Rule(fraction=fraction)
        single = predicted(model, couple, evaluations, rule).single
        held.append(single.low <= observed(model, couple, evaluations, rule) <= single.high)
    assert sum(held) >= 33


def test_intervals_hold_for_other_selections() -> None:
    rules = [
        Rule(fraction=0.2),
        Rule(fraction=0.8),
        Rule("hardest", fraction=0.3),
        Rule("band", band=(0.25, 0.75)),
        Rule("below", threshold=0.65),
    ]
    held, errors = [], []
    for model, couple, rule in itertools.product(MODELS, COUPLES, rules):
        single = predicted(model, couple, FIVE, rule).single
        if rule.name == "below":
            # Sets of unequal size: shared pairs over the mean size, as the prediction has it.
            both = [part(model, couple, FIVE), part(model, (3 - sum(couple),), FIVE)]
            sets = [table.losses_PSE.mean(axis=(1, 2)) <= rule.threshold for table in both]
            overlap = 2 * (sets[0] & sets[1]).sum() / (sets[0].sum() + sets[1].sum())
        else:
            overlap = observed(model, couple, FIVE, rule)
        held.append(single.low <= overlap <= single.high)
        errors.append(single.value - overlap)
    assert np.mean(held) >= 0.9
    assert abs(np.mean(errors)) < 0.005  # no tendency
    assert np.sqrt(np.mean(np.square(errors))) < 0.015


@pytest.mark.parametrize("couple", COUPLES)
@pytest.mark.parametrize("model", MODELS)
def test_certified_stops_after_two_seeds(model, couple) -> None:
    prediction = predicted(model, couple, LATE, Rule(fraction=0.5))
    assert is_stable(prediction)
    assert not is_stable(prediction, 0.995)
    assert seeds_needed(prediction, 0.995) > 2
    # A seed's first evaluations alone agree too little.
    early = predicted(model, couple, (1,), Rule(fraction=0.5))
    assert not is_stable(early)
    assert seeds_needed(early) > 3


@pytest.mark.parametrize("model", MODELS)
def test_three_seeds_agree_with_two(model) -> None:
    # All three couples together: rho within the range of what each alone gives.
    all_three = predict_overlap(part(model, (0, 1, 2), LATE), replicates=50)
    alone = [predicted(model, couple, LATE, Rule(fraction=0.5)).rho for couple in COUPLES]
    assert min(alone) <= all_three.rho <= max(alone)
    assert all_three.repetition.value > all_three.at_seeds(2) > all_three.at_seeds(1)
