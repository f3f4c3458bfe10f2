"""The judge of the embedded world: the gold reward, and nothing about the method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selective_dpo.stats.win_rates import scores_from_rewards
from selective_dpo.worlds.tasks import gold_reward


def gold_scores(prompts: Sequence[str], answers: Sequence[str]) -> NDArray[np.float64]:
    """Gold reward in [0, 2] of each answer to its prompt, [N] float64.

    Raises:
        DataError: a prompt is not of the embedded world.
    """
    return np.array(
        [gold_reward(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)],
        dtype=np.float64,
    )


def compare(prompt: str, answer_a: str, answer_b: str) -> float:
    """1 if answer a has the higher gold reward, 0 if answer b has, 1/2 for a tie."""
    score_a, score_b = gold_scores([prompt, prompt], [answer_a, answer_b])
    return float(scores_from_rewards(score_a, score_b))
