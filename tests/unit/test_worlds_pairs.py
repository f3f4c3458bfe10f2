"""Pairs of the embedded world, the annotator's noise."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from selective_dpo.identity import pair_id
from selective_dpo.worlds.world import (
    TRUTH_COLUMNS,
    LabelledPair,
    annotate,
    label_pairs,
    to_jsonl,
    truth_table,
)

PROMPT = "reverse : a c f d ="
RIGHT, NEAR, OTHER_NEAR, EMPTY = " d f c a", " d f c b", " d f a a", ""
# Gold rewards: exact 2; one substitution in four symbols 3/4 for both the others.


def test_the_annotator_prefers_by_bradley_and_terry() -> None:
    # A gap of 1.2 at temperature 1.2: sigmoid(1) = 0.7311. With 200,000 draws the standard error is
    # sqrt(.7311 * .2689 / 200,000) = .001; four of them are allowed.
    draws = 200_000
    prefers = annotate(np.full(draws, 1.7), np.full(draws, 0.5), np.random.default_rng(0), temperature=1.2)
    assert prefers.mean() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.004)


def test_equal_rewards_are_labelled_by_a_fair_coin() -> None:
    draws = 200_000
    prefers = annotate(np.ones(draws), np.ones(draws), np.random.default_rng(1), temperature=1.2)
    assert prefers.mean() == pytest.approx(0.5, abs=0.0045)  # four standard errors of .0011


def test_a_sure_annotator_never_flips_and_identical_or_empty_answers_make_no_pair() -> None:
    prompts = [PROMPT] * 4
    answers = [[NEAR, RIGHT], [RIGHT, NEAR], [RIGHT, RIGHT], [RIGHT, EMPTY]]
    labelled = label_pairs(prompts, answers, np.random.default_rng(0), annotator_temperature=0.01)
    assert labelled.pairs == [LabelledPair(PROMPT, RIGHT, NEAR, 2.0, 0.75)] * 2
    assert labelled.dropped == {"identical": 1, "empty": 1}


def test_no_usable_answers_give_no_pairs() -> None:
    labelled = label_pairs([PROMPT], [[RIGHT, RIGHT]], np.random.default_rng(0), annotator_temperature=1.0)
    assert labelled.pairs == []
    assert truth_table(labelled.pairs, split="train").num_rows == 0


def test_noise_flips_some_labels() -> None:
    # The gap 1.25 at temperature 1.2: P(flip) = 1 / (1 + exp(1.25 / 1.2)) = .2608; standard error of the
    # share among 4,000: .0069; four of them are allowed.
    count = 4000
    labelled = label_pairs(
        [PROMPT] * count, [[RIGHT, NEAR]] * count, np.random.default_rng(3), annotator_temperature=1.2
    )
    flips = np.mean([pair.reward_chosen < pair.reward_rejected for pair in labelled.pairs])
    assert flips == pytest.approx(1 / (1 + math.exp(1.25 / 1.2)), abs=0.028)


def test_the_method_sees_three_texts_and_nothing_else() -> None:
    pairs = [LabelledPair(PROMPT, NEAR, RIGHT, 0.75, 2.0)]
    assert [json.loads(line) for line in to_jsonl(pairs).splitlines()] == [
        {"prompt": PROMPT, "chosen": NEAR, "rejected": RIGHT}
    ]


def test_truth_is_keyed_by_the_ids_of_the_texts() -> None:
    pairs = [LabelledPair(PROMPT, NEAR, RIGHT, 0.75, 2.0), LabelledPair(PROMPT, NEAR, OTHER_NEAR, 0.75, 0.75)]
    table = truth_table(pairs, split="test")
    assert table.column_names == list(TRUTH_COLUMNS)
    flipped, tied = table.to_pylist()
    assert flipped == {
        "pair_id": pair_id(PROMPT, NEAR, RIGHT),
        "split": "test",
        "operation": "reverse",
        "reward_chosen": 0.75,
        "reward_rejected": 2.0,
        "flipped": True,
        "tie": False,
    }
    assert (tied["flipped"], tied["tie"]) == (False, True)
