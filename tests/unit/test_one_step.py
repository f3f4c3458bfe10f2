"""The mathematics of one-step difficulty, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from selective_dpo.difficulty.one_step import (
    GradientSums,
    add_sums,
    better_size,
    cross_fitted_scale,
    loss_slopes,
    micro_batches,
    scaled_logps,
    step_direction,
)

DPO = {"beta": 0.1}


def sums_of(*gradients: list[float], pairs: int = 1) -> GradientSums:
    """The sums of micro-batches of `pairs` pairs each, with these summed gradients."""
    width = len(gradients[0])
    made = GradientSums(np.zeros(width), np.zeros(width), 0, 0)
    for gradient in gradients:
        made = made.plus(np.array(gradient), pairs)
    return made


def test_gradients_and_squares_are_accumulated_by_micro_batch() -> None:
    # Two micro-batches of two pairs: means (1, 2) and (-2, 0), squares (1, 4) and (4, 0).
    sums = sums_of([2.0, 4.0], [-4.0, 0.0], pairs=2)
    assert sums.gradient_W.tolist() == [-2.0, 4.0]
    assert sums.squares_W.tolist() == [5.0, 4.0]
    assert (sums.pairs, sums.micro_batches) == (4, 2)
    both = add_sums([sums, sums_of([1.0, 1.0])])
    assert both.gradient_W.tolist() == [-1.0, 5.0]
    assert both.squares_W.tolist() == [6.0, 5.0]
    assert (both.pairs, both.micro_batches) == (5, 3)


def test_micro_batches_depend_on_the_pairs_only() -> None:
    ids = [f"pair{number:02}" for number in range(20)]
    lengths = np.array([number * 7 % 5 for number in range(20)])
    dealt = micro_batches(ids, lengths)
    assert [len(rows) for rows in dealt] == [8, 8, 4]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(20))
    assert (np.diff(lengths[np.concatenate(dealt)]) >= 0).all()
    order = np.random.default_rng(0).permutation(20)
    shuffled = micro_batches([ids[row] for row in order], lengths[order])
    for one, other in zip(dealt, shuffled, strict=True):
        assert [ids[row] for row in one] == [ids[order[row]] for row in other]


def test_slopes_of_losses_for_a_policy_that_has_not_moved() -> None:
    tokens = [[4, 2]]
    # d/dx -log sigmoid(beta x) at 0 is -beta / 2; of the rejected log-ratio, beta / 2.
    np.testing.assert_allclose(loss_slopes(tokens, DPO), [[-0.05, 0.05]], rtol=1e-6)
    # d/dx max(0, 1 - beta x) at 0 is -beta.
    np.testing.assert_allclose(loss_slopes(tokens, {**DPO, "loss_type": "hinge"}), [[-0.1, 0.1]], rtol=1e-6)
    # A loss of log-ratios a token: 4 tokens of the chosen one, 2 of the rejected one.
    per_token = loss_slopes(tokens, {**DPO, "loss_type": "sigmoid_norm"})
    np.testing.assert_allclose(per_token, [[-0.05 / 4, 0.05 / 2]], rtol=1e-6)


def test_a_step_goes_against_the_mean_gradient_in_units_of_its_root_mean_square() -> None:
    # Weight 0: gradients 3 and 1, mean 2, rms sqrt(5). Weight 1: 0.03 and -0.01, mean 0.01, rms 0.01 sqrt(5).
    direction = step_direction(sums_of([3.0, 0.03], [1.0, -0.01]))
    # The floor is 0.001 of sqrt((5 + 0.0005) / 2) = 1.5812.
    expected = [-2 / (math.sqrt(5) + 0.0015812), -0.01 / (0.01 * math.sqrt(5) + 0.0015812)]
    np.testing.assert_allclose(direction, expected, rtol=1e-4)


def test_a_factor_of_the_loss_does_not_change_the_step() -> None:
    one, other = sums_of([3.0, 0.03], [1.0, -0.01]), sums_of([0.03, 3e-4], [0.01, -1e-4])
    np.testing.assert_allclose(step_direction(one), step_direction(other), rtol=1e-6)


@pytest.mark.parametrize(("gradient", "reason"), [(0.0, "zero"), (math.nan, "not finite"), (math.inf, "not")])
def test_there_is_no_step_without_a_gradient(gradient: float, reason: str) -> None:
    with pytest.raises(ValueError, match=reason), np.errstate(invalid="ignore"):
        step_direction(sums_of([gradient, gradient]))


def test_margins_of_a_bilinear_model() -> None:
    """log pi(chosen) - log pi(rejected) = <w, x>: then the first order is exact, and can be done by hand."""
    # Pair a learns from b and c: g is x, the loss's gradient at w = 0 is -beta / 2 x.
    features = {"a": np.array([1.0, 2.0]), "b": np.array([2.0, 0.0]), "c": np.array([0.0, 1.0])}
    others = sums_of(*(list(-0.05 * features[name]) for name in "bc"))
    # Mean gradient -0.05 (1, 0.5). Rms 0.05 (sqrt 2, sqrt 0.5), typical 0.05 sqrt(1.25); floor 0.001 of that.
    by_hand = np.array([1 / (math.sqrt(2) + 1e-3 * 1.1180), 0.5 / (math.sqrt(0.5) + 1e-3 * 1.1180)])
    delta = features["a"] @ (0.3 * step_direction(others))
    assert delta == pytest.approx(0.3 * (by_hand[0] + 2 * by_hand[1]), rel=1e-4)


def test_the_next_size_makes_log_ratios_as_large_as_wanted() -> None:
    # Per token: 0.3 / 10 = 0.03 and -0.8 / 20 = -0.04: root mean square sqrt((9 + 16) / 2) / 100.
    wanted = 2.0 * 0.02 / (math.sqrt(12.5) / 100)
    assert better_size(2.0, [0.3, -0.8], [10, 20], 0.02) == pytest.approx(wanted)
    assert better_size(2.0, [0.0, 0.0], [10, 20], 0.02) == 32.0  # no change: 16 times as large
    for wild in ([math.nan, 1.0], [math.inf, 1.0]):
        assert better_size(2.0, wild, [10, 20], 0.02) == 0.125


def test_the_scale_is_fitted_on_the_other_folds() -> None:
    # Of eight pairs that are fitted, six have log-ratio difference 2 and two have -2. The mean loss is least
    # where sigmoid(beta * scale * 2) = 6/8, so scale = logit(3/4) / 0.2.
    chosen = np.array([2.0] * 6 + [-2.0] * 2 + [50.0, -70.0])
    policy = np.stack([chosen - 10, np.full(10, -12.0)], axis=1)
    reference = np.tile([-10.0, -12.0], (10, 1))
    tokens = np.full((10, 2), 5)
    held_out = np.arange(10) >= 8
    scale = cross_fitted_scale(policy, reference, tokens, held_out, DPO)
    assert scale == pytest.approx(math.log(3) / 0.2, rel=1e-3)
    policy[held_out] = 1e6
    assert cross_fitted_scale(policy, reference, tokens, held_out, DPO) == scale


def test_scaled_log_probs_have_scaled_log_ratios() -> None:
    moved = scaled_logps(np.array([[-8.0, -13.0]]), np.array([[-10.0, -12.0]]), 3.0)
    assert moved.tolist() == [[-4.0, -15.0]]
