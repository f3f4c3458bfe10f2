"""Selection within strata, with minimum shares, and with length taken out; expected values by hand."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from selective_dpo.config import SelectConfig
from selective_dpo.curriculum.balance import (
    Attributes,
    require_attributes,
    residual,
    select_with_quota,
    select_within,
    shares_of,
    strata,
)
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.select import Rule, select
from selective_dpo.errors import ConfigError

IDS = np.array(list("abcdefgh"))
DIFFICULTY = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
LONG = np.array([9, 9, 9, 9, -9, -9, -9, -9])
HALF = Rule("easiest", fraction=0.5)


def attributes(source: list[str] | None = None, score: list[float] | None = None) -> Attributes:
    return Attributes(LONG, np.array(source or ["x"] * 8), np.array(score or [np.nan] * 8, dtype=np.float64))


def chosen(selected_P: np.ndarray) -> str:
    return "".join(IDS[selected_P])


def test_within_strata_each_gives_its_own_easiest() -> None:
    assert chosen(select(DIFFICULTY, IDS, HALF).selected_P) == "abcd"  # the long ones only
    selection = select_within(DIFFICULTY, IDS, HALF, np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    assert chosen(selection.selected_P) == "abef"
    assert selection.rank_P.tolist() == list(range(8))  # over all pairs
    hardest = select_within(DIFFICULTY, IDS, Rule("hardest", fraction=0.5), np.array([0, 1] * 4))
    assert chosen(hardest.selected_P) == "efgh"


def test_one_stratum_is_the_plain_rule() -> None:
    difficulty = np.random.default_rng(0).normal(size=8).round(1)  # with ties
    plain = select(difficulty, IDS, Rule("easiest", count=3))
    within = select_within(difficulty, IDS, Rule("easiest", count=3), np.zeros(8, dtype=np.int64))
    assert (within.selected_P == plain.selected_P).all() and (within.rank_P == plain.rank_P).all()


def test_shares_add_up_and_the_largest_remainders_get_what_is_left() -> None:
    # 5 of 4 + 3 + 3: exactly 2, 1.5 and 1.5.
    assert shares_of(5, np.array([4, 3, 3])).tolist() == [2, 2, 1]
    assert shares_of(1, np.array([1, 5])).tolist() == [0, 1]
    for size in range(11):
        assert shares_of(size, np.array([1, 2, 7])).sum() == size


def test_strata_are_fifths_crossed_with_sources() -> None:
    by_length = strata(attributes(), ["length"])
    assert len(set(by_length[:4])) == 1 and len(set(by_length[4:])) == 1 and by_length[0] != by_length[4]
    both = strata(attributes(source=["x", "y"] * 4), ["length", "source"])
    assert len(set(both.tolist())) == 4
    fifths = strata(Attributes(np.arange(100), np.array(["x"] * 100), np.zeros(100)), ["length"])
    assert np.bincount(fifths).tolist() == [20] * 5


def test_a_quota_is_filled_first_and_the_rest_is_the_easiest() -> None:
    source = np.array(["x"] * 6 + ["y"] * 2)  # g and h, the hardest
    selection = select_with_quota(DIFFICULTY, IDS, HALF, source, {"y": 0.25})
    assert chosen(selection.selected_P) == "abcg"
    assert selection.reason_P[6] == "among its source's quota"
    # A quota that the plain rule keeps anyhow changes nothing.
    assert chosen(select_with_quota(DIFFICULTY, IDS, HALF, source, {"x": 0.5}).selected_P) == "abcd"
    with pytest.raises(ConfigError, match=r"asks for 3 pairs of y, which has 2"):
        select_with_quota(DIFFICULTY, IDS, HALF, source, {"y": 0.75})


def test_what_length_says_of_difficulty_is_taken_out() -> None:
    # Means by length 1, 2, 3: .2, .6, .7: rising already, so they are the fit; the mean over all is .5.
    length = np.array([1, 1, 2, 2, 3, 3])
    difficulty = np.array([0.1, 0.3, 0.5, 0.7, 0.6, 0.8])
    assert residual(difficulty, length) == pytest.approx([0.4, 0.6, 0.4, 0.6, 0.4, 0.6])
    # Falling but for one pool: means .9, .2, .4 become .9, .3, .3.
    difficulty = np.array([0.9, 0.9, 0.2, 0.2, 0.4, 0.4])
    assert residual(difficulty, length) == pytest.approx(0.5 + np.array([0, 0, -0.1, -0.1, 0.1, 0.1]))
    # Nothing to take out.
    assert residual(difficulty, np.full(6, 4)) == pytest.approx(difficulty)


def table() -> LossTable:
    return LossTable(IDS, IDS, (1,), (1,), DIFFICULTY[:, None, None])


def test_a_curriculum_says_what_it_was_selected_by() -> None:
    def known(ids: list[str]) -> Attributes:
        assert ids == IDS.tolist()
        return attributes()

    made = build_curriculum(table(), {"balance": ["length"]}, attributes=known)
    assert made.order == ["a", "b", "e", "f"] and made.facts["select"]["balance"] == ["length"]
    left = build_curriculum(table(), {"residual": "length"}, attributes=known)
    # Means .25 and .65 are taken out, .45 is put back: .3 .4 .5 .6 in both halves.
    assert left.difficulty_P == pytest.approx([0.3, 0.4, 0.5, 0.6] * 2)
    assert left.order == ["a", "e", "b", "f"]
    with pytest.raises(ConfigError, match="which only a run has"):
        build_curriculum(table(), {"balance": ["length"]})


def test_selections_without_them_keep_their_key() -> None:
    assert not {"balance", "residual", "quota"} & set(SelectConfig().identity())
    assert SelectConfig(residual="length").identity()["residual"] == "length"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rule": "all", "balance": ["length"]}, "balance and quota have no effect with rule 'all'"),
        ({"balance": ["length"], "quota": {"x": 0.5}}, "give balance or quota, not both"),
        ({"rule": "random", "residual": "length"}, "residual has no effect with rule 'random'"),
        ({"balance": ["length", "length"]}, "names one thing twice"),
        ({"quota": {"x": 0.6, "y": 0.6}}, "above 1 together"),
    ],
)
def test_what_would_be_ignored_is_refused(given: dict, expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        SelectConfig(**given)


def test_what_these_pairs_lack_is_refused() -> None:
    with pytest.raises(ConfigError, match="8 of 8 pairs have no score_chosen"):
        require_attributes(SelectConfig(balance=["score"]), attributes())
    with pytest.raises(ConfigError, match="all pairs are of one source"):
        require_attributes(SelectConfig(balance=["source"]), attributes())
    with pytest.raises(ConfigError, match="names 'z', which is no source of these pairs: there are x, y"):
        require_attributes(SelectConfig(quota={"z": 0.1}), attributes(source=["x", "y"] * 4))
