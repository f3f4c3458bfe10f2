"""A reward model as judge: a sequence classifier with one output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from selective_dpo.config import ModelConfig
from selective_dpo.core.identity import Text
from selective_dpo.data.templates import Conversation, template_digest
from selective_dpo.data.tokenize import tokenizer_digest
from selective_dpo.digests import digest
from selective_dpo.engine.models import loading, model_digest, read_tokenizer
from selective_dpo.errors import ModelError
from selective_dpo.evaluation.judges import RewardJudge
from selective_dpo.evaluation.prompt_tokens import encode_conversation
from selective_dpo.progress import Progress


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

    @property
    def name(self) -> str:
        """See `RewardJudge`."""
        return f"reward-model {self._path}"

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
        self._require_room(rows)
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

    def _require_room(self, rows: Sequence[Sequence[int]]) -> None:
        positions = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, rows), default=0)
        if positions is not None and longest > positions:
            raise ModelError(
                f"a conversation of {longest:,} tokens exceeds the {positions:,} positions of reward model "
                f"{self._path!r}; lower generation.max_new_tokens or choose another"
            )

    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), self._pad_id if self._pad_id is not None else 0)
        attention_mask = torch.zeros_like(input_ids)
        for number, row in enumerate(rows):
            input_ids[number, : len(row)] = torch.tensor(row)
            attention_mask[number, : len(row)] = 1
        output = self._model(
            input_ids=input_ids.to(self._device), attention_mask=attention_mask.to(self._device)
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
