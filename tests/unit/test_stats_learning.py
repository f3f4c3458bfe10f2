"""Learned steps, forgetting and chance: values found by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from selective_dpo.losses import negative_log_sigmoid
from selective_dpo.stats.learning import (
    chance_jaccard,
    forgetting_events,
    learned_steps,
    margins_from_losses,
)

# One seed, five evaluations, a pair a row.
MARGINS = np.array(
    [
        [0.1, 0.5, 0.6, 0.7, 0.8],  # above .4 from the second on
        [0.5, 0.1, 0.5, 0.5, 0.5],  # above .4, lost, and from the third on for good
        [0.5, 0.5, 0.5, 0.5, 0.4],  # at .4 in the end, which is not above it
        [-0.1, 0.1, -0.1, 0.1, -0.1],  # right twice and lost twice
        [0.5, 0.5, 0.5, 0.5, 0.5],  # from the first on
    ]
)[:, None, :]


def test_learned_step_is_the_first_of_the_evaluations_that_stay_above() -> None:
    assert learned_steps(MARGINS, 0.4)[:, 0].tolist() == [2, 3, 6, 6, 1]
    assert learned_steps(MARGINS, 0.0)[:, 0].tolist() == [1, 1, 1, 6, 1]


def test_learned_steps_are_by_seed() -> None:
    two = np.concatenate([MARGINS, -MARGINS], axis=1)
    # The fourth pair with its sign turned: -.1 .1 -.1 .1 becomes above 0 at 1, 3 and, for good, 5.
    assert learned_steps(two, 0.0).tolist() == [[1, 6], [1, 6], [1, 6], [6, 5], [1, 6]]


def test_forgetting_is_a_fall_from_above_to_not_above() -> None:
    assert forgetting_events(MARGINS)[:, 0].tolist() == [0, 0, 0, 2, 0]
    assert forgetting_events(MARGINS, 0.4)[:, 0].tolist() == [0, 1, 1, 0, 0]
    assert forgetting_events(MARGINS[:, :, :1])[:, 0].tolist() == [0] * 5


def test_margins_of_dpos_own_loss() -> None:
    # ln(1 + e^-m): ln 2 at m = 0; ln 3 at e^-m = 2; ln 1.5 at e^-m = 1/2.
    found = margins_from_losses(np.log([2.0, 3.0, 1.5]))
    np.testing.assert_allclose(found, [0.0, -math.log(2), math.log(2)], atol=1e-15)
    wide = np.array([-700.0, -30.0, 1e-9, 30.0])
    np.testing.assert_allclose(margins_from_losses(negative_log_sigmoid(wide)), wide, rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match="above 0"):
        margins_from_losses(np.array([0.5, 0.0]))


def test_chance_jaccard_by_counting() -> None:
    # Of 4 pairs 2 are selected twice over. The 6 second selections share 2, 1, 1, 1, 1, 0 with the first:
    # 1 on average, of 3 in either.
    assert chance_jaccard(0.5) == pytest.approx(1 / 3)
    assert chance_jaccard(1.0) == 1.0
    assert chance_jaccard(0.1) == pytest.approx(0.1 / 1.9)
