from __future__ import annotations

import numpy as np
import pytest

from selective_dpo.stats.calibration import probability_wrong


def test_probabilities_are_how_often_labels_contradict_margins_of_that_size() -> None:
    # Of 1,000 margins of size 1 a half contradicts the label, of 1,000 of size 2 a quarter. The prior's pull
    # is of the order 1 / 2,000.
    small, large = np.repeat([1.0, -1.0], 500), np.repeat([2.0, -2.0], [750, 250])
    found = probability_wrong(np.concatenate([small, large]))
    np.testing.assert_allclose(found[:1000], 0.5, atol=0.01)
    np.testing.assert_allclose(found[1000:1750], 0.25, atol=0.01)
    np.testing.assert_allclose(found[1750:], 0.75, atol=0.01)


def test_the_unit_of_margins_does_not_matter() -> None:
    margins = np.random.default_rng(0).normal(0.5, 1.0, 50)
    for unit in (1e-6, 1e4):
        np.testing.assert_allclose(probability_wrong(unit * margins), probability_wrong(margins))


def test_huge_margins_that_say_nothing_are_not_believed() -> None:
    # Nine of ten labels agree with sizes up to 1, and half of them with larger ones.
    generator = np.random.default_rng(1)
    size = generator.uniform(0.0, 2.0, 4000)
    contradicts = generator.random(4000) < np.where(size < 1.0, 0.1, 0.5)
    found = probability_wrong(np.where(contradicts, -size, size))
    assert np.median(found[contradicts & (size > 1.0)]) < 0.55
    assert found[contradicts & (size > 0.2) & (size < 0.6)].min() > 0.8


@pytest.mark.parametrize("margins", [[0.0, 0.0], [1.0, -1.0], [-1.0, -1.0, 1.0]])
def test_margins_without_information_say_nothing(margins: list[float]) -> None:
    np.testing.assert_allclose(probability_wrong(margins), 0.5, atol=1e-9)


def test_no_pair_is_certain_where_all_margins_agree() -> None:
    few, many = (probability_wrong(np.arange(1.0, count + 1)) for count in (3, 3000))
    assert ((few > 0.05) & (few < 0.5)).all()
    assert ((many > 0.0) & (many < 0.02)).all()
    assert probability_wrong([]).tolist() == []


def test_a_pair_turned_round_has_the_other_probability() -> None:
    # All others being many, one pair hardly changes the count of its like.
    margins = np.random.default_rng(2).normal(0.5, 1.0, 2000)
    before = probability_wrong(margins)
    margins[7] *= -1
    assert probability_wrong(margins)[7] == pytest.approx(1.0 - before[7], abs=0.005)
