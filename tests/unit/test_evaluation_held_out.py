"""Held-out metrics: joined by pair, computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from selective_dpo.errors import DataError, IdentityError, RecordsError
from selective_dpo.evaluation.evaluate import held_out_metrics
from selective_dpo.logprobs.compute import PairLogps

POLICY = PairLogps(["a", "b", "c"], np.array([-1.0, -4.0, -2.0]), np.array([-5.0, -2.0, -2.0]))
# Another order, and a pair that the policy was not asked for
REFERENCE = PairLogps(["c", "x", "a", "b"], np.array([-2.0, 0, -3.0, -3.0]), np.array([-2.0, 0, -3.0, -3.0]))
TOKENS = np.array([[2, 4], [1, 2], [3, 3]])
SETTINGS = {"beta": 0.5}
PROMPTS = {"a": "p", "b": "q", "c": "q", "x": "r"}


def test_metrics_by_hand() -> None:
    # beta .5. a: .5 * ((-1 + 3) - (-5 + 3)) = 2; b: .5 * ((-4 + 3) - (-2 + 3)) = -1; c: 0.
    metrics = held_out_metrics(POLICY, REFERENCE, TOKENS, PROMPTS, SETTINGS)
    assert (metrics.pairs, metrics.prompts) == (3, 2)
    assert metrics.margin.value == pytest.approx((2 - 1 + 0) / 3)
    assert metrics.accuracy.value == pytest.approx((1 + 0 + 0.5) / 3)
    losses = [math.log(1 + math.exp(-2)), math.log(1 + math.e), math.log(2)]
    assert metrics.loss.value == pytest.approx(sum(losses) / 3)
    # Accuracy residuals .5, -.5, 0 by prompt: p .5, q -.5; variance = .5 / 3^2 * 2 / 1
    assert metrics.accuracy.standard_error == pytest.approx(math.sqrt(0.5 / 9 * 2))


def test_the_starting_model_is_at_chance() -> None:
    metrics = held_out_metrics(REFERENCE, REFERENCE, np.ones((4, 2)), PROMPTS, {"beta": 0.1})
    assert metrics.accuracy.value == 0.5
    assert metrics.loss.value == pytest.approx(math.log(2))


def test_what_does_not_match_is_named() -> None:
    with pytest.raises(IdentityError, match="1 of 3 ids are missing: b"):
        held_out_metrics(POLICY, PairLogps(["a", "c"], np.zeros(2), np.zeros(2)), TOKENS, PROMPTS, SETTINGS)
    with pytest.raises(IdentityError, match="2 held-out pairs have no prompt id: b, c"):
        held_out_metrics(POLICY, REFERENCE, TOKENS, {"a": "p"}, SETTINGS)
    broken = POLICY._replace(chosen_P=np.array([-1.0, -np.inf, -2.0]))
    with pytest.raises(RecordsError, match=r"1 held-out pairs .* not finite: b"):
        held_out_metrics(broken, REFERENCE, TOKENS, PROMPTS, SETTINGS)
    with pytest.raises(DataError, match=r"data\.test"):
        held_out_metrics(PairLogps([], np.zeros(0), np.zeros(0)), REFERENCE, TOKENS[:0], PROMPTS, SETTINGS)


def test_the_loss_is_the_one_that_the_policy_was_trained_with() -> None:
    # Log-ratios: a 2 and -2, b -1 and 1, c 0 and 0. Hinge: 1 - .5 * 4, that is 0; 1 - .5 * -2 = 2; 1.
    hinge = held_out_metrics(POLICY, REFERENCE, TOKENS, PROMPTS, {"beta": 0.5, "loss_type": "hinge"})
    assert hinge.loss.value == pytest.approx((0 + 2 + 1) / 3)
    # Per token: a 2/2 + 2/4 = 1.5, b -1 - 1/2 = -1.5, c 0; squared distance from 1 / (2 * .5) = 1.
    ipo = held_out_metrics(POLICY, REFERENCE, TOKENS, PROMPTS, {"beta": 0.5, "loss_type": "ipo"})
    assert ipo.loss.value == pytest.approx((0.5**2 + 2.5**2 + 1) / 3)
    assert ipo.margin == hinge.margin


def test_a_trained_loss_that_no_pair_has_alone_leaves_dpos_own() -> None:
    own = held_out_metrics(POLICY, REFERENCE, TOKENS, PROMPTS, SETTINGS)
    several = {"beta": 0.5, "loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.2]}
    assert held_out_metrics(POLICY, REFERENCE, TOKENS, PROMPTS, several) == own
