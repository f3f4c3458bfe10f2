"""Answers in the form that AlpacaEval reads as `model_outputs`, for its official judge.

The form is that of https://github.com/tatsu-lab/alpaca_eval: a JSON list of objects with `instruction`,
`output` and `generator`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from selective_dpo.artifacts import write_atomic
from selective_dpo.core.identity import Text
from selective_dpo.errors import DataError
from selective_dpo.evaluation.generation import Answers, Prompt

FOLDER = "alpaca_eval_outputs"


def write_model_outputs(path: Path, arm: str, prompts: Sequence[Prompt], answers: Answers) -> None:
    """Write the first sample of each prompt, in the order of `prompts`, with `arm` as the generator.

    Raises:
        DataError: a prompt has no user message.
    """
    outputs = [
        {
            "instruction": instruction_of(prompt.text),
            "output": answers[prompt.prompt_id][0].text,
            "generator": arm,
        }
        for prompt in prompts
    ]
    write_atomic(path, json.dumps(outputs, indent=2) + "\n")


def instruction_of(text: Text) -> str:
    """Plain text as it is; of messages, the content of the last one by the user."""
    if isinstance(text, str):
        return text
    for message in reversed(text):
        if message["role"] == "user":
            return str(message["content"])
    raise DataError("a prompt without a user message has no instruction; drop it from data.test")
