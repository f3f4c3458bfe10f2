"""Win rates and preference metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from selective_dpo.errors import IdentityError
from selective_dpo.evaluation.results import preference_metrics
from selective_dpo.stats.win_rates import (
    Verdicts,
    cross_pairing,
    prompt_scores,
    self_pairing,
    win_rate,
    win_rate_difference,
)

# Prompt a: 1, 1, .5, .5 -> 0.75; prompt b: 0 -> 0; prompt c: 1, .5 -> 0.75
ARM = Verdicts(["a", "c", "a", "b", "a", "a", "c"], [1, 1, 1, 0, 0.5, 0.5, 0.5])


def test_prompts_weigh_the_same_whatever_their_number_of_verdicts() -> None:
    prompt_ids, scores = prompt_scores(ARM)
    assert prompt_ids == ["a", "b", "c"]
    np.testing.assert_array_equal(scores, [0.75, 0.0, 0.75])


def test_win_rate_and_its_standard_error() -> None:
    estimate = win_rate(ARM)
    # mean = (.75 + 0 + .75) / 3 = .5; squared residuals .0625 + .25 + .0625 = .375;
    # variance = .375 / 3^2 * 3 / 2 = .0625, so the standard error is .25
    assert estimate.value == pytest.approx(0.5)
    assert estimate.standard_error == pytest.approx(0.25)
    # .25 / 3 if a prompt's verdicts were alike: r = (.0625 + .1 / 9) / (.25 / 3 + .1 / 9) = .0736 / .0944
    # t = 4.3027 of 2 degrees of freedom, w = t^2 r / 3 = 4.8106, reach sqrt(w / 4 + w^2 / 4) / (1 + w)
    assert estimate.low == pytest.approx(0.5 - 0.45493, abs=1e-4)
    assert estimate.high == pytest.approx(0.5 + 0.45493, abs=1e-4)


def test_one_prompt_has_no_standard_error() -> None:
    estimate = win_rate(Verdicts(["a", "a"], [1, 0]))
    assert estimate.value == 0.5
    assert math.isnan(estimate.standard_error)


def test_the_difference_is_paired_by_prompt_and_not_by_position() -> None:
    # By prompt: a .75 - .25 = .5; b 0 - 0 = 0; c .75 - .5 = .25. Mean .25;
    # squared residuals .0625 + .0625 + 0 = .125; variance = .125 / 9 * 3 / 2 = 1 / 48
    other = Verdicts(["c", "b", "a", "a"], [0.5, 0, 0.5, 0])
    estimate = win_rate_difference(ARM, other)
    assert estimate.value == pytest.approx(0.25)
    assert estimate.standard_error == pytest.approx(math.sqrt(1 / 48))


def test_the_difference_to_itself_is_exactly_zero() -> None:
    estimate = win_rate_difference(ARM, ARM)
    assert (estimate.value, estimate.standard_error) == (0.0, 0.0)
    assert -1.0 < estimate.low < 0.0 < estimate.high < 1.0


def test_a_win_rate_near_the_end_keeps_to_it() -> None:
    every = win_rate(Verdicts([f"p{number}" for number in range(20)], [1] * 20))
    assert every.low < every.value == every.high == 1.0


def test_arms_judged_on_other_prompts_have_no_difference() -> None:
    with pytest.raises(IdentityError, match=r"1 ids missing \(b\), 1 not asked for \(d\)"):
        win_rate_difference(ARM, Verdicts(["a", "c", "d"], [1, 1, 1]))


@pytest.mark.parametrize(
    "verdicts",
    [Verdicts([], []), Verdicts(["a"], [1, 0]), Verdicts(["a"], [1.2]), Verdicts(["a"], [float("nan")])],
)
def test_what_is_not_a_set_of_verdicts_is_refused(verdicts: Verdicts) -> None:
    with pytest.raises(ValueError):
        win_rate(verdicts)


def test_cross_pairing_holds_every_combination_once() -> None:
    pairing = cross_pairing(2, 3)
    pairs = list(zip(pairing.sample_C.tolist(), pairing.opponent_sample_C.tolist(), strict=True))
    assert pairs == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_self_pairing_never_compares_a_sample_with_itself() -> None:
    pairing = self_pairing(3)
    pairs = list(zip(pairing.sample_C.tolist(), pairing.opponent_sample_C.tolist(), strict=True))
    assert pairs == [(0, 1), (0, 2), (1, 2)]
    assert self_pairing(1).sample_C.size == 0


@pytest.mark.parametrize(
    ("chosen", "rejected", "falls"),
    [
        ([-2.0, -1.0], [-9.0, -8.0], True),
        ([2.0, 1.0], [-9.0, -8.0], False),
        ([-2.0, 3.0], [-9.0, -8.0], False),
    ],
)
def test_both_log_probs_falling(chosen: list[float], rejected: list[float], falls: bool) -> None:
    # Means -1.5 and -8.5, each with a standard error of 1/2 (two prompts: sqrt(2 * .25 / 4 * 2));
    # -1.5 + 1.96 / 2 is below 0. The third mean is +.5.
    changes_P2 = np.array([chosen, rejected]).T
    metrics = preference_metrics([0.2, 0.3], [1.0, 1.0], ["x", "y"], changes_P2)
    assert metrics.chosen_change is not None and metrics.rejected_change is not None
    assert metrics.chosen_change.value == np.mean(chosen)
    assert metrics.rejected_change.standard_error == pytest.approx(0.5)
    assert metrics.both_fall is falls
    assert not preference_metrics([0.2, 0.3], [1.0, 1.0], ["x", "y"]).both_fall  # not measured


def test_preference_metrics() -> None:
    # Prompt x holds the first and third pair. Accuracy: 1, 0, .5, 1, mean .625. Residuals by prompt:
    # x (.375 - .125) = .25; y -.625; z .375. Squares .0625 + .390625 + .140625 = .59375.
    # variance = .59375 / 4^2 * 3 / 2
    metrics = preference_metrics([0.2, 1.0, math.log(2), 0.1], [1.5, -0.5, 0.0, 3.0], ["x", "y", "x", "z"])
    assert (metrics.pairs, metrics.prompts) == (4, 3)
    assert metrics.loss.value == pytest.approx((1.3 + math.log(2)) / 4)
    assert metrics.margin.value == pytest.approx(4.0 / 4)
    assert metrics.accuracy.value == pytest.approx(0.625)
    assert metrics.accuracy.standard_error == pytest.approx(math.sqrt(0.59375 / 16 * 1.5))


def test_a_policy_that_has_not_moved_scores_chance() -> None:
    metrics = preference_metrics([math.log(2)] * 3, [0.0] * 3, ["x", "y", "z"])
    assert metrics.accuracy.value == 0.5
    assert metrics.accuracy.standard_error == 0.0


def test_a_loss_that_is_not_finite_is_not_averaged_away() -> None:
    with pytest.raises(ValueError, match="finite"):
        preference_metrics([0.1, math.inf], [1.0, 1.0], ["x", "y"])
