"""The shipped recipes hold the published settings, and today's TRL and PEFT take them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from selective_dpo.config import Recipe
from selective_dpo.config.load import load_recipe
from selective_dpo.config.trainer_options import check_recipe_options

RECIPES = Path(__file__).resolve().parents[2] / "src" / "selective_dpo" / "recipes"
GPUS = 8


class Published(NamedTuple):
    """One row of the original's settings (arXiv 2502.09650 and its released recipes)."""

    model: str
    attention: str
    """Ours: where this is sdpa, the original's was FlashAttention-2, which has no shared rows."""
    template: str
    score_rate: float
    score_batch: tuple[int, int]
    """Pairs per GPU, accumulation."""
    train_rate: float
    """Published for UltraFeedback only; the dpo-mix-7k recipes repeat it and say so."""
    train_batch: tuple[int, int]


QWEN = ("glorgao/Qwen2.5-7B-SFT", "sdpa", "chatml")
MISTRAL = ("HuggingFaceH4/mistral-7b-sft-beta", "sdpa", "zephyr")
LLAMA = ("princeton-nlp/Llama-3-Base-8B-SFT", "sdpa", "")
GEMMA = ("tanliboy/zephyr-gemma-2-9b-sft", "eager", "gemma-system")
PUBLISHED = {
    "qwen2.5-7b-ultrafeedback": Published(*QWEN, 6e-6, (4, 8), 8e-7, (4, 4)),
    "mistral-7b-ultrafeedback": Published(*MISTRAL, 3e-5, (8, 8), 1e-6, (8, 2)),
    "llama-3-8b-ultrafeedback": Published(*LLAMA, 3e-5, (2, 32), 1e-6, (4, 4)),
    "gemma-2-9b-ultrafeedback": Published(*GEMMA, 3e-5, (2, 32), 8e-7, (2, 8)),
    "qwen2.5-7b-dpo-mix-7k": Published(*QWEN, 5e-5, (4, 2), 8e-7, (4, 4)),
    "mistral-7b-dpo-mix-7k": Published(*MISTRAL, 2e-4, (4, 2), 1e-6, (8, 2)),
    "llama-3-8b-dpo-mix-7k": Published(*LLAMA, 3e-4, (2, 4), 1e-6, (4, 4)),
    "gemma-2-9b-dpo-mix-7k": Published(*GEMMA, 2e-5, (2, 4), 8e-7, (2, 8)),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON = {
    "beta": 0.01,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "optim": "paged_adamw_32bit",
    "bf16": True,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
}


def batch_of(per_gpu: int, accumulation: int) -> dict[str, int]:
    pairs = per_gpu * accumulation * GPUS
    return {"per_device_train_batch_size": per_gpu, "pairs_per_update": pairs}


def recipe_named(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml")


def test_every_file_is_tested_and_listed() -> None:
    names = {file.stem for file in RECIPES.glob("*.yaml")}
    assert names == {*PUBLISHED, "local-small"}
    table = (RECIPES / "README.md").read_text("utf-8")
    assert all(name in table for name in names)


@pytest.mark.parametrize("name", [*PUBLISHED, "local-small"])
def test_trl_and_peft_take_every_option(name: str) -> None:
    recipe = recipe_named(name)
    assert recipe.name == name
    check_recipe_options(recipe)
    trained = [recipe.train.trainer]
    if recipe.score.protocol != "one-step":
        trained.append(recipe.score.trainer)
    for trainer in trained:
        assert isinstance(trainer["learning_rate"], float)  # YAML 1.1 reads 6e-6 as text
        assert isinstance(trainer["warmup_steps"], float)


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_and_data(name: str) -> None:
    recipe, published = recipe_named(name), PUBLISHED[name]
    model, data = recipe.model, recipe.data
    assert (model.path, model.attention, model.chat_template) == published[:3]
    assert (model.dtype, model.trust_remote_code) == ("bfloat16", False)
    on_ultrafeedback = name.endswith("ultrafeedback")
    path = "HuggingFaceH4/ultrafeedback_binarized" if on_ultrafeedback else "argilla/dpo-mix-7k"
    splits = ("train_prefs", "test_prefs") if on_ultrafeedback else ("train", "test")
    (train,), (test,) = data.train, data.test
    assert (train.path, test.path, train.fraction) == (path, path, 1.0)
    assert (train.split, test.split) == splits
    assert (data.max_length, data.max_prompt_length, data.overlong) == (1024, 512, "truncate")
    # The original inserts one where the template's text mentions it; Llama-3's does not.
    assert data.empty_system_message != name.startswith("llama")


@pytest.mark.parametrize("name", PUBLISHED)
def test_scoring(name: str) -> None:
    score, published = recipe_named(name).score, PUBLISHED[name]
    assert (score.protocol, score.seeds, score.evaluations) == ("paper", (41, 42, 43), 5)
    lora = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": PROJECTIONS}
    assert score.lora == lora
    expected = {**COMMON, "learning_rate": published.score_rate}
    expected |= batch_of(*published.score_batch)
    assert {**score.trainer, "logging_steps": None} == {**expected, "logging_steps": None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_training(name: str) -> None:
    recipe, published = recipe_named(name), PUBLISHED[name]
    assert (recipe.select.rule, recipe.select.fraction) == ("easiest", 0.5)
    assert recipe.select.order == "easy-to-hard"
    assert recipe.train.lora is None
    trainer = dict(recipe.train.trainer)
    assert trainer.pop("deepspeed")["zero_optimization"] == {"stage": 2}
    expected = {**COMMON, "learning_rate": published.train_rate, "logging_steps": 10, "seed": 42}
    expected |= batch_of(*published.train_batch)
    assert trainer == expected
    assert recipe.launch.processes == GPUS
    per_gpu, accumulation = published.train_batch
    assert per_gpu * accumulation * GPUS == 128


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_files_say_what_is_not_the_originals(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    assert "arXiv 2502.09650" in text
    assert ("OURS" in text) == name.endswith("dpo-mix-7k")
    assert ("the paper says 3e-7" in text) == name.startswith("gemma")
    assert "put the end-of-sequence token after what the template writes" in text
    assert "Left out on purpose" in text
    assert ("after a beginning of sequence" in text) == name.startswith("mistral")
    # The products in the comments are those of the numbers beside them.
    for stage, batch in (("score", PUBLISHED[name].score_batch), ("train", PUBLISHED[name].train_batch)):
        per_gpu, accumulation = batch
        product = f"{per_gpu} x {accumulation} x 8 processes = {per_gpu * accumulation * GPUS} pairs"
        assert product in text, stage
