"""A plan's arithmetic: padded tokens, FLOPs and bytes, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import MambaConfig

from selective_dpo.config import ModelConfig
from selective_dpo.errors import ConfigError
from selective_dpo.logprobs.rows import PartLengths
from selective_dpo.run.costs import (
    Architecture,
    Memory,
    Models,
    RowCounter,
    adapter_parameters,
    architecture_of,
    build_on_meta,
    fits,
    job_flops,
    job_memory,
    measured_rate,
    models_of,
    readable,
    readable_bytes,
    readable_time,
    this_device,
)
from selective_dpo.training.arguments import training_settings
from tests.fixtures.models import LORA, TRAINER, tiny_model_folder, tiny_recipe

# 100 parameters of which 20 are looked up only; 2 layers, 8 wide, keys 2 wide, 2 heads, 10 words.
SIZES = Architecture(100, 20, 2, 8, 2, 2, 10)


def lengths(*pairs: tuple[int, int, int]) -> PartLengths:
    """Of pairs of (prompt, chosen, rejected)."""
    return PartLengths(*np.array(pairs, dtype=np.int64).T)


TEN = lengths((2, 5, 5), (6, 4, 2))
"""The longest row has 10 tokens, packed (2 + 4 + 4, 6 + 3 + 1) or padded (6 + 4)."""


def padded_counter(tmp_path: Path, **blocks: Any) -> RowCounter:
    """Of a model whose attention takes no mask: two rows a pair."""
    recipe = tiny_recipe(tmp_path, **blocks)
    model = recipe.model.model_copy(update={"attention": "flash_attention_2"})
    return RowCounter(recipe.model_copy(update={"model": model}), "cpu")


def training(**given: Any) -> Any:
    return training_settings(
        {"per_device_train_batch_size": 2, **given}, ModelConfig.model_validate({"path": "m"}), 1
    )


def test_padded_rows_of_a_training_in_the_given_order(tmp_path: Path) -> None:
    counter = padded_counter(tmp_path)
    # Padded rows of 5, 3 and 7. Batches (5, 3) and (7): 2 pairs are 4 rows of 5, 1 pair is 2 rows of 7.
    given = lengths((2, 3, 1), (1, 1, 2), (3, 3, 4))
    assert counter.training(given, training()) == 4 * 5 + 2 * 7
    # As an update of two batches they are sorted by length, and the smaller one gets the longest.
    assert counter.training(given, training(gradient_accumulation_steps=2)) == 2 * 7 + 4 * 5
    given = lengths((1, 1, 1), (3, 4, 6), (3, 3, 1), (3, 1, 2))  # 2, 9, 6, 5
    assert counter.training(given, training(gradient_accumulation_steps=2)) == 4 * 9 + 4 * 5


def test_rows_of_a_training_are_the_cheaper_ones_on_the_device(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    # All but a CPU have a GPU's rates: "meta" stands for one here.
    cpu, gpu = RowCounter(recipe, "cpu"), RowCounter(recipe, "meta")
    # A prompt that is worth sharing on a CPU: 40 + 1 + 1 packed. For a GPU the mask makes up for it: 2 x 41.
    shared = lengths((40, 2, 2), (40, 2, 2))
    assert cpu.training(shared, training()) == 2 * 42
    assert gpu.training(shared, training()) == 4 * 41
    # Without a prompt there is nothing to share: 59 + 59 packed cost more than two rows of 59.
    assert cpu.training(lengths((0, 60, 60)), training()) == 2 * 59
    # On a CPU lengths that differ by more than a pass is worth go through the model one after the other.
    apart = lengths((300, 2, 2), (10, 2, 2))
    assert cpu.training(apart, training()) == 302 + 12
    assert gpu.training(apart, training()) == 4 * 301


def test_rows_of_a_forward_pass_within_a_token_budget(tmp_path: Path) -> None:
    padded, packed = padded_counter(tmp_path), RowCounter(tiny_recipe(tmp_path), "cpu")
    given = lengths((1, 1, 2), (5, 2, 2), (4, 1, 1))  # 3, 7, 5 padded; 2, 7, 4 packed
    # 28 tokens hold 2 pairs as long as the longest (4 x 7 = 28): (7, 5), then (3). No row holds a last token.
    assert padded.forward(given, 28) == 4 * 6 + 2 * 2
    # A row a pair: 4 would fit.
    assert packed.forward(given, 28) == 3 * 7
    # A pair that exceeds the budget is a batch of its own.
    assert packed.forward(given, 5) == 7 + 4 + 2
    # All pairs together cost less in padded rows.
    assert packed.forward(lengths((0, 60, 60)), 512) == 2 * 59


def test_flops_of_forward_passes_and_training(tmp_path: Path) -> None:
    def flops(kind: Any, trained: int, forwarded: int, *, again: bool = False) -> float:
        trainer = {**TRAINER, "activation_checkpointing": again}
        recipe = tiny_recipe(tmp_path, score={"trainer": trainer}, train={"lora": None, "trainer": trainer})
        return job_flops(
            recipe,
            Models(SIZES, scorer_adapter=5, policy_adapter=0, rows_per_pair=1),
            kind,
            trained,
            forwarded,
        )

    # 2 x 80 parameters x 10 tokens; a scorer has 5 more.
    assert flops("reference", 0, 10) == 1600
    assert flops("scorer", 0, 10) == 1700
    assert flops("policy", 10, 0) == 3 * 1600
    assert flops("policy", 10, 0, again=True) == 4 * 1600
    # Base weights forward and for the gradient of their inputs; the adapter three times.
    lora = 2 * 1600 + 3 * 100
    assert flops("scorer", 10, 0) == lora
    assert flops("scorer", 10, 0, again=True) == lora + 1700
    assert flops("scorer", 10, 10) == lora + 1700


def test_sizes_of_a_real_model_and_adapter(tmp_path: Path) -> None:
    config = ModelConfig(path=str(tiny_model_folder(tmp_path / "model")))
    sizes = architecture_of(build_on_meta(config))
    # Hidden 16, key and value width 8, inner 32: q 16x16+16, k and v 16x8+8, o 16x16, gate, up and down
    # 16x32, two norms; 2 layers, a norm, embedding and head of 260 rows.
    layer = (256 + 16) + 2 * (128 + 8) + 256 + 3 * 512 + 2 * 16
    assert sizes == Architecture(2 * layer + 16 + 2 * 260 * 16, 260 * 16, 2, 16, 8, 2, 260)
    # Rank 4 on the seven matrices of both layers: 4 x (inputs + outputs).
    adapter = 2 * 4 * ((16 + 16) + 2 * (16 + 8) + (16 + 16) + 2 * (16 + 32) + (32 + 16))
    assert adapter_parameters(build_on_meta(config), LORA, "score.lora") == adapter
    assert adapter_parameters(build_on_meta(config), None, "score.lora") == 0
    with pytest.raises(ConfigError, match=r"^score\.lora does not fit the model: Target modules"):
        adapter_parameters(build_on_meta(config), {"target_modules": ["nope"]}, "score.lora")


def test_a_model_without_attention_is_counted_in_padded_rows(tmp_path: Path) -> None:
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=260)
    config.save_pretrained(tmp_path / "mamba")
    recipe = tiny_recipe(tmp_path, train={"lora": None}, score={"lora": None})
    model = recipe.model.model_copy(update={"path": str(tmp_path / "mamba")})
    recipe = recipe.model_copy(update={"model": model})
    assert models_of(recipe).rows_per_pair == 2
    assert RowCounter(recipe, "cpu").training(lengths((3, 4, 2)), training()) == 2 * 7


def policy_memory(
    tmp_path: Path, adapter: int = 0, processes: int = 1, rows: int = 2, model: Any = None, **trainer: Any
) -> Memory:
    """Of a training of one pair a batch, with rows of 10 tokens."""
    given = {"per_device_train_batch_size": 1, "activation_checkpointing": False, **trainer}
    recipe = tiny_recipe(
        tmp_path,
        model={"dtype": "float32", **(model or {})},
        train={"lora": LORA if adapter else None},
        launch={"processes": processes},
    )
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"trainer": given})})
    models = Models(SIZES, scorer_adapter=5, policy_adapter=adapter, rows_per_pair=rows)
    return job_memory(recipe, models, "policy", TEN)


def test_memory_of_full_fine_tuning(tmp_path: Path) -> None:
    # 2 rows x 10 tokens x 8 wide x 17 values x 4 bytes, in 2 layers.
    assert policy_memory(tmp_path) == (400, 400, 800, 2 * 2 * 10 * 8 * 17 * 4)
    # One layer, and the input of each.
    kept = policy_memory(tmp_path, activation_checkpointing=True).activations
    assert kept == 2 * 10 * 8 * 17 * 4 + 2 * 2 * 10 * 8 * 4
    assert policy_memory(tmp_path, optim="adamw_bnb_8bit").optimizer == 200
    # Weights and gradients of 2 bytes, two states of 4.
    pure = {"dtype": "bfloat16", "master_weights": False}
    assert policy_memory(tmp_path, model=pure, optim="paged_adamw_32bit")[:3] == (200, 200, 800)
    # ZeRO-2: a float32 copy, two states; these and gradients divided by 4.
    half: Any = {"dtype": "bfloat16"}
    zero: Any = {"deepspeed": {"zero_optimization": {"stage": 2}}}
    sharded = policy_memory(tmp_path, model=half, processes=4, **zero)
    assert sharded[:3] == (200, 200 / 4, 100 * (8 + 4) / 4)
    zero = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    assert policy_memory(tmp_path, model=half, processes=4, **zero).weights == 200 / 4
    # Outside of DeepSpeed: weights, gradients and two states of 4 bytes, and a copy of 2 to compute with.
    assert policy_memory(tmp_path, model=half)[:3] == (100 * (4 + 2), 400, 800)


def test_memory_with_an_adapter(tmp_path: Path) -> None:
    half: Any = {"dtype": "bfloat16"}
    flat, eager = (
        policy_memory(
            tmp_path, 5, rows=1, model={**half, "attention": attention}, activation_checkpointing=True
        )
        for attention in ("sdpa", "eager")
    )
    # One row of 10 tokens, 8 wide: the inputs of 2 layers, 2 bytes each; one layer's 17 values.
    assert flat.activations == 2 * 10 * 8 * 2 + 10 * 8 * 17 * 2
    # 5 bytes for each of 2 heads' 100 scores.
    assert eager.activations - flat.activations == 5 * 2 * 100
    # The adapter is float32: 5 x 4 weights, as many gradients, twice as many states.
    assert flat[:3] == (200 + 20, 20, 40)


def test_memory_of_each_kind_of_job(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, evaluate={"generation": {"prompts": 3, "batch_size": 3, "max_new_tokens": 8}}
    )
    models = Models(SIZES, scorer_adapter=5, policy_adapter=7, rows_per_pair=1)
    # float32; 512 tokens a batch are 51 rows of 10, one layer at a time.
    forward = 17 * 4 * 51 * 10 * 8
    assert job_memory(recipe, models, "reference", TEN) == (400, 0, 0, forward)
    # Keys and values of 2 layers, 2 wide, for 3 rows of 32 + 8 tokens; logits of 10 words in float32.
    answers = 2 * 2 * 3 * 40 * 2 * 4 + 3 * 10 * 4
    assert job_memory(recipe, models, "answers") == (400 + 7 * 4, 0, 0, answers)
    # Training keeps both layers of 4 rows; a scorer also measures, which takes more here.
    trained = 2 * 17 * 4 * 4 * 10 * 8
    assert job_memory(recipe, models, "policy", TEN) == (428, 28, 56, trained)
    assert job_memory(recipe, models, "scorer", TEN) == (420, 20, 40, forward)
    # Passes divide the weights where a training does; one-step has sums of 5 weights whole on each process.
    divided = recipe.model_copy(
        update={
            "launch": recipe.launch.model_copy(update={"processes": 2}),
            "score": recipe.score.model_copy(update={"protocol": "one-step", "trainer": {"fsdp": True}}),
        }
    )
    assert job_memory(divided, models, "reference", TEN) == (200, 0, 0, forward)
    assert job_memory(divided, models, "scorer", TEN)[:3] == (210, 20, 16 * 5)
    # Without lengths: rows of twice max_length, 64.
    assert job_memory(recipe, models, "policy").activations == 2 * 17 * 4 * 4 * 128 * 8


def test_the_speed_of_the_model_is_measured(tmp_path: Path) -> None:
    config = ModelConfig(path=str(tiny_model_folder(tmp_path / "model")), dtype="float32")
    sizes, device = architecture_of(build_on_meta(config)), this_device()
    assert device.number >= 1 and device.memory > 0
    assert fits(config, sizes, device)
    assert not fits(config, sizes, device._replace(memory=2 * sizes.parameters * 4 - 1))
    assert not fits(config.model_copy(update={"path": "some/model-of-the-hub"}), sizes, device)
    for dtype in ("float32", "bfloat16"):
        assert 1e6 < measured_rate(config, sizes, device, longest=8, compute_dtype=dtype) < 1e18


def test_quantities_read_well() -> None:
    assert readable(1234, "FLOP") == "1.23 kFLOP"
    assert readable(5.5e19) == "55 E"
    assert readable(12) == "12"
    assert readable(None, "FLOP") == "?"
    assert readable_bytes(3 * 2**30) == "3 GiB"
    assert readable_bytes(512) == "0.5 KiB"
    assert readable_time(90) == "1.5 min"
    assert readable_time(7200) == "2 h"
    assert readable_time(0.25) == "0.25 s"
