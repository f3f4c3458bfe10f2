"""One embedded world as one published folder: model, pairs, prompts, and the truth kept apart.

model/              the SFT model and its tokenizer (safetensors): starting policy and reference
pairs.jsonl         training pairs: prompt, chosen, rejected
test_pairs.jsonl    held-out pairs, of other prompts
test_prompts.jsonl  prompts for judging answers, of neither
truth.parquet       gold rewards by pair_id, for the evaluation only
world.json          configuration, seed and measured facts
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selective_dpo.errors import DataError
from selective_dpo.storage.artifacts import (
    content_key,
    is_complete,
    publish_folder,
    read_json,
    write_atomic,
    write_json,
)
from selective_dpo.worlds.config import WorldConfig
from selective_dpo.worlds.model import save_model, train_sft
from selective_dpo.worlds.pairs import LabelledPairs, label_pairs, to_jsonl, truth_table
from selective_dpo.worlds.sampling import sample_answers
from selective_dpo.worlds.tasks import draw_tasks, gold_reward, prompt_text
from selective_dpo.worlds.tokenizer import build_tokenizer

KIND = "world"
RECIPE_VERSION = 1
"""Raised when the code that makes worlds changes what it makes, so that older folders are made again."""
EXACT = 2.0
"""The gold reward of an exactly right answer."""


class World(NamedTuple):
    """A published world."""

    folder: Path
    facts: dict[str, Any]
    """The content of world.json."""

    @property
    def model(self) -> Path:
        """The SFT model with its tokenizer."""
        return self.folder / "model"

    @property
    def pairs(self) -> Path:
        """Training pairs, JSONL."""
        return self.folder / "pairs.jsonl"

    @property
    def test_pairs(self) -> Path:
        """Held-out pairs, JSONL."""
        return self.folder / "test_pairs.jsonl"

    @property
    def test_prompts(self) -> Path:
        """Prompts for judging, JSONL with the one key `prompt`."""
        return self.folder / "test_prompts.jsonl"

    @property
    def truth(self) -> Path:
        """Gold rewards by pair_id (columns: `pairs.TRUTH_COLUMNS`). Not for the method."""
        return self.folder / "truth.parquet"


class _Seeds(NamedTuple):
    """Independent seeds for the random choices that make a world."""

    tasks: int
    sft: int
    train_answers: int
    test_answers: int
    check_answers: int
    annotator: int


def world_key(seed: int, config: WorldConfig) -> str:
    """The content key that a world's folder is published under."""
    return content_key(recipe=RECIPE_VERSION, seed=seed, config=config.model_dump(mode="json"))


def build_world(folder: str | Path, *, seed: int, config: WorldConfig | None = None) -> World:
    """Make the world of `seed` in `folder`, or return the one that is there if it is this very one.

    The same seed and configuration give the same model and pairs on the same machine. The default
    configuration takes under a minute on one core.

    Raises:
        DataError: the configuration gives no pairs, since the model's two answers are always equal.
    """
    folder = Path(folder)
    config = config or WorldConfig()
    key = world_key(seed, config)
    if is_complete(folder, key=key):
        return load_world(folder)
    with publish_folder(folder, kind=KIND, key=key) as unfinished:
        _fill(unfinished, seed, config)
    return load_world(folder)


def load_world(folder: str | Path) -> World:
    """A world that was built before; `ArtifactError` if there is none."""
    folder = Path(folder)
    return World(folder, read_json(folder / "world.json"))


def _fill(folder: Path, seed: int, config: WorldConfig) -> None:
    seeds = _Seeds(*np.random.SeedSequence(seed).generate_state(len(_Seeds._fields), np.uint32).tolist())
    sizes = config.pairs
    train_prompts, test_pair_prompts, test_prompts = _draw_prompts(seeds.tasks, config)
    clock = _Clock()
    trained = train_sft(config.tasks, config.sft, seed=seeds.sft)
    clock.lap("sft")
    sampled = partial(
        sample_answers, trained.model, build_tokenizer(), max_new_tokens=sizes.max_answer_tokens
    )
    labelled = partial(
        label_pairs,
        generator=np.random.default_rng(seeds.annotator),
        annotator_temperature=sizes.annotator_temperature,
    )
    train_answers = sampled(train_prompts, samples=2, seed=seeds.train_answers, temperature=sizes.temperature)
    test_answers = sampled(
        test_pair_prompts, samples=2, seed=seeds.test_answers, temperature=sizes.temperature
    )
    train, test = labelled(train_prompts, train_answers), labelled(test_pair_prompts, test_answers)
    if not (train.pairs and test.pairs):
        raise DataError(
            "the model gave two equal answers to every prompt: raise pairs.prompts or temperature"
        )
    clock.lap("pairs")
    greedy = sampled(test_prompts, samples=1, seed=seeds.check_answers, temperature=0.0)
    save_model(trained.model, folder / "model")
    _write_texts(folder, train, test, test_prompts)
    write_json(
        folder / "world.json",
        {
            "seed": seed,
            "config": config.model_dump(mode="json"),
            "sft": {
                "loss": trained.loss,
                "parameters": trained.model.num_parameters(),
                "exact_greedy": exact_shares(test_prompts, greedy),
                "exact_sampled": exact_shares(train_prompts, train_answers),
            },
            "pairs": pair_facts(train),
            "test_pairs": pair_facts(test),
            "test_prompts": len(test_prompts),
            "seconds": clock.seconds,
        },
    )


def _write_texts(
    folder: Path, train: LabelledPairs, test: LabelledPairs, test_prompts: Sequence[str]
) -> None:
    write_atomic(folder / "pairs.jsonl", to_jsonl(train.pairs))
    write_atomic(folder / "test_pairs.jsonl", to_jsonl(test.pairs))
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in test_prompts]
    write_atomic(folder / "test_prompts.jsonl", "".join(lines))
    truth = [truth_table(train.pairs, split="train"), truth_table(test.pairs, split="test")]
    pq.write_table(pa.concat_tables(truth), folder / "truth.parquet")


def _draw_prompts(seed: int, config: WorldConfig) -> tuple[list[str], list[str], list[str]]:
    """Prompts of the training pairs, of the test pairs, and for judging; no prompt stands twice."""
    sizes = config.pairs
    counts = (sizes.prompts, sizes.test_pair_prompts, sizes.test_prompts)
    tasks = draw_tasks(
        sum(counts),
        np.random.default_rng(seed),
        operations=config.tasks.operations,
        lengths=config.tasks.lengths,
    )
    prompts = [prompt_text(task) for task in tasks]
    first, second = counts[0], counts[0] + counts[1]
    return prompts[:first], prompts[first:second], prompts[second:]


def exact_shares(prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of exactly right answers by operation, and of "all"."""
    exact: dict[str, list[bool]] = defaultdict(list)
    for prompt, given in zip(prompts, answers, strict=True):
        exact[prompt.split()[0]].extend(gold_reward(prompt, answer) == EXACT for answer in given)
    shares = {operation: float(np.mean(right)) for operation, right in sorted(exact.items())}
    return {"all": float(np.mean([right for rights in exact.values() for right in rights])), **shares}


def pair_facts(labelled: LabelledPairs) -> dict[str, Any]:
    """Number of pairs, of prompts that gave none by reason, and the shares of flipped labels and of ties."""
    pairs = labelled.pairs
    return {
        "pairs": len(pairs),
        "dropped": labelled.dropped,
        "flip_share": float(np.mean([pair.reward_chosen < pair.reward_rejected for pair in pairs])),
        "tie_share": float(np.mean([pair.reward_chosen == pair.reward_rejected for pair in pairs])),
    }


class _Clock:
    """Seconds of wall time by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Note the time since the last lap as that of `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = round(now - self._last, 2)
        self._last = now
