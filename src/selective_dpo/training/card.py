"""The model card of a trained policy: what it is, what it was trained on, and how to make it again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from selective_dpo.config import Recipe, SourceConfig
from selective_dpo.curriculum.import_ import imported_from
from selective_dpo.models import shown_path
from selective_dpo.training.selective_trainer import ConsumedOrder


def model_card(
    recipe: Recipe, *, label: str, facts: Mapping[str, Any], order: ConsumedOrder, key: str
) -> str:
    """Markdown with the hub's YAML header.

    Args:
        label: the selection in words, such as "easiest 50%, easy to hard".
        facts: the curriculum's facts (`Curriculum.facts`).
        order: what was really consumed.
        key: the digest of every input of this training.
    """
    # The hub takes only its own names for a base model, and refuses a card with a path.
    base = shown_path(recipe.model.path)
    header = {
        **({} if base.startswith("./") else {"base_model": base}),
        "library_name": "peft" if recipe.train.lora is not None else "transformers",
        "tags": ["selective-dpo", "dpo", "trl"],
        "pipeline_tag": "text-generation",
    }
    # Curricula of earlier versions say by which command they were made, with the paths in it.
    origin = {name: fact for name, fact in facts.get("provenance", {}).items() if name != "command"}
    provenance = json.dumps(origin, indent=2, sort_keys=True)
    trained = without_paths(recipe.train.model_dump(mode="json"))
    settings = yaml.safe_dump(trained, sort_keys=False).rstrip()
    revision = recipe.model.revision
    model = code_span(base) + (f" (revision {code_span(revision)})" if revision != "main" else "")
    sources = "\n".join(_source(source) for source in recipe.data.train)
    return f"""---
{yaml.safe_dump(header, sort_keys=False).rstrip()}
---

# {recipe.name}

{model} trained with DPO on {order.pairs:,} of {facts.get("pairs", order.pairs):,} scored
preference pairs: {label}. {_difficulty(facts)}, after
[Selective DPO](https://arxiv.org/abs/2502.09650).

Preference pairs:

{sources}

## Training

{code_block(settings, "yaml")}

Rows consumed: {order.consumed:,}; SHA-256 of their order `{order.consumed_digest}`, which
{"equals" if order.matches else "DIFFERS FROM"} the curriculum's. Key of all inputs: `{key}`.

## Provenance

{code_block(provenance, "json")}
"""


def _difficulty(facts: Mapping[str, Any]) -> str:
    """What difficulty is, in words."""
    if imported := imported_from(facts):
        by = imported.get("made_by", {})
        model = f", measured with {code_span(by['model'])}" if "model" in by else ""
        return (
            f"Difficulty was imported from the {imported['kind']} {code_span(imported['name'])}{model}\n"
            f"(SHA-256 `{imported['sha256']}`, joined by {imported['joined_by']})"
        )
    return (
        "Difficulty is the mean held-out DPO loss of scorers trained on the other half of\nthe pairs "
        f"(seeds {facts.get('seeds')}, evaluations {facts.get('evaluations')})"
    )


def without_paths(settings: Any) -> Any:
    """Settings, with each absolute path in them as `shown_path` gives it."""
    if isinstance(settings, dict):
        return {name: without_paths(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [without_paths(value) for value in settings]
    is_path = isinstance(settings, str) and settings.startswith(("/", "~/"))
    return shown_path(settings) if is_path else settings


def code_span(text: str) -> str:
    """`text` in Markdown as it is: no markup, HTML or link in it counts, and it cannot end its own span.

    Line breaks and control characters, which could, become U+FFFD.
    """
    shown = "".join(character if character.isprintable() else "\ufffd" for character in text)
    ticks = "`" * (_longest_run(shown) + 1)
    # A space keeps ticks of the text apart from those around it; Markdown takes it away again.
    space = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def code_block(text: str, language: str) -> str:
    """`text` as a fenced block that no line of it can end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _source(source: SourceConfig) -> str:
    split = f" {code_span(source.split)}" if source.split else ""
    return f"- {code_span(shown_path(source.path))}{split}"
