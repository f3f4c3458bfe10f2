"""A recipe's settings as TRL's `DPOConfig`."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from trl import DPOConfig

from selective_dpo.config import ModelConfig, Settings
from selective_dpo.config.trainer_options import PAIRS_PER_UPDATE, accumulation
from selective_dpo.distributed.processes import this_process
from selective_dpo.errors import ConfigError
from selective_dpo.storage.artifacts import read_json

# The original's settings for everything that does not depend on the model or the data (arXiv 2502.09650
# and its released recipes), where they differ from TRL's defaults.
ORIGINAL_DEFAULTS: Settings = {
    "beta": 0.01,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}


PURE = "full fine-tuning in pure {dtype} loses the updates that are smaller than its rounding: nearly all"
"""The warning about `model.master_weights: false`."""


def dpo_arguments(
    settings: Settings,
    *,
    model: ModelConfig,
    max_length: int,
    output_dir: Path,
    seed: int,
    sequential: bool,
) -> DPOConfig:
    """The full `DPOConfig` of one training.

    `settings` are the recipe's pass-through keys; they win over `ORIGINAL_DEFAULTS`, and what this
    package decides (folders, seed, order, lengths) wins over nothing, since such keys are refused
    when the recipe is checked. Mixed precision follows the weights' type where it is not given.

    Raises:
        ConfigError: TRL or transformers refuse a value.
    """
    # A deep copy: transformers fills in what `fsdp_config` lacks, and keys are made of the recipe.
    given: dict[str, Any] = copy.deepcopy({**ORIGINAL_DEFAULTS, **settings})
    if given.pop(PAIRS_PER_UPDATE, None) is not None:
        given["gradient_accumulation_steps"] = accumulation(settings, this_process().num_processes)
    given.setdefault("bf16", mixed_precision(settings, model) == "bfloat16")
    # transformers takes bfloat16 on a CPU only where `use_cpu` says that the CPU is meant.
    given.setdefault("use_cpu", not torch.accelerator.is_available())
    given.setdefault("report_to", "none")
    given.setdefault("save_strategy", "no")
    given.setdefault("seed", seed)
    if "gradient_checkpointing" not in given and hasattr(DPOConfig, "activation_checkpointing"):
        # TRL's own default, by the name that transformers does not warn about.
        given.setdefault("activation_checkpointing", not fsdp_recomputes(settings))
    try:
        return DPOConfig(
            output_dir=str(output_dir),
            data_seed=given["seed"],
            max_length=max_length,
            train_sampling_strategy="sequential" if sequential else "random",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            **given,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"trainer settings: {str(error).strip().splitlines()[0]}") from error


def fsdp_recomputes(settings: Settings) -> bool:
    """Whether FSDP recomputes activations itself, by the recipe or the launcher: twice would be refused."""
    config = settings.get("fsdp_config")
    own = config if isinstance(config, dict) else {}
    asked = own.get("activation_checkpointing", own.get("fsdp_activation_checkpointing", False))
    launched = all(_is_set(name) for name in ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING"))
    return str(asked).lower() == "true" or launched


def spreads_weights(settings: Settings) -> bool:
    """Whether processes divide a model's weights (FSDP, ZeRO-3), as the recipe or the launcher asks."""
    if settings.get("fsdp") or _is_set("ACCELERATE_USE_FSDP"):
        return True
    if deepspeed := settings.get("deepspeed"):
        return _zero_stage(deepspeed) == 3
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    launched = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0"))
    return _is_set("ACCELERATE_USE_DEEPSPEED") and (launched if file == "none" else _zero_stage(file)) == 3


def passes_spread(model: ModelConfig, settings: Settings) -> bool:
    """Whether the passes before a training divide the frozen weights, too: where the training does.

    Not those in 4 bits, which are a quarter as large.
    """
    return this_process().num_processes > 1 and not model.quantization and spreads_weights(settings)


def _zero_stage(config: dict[str, Any] | str) -> int:
    """Of a DeepSpeed configuration, or of a file that holds one."""
    given = config if isinstance(config, dict) else read_json(Path(config))
    return int((given.get("zero_optimization") or {}).get("stage", 0))


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")


# The rest is read from the recipe, since to make a `DPOConfig` changes the process: with ZeRO-3 in it,
# transformers spreads every model that is loaded from then on over the processes.


def mixed_precision(settings: Settings, model: ModelConfig) -> str:
    """The type that a training with these settings computes in where it is not the weights' own; else ""."""
    if settings.get("bf16", model.dtype == "bfloat16" and not settings.get("fp16")):
        return "bfloat16"
    return "float16" if settings.get("fp16") else ""


def weights_dtype(model: ModelConfig, lora: Settings | None, settings: Settings) -> str:
    """The type that a training holds the model's weights in.

    float32 where all of them are trained: a step of bfloat16 is 2^-8 of a weight, and an update at the usual
    rates is smaller. Under an adapter they stay as they are loaded, and DeepSpeed has a float32 copy.
    """
    is_full = lora is None and not settings.get("deepspeed")
    return "float32" if is_full and model.master_weights else model.dtype


def hold_for_training(policy: Any, args: DPOConfig, dtype: str) -> Any:
    """`policy`, its weights held in `dtype` (see `weights_dtype`), unless a launcher has set up DeepSpeed."""
    if args.deepspeed_plugin is None and dtype == "float32":
        policy.float()
    return policy


def autocast_dtype(settings: Settings, model: ModelConfig) -> torch.dtype | None:
    """`mixed_precision` as a type of PyTorch's; None: there is none."""
    name = mixed_precision(settings, model)
    return getattr(torch, name) if name else None


def lora_config(settings: Settings | None, revision: str = "main") -> LoraConfig | None:
    """PEFT's configuration for a causal language model; None for full fine-tuning.

    It names the base's `revision`, for whoever loads the adapter.
    """
    if settings is None:
        return None
    try:
        return LoraConfig(
            task_type="CAUSAL_LM", revision=None if revision == "main" else revision, **settings
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora settings: {str(error).strip().splitlines()[0]}") from error


class TrainingSettings(NamedTuple):
    """What decides the cost of one stage's training, with the libraries' defaults filled in."""

    pairs_per_batch: int
    """On each process."""
    accumulation: int
    epochs: float
    learning_rate: float
    beta: float
    optimizer: str
    recomputes: bool
    """Activation checkpointing: activations are computed again in the backward pass."""
    compute_dtype: str
    """The type of matrix multiplications: the mixed precision, else the weights' type."""
    shards: str
    """What processes divide among them: "", "optimizer" (ZeRO-1), "gradients" (and optimizer; ZeRO-2), or
    "weights" (and all; ZeRO-3, FSDP). A DeepSpeed configuration in a file is not read."""
    keeps_master_weights: bool
    """DeepSpeed trains a float32 copy of 16-bit weights."""


def training_settings(settings: Settings, model: ModelConfig, processes: int) -> TrainingSettings:
    """What `score.trainer` or `train.trainer` decide on so many processes for a model as `model` says."""

    def value(name: str) -> Any:
        return {**ORIGINAL_DEFAULTS, **settings}.get(name, getattr(DPOConfig, name))

    checkpointing = value("activation_checkpointing")
    if checkpointing is None:  # the older name counts only where the newer one is not given
        checkpointing = value("gradient_checkpointing")
    deepspeed, shards = settings.get("deepspeed"), ""
    if settings.get("fsdp"):
        shards = "weights"
    elif isinstance(deepspeed, dict):
        shards = {1: "optimizer", 2: "gradients", 3: "weights"}.get(_zero_stage(deepspeed), "")
    return TrainingSettings(
        pairs_per_batch=value("per_device_train_batch_size"),
        accumulation=accumulation(settings, processes) or value("gradient_accumulation_steps"),
        epochs=float(value("num_train_epochs")),
        learning_rate=float(value("learning_rate")),
        beta=float(value("beta")),
        optimizer=str(value("optim")),
        recomputes=bool(checkpointing),
        compute_dtype=mixed_precision(settings, model) or model.dtype,
        shards=shards,
        keeps_master_weights=bool(deepspeed) and model.dtype != "float32",
    )


def optimizer_steps(pairs: int, settings: TrainingSettings, processes: int) -> int:
    """Updates of a training: `accumulation` batches of every process make one, the last may have fewer.

    Every process gets as many batches (accelerate's `even_batches`).
    """
    batches_per_process = math.ceil(math.ceil(pairs / settings.pairs_per_batch) / processes)
    return math.ceil(settings.epochs * max(1, math.ceil(batches_per_process / settings.accumulation)))
