"""Cycles of preferences, found by hand."""

from __future__ import annotations

import numpy as np

from selective_dpo.stats.contradictions import contradicting, joined


def test_two_pairs_that_disagree_contradict_and_a_chain_does_not() -> None:
    # a > b and b > a of one prompt; c > d beside them; the chain e > f > g of another one.
    found = contradicting([0, 0, 0, 1, 1], list("abcef"), list("badfg"))
    assert found.tolist() == [True, True, False, False, False]


def test_a_cycle_of_three_is_one_and_what_hangs_on_it_is_not() -> None:
    found = contradicting([7] * 4, list("abca"), list("bcad"))
    assert found.tolist() == [True, True, True, False]


def test_equal_answers_to_other_prompts_are_other_answers() -> None:
    assert not contradicting(["p", "q"], ["yes", "no"], ["no", "yes"]).any()


def test_no_pairs_contradict_nothing() -> None:
    assert contradicting([], [], []).tolist() == []


def test_links_join_labels_through_others() -> None:
    found = joined([0, 1, 2, 3, 2], [0, 1], [1, 3])
    assert found[0] == found[1] == found[3]
    assert found[2] == found[4] != found[0]
    assert len(np.unique(joined([0, 1], [], []))) == 2
