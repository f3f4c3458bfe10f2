"""Win rates from verdicts: each prompt weighs the same, and uncertainty is clustered by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selective_dpo.identity import require_same
from selective_dpo.stats.estimates import Estimate, clustered_share

WIN, TIE, LOSS = 1.0, 0.5, 0.0


class Verdicts(NamedTuple):
    """Comparisons of one arm's answers with its opponent's; columns of equal length N."""

    prompt_ids_N: Sequence[str]
    scores_N: ArrayLike
    """1 where the arm's answer won, 0.5 for a tie, 0 where it lost; or the probability that it is better."""


class Pairing(NamedTuple):
    """Which sample of the arm meets which sample of its opponent; shapes [C] int64."""

    sample_C: NDArray[np.int64]
    opponent_sample_C: NDArray[np.int64]


def scores_from_rewards(rewards_a: ArrayLike, rewards_b: ArrayLike) -> NDArray[np.float64]:
    """1 where a's reward is larger, 0.5 where both are equal to the last bit, 0 where b's is; broadcasts."""
    difference = np.asarray(rewards_a, dtype=np.float64) - np.asarray(rewards_b, dtype=np.float64)
    return np.select([difference > 0, difference < 0], [WIN, LOSS], default=TIE)


def cross_pairing(samples: int, opponent_samples: int) -> Pairing:
    """Each of the arm's samples against each of the opponent's: C = samples * opponent_samples.

    For the same answers it has a smaller variance than one comparison per sample, and the same mean.
    """
    sample, opponent_sample = np.divmod(
        np.arange(samples * opponent_samples, dtype=np.int64), opponent_samples
    )
    return Pairing(sample, opponent_sample)


def self_pairing(samples: int) -> Pairing:
    """A model's samples against each other: each two different samples once, C = samples * (samples - 1) / 2.

    Only one of (i, j) and (j, i) is compared: together they would score exactly one half whatever the
    answers are, and say nothing of the spread.
    """
    first, second = np.triu_indices(samples, k=1)
    return Pairing(first.astype(np.int64), second.astype(np.int64))


def prompt_scores(verdicts: Verdicts) -> tuple[list[str], NDArray[np.float64]]:
    """Prompt ids [G], sorted and unique, and the mean score [G] of each.

    So a prompt with more verdicts does not weigh more.

    Raises:
        ValueError: no verdicts, columns of different lengths, or a score outside [0, 1].
    """
    scores = np.asarray(verdicts.scores_N, dtype=np.float64)
    if scores.shape != (len(verdicts.prompt_ids_N),) or scores.size == 0:
        raise ValueError(
            f"need as many scores as prompt ids, and some: {scores.shape} and {len(verdicts.prompt_ids_N)}"
        )
    if not ((scores >= LOSS) & (scores <= WIN)).all():
        raise ValueError("a verdict's score must be in [0, 1]")
    prompt_ids, group_N = np.unique(np.asarray(verdicts.prompt_ids_N), return_inverse=True)
    means = np.bincount(group_N, weights=scores) / np.bincount(group_N)
    return prompt_ids.tolist(), means


def win_rate(verdicts: Verdicts) -> Estimate:
    """Share of comparisons won, ties counted one half: the mean over prompts of their mean scores.

    Raises:
        ValueError: see `prompt_scores`.
    """
    prompt_ids_G, scores_G = prompt_scores(verdicts)
    return clustered_share(scores_G, prompt_ids_G)


def win_rate_difference(arm: Verdicts, other: Verdicts) -> Estimate:
    """Win rate of `arm` minus that of `other`, paired by prompt.

    Both were compared with the same opponent on the same prompts, and what makes a prompt easy or hard
    to win for both cancels in the differences.

    Raises:
        IdentityError: the two were not judged on the same prompts.
        ValueError: see `prompt_scores`.
    """
    (prompt_ids_G, scores_G), (other_ids_G, other_scores_G) = prompt_scores(arm), prompt_scores(other)
    require_same(prompt_ids_G, other_ids_G, what="prompts of two win rates")
    # Both are sorted by prompt id, and now known to hold the same ones.
    return clustered_share(scores_G - other_scores_G, prompt_ids_G, least=-1.0)
