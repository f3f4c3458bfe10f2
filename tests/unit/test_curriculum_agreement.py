"""Agreement: against SciPy, against repeated rows, and the bootstrap against analytic errors."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats

from selective_dpo.curriculum import agreement as agreement_module
from selective_dpo.curriculum.agreement import agreement, scorer_check
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.select import Rule, select
from selective_dpo.errors import RecordsError
from selective_dpo.stats import bootstrap as bootstrap_module
from selective_dpo.stats.bootstrap import Draws, bounds, cluster_bootstrap, cluster_codes, estimates, rows_for
from selective_dpo.stats.rank_correlation import weighted_spearman


def table_of(losses_PSE, prompts_P=None) -> LossTable:
    losses = np.asarray(losses_PSE, dtype=np.float64)
    ids = np.array([f"p{index:05d}" for index in range(len(losses))])
    prompts = ids if prompts_P is None else np.asarray(prompts_P).astype(str)
    seeds = tuple(range(41, 41 + losses.shape[1]))
    return LossTable(ids, prompts, seeds, tuple(range(1, losses.shape[2] + 1)), losses)


def noisy(pairs: int, seeds: int = 3, evaluations: int = 2, *, decimals: int = 2) -> np.ndarray:
    generator = np.random.default_rng(pairs)
    signal = generator.normal(size=(pairs, 1, 1))
    noise = generator.normal(size=(pairs, seeds, evaluations))
    return np.round(0.7 + 0.2 * (signal + 0.5 * noise), decimals)


def codes_of(values_CP) -> np.ndarray:
    return np.array([np.unique(values, return_inverse=True)[1] for values in values_CP])


def test_spearman_matrix_equals_scipy_with_ties() -> None:
    losses = noisy(300)
    result = agreement(table_of(losses), replicates=5)
    expected = scipy.stats.spearmanr(losses.reshape(300, -1)).statistic
    np.testing.assert_allclose(result["spearman"], expected, atol=1e-12)
    assert result["columns"][1] == {"seed": 41, "evaluation": 2}
    assert result["columns"][2] == {"seed": 42, "evaluation": 1}


def test_integer_weights_equal_repeated_rows() -> None:
    generator = np.random.default_rng(1)
    values = np.round(generator.normal(size=(3, 40)), 1)
    weights = generator.integers(0, 4, size=40)
    repeated = np.repeat(values, weights, axis=1)
    expected = scipy.stats.spearmanr(repeated.T).statistic
    np.testing.assert_allclose(
        weighted_spearman(codes_of(values), weights.astype(float)), expected, atol=1e-12
    )


def test_movement_by_hand() -> None:
    # Losses 0.3 and 0.4 away from ln 2: sqrt((.09 + .16) / 2).
    losses = [[[math.log(2) - 0.3]], [[math.log(2) + 0.4]]]
    assert agreement(table_of(losses), replicates=2)["movement"] == pytest.approx(math.sqrt(0.125))
    assert agreement(table_of(losses), chance_loss=None, replicates=2)["movement"] is None


def test_the_check_by_hand() -> None:
    # Trained scorers scored four of five pairs, too, with two evaluations. Their means rank the pairs
    # 1 3 2 4, one-step ranks 1 2 3 4: 1 - 6 * 2 / (4 * 15) = 0.8. Easiest halves {a, c} and {a, b}.
    # The first evaluation ranks as the mean does, the last 1 2 3 4: 0.8 again.
    own = table_of([[[0.1]], [[0.2]], [[0.3]], [[0.4]], [[9.0]]])
    trained = table_of([[[0.1, 0.1]], [[0.5, 0.2]], [[0.2, 0.3]], [[0.9, 0.9]]])
    found = scorer_check(own, trained)
    assert found["pairs"] == 4
    assert found["spearman"]["value"] == pytest.approx(0.8)
    assert found["overlap"]["value"] == 0.5
    assert found["evaluations"]["value"] == pytest.approx(0.8)
    with pytest.raises(RecordsError, match="no pairs with one-step in common"):
        scorer_check(own.of_pairs(np.array([False, False, False, True, True])), trained)


def test_between_seeds_by_hand() -> None:
    # Seed 41 ranks the four pairs a b c d, seed 42 a c d b. Easiest halves {a, b} and {a, c}.
    losses = [[[0.1], [0.1]], [[0.2], [0.9]], [[0.3], [0.2]], [[0.9], [0.3]]]
    result = agreement(table_of(losses), replicates=20)
    (between,) = result["seeds"]
    assert (between["a"], between["b"]) == (41, 42)
    assert between["overlap"]["value"] == pytest.approx(1 / 2)
    assert between["jaccard"]["value"] == pytest.approx(1 / 3)
    # Ranks 1 2 3 4 and 1 4 2 3: d^2 = 0 + 4 + 1 + 1 = 6; 1 - 6 * 6 / (4 * 15).
    assert between["spearman"]["value"] == pytest.approx(1 - 36 / 60)
    # Means .1, .55, .25, .6: none above ln 2 = .693.
    assert result["above_chance"]["value"] == 0.0
    assert result["fraction"] == 0.5
    assert result["bootstrap"] == {"replicates": 20, "clusters": 4, "level": 0.95}


@pytest.mark.parametrize(
    ("rule", "fraction"),
    [
        (Rule(fraction=0.3), 0.3),
        (Rule("hardest", fraction=0.3), 0.3),
        (Rule(count=50), 50 / 201),
        (Rule("band", band=(0.25, 0.75)), None),
        (Rule("below", threshold=0.65), None),
    ],
)
def test_sets_are_those_that_the_rule_selects_by_each_seed(rule, fraction) -> None:
    losses = noisy(201, seeds=2)
    table = table_of(losses)
    first, second = (select(losses[:, s].mean(axis=1), table.pair_ids_P, rule).selected_P for s in (0, 1))
    result = agreement(table, rule=rule, replicates=5)
    both, either = (first & second).sum(), (first | second).sum()
    assert result["seeds"][0]["overlap"]["value"] == pytest.approx(both / first.sum(), abs=1e-12)
    assert result["seeds"][0]["jaccard"]["value"] == pytest.approx(both / either, abs=1e-12)
    if rule.name == "below":
        assert result["fraction"] is None
    elif fraction is not None:
        assert result["fraction"] == pytest.approx(fraction, abs=0.5 / 201)


@pytest.mark.parametrize("rule", [Rule("random", fraction=0.2), Rule("all")])
def test_rules_that_do_not_go_by_difficulty_compare_the_easiest_half(rule) -> None:
    table = table_of(noisy(100, seeds=2))
    assert agreement(table, rule=rule, replicates=5) == agreement(table, rule=Rule(), replicates=5)


def test_aggregates_are_used_for_the_seeds_own_difficulties() -> None:
    losses = noisy(150, seeds=2, evaluations=3)
    final = scipy.stats.spearmanr(losses[:, 0, -1], losses[:, 1, -1]).statistic
    assert agreement(table_of(losses), "final", replicates=5)["seeds"][0]["spearman"][
        "value"
    ] == pytest.approx(final)


def test_above_chance_counts_nats_even_for_ranks() -> None:
    losses = np.full((10, 1, 2), 0.6)
    losses[:3] = 0.7
    for how in ("mean", "rank-mean"):
        assert agreement(table_of(losses), how, replicates=5)["above_chance"]["value"] == pytest.approx(0.3)


def test_one_seed_has_nothing_to_compare() -> None:
    result = agreement(table_of(noisy(50, seeds=1)), replicates=5)
    assert result["seeds"] == []
    assert len(result["spearman"]) == 2


def test_what_is_not_defined_is_null_and_the_result_is_json() -> None:
    constant = agreement(table_of(np.full((6, 2, 1), 0.7)), replicates=5)
    assert constant["spearman"][0][1] is None
    single = agreement(table_of([[[0.1], [0.2]]]), replicates=5)
    assert single["above_chance"] == {"value": None, "standard_error": None, "low": None, "high": None}
    one_prompt = agreement(table_of(noisy(30), ["same"] * 30), replicates=5)
    assert one_prompt["seeds"][0]["spearman"]["value"] is not None
    assert one_prompt["seeds"][0]["spearman"]["standard_error"] is None
    json.dumps([constant, single, one_prompt], allow_nan=False)


def test_partial_tables_compare_the_complete_pairs_and_present_columns() -> None:
    losses = noisy(60, seeds=2, evaluations=2)
    partial = losses.copy()
    partial[:10, 0, 0] = np.nan  # ten pairs lack one record
    partial[:, 1, 0] = np.nan  # one evaluation is not there at all
    result = agreement(table_of(partial), replicates=5)
    assert result["pairs"] == 50
    present = [{"seed": 41, "evaluation": 1}, {"seed": 41, "evaluation": 2}, {"seed": 42, "evaluation": 2}]
    assert result["columns"] == present
    expected = scipy.stats.spearmanr(losses[10:].reshape(50, -1)[:, [0, 1, 3]]).statistic
    np.testing.assert_allclose(result["spearman"], expected, atol=1e-12)


def test_same_seed_same_numbers() -> None:
    table = table_of(noisy(80))
    assert agreement(table, replicates=50, seed=1) == agreement(table, replicates=50, seed=1)
    assert agreement(table, replicates=50, seed=1) != agreement(table, replicates=50, seed=2)


def test_standard_error_of_a_share_is_the_binomial_one() -> None:
    losses = np.full((400, 1, 1), 0.5)
    losses[:100] = 0.9
    result = agreement(table_of(losses), replicates=5)["above_chance"]
    exact = math.sqrt(0.25 * 0.75 / 399)  # of independent pairs
    assert result["standard_error"] == pytest.approx(exact)
    assert result["low"] == pytest.approx(0.25 - 1.96 * exact, abs=0.003)
    assert result["high"] == pytest.approx(0.25 + 1.96 * exact, abs=0.003)


def test_a_share_of_none_has_an_interval_too() -> None:
    # 10 of 10 pairs below ln 2. Student's t of 9 degrees of freedom is 2.262; Wilson: t^2 / (10 + t^2).
    above = agreement(table_of(np.full((10, 1, 1), 0.5)), replicates=5)["above_chance"]
    assert (above["value"], above["low"]) == (0.0, 0.0)
    assert above["high"] == pytest.approx(2.2622**2 / (10 + 2.2622**2), abs=1e-4)


def test_standard_error_of_spearman_without_correlation() -> None:
    # Of independent columns its variance is 1 / (n - 1).
    generator = np.random.default_rng(3)
    result = agreement(table_of(generator.normal(size=(500, 2, 1))), replicates=1000)
    assert result["seeds"][0]["spearman"]["standard_error"] == pytest.approx(1 / math.sqrt(499), rel=0.12)


def test_clustered_pairs_get_wider_intervals() -> None:
    # Every prompt has four identical pairs: 100 prompts know what 100 pairs know, so the error is that of
    # 100 observations, twice that which 400 independent pairs would have.
    losses = np.repeat(noisy(100, seeds=2, evaluations=1, decimals=6), 4, axis=0)
    prompts = np.repeat(np.arange(100), 4)
    clustered = agreement(table_of(losses, prompts), replicates=1000)
    as_if_independent = agreement(table_of(losses), replicates=1000)
    for statistic in ("spearman", "overlap"):
        wide = clustered["seeds"][0][statistic]["standard_error"]
        narrow = as_if_independent["seeds"][0][statistic]["standard_error"]
        assert wide / narrow == pytest.approx(2.0, rel=0.15)
    wide = clustered["spearman_high"][0][1] - clustered["spearman_low"][0][1]
    narrow = as_if_independent["spearman_high"][0][1] - as_if_independent["spearman_low"][0][1]
    assert wide / narrow == pytest.approx(2.0, rel=0.2)


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    # Clusters of three with shared noise; the true mean is 0. 95% of 300 intervals should hold it; the
    # standard error of that count is sqrt(300 * .95 * .05) = 3.8, and percentile intervals of 60 clusters
    # are a little short.
    generator = np.random.default_rng(11)
    clusters = np.repeat(np.arange(60), 3)
    held = 0
    for trial in range(300):
        values = generator.normal(size=60)[clusters] + generator.normal(size=180)
        draws = cluster_bootstrap(
            lambda weights, values=values: np.array([np.average(values, weights=weights)]),
            clusters,
            replicates=200,
            seed=trial,
        )
        low, high = bounds(draws)
        held += bool(low[0] <= 0 <= high[0])
    assert 0.90 <= held / 300 <= 0.98


def test_undefined_draws_give_no_interval() -> None:
    draws = Draws(np.array([1.0, 1.0]), np.array([[1.0, np.nan], [2.0, np.nan], [3.0, 1.0]]), clusters=3)
    defined, mostly_undefined = estimates(draws)
    assert defined.standard_error == pytest.approx(1.0)
    assert math.isnan(mostly_undefined.standard_error)


def test_binned_resamples_agree_with_exact_ones(monkeypatch) -> None:
    table = table_of(noisy(3000, decimals=9))
    exact = agreement(table, replicates=100)
    monkeypatch.setattr(agreement_module, "_MAX_BINS", 512)
    binned = agreement(table, replicates=100)
    # Point values do not go through the bins at all. A bin moves a rank by up to 1 / 512 of its range, at
    # random over the pairs, so a correlation by about 1 / 512 / sqrt(3000); five of them.
    assert binned["spearman"] == exact["spearman"]
    np.testing.assert_allclose(
        binned["spearman_low"], exact["spearman_low"], rtol=0, atol=5 / 512 / math.sqrt(3000)
    )
    for name in ("overlap", "jaccard"):
        assert binned["seeds"][0][name]["low"] == pytest.approx(exact["seeds"][0][name]["low"], abs=2e-3)


def test_resamples_of_large_tables_are_bounded() -> None:
    assert rows_for(20) == 20_000
    assert rows_for(18) * 18 <= 400_000
    # 5,000 clusters of two pairs; about 1,000 pairs are 500 clusters.
    draws = cluster_bootstrap(
        lambda weights: weights.sum(keepdims=True),
        np.repeat(np.arange(5000), 2),
        replicates=20,
        max_rows=1000,
    )
    assert (draws.clusters, draws.drawn) == (5000, 500)


def test_a_resample_holds_whole_clusters_as_often_as_they_were_drawn() -> None:
    clusters = np.array(["b", "a", "c", "a", "b", "a"])
    seen = []

    def note(rows, weights):
        seen.append(dict(zip(rows.tolist(), weights.tolist(), strict=True)))
        return np.zeros(1)

    cluster_bootstrap(lambda weights: np.zeros(1), clusters, replicates=50, resampled=note)
    rows_of = {"a": {1, 3, 5}, "b": {0, 4}, "c": {2}}
    for weight_of in seen:
        times = {label: {weight_of.get(row, 0.0) for row in rows} for label, rows in rows_of.items()}
        assert all(len(each) == 1 for each in times.values())
        assert sum(each.pop() for each in times.values()) == 3  # clusters drawn
    assert len({tuple(sorted(weight_of.items())) for weight_of in seen}) > 5


def test_fewer_of_many_clusters_give_the_same_errors(monkeypatch) -> None:
    # 2,000 prompts with 2 pairs each. The standard deviations of two times 1,000 draws differ by about
    # sqrt(2 / 2000) = 3% by chance; what drawing 400 prompts instead adds is about 1 / sqrt(400) = 5%.
    prompts = np.repeat(np.arange(2000), 2)
    noise = np.repeat(noisy(2000, seeds=2, decimals=6), 2, axis=0) / 2
    table = table_of(noise + noisy(4000, seeds=2, decimals=6) / 2, prompts)
    whole = agreement(table)
    monkeypatch.setattr(bootstrap_module, "_CELLS_A_RESAMPLE", 6 * 800)
    fewer = agreement(table)
    assert fewer["bootstrap"] == {**whole["bootstrap"], "clusters_drawn": 400}
    assert fewer["spearman"] == whole["spearman"]
    for name in ("spearman", "overlap", "jaccard"):
        few, all_of_them = fewer["seeds"][0][name], whole["seeds"][0][name]
        assert few["value"] == all_of_them["value"]
        assert few["standard_error"] == pytest.approx(all_of_them["standard_error"], rel=0.15)
        error = all_of_them["standard_error"]
        assert few["low"] == pytest.approx(all_of_them["low"], abs=0.3 * error)
        assert few["high"] == pytest.approx(all_of_them["high"], abs=0.3 * error)


def test_error_of_fewer_clusters_is_the_analytic_one(monkeypatch) -> None:
    # Of independent columns the variance of Spearman's correlation is 1 / (n - 1), whatever is drawn.
    monkeypatch.setattr(bootstrap_module, "_CELLS_A_RESAMPLE", 4 * 1000)
    generator = np.random.default_rng(3)
    result = agreement(table_of(generator.normal(size=(20_000, 2, 1))))
    assert result["bootstrap"]["clusters_drawn"] == 1000
    assert result["seeds"][0]["spearman"]["standard_error"] == pytest.approx(1 / math.sqrt(19_999), rel=0.12)


def test_columns_with_few_values_keep_them_in_bins(monkeypatch) -> None:
    # The bins are each column's own: next to 3,000 distinct values two must not become one.
    losses = noisy(3000, seeds=2, evaluations=1, decimals=9)
    losses[:, 1] = np.where(losses[:, 1] > 0.7, 1.0, 0.5)
    monkeypatch.setattr(agreement_module, "_MAX_BINS", 512)
    result = agreement(table_of(losses), replicates=50)["seeds"][0]["spearman"]
    assert result["low"] < result["value"] < result["high"]


@pytest.mark.parametrize("labels", [["b", "a", "b", "c"], ["\u00e9", "a", "\u00e9", "\u4e2d"], [5, 2, 5, 9]])
def test_cluster_codes_are_those_of_unique(labels) -> None:
    assert cluster_codes(labels).tolist() == [1, 0, 1, 2]


def test_table_is_not_changed() -> None:
    table = table_of(noisy(40))
    before = dataclasses.replace(table, losses_PSE=table.losses_PSE.copy())
    agreement(table, replicates=5)
    np.testing.assert_array_equal(table.losses_PSE, before.losses_PSE)
