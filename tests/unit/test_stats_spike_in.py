"""Planted labels: counted by hand, and a bound that holds as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from selective_dpo.stats.spike_in import (
    false_discovery_rate,
    limit_false_alarms,
    measure_spike_in,
    plant,
)

# From the largest score on: planted, not, planted and not (equal scores), not.
SCORE = [0.9, 0.8, 0.5, 0.5, 0.1]
PLANTED = [True, False, True, False, False]


def test_auroc_and_precision_are_those_counted_by_hand() -> None:
    found = measure_spike_in(SCORE, PLANTED, list("abcde"), sizes=[1, 2, 3, 4, 5])
    # The first planted pair is above all 3 others; the second is above one, equal to one, below one.
    assert found.auroc.value == pytest.approx((3 + 1.5) / 6)
    # Of the two with equal scores, half a planted one falls into the first three.
    assert [each.value for each in found.precision.values()] == pytest.approx(
        [1, 1 / 2, 1.5 / 3, 2 / 4, 2 / 5]
    )
    for each in (found.auroc, *found.precision.values()):
        assert 0.0 <= each.low <= each.value <= each.high <= 1.0


def test_a_score_that_knows_nothing_has_an_auroc_of_one_half() -> None:
    found = measure_spike_in([1.0] * 10, [True] * 2 + [False] * 8, range(10), sizes=[5])
    assert found.auroc.value == 0.5
    assert found.precision[5].value == pytest.approx(0.2)


def test_pairs_of_one_prompt_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    score, planted = generator.random(200), generator.random(200) < 0.3
    alone = measure_spike_in(score, planted, np.arange(200), sizes=[50])
    # Each pair four times, under one prompt: nothing more is known, and the interval stays as wide.
    prompts = np.repeat(np.arange(200), 4)
    together = measure_spike_in(np.repeat(score, 4), np.repeat(planted, 4), prompts, sizes=[200])
    assert together.auroc.value == pytest.approx(alone.auroc.value)
    assert together.auroc.high - together.auroc.low == pytest.approx(
        alone.auroc.high - alone.auroc.low, rel=0.1
    )
    assert together.precision[200].value == pytest.approx(alone.precision[50].value)


@pytest.mark.parametrize("planted", [[True] * 5, [False] * 5])
def test_nothing_can_be_said_where_all_or_none_are_planted(planted: list[bool]) -> None:
    with pytest.raises(ValueError, match="some of the pairs must be planted"):
        measure_spike_in(SCORE, planted, list("abcde"), sizes=[1])


def test_which_pairs_are_planted_depends_on_the_ids_alone() -> None:
    ids = np.array([f"{number:02d}" for number in range(40)])
    planted = plant(ids, 0.1, seed=3)
    assert planted.sum() == 4
    shuffled = np.random.default_rng(1).permutation(40)
    assert (plant(ids[shuffled], 0.1, seed=3) == planted[shuffled]).all()
    assert (plant(ids, 0.1, seed=4) != planted).any()
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="cannot plant"):
            plant(ids, share, seed=0)


def test_the_limit_is_clopper_and_pearsons() -> None:
    # 20 pairs with the largest scores, all planted, of 20 prompts: the upper limit of 0 in 20 at the level
    # 1 - d is 1 - d^(1/20), by hand, with d = 0.1.
    score = np.arange(100.0)
    planted = score >= 80
    found = limit_false_alarms(score, planted, np.arange(100), 0.2, shares=[0.2])
    assert found is not None
    assert (found.threshold, found.flagged, found.false_alarms) == (80.0, 20, 0.0)
    assert found.upper == pytest.approx(1 - 0.1 ** (1 / 20))
    # Of ten prompts with two pairs each they count as 10.
    halved = limit_false_alarms(score, planted, np.arange(100) // 2, 0.3, shares=[0.2])
    assert halved is not None
    assert halved.upper == pytest.approx(1 - 0.1 ** (1 / 10))
    # Two shares are tried, so each gets half of the 0.1; the larger one holds 20 of 40 wrongly.
    both = limit_false_alarms(score, planted, np.arange(100), 0.2, shares=[0.2, 0.4])
    assert both is not None
    assert (both.flagged, both.upper) == (20, pytest.approx(1 - 0.05 ** (1 / 20)))
    assert limit_false_alarms(score, planted, np.arange(100), 0.05, shares=[0.2, 0.4]) is None


def test_equal_scores_are_flagged_together() -> None:
    found = limit_false_alarms(
        [1.0] * 50 + [0.0] * 50, [True] * 50 + [False] * 50, range(100), 0.2, shares=[0.1]
    )
    assert found is not None
    assert found.flagged == 50


def test_the_false_discovery_rate_is_that_of_a_mixture() -> None:
    # Flagged at 0.8: one of four own pairs (0.9), and planted two of four (0.1 and 0.2 become 0.9 and 0.8).
    own = [0.9, 0.1, 0.2, 0.5]
    assert false_discovery_rate(own, 0.1, 0.8) == pytest.approx(0.9 * 0.25 / (0.9 * 0.25 + 0.1 * 0.5))
    assert np.isnan(false_discovery_rate(own, 0.1, 0.95))


def test_the_bound_is_kept_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    population = 1 / (1 + np.exp(generator.normal(2.0, 1.5, size=100_000)))
    broken = reached = 0
    for _ in range(200):
        own = generator.choice(population, size=1000)
        planted = generator.random(1000) < 0.1
        score = np.where(planted, 1 - own, own)
        found = limit_false_alarms(score, planted, np.arange(1000), 0.4)
        if found is not None:
            reached += 1
            broken += false_discovery_rate(population, 0.1, found.threshold) > 0.4
    assert reached > 100  # else the bound would be kept by never flagging anything
    assert broken <= 0.1 * 200


def test_without_their_prompts_pairs_that_are_alike_would_break_the_bound() -> None:
    # Each prompt has six equal pairs. At the share that is tried about 5.6% of the flagged are false alarms.
    generator = np.random.default_rng(11)
    population = 1 / (1 + np.exp(generator.normal(2.0, 1.5, size=100_000)))
    broken = {"by prompt": 0, "pair by pair": 0}
    for _ in range(200):
        own, planted = generator.choice(population, size=400), generator.random(400) < 0.1
        score, is_planted = np.repeat(np.where(planted, 1 - own, own), 6), np.repeat(planted, 6)
        for name, prompts in (("by prompt", np.repeat(np.arange(400), 6)), ("pair by pair", np.arange(2400))):
            found = limit_false_alarms(score, is_planted, prompts, 0.036, shares=[0.05])
            if found is not None:
                broken[name] += false_discovery_rate(population, 0.1, found.threshold) > 0.036
    assert broken["by prompt"] <= 0.1 * 200 < broken["pair by pair"], broken
