"""A first recipe for a model and a file of pairs: what can be read from the two is filled in, and said."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from selective_dpo.config import ModelConfig, SourceConfig
from selective_dpo.data.adapters import CHAT, DropReason, Pair, as_chat, parse_row
from selective_dpo.data.readers import Malformed
from selective_dpo.data.sources import Source, open_source
from selective_dpo.data.tokenize import PairTokens, tokenize_pairs
from selective_dpo.errors import ConfigError, DataError, name_some
from selective_dpo.models import load_model_config, load_tokenizer
from selective_dpo.run.costs import architecture_of, build_on_meta
from selective_dpo.storage.artifacts import write_atomic

SAMPLE = 500
"""Rows that are looked at, from the first."""

_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "question", "query", "input", "context", "messages", "conversations"),
    "chosen": (
        "chosen",
        "accepted",
        "preferred",
        "answer_chosen",
        "chosen_response",
        "response_chosen",
        "better",
    ),
    "rejected": (
        "rejected",
        "dispreferred",
        "answer_rejected",
        "rejected_response",
        "response_rejected",
        "worse",
    ),
}
"""Our columns, and what others call them; the first that a file has is taken."""

_LARGE = 20e6
"""Parameters from which activations are worth recomputing."""


class Found(NamedTuple):
    """What was read from a model and its pairs."""

    rows: int
    looked_at: int
    dropped: Mapping[str, int]
    """Of those looked at, by reason."""
    columns: Mapping[str, str]
    adapter: str
    median_length: int
    max_length: int
    """Tokens of prompt and longer answer that 99% stay below, rounded up; at most what the model takes."""
    max_prompt_length: int
    parameters: int
    """Of the model's matrices."""
    dtype: str
    batch: int
    accumulation: int

    def describe(self) -> str:
        """One line for the terminal."""
        drops = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        return (
            f"{self.rows:,} rows, {self.looked_at:,} looked at{f' ({drops})' if drops else ''}; half have at "
            f"most {self.median_length:,} tokens, 99% {self.max_length:,}; {self.parameters:,} parameters"
        )


def write_first_recipe(
    path: Path, model: str, data: str, *, split: str = "", overwrite: bool = False
) -> Found:
    """Write a commented recipe for `model` and `data` to `path`.

    Names of files are written relative to the recipe, so that it works from any folder.

    Raises:
        ConfigError: `path` is there and `overwrite` is off, or is no .yaml file; unknown columns.
        DataError, ModelError: the data or the model cannot be read.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path} is no name of a recipe: let it end in .yaml")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists: choose another name, or pass --overwrite to replace it")
    found = look_at(model, SourceConfig(path=data, split=split))
    folder = path.absolute().parent
    text = _recipe(path.stem, _named_from(folder, model), _named_from(folder, data), split, found)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return found


def look_at(model: str, data: SourceConfig) -> Found:
    """Read a model's sizes and up to `SAMPLE` rows, and choose settings by them.

    Raises:
        ConfigError, DataError, ModelError: as `write_first_recipe`.
    """
    config = ModelConfig(path=model)
    source = open_source(data)
    rows = list(islice(source.rows(), SAMPLE))
    columns = _columns(source, [row for row in rows if not isinstance(row, Malformed)])
    tokenizer = load_tokenizer(config)
    read = [
        DropReason.MALFORMED if isinstance(row, Malformed) else parse_row(_renamed(row, columns))
        for row in rows
    ]
    pairs = [pair for pair in read if isinstance(pair, Pair)]
    is_chat = bool(tokenizer.chat_template) and any(not pair.is_conversational for pair in pairs)
    if is_chat:
        pairs = [as_chat(pair) for pair in pairs]
    dropped = Counter(str(pair) for pair in read if isinstance(pair, DropReason))
    tokens = [each for each in tokenize_pairs(pairs, tokenizer) if isinstance(each, PairTokens)]
    if not tokens:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "there is no row"
        raise DataError(
            f"none of the first {len(rows):,} rows of {source.label} is a usable pair ({reasons}); a pair "
            "has prompt, chosen and rejected"
        )
    sizes = architecture_of(build_on_meta(config))
    longest = int(getattr(load_model_config(config), "max_position_embeddings", 0) or 1 << 20)
    prompts = np.array([len(each.prompt_ids) for each in tokens])
    totals = prompts + [max(len(each.chosen_ids), len(each.rejected_ids)) for each in tokens]
    max_length = min(longest, _rounded_up(float(np.quantile(totals, 0.99))))
    has_gpu = torch.cuda.is_available()
    count = source.row_count()
    # An update of up to 32 pairs, and some twenty updates at least on the easiest half.
    update = int(np.clip(2 ** math.floor(math.log2(max(1, count / 40))), 4, 32))
    batch = 4 if has_gpu or max_length <= 512 else 2
    return Found(
        rows=count,
        looked_at=len(rows),
        dropped=dropped,
        columns=columns,
        adapter=CHAT if is_chat else "",
        median_length=int(np.median(totals)),
        max_length=max_length,
        max_prompt_length=min(max_length - 1, _rounded_up(float(np.quantile(prompts, 0.99)))),
        parameters=sizes.matrix_parameters,
        dtype="bfloat16" if has_gpu else "float32",
        batch=min(batch, update),
        accumulation=max(1, update // batch),
    )


def _rounded_up(length: float) -> int:
    return 64 * math.ceil(length / 64)


def _columns(source: Source, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """`columns` of the source: our name -> its, where they differ."""
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    taken = {ours: next((name for name in theirs if name in names), "") for ours, theirs in _NAMES.items()}
    if not taken["chosen"] or not taken["rejected"]:
        named = name_some(names, limit=12)
        raise ConfigError(
            f"{source.label} has no columns known as chosen and rejected (it has {named}): rename "
            "them, or begin with `init RECIPE --from local-small` and give data.train.columns"
        )
    return {ours: name for ours, name in taken.items() if name and name != ours}


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {**row, **{ours: row[name] for ours, name in columns.items() if name in row}}


def _named_from(folder: Path, name: str) -> str:
    place = Path(name).expanduser()
    return os.path.relpath(place.absolute(), folder) if place.exists() else name


def _recipe(name: str, model: str, data: str, split: str, found: Found) -> str:
    def quoted(value: str) -> str:
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()

    source = [f"- path: {quoted(data)}", *([f"  split: {quoted(split)}"] if split else [])]
    if found.columns:
        pairs = ", ".join(f"{ours}: {quoted(theirs)}" for ours, theirs in found.columns.items())
        source.append(f"  columns: {{{pairs}}}")
    if found.adapter:
        source.append(f"  adapter: {found.adapter}  # its texts become a user's and an assistant's message")
    drops = ", ".join(f"{count:,} {reason}" for reason, count in found.dropped.items()) or "none"
    checkpointing = "true" if found.parameters > _LARGE else "false"
    return _TEMPLATE.format(
        name=quoted(name),
        model=quoted(model),
        source="\n    ".join(source),
        drops=drops,
        checkpointing=checkpointing,
        **{
            key: value
            for key, value in found._asdict().items()
            if key not in ("columns", "adapter", "dropped")
        },
    )


_TEMPLATE = """\
# Written by `selective-dpo init`. Every key, its default and its meaning: docs/recipe.md. Next:
#
#     selective-dpo doctor RECIPE     # environment, model, template and data, before any work
#     selective-dpo plan RECIPE       # what would run, and what it would cost
#     selective-dpo run RECIPE
#
# A key can be changed for one run: `selective-dpo run RECIPE --select.fraction 0.6`.

name: {name}  # the run's folder is runs/NAME
output_dir: runs

model:
  # {parameters:,} parameters in its matrices. It is where DPO starts and the reference, and difficulty is
  # difficulty FOR THIS MODEL: it should follow instructions already (SFT).
  path: {model}
  dtype: {dtype}

data:
  # {rows:,} rows. Of the first {looked_at:,} these are no usable pairs: {drops}.
  train:
    {source}
  # Pairs kept apart, to measure the trained policy with. Recommended.
  # test:
  #   - path: test-pairs.jsonl
  # Tokens. Half of the pairs have at most {median_length:,}, and 99% fit.
  max_length: {max_length}
  max_prompt_length: {max_prompt_length}
  overlong: drop                   # counted, with its reason; or truncate

score:
  protocol: one-step               # one gradient pass and one forward pass; paper: the published six scorers
  splits: 2                        # twice, with other folds: how far the result depends on them is reported
  lora: {{r: 16, lora_alpha: 16, lora_dropout: 0.0, target_modules: all-linear}}
  trainer:
    beta: 0.1
    per_device_train_batch_size: {batch}
    activation_checkpointing: {checkpointing}

select:
  rule: easiest
  fraction: 0.5                    # the share kept; the right one depends on the model and on the data
  order: easy-to-hard

train:
  lora: {{r: 16, lora_alpha: 16, lora_dropout: 0.0, target_modules: all-linear}}
  trainer:
    beta: 0.1
    learning_rate: 5e-5            # with lora: null, all weights are trained, at a rate near 1e-6
    per_device_train_batch_size: {batch}
    gradient_accumulation_steps: {accumulation}
    num_train_epochs: 1
    lr_scheduler_type: cosine
    warmup_steps: 0.1
    activation_checkpointing: {checkpointing}  # slower by about a fifth, for much less memory
    logging_steps: 5
"""
