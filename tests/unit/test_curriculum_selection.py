"""Which pairs a rule keeps, and that the rows' order has no say in it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.curriculum.select import Rule, select, size_of, training_positions
from selective_dpo.errors import ConfigError

IDS = np.array(["d", "a", "c", "b", "e"])
DIFFICULTY = np.array([0.9, 0.5, 0.7, 0.5, 0.1])
# By difficulty, ties by id: e .1, a .5, b .5, c .7, d .9.


def kept(rule: Rule) -> set[str]:
    return set(IDS[select(DIFFICULTY, IDS, rule).selected_P].tolist())


def test_ranks_break_ties_by_id() -> None:
    result = select(DIFFICULTY, IDS, Rule())
    assert dict(zip(IDS.tolist(), result.rank_P.tolist(), strict=True)) == {
        "e": 0,
        "a": 1,
        "b": 2,
        "c": 3,
        "d": 4,
    }


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(), "eab"),  # half of 5 is 2.5, halves go up
        (Rule(fraction=0.4), "ea"),
        (Rule(fraction=0.01), "e"),  # at least one
        (Rule(fraction=1.0), "eabcd"),
        (Rule(count=4), "eabc"),
        (Rule("hardest", fraction=0.4), "dc"),
        (Rule("hardest", count=1), "d"),
        (Rule("below", threshold=0.5), "eab"),
        (Rule("band", band=(0.2, 0.8)), "abc"),  # ranks 1 to 3
        (Rule("band", band=(0.0, 0.2)), "e"),
        (Rule("all"), "abcde"),
    ],
)
def test_rules_by_hand(rule, expected) -> None:
    assert kept(rule) == set(expected)


@pytest.mark.parametrize(
    ("fraction", "pairs", "size"),
    [
        (0.29, 50, 15),  # 14.5; binary floating point would say 14.499999999999998
        (0.5, 5, 3),
        (0.35, 10, 4),
        (0.333, 3, 1),
        (0.001, 10, 1),
        (1.0, 7, 7),
    ],
)
def test_sizes_round_halves_up(fraction, pairs, size) -> None:
    assert size_of(pairs, Rule(fraction=fraction)) == size


def test_reasons_say_why() -> None:
    def reasons(rule: Rule) -> list[str]:
        return select(DIFFICULTY, IDS, rule).reason_P.tolist()

    easy, hard = "among the easiest 50%", "harder than the easiest 50%"
    assert reasons(Rule()) == [hard, easy, hard, easy, easy]
    assert set(reasons(Rule("hardest", fraction=0.3))) == {
        "among the hardest 30%",
        "easier than the hardest 30%",
    }
    assert set(reasons(Rule("random"))) == {"random control", "not drawn"}
    assert set(reasons(Rule("below", threshold=0.693))) == {
        "at or below the threshold 0.693",
        "above the threshold 0.693",
    }
    band = "the band 20% to 80%"
    assert set(reasons(Rule("band", band=(0.2, 0.8)))) == {
        f"{word} {band}" for word in ("easier than", "within", "harder than")
    }
    assert set(reasons(Rule("all"))) == {"all scored pairs"}
    assert "among the easiest 2 pairs" in reasons(Rule(count=2))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(count=6), "count is 6, but there are 5"),
        (Rule("below"), "needs a threshold"),
        (Rule("below", threshold=0.05), "smallest is 0.1"),
        (Rule("band", band=(0.2, 0.21)), "keeps none"),
    ],
)
def test_wrong_settings_are_refused_with_a_remedy(rule, words) -> None:
    with pytest.raises(ConfigError, match=words):
        select(DIFFICULTY, IDS, rule)


def test_not_finite_or_mismatched_input_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        select(np.array([0.1, np.nan]), np.array(["a", "b"]), Rule())
    with pytest.raises(ValueError, match="for each id"):
        select(np.array([0.1]), np.array(["a", "b"]), Rule())


def test_random_control_has_the_size_and_depends_on_the_seed_only() -> None:
    ids = np.array([f"{index:03d}" for index in range(200)])
    generator = np.random.default_rng(5)
    draws = [select(generator.normal(size=200), ids, Rule("random", fraction=0.3, seed=s)) for s in (1, 1, 2)]
    assert [int(draw.selected_P.sum()) for draw in draws] == [60, 60, 60]
    assert (draws[0].selected_P == draws[1].selected_P).all()  # whatever the difficulties
    assert not (draws[0].selected_P == draws[2].selected_P).all()


def test_random_draws_every_pair_equally_often() -> None:
    ids = np.array([f"{index:02d}" for index in range(20)])
    drawn = sum(
        select(np.zeros(20), ids, Rule("random", fraction=0.5, seed=s)).selected_P.astype(int)
        for s in range(400)
    )
    # Binomial(400, 1/2): standard deviation 10; 5 of them either side.
    assert drawn.min() > 150
    assert drawn.max() < 250


@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=2, max_size=30),
    st.sampled_from(
        [
            Rule(),
            Rule("hardest", fraction=0.3),
            Rule("random", seed=3),
            Rule("band", band=(0.0, 0.7)),
            Rule("all"),
        ]
    ),
    st.sampled_from(["easy-to-hard", "hard-to-easy", "shuffled"]),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_rows_does_not_matter(values, rule, order, random) -> None:
    ids = np.array([f"id{index:02d}" for index in range(len(values))])
    difficulty = np.array(values)
    mixed = list(range(len(values)))
    random.shuffle(mixed)
    straight = select(difficulty, ids, rule)
    shuffled = select(difficulty[mixed], ids[mixed], rule)
    for field in ("rank_P", "selected_P", "reason_P"):
        assert (getattr(straight, field)[mixed] == getattr(shuffled, field)).all()
    positions = training_positions(straight, ids, order, seed=7)
    assert (positions[mixed] == training_positions(shuffled, ids[mixed], order, seed=7)).all()


def test_orders_by_hand() -> None:
    selection = select(DIFFICULTY, IDS, Rule(count=4))  # e a b c, easiest first; rows are d a c b e
    assert training_positions(selection, IDS).tolist() == [-1, 1, 3, 2, 0]
    assert training_positions(selection, IDS, "hard-to-easy").tolist() == [-1, 2, 0, 1, 3]
    with pytest.raises(ValueError, match="unknown order"):
        training_positions(selection, IDS, "sideways")


def test_shuffled_is_a_permutation_decided_by_the_seed() -> None:
    ids = np.array([f"{index:03d}" for index in range(100)])
    selection = select(np.arange(100.0), ids, Rule())
    first, again, other = (training_positions(selection, ids, "shuffled", seed) for seed in (1, 1, 2))
    assert sorted(first[selection.selected_P].tolist()) == list(range(50))
    assert (first[~selection.selected_P] == -1).all()
    assert (first == again).all()
    assert not (first == other).all()


def test_shuffled_order_is_independent_of_a_random_draw_with_the_same_seed() -> None:
    ids = np.array([f"{index:03d}" for index in range(100)])
    selection = select(np.arange(100.0), ids, Rule("random", fraction=1.0, seed=1))
    positions = training_positions(selection, ids, "shuffled", seed=1)
    drawn = np.random.default_rng([1, 1]).permutation(100)
    assert not (np.argsort(positions) == drawn).all()


def test_rules_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rule().fraction = 0.3
