"""Who decides which of two answers is better."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification

from selective_dpo.config import EvaluateConfig, ModelConfig
from selective_dpo.data.templates import Conversation, template_digest
from selective_dpo.data.tokenize import tokenizer_digest
from selective_dpo.distributed.progress import Progress
from selective_dpo.errors import ConfigError, DataError, ModelError, name_some
from selective_dpo.evaluation.generate import encode_conversation
from selective_dpo.extensions import Registry
from selective_dpo.identity import Text, canonical_text
from selective_dpo.models import loading, model_digest, read_tokenizer
from selective_dpo.stats.win_rates import scores_from_rewards
from selective_dpo.storage.artifacts import file_digest
from selective_dpo.storage.digests import canonical_json, digest

J = TypeVar("J")


class Judge(Protocol):
    """Compares two answers to the same prompt. To add one, see `judge`."""

    name: str
    """What `results.json` calls it. A registered class without one is called as the recipe calls it."""

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

    name: str
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
            bad = [key[:80] for (key, _), reward in zip(new, found, strict=True) if not np.isfinite(reward)]
            if bad:
                raise ModelError(
                    f"judge {self.name!r} gave {len(bad):,} answers a reward that is not finite; "
                    f"use another reward model. Prompts: {name_some(bad, 3)}"
                )
            self._known.update(zip(new, found, strict=True))
        return scores_from_rewards(
            *(
                [self._known[pair] for pair in zip(keys, answers, strict=True)]
                for answers in (answers_a, answers_b)
            )
        )


class WorldJudge(RewardJudge):
    """The gold reward that a world's tasks define: `tasks`, or `constraints` for a real language model."""

    def __init__(self, name: str, tasks: str) -> None:
        """`tasks`: the module of `selective_dpo.worlds` whose `gold_reward` it asks."""
        super().__init__()
        self.name = name
        self._tasks = importlib.import_module(f"selective_dpo.worlds.{tasks}")

    def fingerprint(self) -> str:
        """Of the code that defines the tasks and their rewards."""
        return file_digest(Path(str(self._tasks.__file__)))

    def rewards(self, prompts: Sequence[Text], answers: Sequence[str]) -> list[float]:
        """The `gold_reward` of each answer; a prompt in chat form is its one user message.

        Raises:
            DataError: a prompt is not one of this world's.
        """
        return [
            float(self._tasks.gold_reward(self._instruction(prompt), answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _instruction(self, prompt: Text) -> str:
        if isinstance(prompt, str):
            return prompt
        if len(prompt) == 1 and isinstance(prompt[0]["content"], str):
            return str(prompt[0]["content"])
        raise DataError(f"judge {self.name!r} reads its own one-message prompts, not conversations")


def _adopt(name: str, made: Any) -> JudgeFactory:
    """The entry of a class that `module:name` or a registration names; it is made without arguments."""

    def make(config: EvaluateConfig) -> Judge:
        found = made()
        lacking = [part for part in ("compare", "fingerprint") if not callable(getattr(found, part, None))]
        if lacking:
            raise ConfigError(f"judge {name!r} has no method {' and no '.join(lacking)}")
        if not hasattr(found, "name"):
            found.name = name
        return cast(Judge, found)

    return make


JudgeFactory = Callable[[EvaluateConfig], Judge]

JUDGES: Registry[JudgeFactory] = Registry("judge", _adopt)
"""`evaluate.judge` -> what makes the judge."""


def judge(name: str) -> Callable[[type[J]], type[J]]:
    """Register the decorated class, which is made without arguments, as `evaluate.judge: NAME`.

    It needs `compare` and `fingerprint()` of `Judge`: the fingerprint stands in the evaluation's key.
    """

    def register(made: type[J]) -> type[J]:
        JUDGES[name] = _adopt(name, made)
        return made

    return register


def judge_for(config: EvaluateConfig) -> Judge | None:
    """The judge that the recipe asks for; None for `none`.

    Raises:
        ConfigError: there is no such judge, or it lacks a method.
        ModelError: the reward model cannot be used; found before any answer is generated.
    """
    return None if config.judge == "none" else JUDGES[config.judge](config)


class RewardModelJudge(RewardJudge):
    """Prefers the answer to which a sequence classifier gives the larger output.

    Prompt and answer are read as a conversation through the reward model's own chat template; a
    plain-text prompt becomes its user message.
    """

    def __init__(self, path: str, *, device: str | torch.device | None = None, batch_size: int = 16) -> None:
        """Check what can be checked cheaply; the weights are loaded when first needed.

        By then the policies have left the device. `path` is a hub name or a folder; `device` defaults
        to the GPU where there is one; `batch_size` is the number of conversations read at once.

        Raises:
            ModelError: not a classifier with one output, or its tokenizer has no chat template.
        """
        super().__init__()
        self.name = f"reward-model {path}"
        self._path = path
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with loading("reward model", path):
            self._config: Any = AutoConfig.from_pretrained(path)
        self._tokenizer: Any = read_tokenizer(path, what="reward model")
        if self._config.num_labels != 1:
            raise ModelError(
                f"reward model {path!r} has {self._config.num_labels} outputs; "
                "choose a sequence classifier with one"
            )
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of reward model {path!r} has no chat template; choose one that has"
            )
        # Causal classifiers find the last token by its not being padding. Without a padding token of the
        # model's own, any other choice could hide a real last token, so nothing is padded then.
        self._pad_id = self._config.get_text_config().pad_token_id
        self._batch_size = batch_size if self._pad_id is not None else 1

    def fingerprint(self) -> str:
        """Of weights (of a hub model: its commit), tokenizer and chat template."""
        return digest(
            [
                model_digest(ModelConfig(path=self._path)),
                tokenizer_digest(self._tokenizer),
                template_digest(self._tokenizer),
            ]
        )

    def rewards(self, prompts: Sequence[Text], answers: Sequence[str]) -> list[float]:
        """The classifier's output for each conversation.

        Raises:
            ModelError: the weights cannot be loaded, or a conversation exceeds the model's positions.
        """
        rows = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        positions = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, rows), default=0)
        if positions is not None and longest > positions:
            raise ModelError(
                f"a conversation of {longest:,} tokens exceeds the {positions:,} positions of reward model "
                f"{self._path!r}; lower generation.max_new_tokens or choose another"
            )
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        rewards = [0.0] * len(rows)
        with torch.no_grad(), Progress(len(rows), "rewards", unit="answers") as progress:
            for start in range(0, len(rows), self._batch_size):
                batch = order[start : start + self._batch_size]
                for row, reward in zip(batch, self._forward([rows[row] for row in batch]), strict=True):
                    rewards[row] = reward
                progress.advance(len(batch))
        return rewards

    def _encode(self, prompt: Text, answer: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages.append({"role": "assistant", "content": answer})
        return encode_conversation(self._tokenizer, Conversation(messages))

    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        ids = [torch.tensor(row, device=self._device) for row in rows]
        output = self._model(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=self._pad_id or 0),
            attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        )
        found: list[float] = output.logits.float().squeeze(-1).tolist()
        return found

    @cached_property
    def _model(self) -> Any:
        with loading("reward model", self._path):
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self._path,
                dtype="auto" if self._device.type == "cuda" else torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        if found["missing_keys"]:
            # A language model without the classifier's head would load, with a random head
            missing = sorted(found["missing_keys"])[0]
            raise ModelError(f"{self._path!r} is not a trained reward model: its weights lack {missing}")
        return model.to(self._device).eval()


JUDGES["embedded-world"] = lambda config: WorldJudge("embedded-world", "tasks")
JUDGES["constraints"] = lambda config: WorldJudge("constraints", "constraints")


def _language_judge(config: EvaluateConfig) -> Judge:
    from selective_dpo.evaluation.language_judges import language_judge

    return language_judge(config)


JUDGES["endpoint"] = JUDGES["local-model"] = _language_judge
JUDGES["reward-model"] = lambda config: RewardModelJudge(config.reward_model)
