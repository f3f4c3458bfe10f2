"""Who decides which of two answers is better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from selective_dpo.artifacts import file_digest
from selective_dpo.config import EvaluateConfig
from selective_dpo.core.identity import Text, canonical_text
from selective_dpo.core.winrates import scores_from_rewards
from selective_dpo.digests import canonical_json
from selective_dpo.errors import DataError, ModelError, name_some


class Judge(Protocol):
    """Compares two answers to the same prompt."""

    @property
    def name(self) -> str:
        """What `results.json` calls it."""

    def fingerprint(self) -> str:
        """SHA-256 of the content that decides its verdicts, wherever that lies."""

    def compare(
        self, prompts: Sequence[Text], answers_a: Sequence[str], answers_b: Sequence[str]
    ) -> NDArray[np.float64]:
        """For each of N comparisons: 1 where answer a is better, 0.5 for a tie, 0 where b is; shape [N]."""


class RewardJudge(ABC):
    """A judge that gives each answer a number and prefers the larger; equal numbers are a tie.

    Each answer is looked at once, however many comparisons and arms it takes part in.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}

    @property
    @abstractmethod
    def name(self) -> str:
        """What `results.json` calls it."""

    @abstractmethod
    def fingerprint(self) -> str:
        """See `Judge.fingerprint`."""

    @abstractmethod
    def rewards(self, prompts: Sequence[Text], answers: Sequence[str]) -> list[float]:
        """The reward of each answer to its prompt; larger is better."""

    def compare(
        self, prompts: Sequence[Text], answers_a: Sequence[str], answers_b: Sequence[str]
    ) -> NDArray[np.float64]:
        """See `Judge.compare`.

        Raises:
            ModelError: a reward is not a finite number.
        """
        keys = [canonical_json(canonical_text(prompt)) for prompt in prompts]
        new: dict[tuple[str, str], Text] = {}
        for answers in (answers_a, answers_b):
            for key, prompt, answer in zip(keys, prompts, answers, strict=True):
                if (key, answer) not in self._known:
                    new[key, answer] = prompt
        if new:
            found = self.rewards(list(new.values()), [answer for _, answer in new])
            _require_finite(found, list(new), self.name)
            self._known.update(zip(new, found, strict=True))
        return scores_from_rewards(
            [self._known[key, answer] for key, answer in zip(keys, answers_a, strict=True)],
            [self._known[key, answer] for key, answer in zip(keys, answers_b, strict=True)],
        )


class EmbeddedWorldJudge(RewardJudge):
    """The gold reward that the embedded world's tasks define."""

    @property
    def name(self) -> str:
        """See `RewardJudge`."""
        return "embedded-world"

    def fingerprint(self) -> str:
        """Of the code that defines the tasks and their rewards."""
        from selective_dpo.worlds import tasks

        return file_digest(Path(tasks.__file__))

    def rewards(self, prompts: Sequence[Text], answers: Sequence[str]) -> list[float]:
        """See `selective_dpo.worlds.tasks.gold_reward`.

        Raises:
            DataError: a prompt is not one of the embedded world's.
        """
        from selective_dpo.worlds.tasks import gold_reward

        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if not isinstance(prompt, str):
                raise DataError("judge 'embedded-world' reads its own plain-text prompts, not chat messages")
            found.append(gold_reward(prompt, answer))
        return found


def judge_for(config: EvaluateConfig) -> Judge | None:
    """The judge that the recipe asks for; None for `none`.

    Raises:
        ModelError: the reward model cannot be used; found before any answer is generated.
    """
    if config.judge == "none":
        return None
    if config.judge == "embedded-world":
        return EmbeddedWorldJudge()
    from selective_dpo.evaluation.reward_model import RewardModelJudge

    return RewardModelJudge(config.reward_model)


def _require_finite(rewards: Sequence[float], keys: Sequence[tuple[str, str]], name: str) -> None:
    bad = [key[0][:80] for key, reward in zip(keys, rewards, strict=True) if not np.isfinite(reward)]
    if bad:
        raise ModelError(
            f"judge {name!r} gave {len(bad):,} answers a reward that is not finite; "
            f"use another reward model. Prompts: {name_some(bad, 3)}"
        )
