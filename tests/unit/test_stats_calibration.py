from __future__ import annotations

import math

import numpy as np
import pytest

from selective_dpo.stats.calibration import probability_wrong


def test_probabilities_fit_how_often_margins_agree_with_labels() -> None:
    # Six margins of 2 and two of -2: the mean loss is least where sigmoid(2 scale) = 6/8, whatever the unit.
    margins = np.array([2.0] * 6 + [-2.0] * 2)
    for unit in (1.0, 1e-6, 1e4):
        np.testing.assert_allclose(probability_wrong(unit * margins), [0.25] * 6 + [0.75] * 2, atol=1e-4)


def test_the_order_is_that_of_the_margins() -> None:
    margins = np.random.default_rng(0).normal(0.5, 1.0, 50)
    assert (np.argsort(probability_wrong(margins)) == np.argsort(-margins)).all()


@pytest.mark.parametrize("margins", [[0.0, 0.0], [1.0, -1.0], [-1.0, -2.0, 0.5]])
def test_margins_without_information_say_nothing(margins: list[float]) -> None:
    assert probability_wrong(margins).tolist() == [0.5] * len(margins)


def test_no_pair_is_certain_where_all_margins_agree() -> None:
    # Every label is confirmed: the scale runs to its bound, and the sum of exp(-scale) is left.
    found = probability_wrong([1.0, 2.0, 3.0])
    assert (found < 1e-6).all() and (found >= 0).all() and math.isfinite(found.sum())
    assert probability_wrong([]).tolist() == []
