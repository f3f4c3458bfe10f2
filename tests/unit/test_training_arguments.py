"""A recipe's settings as TRL's `DPOConfig`: the original's defaults, and what is given."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from selective_dpo.config import ModelConfig
from selective_dpo.config.trainer_options import accumulation, check_dpo_options
from selective_dpo.errors import ConfigError
from selective_dpo.training.arguments import (
    autocast_dtype,
    dpo_arguments,
    fsdp_recomputes,
    lora_config,
    optimizer_steps,
    spreads_weights,
    training_settings,
    weights_dtype,
)


def arguments(settings: dict[str, Any], dtype: str = "float32", *, sequential: bool = True) -> Any:
    model = ModelConfig(path="m", dtype=dtype)  # type: ignore[arg-type]
    return dpo_arguments(
        settings, model=model, max_length=77, output_dir=Path("out"), seed=41, sequential=sequential
    )


def test_defaults_are_the_originals() -> None:
    args = arguments({})
    assert (args.beta, args.num_train_epochs, args.lr_scheduler_type) == (0.01, 1, "cosine")
    assert args.warmup_steps == 0.1
    assert args.gradient_checkpointing
    assert (args.max_length, args.seed, args.data_seed) == (77, 41, 41)
    assert args.report_to == [] and args.save_strategy == "no"


def test_what_is_given_wins_over_the_defaults() -> None:
    args = arguments({"beta": 0.3, "seed": 7, "activation_checkpointing": False})
    assert (args.beta, args.seed, args.data_seed) == (0.3, 7, 7)
    assert not args.gradient_checkpointing


@pytest.mark.parametrize(("sequential", "strategy"), [(True, "sequential"), (False, "random")])
def test_the_order_is_not_the_recipes_to_decide(sequential: bool, strategy: str) -> None:
    assert arguments({}, sequential=sequential).train_sampling_strategy == strategy


@pytest.mark.parametrize(
    ("dtype", "settings", "expected"),
    [
        ("float32", {}, None),
        ("bfloat16", {}, torch.bfloat16),
        ("float32", {"bf16": True}, torch.bfloat16),
        ("bfloat16", {"bf16": False}, None),
    ],
)
def test_mixed_precision_follows_the_weights(
    dtype: str, settings: dict[str, Any], expected: torch.dtype | None
) -> None:
    # Also on a machine without a GPU, where transformers wants to be told that the CPU is meant.
    assert arguments(settings, dtype).bf16 is (expected is torch.bfloat16)
    model = ModelConfig.model_validate({"path": "m", "dtype": dtype})
    assert autocast_dtype(settings, model) == expected


def test_settings_are_read_without_a_config_that_changes_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ZeRO-3 in it, a `DPOConfig` has transformers spread each model that is loaded from then on."""
    monkeypatch.setattr("selective_dpo.training.arguments.DPOConfig", lambda *_, **__: pytest.fail("made"))
    model = ModelConfig.model_validate({"path": "m", "dtype": "bfloat16"})
    settings = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    assert autocast_dtype(settings, model) is torch.bfloat16


def test_the_recipes_settings_are_left_as_they_are() -> None:
    """transformers writes its defaults into `fsdp_config`, and keys are made of the recipe."""
    settings = {"fsdp": "full_shard", "fsdp_config": {"version": 2}}
    arguments(settings)
    assert settings == {"fsdp": "full_shard", "fsdp_config": {"version": 2}}


@pytest.mark.parametrize(
    ("dtype", "lora", "settings", "master_weights", "expected"),
    [
        ("bfloat16", None, {}, True, "float32"),
        ("bfloat16", {"r": 4}, {}, True, "bfloat16"),
        ("bfloat16", None, {"deepspeed": {}}, True, "float32"),  # empty: no DeepSpeed
        ("bfloat16", None, {"deepspeed": "zero3.json"}, True, "bfloat16"),
        ("bfloat16", None, {}, False, "bfloat16"),
        ("float32", None, {}, True, "float32"),
    ],
)
def test_weights_are_held_in_float32_where_all_are_trained(
    dtype: str, lora: dict[str, Any] | None, settings: dict[str, Any], master_weights: bool, expected: str
) -> None:
    raw = {"path": "m", "dtype": dtype, "master_weights": master_weights}
    assert weights_dtype(ModelConfig.model_validate(raw), lora, settings) == expected


def test_defaults_use_no_deprecated_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments({})


def test_what_trl_refuses_is_one_line() -> None:
    with pytest.raises(ConfigError, match="trainer settings: ") as caught:
        arguments({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]})
    assert "\n" not in str(caught.value)


def test_lora_keys_are_pefts() -> None:
    assert lora_config(None) is None
    config = lora_config({"r": 16, "lora_alpha": 16, "target_modules": "all-linear"})
    assert (config.r, config.task_type) == (16, "CAUSAL_LM")
    with pytest.raises(ConfigError, match="lora settings: "):
        lora_config({"rank": 16})


def settings(dtype: str = "float32", **given: Any) -> Any:
    return training_settings(given, ModelConfig.model_validate({"path": "m", "dtype": dtype}), 1)


def test_settings_are_those_that_trl_would_use() -> None:
    found, args = settings("bfloat16"), arguments({}, "bfloat16")
    assert found.pairs_per_batch == args.per_device_train_batch_size
    assert found.accumulation == args.gradient_accumulation_steps
    assert (found.epochs, found.beta) == (args.num_train_epochs, args.beta)
    assert (found.learning_rate, found.optimizer) == (args.learning_rate, args.optim)
    assert found.recomputes == args.gradient_checkpointing
    assert (found.compute_dtype, found.shards, found.keeps_master_weights) == ("bfloat16", "", False)
    assert not settings(gradient_checkpointing=False).recomputes
    assert settings(gradient_checkpointing=False, activation_checkpointing=True).recomputes
    assert settings(bf16=True).compute_dtype == "bfloat16"
    assert settings("bfloat16", fp16=True).compute_dtype == "float16"
    assert settings(fsdp="full_shard").shards == "weights"
    assert settings(deepspeed={"zero_optimization": {"stage": 2}}).shards == "gradients"
    assert settings("bfloat16", deepspeed="zero.json").keeps_master_weights


ZERO_3 = {"zero_optimization": {"stage": 3}}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("given", "launcher", "expected"),
    [
        ({}, {}, False),
        ({"fsdp": True}, {}, True),
        ({"deepspeed": ZERO_3}, {}, True),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {}, False),
        ({"deepspeed": "zero3.json"}, {}, True),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, True),
        ({}, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, True),
        ({}, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False),
        ({}, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero3.json"}, True),
        ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, False),
    ],
)
def test_weights_are_spread_where_the_recipe_or_the_launcher_says_so(
    given: dict[str, Any],
    launcher: dict[str, str],
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO_3), "utf-8")
    monkeypatch.chdir(tmp_path)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert spreads_weights(given) is expected


@pytest.mark.parametrize(
    ("pairs", "batch", "accumulation", "processes", "epochs", "steps"),
    [
        (10, 4, 1, 1, 1, 3),
        (10, 4, 2, 1, 1, 2),  # batches 4 4 | 2
        (10, 4, 2, 1, 3, 6),  # an epoch's last update does not wait for the next epoch
        (10, 4, 1, 2, 1, 2),
        (10, 4, 8, 1, 1, 1),
        (10, 4, 1, 1, 0.5, 2),  # half of three, upwards
    ],
)
def test_optimizer_steps(
    pairs: int, batch: int, accumulation: int, processes: int, epochs: float, steps: int
) -> None:
    given = settings(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=epochs
    )
    assert optimizer_steps(pairs, given, processes) == steps


# --- pairs_per_update: accumulation follows from the processes ---------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "batch", "processes", "expected"),
    [(256, 4, 8, 8), (256, 4, 1, 64), (16, 4, 4, 1), (8, None, 1, 1)],
)
def test_accumulation_makes_up_the_update(
    pairs: int, batch: int | None, processes: int, expected: int
) -> None:
    settings = {"pairs_per_update": pairs}
    settings |= {} if batch is None else {"per_device_train_batch_size": batch}
    assert accumulation(settings, processes) == expected
    model = ModelConfig(path="m", dtype="float32")
    found = training_settings(settings, model, processes)
    assert found.pairs_per_batch * found.accumulation * processes == pairs


def test_without_it_trls_option_counts() -> None:
    assert accumulation({"gradient_accumulation_steps": 3}, 8) is None
    found = training_settings({"gradient_accumulation_steps": 3}, ModelConfig(path="m"), 8)
    assert found.accumulation == 3


@pytest.mark.parametrize(
    ("settings", "processes", "expected"),
    [
        ({"pairs_per_update": 100, "per_device_train_batch_size": 8}, 2, "one of 1, 2, 5, 10, 25, 50"),
        (
            {"pairs_per_update": 3, "per_device_train_batch_size": 1},
            8,
            "start as many processes as divide it",
        ),
    ],
)
def test_pairs_that_do_not_divide_are_refused(settings: dict, processes: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        accumulation(settings, processes)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pairs_per_update": 8, "gradient_accumulation_steps": 2}, "give one of both"),
        ({"pairs_per_update": 0}, "must be a whole number above 0"),
        ({"pairs_per_update": True}, "must be a whole number above 0"),
    ],
)
def test_what_contradicts_it_is_refused(settings: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_dpo_options(settings, "train.trainer", "train")


def test_trl_gets_the_accumulation(tmp_path: Path) -> None:
    settings = {"pairs_per_update": 16, "per_device_train_batch_size": 2, "bf16": False}
    args = dpo_arguments(
        settings,
        model=ModelConfig(path="m", dtype="float32"),
        max_length=64,
        output_dir=tmp_path,
        seed=1,
        sequential=True,
    )
    assert args.gradient_accumulation_steps == 8


# --- FSDP in transformers 5's own form ----------------------------------------------------------------------


def test_fsdp_may_be_true() -> None:
    check_dpo_options({"fsdp": True, "bf16": False}, "train.trainer", "train")
    with pytest.raises(ConfigError, match="fsdp"):
        check_dpo_options({"fsdp": 3}, "train.trainer", "train")


@pytest.mark.parametrize("name", ["activation_checkpointing", "fsdp_activation_checkpointing"])
def test_activations_are_not_recomputed_twice_where_fsdp_does_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fsdp_recomputes({"fsdp": True, "fsdp_config": {name: True}})
    assert not fsdp_recomputes({"fsdp": True, "fsdp_config": {name: False}}) and not fsdp_recomputes({})
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert not fsdp_recomputes({})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert fsdp_recomputes({})
