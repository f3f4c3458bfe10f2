from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.core.dpo import LN_2, dpo_losses


def test_a_pair_by_hand() -> None:
    # log-ratios: chosen -10 - -12 = 2, rejected -8 - -5 = -3; margin 0.1 * (2 - -3) = 0.5;
    # loss = -log(1 / (1 + e^-0.5)) = log(1 + e^-0.5) = log(1.6065306597) = 0.4740769842.
    found = dpo_losses([-10.0], [-8.0], [-12.0], [-5.0], beta=0.1)
    assert found.margin_P[0] == pytest.approx(0.5, rel=1e-15)
    assert found.loss_P[0] == pytest.approx(0.4740769842, abs=1e-10)


def test_a_policy_that_is_the_reference_has_margin_0_and_loss_ln_2() -> None:
    found = dpo_losses([-10.0, -1.0], [-8.0, -2.0], [-10.0, -1.0], [-8.0, -2.0], beta=0.3)
    assert (found.margin_P == 0.0).all()
    assert (found.loss_P == LN_2).all() and math.isclose(LN_2, 0.6931471805599453)


def test_extreme_margins_neither_overflow_nor_vanish() -> None:
    # For a large positive margin m the loss is e^-m, for a large negative one it is -m.
    found = dpo_losses([700.0, -700.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], beta=1.0)
    assert found.loss_P[0] == pytest.approx(math.exp(-700.0), rel=1e-12)
    assert found.loss_P[1] == 700.0


def test_float32_log_probs_are_computed_on_in_float64() -> None:
    chosen, reference = np.float32([-100.1]), np.float32([-100.2])
    zero = np.zeros(1, dtype=np.float32)
    found = dpo_losses(chosen, zero, reference, zero, beta=0.1)
    assert found.loss_P.dtype == np.float64
    assert found.margin_P[0] == 0.1 * (float(chosen[0]) - float(reference[0]))


@given(st.lists(st.floats(-500, 500), min_size=4, max_size=4), st.floats(0.001, 5.0))
def test_swapping_chosen_and_rejected_turns_the_margin_round(logps: list[float], beta: float) -> None:
    a, b, c, d = logps
    one, other = dpo_losses([a], [b], [c], [d], beta=beta), dpo_losses([b], [a], [d], [c], beta=beta)
    assert one.margin_P[0] == -other.margin_P[0]
    # -log s(m) - (-log s(-m)) = -m
    difference = one.loss_P[0] - other.loss_P[0]
    assert difference == pytest.approx(-one.margin_P[0], rel=1e-9, abs=1e-9)


def test_what_is_not_finite_stays_so_without_a_warning() -> None:
    inf = math.inf
    found = dpo_losses([math.nan, -inf, -inf], [0.0, 0.0, -inf], [0.0] * 3, [0.0] * 3, beta=0.1)
    assert np.isnan(found.loss_P[[0, 2]]).all() and found.loss_P[1] == inf


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be positive"):
        dpo_losses([0.0], [0.0], [0.0], [0.0], beta=beta)


@pytest.mark.parametrize("chosen", [[0.0, 0.0], [[0.0]], 0.0])
def test_shapes_must_be_the_same_and_flat(chosen: object) -> None:
    with pytest.raises(ValueError, match="one shape"):
        dpo_losses(chosen, [0.0], [0.0], [0.0], beta=0.1)  # type: ignore[arg-type]
