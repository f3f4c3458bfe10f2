"""A recipe's settings as TRL's `DPOConfig`: the original's defaults, and what is given."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from selective_dpo.config import ModelConfig
from selective_dpo.errors import ConfigError
from selective_dpo.training.arguments import autocast_dtype, dpo_arguments, lora_config


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
    assert autocast_dtype(arguments(settings, dtype)) == expected


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
