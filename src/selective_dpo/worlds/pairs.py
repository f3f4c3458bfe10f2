"""Preference pairs from a model's own answers, labelled by an annotator as noisy as people are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from selective_dpo.identity import pair_id
from selective_dpo.worlds.tasks import gold_reward, parse_prompt

TRUTH_COLUMNS = {
    "pair_id": pa.string(),
    "split": pa.string(),
    "operation": pa.string(),
    "reward_chosen": pa.float64(),
    "reward_rejected": pa.float64(),
    "flipped": pa.bool_(),
    "tie": pa.bool_(),
}
"""`split` is "train" or "test"; `flipped`: the gold reward prefers the rejected answer; `tie`: it prefers
neither."""


class LabelledPair(NamedTuple):
    """A pair as the annotator left it, with the gold rewards that only the evaluation may see."""

    prompt: str
    chosen: str
    rejected: str
    reward_chosen: float
    reward_rejected: float


class LabelledPairs(NamedTuple):
    """Pairs, and how many prompts gave none, by reason ("identical" or "empty" answers)."""

    pairs: list[LabelledPair]
    dropped: dict[str, int]


def label_pairs(
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    generator: np.random.Generator,
    *,
    annotator_temperature: float,
) -> LabelledPairs:
    """One labelled pair for each prompt whose two answers differ and are not empty."""
    kept: list[tuple[str, str, str]] = []
    dropped = Counter({"identical": 0, "empty": 0})
    for prompt, (first, second) in zip(prompts, answers, strict=True):
        if first == second:
            dropped["identical"] += 1
        elif not first or not second:
            dropped["empty"] += 1
        else:
            kept.append((prompt, first, second))
    rewards_P2 = np.array([[gold_reward(p, a), gold_reward(p, b)] for p, a, b in kept]).reshape(-1, 2)
    prefers_first_P = annotate(
        rewards_P2[:, 0], rewards_P2[:, 1], generator, temperature=annotator_temperature
    )
    pairs = [
        LabelledPair(prompt, first, second, *rewards)
        if prefers_first
        else LabelledPair(prompt, second, first, *rewards[::-1])
        for (prompt, first, second), rewards, prefers_first in zip(
            kept, rewards_P2.tolist(), prefers_first_P.tolist(), strict=True
        )
    ]
    return LabelledPairs(pairs, dict(dropped))


def annotate(
    rewards_first_P: ArrayLike,
    rewards_second_P: ArrayLike,
    generator: np.random.Generator,
    *,
    temperature: float,
) -> NDArray[np.bool_]:
    """Whether the annotator prefers the first answer, [P] bool.

    P(first is preferred) = sigmoid((r_first - r_second) / temperature), Bradley and Terry (1952).
    """
    gap_P = (np.asarray(rewards_first_P, float) - np.asarray(rewards_second_P, float)) / temperature
    probability_P = 1.0 / (1.0 + np.exp(-gap_P))
    return np.asarray(generator.random(gap_P.shape) < probability_P)


def to_jsonl(pairs: Sequence[LabelledPair]) -> str:
    """What the method reads: prompt, chosen and rejected, a JSON object a line, and nothing else."""
    return "".join(
        json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}) + "\n"
        for pair in pairs
    )


def truth_table(pairs: Sequence[LabelledPair], *, split: str) -> pa.Table:
    """What the method never reads: one row a pair, with the columns `TRUTH_COLUMNS`."""
    rows = [
        {
            "pair_id": pair_id(pair.prompt, pair.chosen, pair.rejected),
            "split": split,
            "operation": parse_prompt(pair.prompt).operation,
            "reward_chosen": pair.reward_chosen,
            "reward_rejected": pair.reward_rejected,
            "flipped": pair.reward_chosen < pair.reward_rejected,
            "tie": pair.reward_chosen == pair.reward_rejected,
        }
        for pair in pairs
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(list(TRUTH_COLUMNS.items())))
