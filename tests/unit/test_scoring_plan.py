from __future__ import annotations

import pytest

from selective_dpo.config import ScoreConfig
from selective_dpo.difficulty.protocols import ScorerRun, planned_runs, require_fold_sizes, split_pairs
from selective_dpo.errors import DataError

PROMPTS = ["a", "b", "a", "c", "d", "b", "e"]


def test_the_papers_protocol_is_three_seeds_of_two_folds() -> None:
    names = [run.name for run in planned_runs(ScoreConfig(protocol="paper"))]
    assert names == [f"seed{seed}-fold{fold}" for seed in (41, 42, 43) for fold in (0, 1)]


def test_seeds_are_run_in_the_recipes_order() -> None:
    runs = planned_runs(ScoreConfig(protocol="custom", seeds=(7, 3)))
    assert runs == (ScorerRun(7, 0), ScorerRun(7, 1), ScorerRun(3, 0), ScorerRun(3, 1))


def test_the_two_scorers_of_a_seed_swap_the_halves() -> None:
    first, second = (split_pairs(PROMPTS, ScorerRun(41, fold)) for fold in (0, 1))
    assert first.train.tolist() == second.held_out.tolist()
    assert first.held_out.tolist() == second.train.tolist()
    assert sorted([*first.train, *first.held_out]) == list(range(len(PROMPTS)))
    prompts = [{PROMPTS[row] for row in rows} for rows in first]
    assert not prompts[0] & prompts[1]


def test_a_fold_of_too_few_prompts_is_refused_however_many_pairs_it_has() -> None:
    # Sixty pairs of one prompt and two others: folds of 61 (or 60) pairs and of 1 (or 2).
    prompts = ["a"] * 60 + ["b", "c"]
    for run in planned_runs(ScoreConfig(protocol="paper")):
        with pytest.raises(
            DataError, match=rf"{run.name}: its fold has .* fewer than score.min_fold_prompts = 5"
        ):
            require_fold_sizes(prompts, run, 5)
    ten = [str(number % 10) for number in range(20)]  # Two pairs a prompt: five prompts in each half.
    require_fold_sizes(ten, ScorerRun(41, 0), 5)
    with pytest.raises(
        DataError, match=r"its fold has 10 pairs of 5 prompt\(s\), .* = 6: .*or lower that key"
    ):
        require_fold_sizes(ten, ScorerRun(41, 0), 6)


def test_too_few_prompts_are_the_users_to_mend() -> None:
    with pytest.raises(
        DataError, match=r"cannot split 1 prompt\(s\) into 2 folds: one each is needed; give more pairs"
    ):
        split_pairs(["a", "a"], ScorerRun(41, 0))
