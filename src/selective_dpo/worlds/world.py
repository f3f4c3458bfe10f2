"""One embedded world as one published folder: model, preference pairs, prompts, and the truth kept apart.

model/              the SFT model and its tokenizer (safetensors): starting policy and reference
pairs.jsonl         training pairs: prompt, chosen, rejected
test_pairs.jsonl    held-out pairs, of other prompts
test_prompts.jsonl  prompts for judging answers, of neither
truth.parquet       gold rewards by pair_id, for the evaluation only
world.json          configuration, seed and measured facts

The pairs are a model's own answers, labelled by an annotator who errs as people do. P: pairs.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from selective_dpo.config import Block, Count
from selective_dpo.errors import DataError
from selective_dpo.identity import Text, pair_id
from selective_dpo.storage.artifacts import (
    content_key,
    is_complete,
    publish_folder,
    read_json,
    write_atomic,
    write_json,
)
from selective_dpo.worlds.model import (
    Positive,
    SFTConfig,
    TasksConfig,
    build_tokenizer,
    sample_answers,
    save_model,
    train_sft,
)
from selective_dpo.worlds.tasks import draw_tasks, gold_reward, parse_prompt, prompt_text

KIND = "world"
RECIPE_VERSION = 1
"""Raised when the code that makes worlds changes what it makes, so that older folders are made again."""
EXACT = 2.0
"""The gold reward of an exactly right answer."""
TRUTH_COLUMNS = {
    "pair_id": pa.string(),
    "split": pa.string(),
    "operation": pa.string(),
    "reward_chosen": pa.float64(),
    "reward_rejected": pa.float64(),
    "flipped": pa.bool_(),
    "tie": pa.bool_(),
}
"""`split` is "train" or "test"; `flipped`: the gold reward prefers the rejected answer; `tie`: it prefers
neither."""


class Language(NamedTuple):
    """How the prompts and answers of a world are written, and what they are worth."""

    reward: Callable[[str, str], float]
    """(prompt, answer) -> gold reward."""
    operation: Callable[[str], str]
    """What kind of task a prompt is."""
    user: Callable[[str], Text]
    """A prompt's text as the data has it: plain, or as chat messages."""
    assistant: Callable[[str], Text]
    """An answer's text as the data has it."""


LISTS = Language(gold_reward, lambda prompt: parse_prompt(prompt).operation, str, str)
"""Plain text and list tasks: the embedded world's."""


class PairsConfig(Block):
    """Preference pairs."""

    prompts: Count = 3000
    """Prompts with two answers each, for training; identical answers make no pair."""
    temperature: Positive = 1.0
    """Of the sampled answers."""
    annotator_temperature: Positive = 1.2
    """P(a is preferred to b) = sigmoid((reward of a - reward of b) / this): Bradley-Terry noise."""
    test_pair_prompts: Count = 400
    """Prompts for held-out pairs, made and labelled as the training pairs are."""
    test_prompts: Count = 600
    """Prompts kept for judging answers; disjoint from those of all pairs."""
    max_answer_tokens: Count = 10
    """An answer is cut after so many tokens; right ones have at most the longest length plus <eos>."""


class WorldConfig(Block):
    """Everything but the seed that decides a world."""

    tasks: TasksConfig = TasksConfig()
    """What is asked."""
    sft: SFTConfig = SFTConfig()
    """The starting policy."""
    pairs: PairsConfig = PairsConfig()
    """What it is trained on next."""


class World(NamedTuple):
    """The paths of a published world (see the head of this file), and the content of its world.json."""

    folder: Path
    model: Path
    pairs: Path
    test_pairs: Path
    test_prompts: Path
    truth: Path
    """Its columns are `TRUTH_COLUMNS`. Not for the method."""
    facts: dict[str, Any]


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
    return World(
        folder=folder,
        model=folder / "model",
        pairs=folder / "pairs.jsonl",
        test_pairs=folder / "test_pairs.jsonl",
        test_prompts=folder / "test_prompts.jsonl",
        truth=folder / "truth.parquet",
        facts=read_json(folder / "world.json"),
    )


def _fill(folder: Path, seed: int, config: WorldConfig) -> None:
    # One independent seed for each random choice that makes a world.
    tasks_seed, sft_seed, train_seed, test_seed, greedy_seed, annotator_seed = (
        np.random.SeedSequence(seed).generate_state(6, np.uint32).tolist()
    )
    sizes = config.pairs
    train_prompts, test_pair_prompts, test_prompts = _draw_prompts(tasks_seed, config)
    started = time.perf_counter()
    model, sft_loss = train_sft(config.tasks, config.sft, seed=sft_seed)
    trained = time.perf_counter()
    sampled = partial(sample_answers, model, build_tokenizer(), max_new_tokens=sizes.max_answer_tokens)
    train_answers = sampled(train_prompts, samples=2, seed=train_seed, temperature=sizes.temperature)
    test_answers = sampled(test_pair_prompts, samples=2, seed=test_seed, temperature=sizes.temperature)
    generator = np.random.default_rng(annotator_seed)
    train, test = (
        label_pairs(prompts, answers, generator, annotator_temperature=sizes.annotator_temperature)
        for prompts, answers in ((train_prompts, train_answers), (test_pair_prompts, test_answers))
    )
    if not (train.pairs and test.pairs):
        raise DataError(
            "the model gave two equal answers to every prompt: raise pairs.prompts or temperature"
        )
    sampled_at = time.perf_counter()
    greedy = sampled(test_prompts, samples=1, seed=greedy_seed, temperature=0.0)
    save_model(model, folder / "model")
    write_pairs(folder, train.pairs, test.pairs, test_prompts)
    write_json(
        folder / "world.json",
        {
            "seed": seed,
            "config": config.model_dump(mode="json"),
            "sft": {
                "loss": sft_loss,
                "parameters": model.num_parameters(),
                "exact_greedy": exact_shares(test_prompts, greedy),
                "exact_sampled": exact_shares(train_prompts, train_answers),
            },
            "pairs": pair_facts(train),
            "test_pairs": pair_facts(test),
            "test_prompts": len(test_prompts),
            "seconds": {"sft": round(trained - started, 2), "pairs": round(sampled_at - trained, 2)},
        },
    )


def _draw_prompts(seed: int, config: WorldConfig) -> tuple[list[str], list[str], list[str]]:
    """Prompts of the training pairs, of the test pairs, and for judging; no prompt stands twice."""
    sizes = config.pairs
    tasks = draw_tasks(
        sizes.prompts + sizes.test_pair_prompts + sizes.test_prompts,
        np.random.default_rng(seed),
        operations=config.tasks.operations,
        lengths=config.tasks.lengths,
    )
    prompts = [prompt_text(task) for task in tasks]
    first, second = sizes.prompts, sizes.prompts + sizes.test_pair_prompts
    return prompts[:first], prompts[first:second], prompts[second:]


def exact_shares(prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of exactly right answers by operation, and of "all"."""
    exact: dict[str, list[bool]] = defaultdict(list)
    for prompt, given in zip(prompts, answers, strict=True):
        exact[prompt.split()[0]].extend(gold_reward(prompt, answer) == EXACT for answer in given)
    shares = {operation: float(np.mean(right)) for operation, right in sorted(exact.items())}
    return {"all": float(np.mean([right for rights in exact.values() for right in rights])), **shares}


def write_pairs(
    folder: Path,
    train: Sequence[LabelledPair],
    test: Sequence[LabelledPair],
    test_prompts: Sequence[str],
    language: Language = LISTS,
) -> None:
    """What the method reads (see the head of this file), and the truth that it never reads."""
    write_atomic(folder / "pairs.jsonl", to_jsonl(train, language))
    write_atomic(folder / "test_pairs.jsonl", to_jsonl(test, language))
    lines = [json.dumps({"prompt": language.user(prompt)}) + "\n" for prompt in test_prompts]
    write_atomic(folder / "test_prompts.jsonl", "".join(lines))
    truth = [
        truth_table(pairs, split=split, language=language)
        for split, pairs in (("train", train), ("test", test))
    ]
    pq.write_table(pa.concat_tables(truth), folder / "truth.parquet")


def pair_facts(labelled: LabelledPairs) -> dict[str, Any]:
    """Number of pairs, of prompts that gave none by reason, and the shares of flipped labels and of ties."""
    pairs = labelled.pairs
    return {
        "pairs": len(pairs),
        "dropped": labelled.dropped,
        "flip_share": float(np.mean([pair.reward_chosen < pair.reward_rejected for pair in pairs])),
        "tie_share": float(np.mean([pair.reward_chosen == pair.reward_rejected for pair in pairs])),
    }


class LabelledPair(NamedTuple):
    """A pair as the annotator left it, with the gold rewards that only the evaluation may see."""

    prompt: str
    chosen: str
    rejected: str
    reward_chosen: float
    reward_rejected: float


class LabelledPairs(NamedTuple):
    """Pairs, and how many prompts gave none, by reason ("identical" or "empty" answers)."""

    pairs: list[LabelledPair]
    dropped: dict[str, int]


def label_pairs(
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    generator: np.random.Generator,
    *,
    annotator_temperature: float,
    reward: Callable[[str, str], float] = gold_reward,
) -> LabelledPairs:
    """One labelled pair for each prompt whose two answers differ and are not empty."""
    kept: list[tuple[str, str, str]] = []
    dropped = Counter({"identical": 0, "empty": 0})
    for prompt, (first, second) in zip(prompts, answers, strict=True):
        if first == second:
            dropped["identical"] += 1
        elif not first or not second:
            dropped["empty"] += 1
        else:
            kept.append((prompt, first, second))
    rewards_P2 = np.array([[reward(p, a), reward(p, b)] for p, a, b in kept]).reshape(-1, 2)
    prefers_first_P = annotate(
        rewards_P2[:, 0], rewards_P2[:, 1], generator, temperature=annotator_temperature
    )
    pairs = [
        LabelledPair(prompt, first, second, *rewards)
        if prefers_first
        else LabelledPair(prompt, second, first, *rewards[::-1])
        for (prompt, first, second), rewards, prefers_first in zip(
            kept, rewards_P2.tolist(), prefers_first_P.tolist(), strict=True
        )
    ]
    return LabelledPairs(pairs, dict(dropped))


def annotate(
    rewards_first_P: ArrayLike,
    rewards_second_P: ArrayLike,
    generator: np.random.Generator,
    *,
    temperature: float,
) -> NDArray[np.bool_]:
    """Whether the annotator prefers the first answer, [P] bool.

    P(first is preferred) = sigmoid((r_first - r_second) / temperature), Bradley and Terry (1952).
    """
    gap_P = (np.asarray(rewards_first_P, float) - np.asarray(rewards_second_P, float)) / temperature
    probability_P = 1.0 / (1.0 + np.exp(-gap_P))
    return np.asarray(generator.random(gap_P.shape) < probability_P)


def to_jsonl(pairs: Sequence[LabelledPair], language: Language = LISTS) -> str:
    """What the method reads: prompt, chosen and rejected, a JSON object a line, and nothing else."""
    return "".join(
        json.dumps(
            {
                "prompt": language.user(pair.prompt),
                "chosen": language.assistant(pair.chosen),
                "rejected": language.assistant(pair.rejected),
            }
        )
        + "\n"
        for pair in pairs
    )


def truth_table(pairs: Sequence[LabelledPair], *, split: str, language: Language = LISTS) -> pa.Table:
    """What the method never reads: one row a pair, with the columns `TRUTH_COLUMNS`."""
    rows = [
        {
            "pair_id": pair_id(
                language.user(pair.prompt), language.assistant(pair.chosen), language.assistant(pair.rejected)
            ),
            "split": split,
            "operation": language.operation(pair.prompt),
            "reward_chosen": pair.reward_chosen,
            "reward_rejected": pair.reward_rejected,
            "flipped": pair.reward_chosen < pair.reward_rejected,
            "tie": pair.reward_chosen == pair.reward_rejected,
        }
        for pair in pairs
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(list(TRUTH_COLUMNS.items())))
