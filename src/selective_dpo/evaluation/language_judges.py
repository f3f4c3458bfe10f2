"""Judges that are language models: behind an OpenAI-compatible server, or in this process.

Each question is asked twice, with the answers in both orders, since such models prefer a place. What counts
is the probability of the label that names the better answer; where a server gives no probabilities, the label
that it writes. An answer that names neither is *unparsed*: the other order decides then, and more than 1% of
these end the evaluation, for a tie would hide them.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from selective_dpo.config import ModelConfig
from selective_dpo.config.schema import EvaluateConfig, LanguageJudgeConfig
from selective_dpo.data.adapters import contents_of
from selective_dpo.data.templates import template_digest
from selective_dpo.data.tokenize import tokenizer_digest
from selective_dpo.distributed.progress import Progress
from selective_dpo.errors import ConfigError, ModelError
from selective_dpo.evaluation.generate import encode_prompt
from selective_dpo.identity import Text
from selective_dpo.models import load_policy, model_digest, read_tokenizer
from selective_dpo.storage.artifacts import read_json, write_json
from selective_dpo.storage.digests import digest

PROMPT = """Two assistants have answered the same instruction. Say which answer is better: more helpful,
correct and to the point. Length alone is no merit, and neither is the order in which the answers stand.

[Instruction]
{prompt}

[Answer A]
{answer_a}

[Answer B]
{answer_b}

Which answer is better? Reply with one letter, A or B, and nothing else."""
MAX_UNPARSED = 0.01
"""Share of the questions."""
CHARACTERS_A_TOKEN = 4.0
"""For the cost, which is estimated before anything is asked."""


class Bias(NamedTuple):
    """What both orders say of a judge, over all questions so far."""

    questions: int
    unparsed: int
    first_preferred: float
    """Mean probability of the answer that stood first; 0.5 without a preference for a place."""
    consistent: float
    """Share of the comparisons in which both orders prefer the same answer."""


class LanguageModelJudge(ABC):
    """See the module's text."""

    def __init__(self, name: str, options: LanguageJudgeConfig) -> None:
        self.name, self._options = name, options
        self.template = Path(options.template).read_text("utf-8") if options.template else PROMPT
        lacking = [part for part in ("{prompt}", "{answer_a}", "{answer_b}") if part not in self.template]
        if lacking:
            raise ConfigError(f"{options.template}: the judge's template has no {' and no '.join(lacking)}")
        self._known: dict[str, float | None] = {}
        self._orders: list[tuple[float, float]] = []

    @abstractmethod
    def fingerprint(self) -> str:
        """See `Judge.fingerprint`."""

    @abstractmethod
    def ask(self, questions: Sequence[str]) -> list[float | None]:
        """The probability that the first answer of each question is the better one; None: unparsed."""

    def compare(
        self, prompts: Sequence[Text], answers_a: Sequence[str], answers_b: Sequence[str]
    ) -> NDArray[np.float64]:
        """The probability that answer a is better, the mean of both orders; equal answers: one half.

        Raises:
            ModelError: too many questions are unparsed, or one in both orders.
        """
        rows = list(zip(prompts, answers_a, answers_b, strict=True))
        orders = [(self._question(p, a, b), self._question(p, b, a)) for p, a, b in rows if a != b]
        new = list(dict.fromkeys(each for both in orders for each in both if each not in self._known))
        self._known.update(zip(new, self.ask(new), strict=True))
        asked = {question for both in orders for question in both}
        unparsed = [question for question in asked if self._known[question] is None]
        lost = [one for one, other in orders if self._known[one] is None and self._known[other] is None]
        if len(unparsed) > MAX_UNPARSED * len(asked) or lost:
            raise ModelError(
                f"judge {self.name!r} named neither label in {len(unparsed):,} of {len(asked):,} questions, "
                f"more than {MAX_UNPARSED:.0%} or both orders of one: choose another model, or a template "
                f"that asks for {' or '.join(self._options.labels)} alone; such as "
                f"{(lost or unparsed)[0][:200]!r}"
            )
        scores, found = [], iter(orders)
        for _, a, b in rows:
            if a == b:
                scores.append(0.5)
                continue
            first, second = (self._known[question] for question in next(found))
            if first is not None and second is not None:
                self._orders.append((first, second))
            both = [each for each in (first, None if second is None else 1.0 - second) if each is not None]
            scores.append(float(np.mean(both)))
        return np.array(scores)

    @property
    def bias(self) -> Bias:
        """Of all comparisons so far."""
        first_C2 = np.array(self._orders).reshape(-1, 2)
        known = list(self._known.values())
        return Bias(
            len(known),
            sum(each is None for each in known),
            float(first_C2.mean()) if len(first_C2) else math.nan,
            float(np.mean((first_C2[:, 0] > 0.5) != (first_C2[:, 1] > 0.5))) if len(first_C2) else math.nan,
        )

    def notes(self) -> tuple[str, ...]:
        """What to tell of the judge beside its verdicts."""
        questions, unparsed, first, consistent = self.bias
        return (
            f"judge: {questions:,} questions, {unparsed:,} unparsed; the first answer was preferred with "
            f"probability {first:.2f}; both orders agreed in {consistent:.0%} of the comparisons",
        )

    def _question(self, prompt: Text, first: str, second: str) -> str:
        text = prompt if isinstance(prompt, str) else "\n\n".join(contents_of(prompt))
        parts = {"{prompt}": text, "{answer_a}": first, "{answer_b}": second}
        # In one pass, so that braces in a text are no places to fill.
        return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found.group()], self.template)


def label_probability(first: float | None, second: float | None) -> float | None:
    """P(first label) among the two, from log-probs; a missing one counts as no probability."""
    if first is None and second is None:
        return None
    if first is None or second is None:
        return 0.0 if first is None else 1.0
    return 1.0 / (1.0 + math.exp(min(700.0, second - first)))


def parse_label(text: str, labels: tuple[str, str]) -> float | None:
    """1 where the text names the first label alone, 0 for the second, None for both or neither."""
    named = [re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text) is not None for label in labels]
    return None if named[0] == named[1] else float(named[0])


class EndpointJudge(LanguageModelJudge):
    """A model behind an OpenAI-compatible server, at temperature 0."""

    def __init__(self, options: LanguageJudgeConfig) -> None:
        super().__init__(f"endpoint {options.model}", options)
        try:
            import openai
        except ImportError as error:
            raise ConfigError("judge 'endpoint' needs: pip install 'selective-dpo[judge]'") from error
        try:
            # It repeats what a server refuses for a while (429, 5xx, cut connections), and waits in between.
            self._client = openai.OpenAI(base_url=options.base_url, max_retries=6, timeout=120.0)
        except openai.OpenAIError as error:
            raise ConfigError(f"judge 'endpoint': {error}") from error
        self._errors = openai.OpenAIError
        self._spent = 0.0

    def fingerprint(self) -> str:
        """Of the model's name, the server's address and the prompt; what the server does is its own."""
        options = self._options
        return digest(["endpoint", options.model, options.base_url, self.template, list(options.labels)])

    def ask(self, questions: Sequence[str]) -> list[float | None]:
        """See `LanguageModelJudge.ask`.

        Raises:
            ConfigError: it would cost more than `max_cost`; nothing is asked then.
            ModelError: the server does not answer.
        """
        known = {question: self._cached(question) for question in questions}
        new = [question for question in questions if known[question] is None]
        tokens = sum(map(len, new)) / CHARACTERS_A_TOKEN
        cost, limit = tokens * self._options.price / 1e6, self._options.max_cost
        if limit is not None and self._spent + cost > limit:
            raise ConfigError(
                f"{len(new):,} questions of about {tokens:,.0f} tokens would cost {cost:.2f} beside "
                f"{self._spent:.2f} spent, more than language_judge.max_cost = {limit:g}: raise it, or "
                "answer fewer prompts"
            )
        self._spent += cost
        with (
            ThreadPoolExecutor(self._options.threads) as pool,
            Progress(len(new), "verdicts", unit="questions") as progress,
        ):
            for question, reply in zip(new, pool.map(self._reply, new), strict=True):
                known[question] = reply
                progress.advance(1)
        return [self._read(known[question] or {}) for question in questions]

    def _reply(self, question: str) -> dict[str, Any]:
        """What the server says, as it is kept: the text, and log-probs of its first token's candidates."""
        try:
            reply = self._client.chat.completions.create(
                model=self._options.model,
                messages=[{"role": "user", "content": question}],
                temperature=0.0,
                max_tokens=8,
                logprobs=True,
                top_logprobs=10,
            )
        except self._errors as error:
            raise ModelError(
                f"judge {self.name!r}: {error}; look at the server, then repeat the command"
            ) from error
        choice = reply.choices[0]
        content = choice.logprobs.content if choice.logprobs else None
        found = {
            "text": choice.message.content or "",
            "logprobs": {each.token: each.logprob for each in content[0].top_logprobs} if content else {},
        }
        if place := self._place(question):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, found)
        return found

    def _read(self, reply: dict[str, Any]) -> float | None:
        of_labels = []
        for label in self._options.labels:
            found = [value for token, value in reply["logprobs"].items() if token.strip() == label]
            of_labels.append(float(np.logaddexp.reduce(found)) if found else None)
        found_label = label_probability(*of_labels)
        return parse_label(reply["text"], self._options.labels) if found_label is None else found_label

    def _place(self, question: str) -> Path | None:
        content = digest([self._options.model, self._options.base_url, question])
        return Path(self._options.cache) / f"{content}.json" if self._options.cache else None

    def _cached(self, question: str) -> dict[str, Any] | None:
        place = self._place(question)
        return read_json(place) if place and place.is_file() else None


class LocalModelJudge(LanguageModelJudge):
    """A Hugging Face model in this process, by the logits of the two labels where its reply would begin."""

    def __init__(self, options: LanguageJudgeConfig) -> None:
        super().__init__(f"local model {options.model}", options)
        self._tokenizer = read_tokenizer(options.model, what="judge")
        self._label_ids = [
            self._tokenizer.encode(label, add_special_tokens=False)[0] for label in options.labels
        ]
        if self._label_ids[0] == self._label_ids[1]:
            raise ConfigError(
                f"the labels {options.labels} begin with one token of {options.model}; choose others"
            )

    def fingerprint(self) -> str:
        """Of weights (of a hub model: its commit), tokenizer, chat template and prompt."""
        model = model_digest(ModelConfig(path=self._options.model))
        parts = [tokenizer_digest(self._tokenizer), template_digest(self._tokenizer), self.template]
        return digest(["local-model", model, *parts, list(self._options.labels)])

    @torch.no_grad()
    def ask(self, questions: Sequence[str]) -> list[float | None]:
        """See `LanguageModelJudge.ask`; nothing is ever unparsed. The model leaves the device afterwards."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype: Any = "bfloat16" if device.type == "cuda" else "float32"
        model = load_policy(ModelConfig(path=self._options.model, dtype=dtype)).to(device).eval()
        found: list[float | None] = []
        with Progress(len(questions), "verdicts", unit="questions") as progress:
            for question in questions:
                message: Text = [{"role": "user", "content": question}]
                ids = encode_prompt(self._tokenizer, message if self._tokenizer.chat_template else question)
                logits_V = model(input_ids=torch.tensor([ids], device=device), logits_to_keep=1).logits[0, -1]
                first, second = logits_V[self._label_ids].double().tolist()
                found.append(label_probability(first, second))
                progress.advance(1)
        return found


def language_judge(config: EvaluateConfig) -> LanguageModelJudge:
    """The judge of `evaluate.language_judge`."""
    assert config.language_judge is not None  # the configuration requires it
    kind = EndpointJudge if config.judge == "endpoint" else LocalModelJudge
    return kind(config.language_judge)
