"""The loss of a pair: hand-derived values of each loss, and what all of them share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.losses import (
    LN_2,
    LOSSES,
    PairLosses,
    chance_loss,
    is_dpos_own,
    is_pairwise,
    options_read,
    pair_losses,
)

INF = math.inf


def losses_of(ratios_P2: Any, tokens_P2: Any = None, **settings: Any) -> PairLosses:
    """Of log-ratios: the reference's log-probs are 0, so they are the policy's."""
    ratios = np.asarray(ratios_P2, dtype=np.float64)
    tokens = np.ones_like(ratios) if tokens_P2 is None else tokens_P2
    return pair_losses(ratios, np.zeros_like(ratios), tokens, {"beta": 0.5, **settings})


def test_a_pair_by_hand() -> None:
    # log-ratios: chosen -10 - -12 = 2, rejected -8 - -5 = -3; margin 0.1 * (2 - -3) = 0.5;
    # loss = -log(1 / (1 + e^-0.5)) = log(1 + e^-0.5) = log(1.6065306597) = 0.4740769842.
    found = pair_losses([[-10.0, -8.0]], [[-12.0, -5.0]], [[1, 1]], {"beta": 0.1})
    assert found.margin_P[0] == pytest.approx(0.5, rel=1e-15)
    assert found.loss_P[0] == pytest.approx(0.4740769842, abs=1e-10)


# One pair: log-ratios 2 and -4, beta 0.5, so rewards r_w = 1 and r_l = -2, margin 3; 4 and 8 tokens.
# With s(x) = 1 / (1 + e^-x): s(1) = 0.7310585786, s(2) = 0.8807970780, s(3) = 0.9525741268;
# -log s(1) = 0.3132616875, -log s(-1) = 1.3132616875, -log s(2) = 0.1269280110,
# -log s(3) = 0.0485873516, -log s(-3) = 3.0485873516.
BY_HAND: dict[str, tuple[dict[str, Any], float]] = {
    "sigmoid": ({}, 0.0485873516),
    # max(0, 1 - 3)
    "hinge": ({}, 0.0),
    # Per token 2 / 4 - -4 / 8 = 1; (1 - 1 / (2 * 0.5))^2
    "ipo": ({}, 0.0),
    # Label smoothing 0.25: s(3) (log s(3) - log 0.75) + s(-3) (log s(-3) - log 0.25)
    # = 0.9525741268 * (-0.0485873516 + 0.2876820724) + 0.0474258732 * (-3.0485873516 + 1.3862943611)
    # = 0.2277554449 - 0.0788356966
    "exo_pair": ({"label_smoothing": 0.25}, 0.1489197483),
    # 0.3132616875 + (1.3132616875 + -log s(2) = 0.1269280110) / 2
    "nca_pair": ({}, 1.0333565368),
    # Label smoothing 0.25: (0.75 * 0.0485873516 - 0.25 * 3.0485873516) / 0.5
    "robust": ({"label_smoothing": 0.25}, -1.4514126484),
    # -log s(1) - log s(2)
    "bco_pair": ({}, 0.4401896985),
    # (2 - 1)^2 + (-4 + 1)^2
    "sppo_hard": ({}, 10.0),
    # (1 - s(1)) + s(-2) = 0.2689414214 + 0.1192029220
    "apo_zero": ({}, 0.3881443434),
    # s(1) + (1 - s(3))
    "apo_down": ({}, 0.7784844518),
    # tau 1, so that the share is s(3): 0.0485873516 * (1 - s(3)) + e^-3 * s(3), e^-3 = 0.0497870684
    "discopop": ({"discopop_tau": 1.0}, 0.0497301708),
    # 0.5 * 1 = 0.5 a token: log(1 + e^-0.5)
    "sigmoid_norm": ({}, 0.4740769842),
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_loss_by_hand(loss_type: str) -> None:
    options, expected = BY_HAND[loss_type]
    found = losses_of([[2.0, -4.0]], [[4, 8]], loss_type=loss_type, **options)
    assert found.margin_P.tolist() == [3.0]
    assert found.loss_P[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("kind", "chosen", "rejected"),
    [
        # f'(t) at t = e^2 and t = e^-4, but for a constant.
        ("reverse_kl", 2.0, -4.0),
        # 1 - 1 / t
        ("forward_kl", 1 - math.exp(-2), 1 - math.exp(4)),
        # log(2 t / (1 + t))
        ("js_divergence", math.log(2 / (1 + math.exp(-2))), math.log(2 / (1 + math.exp(4)))),
        # (t^(0.5 - 1) - 1) / (0.5 - 1)
        ("alpha_divergence", 2 - 2 * math.exp(-1), 2 - 2 * math.exp(2)),
    ],
)
def test_divergences_change_the_loss_and_not_the_margin(kind: str, chosen: float, rejected: float) -> None:
    found = losses_of([[2.0, -4.0]], f_divergence_type=kind)
    assert found.margin_P.tolist() == [3.0]
    assert found.loss_P[0] == pytest.approx(math.log1p(math.exp(-0.5 * (chosen - rejected))), rel=1e-12)


def test_several_losses_are_a_weighted_sum() -> None:
    found = losses_of(
        [[2.0, -4.0]], loss_type=["sigmoid", "sppo_hard", "apo_zero"], loss_weights=[2.0, 0.5, 1.0]
    )
    assert found.loss_P[0] == pytest.approx(2 * 0.0485873516 + 0.5 * 10 + 0.3881443434, abs=1e-9)
    both = losses_of([[2.0, -4.0]], loss_type=["sigmoid", "apo_zero"])
    assert both.loss_P[0] == pytest.approx(0.0485873516 + 0.3881443434, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, LN_2),
        ({"loss_type": "hinge"}, 1.0),
        # (0 - 1 / (2 * 0.5))^2
        ({"loss_type": "ipo"}, 1.0),
        ({"loss_type": "nca_pair"}, 2 * LN_2),
        # twice (0.5 / 0.5)^2
        ({"loss_type": "sppo_hard"}, 2.0),
        ({"loss_type": "apo_down"}, 1.0),
        # Half ln 2, half e^0
        ({"loss_type": "discopop"}, (LN_2 + 1) / 2),
        # 0.5 * (log 0.5 - log 0.9) + 0.5 * (log 0.5 - log 0.1)
        ({"loss_type": "exo_pair", "label_smoothing": 0.1}, -LN_2 - (math.log(0.9) + math.log(0.1)) / 2),
        ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0, 0.2]}, LN_2 + 0.2),
    ],
)
def test_the_loss_of_a_policy_that_has_not_moved(settings: dict[str, Any], expected: float) -> None:
    assert chance_loss({"beta": 0.5, **settings}) == pytest.approx(expected, rel=1e-14)


def test_a_policy_that_is_the_reference_has_margin_0_and_loss_ln_2() -> None:
    found = pair_losses(
        [[-10.0, -8.0], [-1.0, -2.0]], [[-10.0, -8.0], [-1.0, -2.0]], np.ones((2, 2)), {"beta": 0.3}
    )
    assert (found.margin_P == 0.0).all()
    assert (found.loss_P == LN_2).all() and math.isclose(LN_2, 0.6931471805599453)


def test_dpos_own_loss_is_known_by_its_margin() -> None:
    assert is_dpos_own(losses_of([[2.0, -4.0], [0.0, 7.0]]))
    assert is_dpos_own(losses_of([[INF, -INF]])) and not is_dpos_own(losses_of([[math.nan, 0.0]]))
    assert not is_dpos_own(losses_of([[2.0, -4.0]], loss_type="hinge"))


def test_extreme_margins_neither_overflow_nor_vanish() -> None:
    # For a large positive margin m the loss is e^-m, for a large negative one it is -m.
    found = losses_of([[700.0, 0.0], [-700.0, 0.0]], beta=1.0)
    assert found.loss_P[0] == pytest.approx(math.exp(-700.0), rel=1e-12)
    assert found.loss_P[1] == 700.0


def test_float32_log_probs_are_computed_on_in_float64() -> None:
    policy, reference = np.float32([[-100.1, 0.0]]), np.float32([[-100.2, 0.0]])
    found = pair_losses(policy, reference, [[1, 1]], {"beta": 0.1})
    assert found.loss_P.dtype == np.float64
    assert found.margin_P[0] == 0.1 * (float(policy[0, 0]) - float(reference[0, 0]))


@given(st.lists(st.floats(-500, 500), min_size=2, max_size=2), st.floats(0.001, 5.0))
def test_swapping_chosen_and_rejected_turns_the_margin_round(ratios: list[float], beta: float) -> None:
    one, other = losses_of([ratios], beta=beta), losses_of([ratios[::-1]], beta=beta)
    assert one.margin_P[0] == -other.margin_P[0]
    # -log s(m) - (-log s(-m)) = -m
    difference = one.loss_P[0] - other.loss_P[0]
    assert difference == pytest.approx(-one.margin_P[0], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_is_not_finite_stays_so_without_a_warning(loss_type: str) -> None:
    smoothing = {"label_smoothing": 0.1} if "label_smoothing" in options_read(loss_type) else {}
    found = losses_of([[math.nan, 0.0], [math.nan, math.nan]], loss_type=loss_type, **smoothing)
    assert np.isnan(found.loss_P).all() and np.isnan(found.margin_P).all()
    huge = losses_of([[-1e300, 1e300], [1e300, -1e300]], loss_type=loss_type, **smoothing)
    assert np.isfinite(huge.margin_P).all()


def test_infinite_log_probs_give_infinite_losses_or_none() -> None:
    found = losses_of([[-INF, 0.0], [-INF, -INF]])
    assert found.loss_P[0] == INF and np.isnan(found.loss_P[1])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": -0.1}, "beta must be positive"),
        ({"beta": math.nan}, "beta must be positive"),
        ({"loss_type": "exo_pair"}, "exo_pair needs a label_smoothing above 0 and below 1"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "robust needs a label_smoothing .* below 0.5"),
        ({"loss_type": "sft"}, "'sft' is not a pairwise loss: use one of sigmoid, hinge"),
        ({"f_divergence_type": "kl"}, "'kl' is none of reverse_kl"),
        ({"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]}, "zip"),
    ],
)
def test_what_makes_no_loss_is_an_error(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        losses_of([[0.0, 0.0]], **settings)


@pytest.mark.parametrize("policy", [[[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0], 0.0])
def test_shapes_must_be_the_same(policy: object) -> None:
    with pytest.raises(ValueError, match="one shape"):
        pair_losses(policy, [[0.0, 0.0]], [[1, 1]], {"beta": 0.1})  # type: ignore[arg-type]


def test_which_settings_have_a_loss_for_each_pair() -> None:
    assert is_pairwise({}) and is_pairwise({"loss_type": ["sigmoid", "ipo"]})
    assert not is_pairwise({"loss_type": "aot"}) and not is_pairwise({"loss_type": ["sigmoid", "sft"]})
