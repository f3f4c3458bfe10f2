"""Stability: the bivariate normal model against SciPy and by hand, the prediction against fresh seeds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from selective_dpo.curriculum import stability as seed_sets_module
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.select import Rule, select
from selective_dpo.curriculum.stability import (
    Prediction,
    is_stable,
    mean_overlap,
    predict_overlap,
    seed_sets,
    seeds_needed,
)
from selective_dpo.errors import ConfigError, RecordsError
from selective_dpo.stats.estimates import Estimate
from selective_dpo.stats.latent_correlation import correlation_of_means, overlap_curve

FRACTIONS = ((0.0, 0.5), (0.0, 0.3), (0.0, 0.02), (0.6, 1.0), (0.25, 0.75), (0.5, 0.55))


def table_of(losses, prompts=None) -> LossTable:
    """Losses [P, S] or [P, S, E]; pairs are named in the order of the rows."""
    losses = np.asarray(losses, dtype=np.float64)
    losses = losses[:, :, None] if losses.ndim == 2 else losses
    ids = np.array([f"p{index:06d}" for index in range(len(losses))])
    prompt_ids = ids if prompts is None else np.asarray(prompts).astype(str)
    seeds = tuple(range(41, 41 + losses.shape[1]))
    return LossTable(ids, prompt_ids, seeds, tuple(range(1, losses.shape[2] + 1)), losses)


def noisy(pairs: int, seeds: int, rho: float, *, seed: int = 0) -> np.ndarray:
    """Losses [P, S] whose logarithms are normal and correlate by rho."""
    generator = np.random.default_rng([pairs, seed])
    shared = generator.normal(size=(pairs, 1)) * math.sqrt(rho)
    return np.exp(0.3 * (shared + generator.normal(size=(pairs, seeds)) * math.sqrt(1 - rho)))


def prediction_of(rho: float, seeds: int = 2, quantiles=(0.0, 0.5), low: float = 0.0) -> Prediction:
    repetition = Estimate(0.0, 0.0, low, 1.0)
    made = Prediction(seeds, (), quantiles, rho, repetition, repetition, 100, 100, 100)
    return made._replace(repetition=repetition._replace(value=made.at_seeds(seeds)))


# The model.


def test_overlap_of_halves_is_sheppards() -> None:
    # P(X < 0, Y < 0) = 1/4 + arcsin(rho) / (2 pi); arcsin(1/2) = pi/6, so 1/3; of half of the pairs 2/3.
    curve = overlap_curve(0.0, 0.5)
    assert curve.overlap(0.5) == pytest.approx(2 / 3, abs=1e-12)
    assert curve.correlation(2 / 3) == pytest.approx(0.5, abs=1e-12)
    rho = np.linspace(0, 1, 50)
    np.testing.assert_allclose(curve.overlap(rho), 1 - np.arccos(rho) / np.pi, atol=1e-9)


@pytest.mark.parametrize(("low", "high"), FRACTIONS)
@pytest.mark.parametrize("rho", [0.05, 0.5, 0.9, 0.99, 0.9995])
def test_overlap_equals_scipys_bivariate_normal(low, high, rho) -> None:
    from scipy.special import ndtri

    h, k = max(ndtri(low), -12.0), min(ndtri(high), 12.0)
    joint = multivariate_normal([0, 0], [[1, rho], [rho, 1]])
    square = joint.cdf([k, k]) - 2 * joint.cdf([h, k]) + joint.cdf([h, h])
    curve = overlap_curve(low, high)
    assert curve.overlap(rho) == pytest.approx(square / (high - low), abs=2e-6)
    assert curve.correlation(curve.overlap(rho)) == pytest.approx(rho, abs=1e-9)


@pytest.mark.parametrize(("low", "high"), FRACTIONS)
def test_curve_rises_from_chance_to_one(low, high) -> None:
    curve = overlap_curve(low, high)
    overlap = curve.overlap(np.linspace(0, 1, 200))
    assert (np.diff(overlap) >= 0).all()
    assert overlap[0] == pytest.approx(high - low, abs=2e-6)
    assert overlap[-1] == 1.0
    assert curve.correlation(1.0) == 1.0
    np.testing.assert_allclose(curve.correlation([0.0, (high - low) / 2]), 0.0, atol=1e-12)
    assert np.isnan(curve.correlation(np.nan))


def test_easiest_and_hardest_have_one_curve() -> None:
    rho = np.linspace(0, 1, 20)
    easiest, hardest = overlap_curve(0.0, 0.25), overlap_curve(0.75, 1.0)
    np.testing.assert_allclose(easiest.overlap(rho), hardest.overlap(rho), atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.1)])
def test_quantiles_are_checked(low, high) -> None:
    with pytest.raises(ValueError, match="quantiles"):
        overlap_curve(low, high)


def test_correlation_of_means_by_hand() -> None:
    # Shared variance 1, noise 1. Means of two: noise 1/2, so 1 / 1.5; with one: 1 / sqrt(1.5 * 2).
    assert correlation_of_means(0.5, 2, 2) == pytest.approx(2 / 3)
    assert correlation_of_means(0.5, 2, 1) == pytest.approx(1 / math.sqrt(3))
    assert correlation_of_means(0.5, 1, 1) == pytest.approx(0.5)
    # The other's noise is 3: 1 / sqrt(2 * 4).
    assert correlation_of_means(0.5, 1, 1, 3.0) == pytest.approx(1 / math.sqrt(8))
    np.testing.assert_array_equal(correlation_of_means([0.0, 1.0], 3, 2, [0.5, 7.0]), [0.0, 1.0])


# What is observed.


def test_mean_overlap_by_hand() -> None:
    # Easiest two of four: {a, b}, {a, c}, {a, b}; couples share 1, 2, 1 of 2: mean (.5 + 1 + .5) / 3.
    losses = [[0.1, 0.1, 0.1], [0.2, 0.4, 0.2], [0.3, 0.2, 0.9], [0.4, 0.3, 0.3]]
    sets = seed_sets(table_of(losses), "mean", Rule(fraction=0.5))
    assert mean_overlap(sets, np.ones(4)) == pytest.approx(2 / 3)
    prediction = predict_overlap(table_of(losses), replicates=20)
    assert [(each.a, each.b, each.overlap) for each in prediction.observed] == [
        (41, 42, 0.5),
        (41, 43, 1.0),
        (42, 43, 0.5),
    ]
    assert prediction.rho == pytest.approx(0.5, abs=1e-9)  # 2/3 again: arccos(1/2) = pi/3


@pytest.mark.parametrize(
    "rule", [Rule(fraction=0.3), Rule("hardest", fraction=0.3), Rule("band", band=(0.25, 0.75))]
)
def test_weights_count_as_repeated_rows(rule) -> None:
    losses = noisy(60, 3, 0.8)
    weights = np.random.default_rng(1).integers(0, 3, size=60)
    rows = np.repeat(np.arange(60), weights)
    weighted = mean_overlap(seed_sets(table_of(losses), "mean", rule), weights.astype(float))
    repeated = mean_overlap(seed_sets(table_of(losses[rows]), "mean", rule), np.ones(len(rows)))
    # A pair at an edge goes in or out with both of its copies: one copy at each of a seed's two edges.
    assert weighted == pytest.approx(repeated, abs=2 / (0.3 * len(rows)))


@pytest.mark.parametrize(
    "rule",
    [
        Rule(fraction=0.3),
        Rule(count=31),
        Rule("hardest", fraction=0.45),
        Rule("band", band=(0.2, 0.6)),
        Rule("below", threshold=1.1),
    ],
)
def test_sets_are_those_that_the_rule_selects_by_each_seed(rule) -> None:
    table = table_of(np.round(noisy(101, 2, 0.9), 2))  # rounded: with ties
    first, second = (
        select(table.losses_PSE[:, s, 0], table.pair_ids_P, rule).selected_P.astype(int) for s in (0, 1)
    )
    prediction = predict_overlap(table, rule=rule, replicates=5)
    expected = 2 * (first @ second) / (first.sum() + second.sum())
    assert prediction.observed[0].overlap == pytest.approx(expected)
    low, high = prediction.quantiles
    assert high - low == pytest.approx((first.mean() + second.mean()) / 2)


def test_evaluations_of_a_seed_are_aggregated_first() -> None:
    losses = noisy(200, 4, 0.9).reshape(200, 2, 2)
    assert predict_overlap(table_of(losses), replicates=5).rho == pytest.approx(
        predict_overlap(table_of(losses.mean(axis=2)), replicates=5).rho
    )
    last = predict_overlap(table_of(losses), "final", replicates=5)
    assert last.rho == pytest.approx(predict_overlap(table_of(losses[:, :, 1]), replicates=5).rho)


def test_pairs_without_all_records_are_left_out() -> None:
    losses = noisy(100, 2, 0.9)
    losses[10, 1] = np.nan
    prediction = predict_overlap(table_of(losses), replicates=5)
    assert prediction.pairs == 99
    assert prediction.rho == predict_overlap(table_of(np.delete(losses, 10, axis=0)), replicates=5).rho


# The prediction.


@pytest.mark.parametrize("rule", [Rule(fraction=0.5), Rule(fraction=0.2), Rule("band", band=(0.4, 0.8))])
def test_prediction_holds_for_fresh_seeds(rule) -> None:
    losses = np.log(noisy(60_000, 6, 0.8))
    table = table_of(losses)
    prediction = predict_overlap(table_of(losses[:, :3]), rule=rule, replicates=20)
    chosen = [
        select(losses[:, part].mean(axis=1), table.pair_ids_P, rule).selected_P
        for part in ([0, 1, 2], [3, 4, 5], [5])
    ]
    # Overlaps of at least 12,000 pairs are known to .005; a few of these in the prediction, too.
    repeated, single = ((chosen[0] & other).sum() / chosen[0].sum() for other in chosen[1:])
    assert prediction.rho == pytest.approx(0.8, abs=0.01)
    assert prediction.repetition.value == pytest.approx(repeated, abs=0.012)
    assert prediction.single.value == pytest.approx(single, abs=0.012)
    assert prediction.at_seeds(3) == prediction.repetition.value
    assert prediction.at_seeds(3, 1) == prediction.single.value


@pytest.mark.slow
def test_intervals_cover_fresh_seeds_of_unequal_noise() -> None:
    # Noise variances differ as the intervals assume. 150 trials at 95%: standard error 1.8%.
    held = {"repetition": 0, "single": 0}
    for trial in range(150):
        generator = np.random.default_rng(trial)
        variance = 0.15 * generator.chisquare(12, size=4) / 12
        losses = generator.normal(size=(600, 1)) + generator.normal(size=(600, 4)) * np.sqrt(variance)
        table = table_of(losses)
        prediction = predict_overlap(table_of(losses[:, :2]), replicates=100, seed=trial)
        chosen = [
            select(losses[:, part].mean(axis=1), table.pair_ids_P, Rule()).selected_P
            for part in ([0, 1], [2, 3], [2])
        ]
        for name, other in zip(held, chosen[1:], strict=True):
            estimate = getattr(prediction, name)
            held[name] += estimate.low <= (chosen[0] & other).mean() / 0.5 <= estimate.high
    assert all(0.91 <= count / 150 <= 1.0 for count in held.values()), held


def test_more_pairs_narrow_the_interval_of_a_repetition() -> None:
    def width(pairs: int) -> float:
        low, high = predict_overlap(table_of(noisy(pairs, 2, 0.9)), replicates=200).repetition[2:]
        return high - low

    assert width(200) > 1.5 * width(5_000)


def test_clustered_pairs_get_wider_intervals() -> None:
    losses = np.repeat(noisy(150, 2, 0.9), 4, axis=0) + np.arange(600)[:, None] * 1e-9
    clustered = predict_overlap(table_of(losses, np.repeat(np.arange(150), 4)), replicates=400)
    independent = predict_overlap(table_of(losses), replicates=400)
    assert clustered.clusters == 150
    assert clustered.repetition.value == independent.repetition.value
    assert clustered.repetition.standard_error > 1.3 * independent.repetition.standard_error


def test_identical_seeds_predict_one_but_not_for_certain() -> None:
    losses = np.repeat(noisy(40, 1, 0.9), 2, axis=1)
    prediction = predict_overlap(table_of(losses))
    assert prediction.rho == 1.0
    assert prediction.repetition.value == prediction.repetition.high == 1.0
    # 20 selected and none in dispute: a share of up to about 1 - .025^(1/20) = .17 is still possible.
    assert 0.8 < prediction.repetition.low < 1.0
    assert seeds_needed(prediction, 1.0) == 1
    assert not is_stable(prediction, 1.0)


def test_ties_are_selected_alike() -> None:
    # Every loss is the same: the ids decide, and always will.
    assert predict_overlap(table_of(np.full((30, 2), 0.7))).repetition.value == 1.0


def test_opposite_seeds_predict_chance_whatever_their_number() -> None:
    losses = np.stack([np.arange(100.0), -np.arange(100.0)], axis=1)
    prediction = predict_overlap(table_of(losses), rule=Rule(fraction=0.4), replicates=50)
    assert prediction.rho == 0.0
    assert prediction.repetition.value == pytest.approx(0.4, abs=2e-6)
    assert prediction.at_seeds(1000) == prediction.repetition.value
    assert seeds_needed(prediction) is None
    assert seeds_needed(prediction, 0.3) == 1


@pytest.mark.parametrize("rule", [Rule("random", fraction=0.5), Rule("all"), Rule(fraction=1.0)])
def test_what_does_not_go_by_difficulty_is_stable_by_construction(rule) -> None:
    prediction = predict_overlap(table_of(noisy(50, 2, 0.1)), rule=rule)
    assert prediction.repetition == prediction.single == Estimate(1.0, 0.0, 1.0, 1.0)
    assert [each.overlap for each in prediction.observed] == [1.0]
    assert math.isnan(prediction.rho)
    assert prediction.at_seeds(5) == 1.0
    assert seeds_needed(prediction, 1.0) == 1
    assert is_stable(prediction, 1.0)


def test_one_prompt_has_no_interval() -> None:
    prediction = predict_overlap(table_of(noisy(50, 2, 0.99), ["same"] * 50), replicates=10)
    assert math.isnan(prediction.repetition.low)
    assert not is_stable(prediction, 0.1)
    assert prediction.as_json()["repetition"]["low"] is None


# Stopping.


def test_seeds_needed_by_hand() -> None:
    # Halves overlap by .9 at rho_k = cos(.1 pi) = .95106; k / (k + 1) reaches it at k = 19.4, so 20.
    prediction = prediction_of(0.5)
    assert seeds_needed(prediction, 0.9) == 20
    assert prediction.at_seeds(19) < 0.9 <= prediction.at_seeds(20)
    assert seeds_needed(prediction, 2 / 3) == 1
    assert seeds_needed(prediction, 1.0) is None


@pytest.mark.parametrize("rho", [0.2, 0.9, 0.99])
@pytest.mark.parametrize("seeds", [1, 2, 3, 7])
def test_seeds_needed_for_what_they_reach(rho, seeds) -> None:
    prediction = prediction_of(rho, quantiles=(0.0, 0.3))
    assert seeds_needed(prediction, prediction.at_seeds(seeds)) == seeds


def test_stopping_rule() -> None:
    # Two seeds of rho = .9: 1.8 / 1.9; 1 - arccos(.947) / pi = .896.
    prediction = prediction_of(0.9, low=0.85)
    assert prediction.repetition.value == pytest.approx(0.896, abs=5e-4)
    # The lower end of the interval, .85, decides.
    assert is_stable(prediction, 0.85)
    assert not is_stable(prediction, 0.86)
    assert not is_stable(prediction)


@pytest.mark.parametrize("target", [0.0, -1.0, 1.01, math.nan])
def test_target_is_checked(target) -> None:
    for function in (is_stable, seeds_needed):
        with pytest.raises(ConfigError, match="target overlap"):
            function(prediction_of(0.9), target)


# The rest.


@pytest.mark.parametrize(
    ("losses", "rule", "error", "words"),
    [
        (noisy(10, 1, 0.9), Rule(), RecordsError, "at least two seeds"),
        (np.full((10, 2), np.nan), Rule(), RecordsError, "no pair has"),
        (noisy(10, 2, 0.9), Rule("below"), ConfigError, "threshold"),
        (noisy(10, 2, 0.9), Rule("below", threshold=-1.0), ConfigError, "raise it"),
        (noisy(10, 2, 0.9), Rule(count=17), ConfigError, "count"),
    ],
)
def test_mistakes_are_named(losses, rule, error, words) -> None:
    with pytest.raises(error, match=words):
        predict_overlap(table_of(losses), rule=rule)


def test_same_seed_same_numbers() -> None:
    table = table_of(noisy(200, 3, 0.9))
    assert predict_overlap(table, replicates=50) == predict_overlap(table, replicates=50)
    other = predict_overlap(table, replicates=50, seed=1)
    assert other.rho == predict_overlap(table, replicates=50).rho
    assert other.repetition.low != predict_overlap(table, replicates=50).repetition.low


def test_binned_resamples_agree_with_exact_ones(monkeypatch) -> None:
    table = table_of(noisy(4000, 2, 0.95))
    exact = predict_overlap(table, replicates=100)
    monkeypatch.setattr(seed_sets_module, "_MAX_BINS", 1000)
    binned = predict_overlap(table, replicates=100)
    assert binned.rho == exact.rho
    # The edge moves by up to half a bin, 2 pairs of the 2,000 selected.
    assert binned.repetition.low == pytest.approx(exact.repetition.low, abs=2 / 2000)
    assert binned.repetition.high == pytest.approx(exact.repetition.high, abs=2 / 2000)


def test_as_json() -> None:
    written = json.loads(json.dumps(predict_overlap(table_of(noisy(50, 2, 0.9))).as_json(), allow_nan=False))
    assert written["observed"][0]["a"] == 41
    assert set(written["repetition"]) == {"value", "standard_error", "low", "high"}
    json.dumps(predict_overlap(table_of(noisy(50, 2, 0.9)), rule=Rule("all")).as_json(), allow_nan=False)
