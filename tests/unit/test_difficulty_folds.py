from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.difficulty.folds import assign_folds

prompt_lists = st.lists(st.integers(0, 12).map(str), min_size=2, max_size=60).filter(
    lambda prompts: len(set(prompts)) >= 2
)


@given(prompt_lists, st.integers(0, 1000))
def test_a_prompt_is_never_split_and_halves_differ_by_at_most_the_largest_prompt(
    prompts: list[str], seed: int
) -> None:
    folds = assign_folds(prompts, seed=seed)
    assert len(folds) == len(prompts)
    assert len(set(zip(prompts, folds.tolist(), strict=True))) == len(set(prompts))
    sizes = Counter(folds.tolist())
    assert set(sizes) == {0, 1}
    assert abs(sizes[0] - sizes[1]) <= max(Counter(prompts).values())


@given(prompt_lists, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(prompts: list[str], seed: int, random: object) -> None:
    shuffled = list(prompts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one = dict(zip(prompts, assign_folds(prompts, seed=seed).tolist(), strict=True))
    other = dict(zip(shuffled, assign_folds(shuffled, seed=seed).tolist(), strict=True))
    assert one == other


def test_single_pairs_are_halved_exactly_and_seeds_split_independently() -> None:
    prompts = [str(number) for number in range(1000)]
    first, second = assign_folds(prompts, seed=41), assign_folds(prompts, seed=42)
    assert first.sum() == second.sum() == 500
    assert (assign_folds(prompts, seed=41) == first).all()
    # Independent halves agree on 500 pairs, give or take: the hypergeometric standard deviation of the pairs
    # in fold 1 of both is sqrt(1000 * 0.5^4 * 1000 / 999) = 7.9, and each such pair counts twice.
    assert abs(int((first == second).sum()) - 500) < 4 * 2 * 7.9


def test_each_pair_is_in_each_fold_for_about_half_of_the_seeds() -> None:
    folds = np.array([assign_folds(["a", "b", "c", "d", "d", "e"], seed=seed) for seed in range(400)])
    # Binomial standard error of a share of one half over 400 seeds: 0.025.
    assert (np.abs(folds.mean(axis=0) - 0.5) < 5 * 0.025).all()


@pytest.mark.parametrize("prompts", [[], ["a"], ["a", "a", "a"]])
def test_one_prompt_cannot_be_halved(prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        assign_folds(prompts, seed=0)
