"""The settings of a training that decide its cost, with the libraries' own defaults filled in.

Read from the recipe, not from a `DPOConfig`: to make one would set up devices, and needs DeepSpeed where
the recipe asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from selective_dpo.config import ModelConfig, Settings
from selective_dpo.training.arguments import ORIGINAL_DEFAULTS, mixed_precision


class TrainingSettings(NamedTuple):
    """One stage's training."""

    pairs_per_batch: int
    """On each process."""
    accumulation: int
    epochs: float
    learning_rate: float
    beta: float
    optimizer: str
    recomputes: bool
    """Activations are thrown away and computed again in the backward pass (checkpointing)."""
    compute_dtype: str
    """What matrices are multiplied in: the mixed precision, else the weights' type."""
    shards: str
    """What processes divide among them: "", "optimizer" (ZeRO-1), "gradients" (and optimizer; ZeRO-2), or
    "weights" (and all; ZeRO-3, FSDP)."""
    keeps_master_weights: bool
    """DeepSpeed trains a float32 copy of 16-bit weights."""
    unread: str
    """A setting that could not be looked into; counted as if it were not there."""


def training_settings(settings: Settings, model: ModelConfig) -> TrainingSettings:
    """What `score.trainer` or `train.trainer` decide for a model loaded as `model` says."""

    def value(key: str) -> Any:
        return trainer_value(settings, key)

    checkpointing = value("activation_checkpointing")
    if checkpointing is None:  # the older name counts only where the newer one is not given
        checkpointing = value("gradient_checkpointing")
    shards, unread = _sharding(settings)
    return TrainingSettings(
        pairs_per_batch=value("per_device_train_batch_size"),
        accumulation=value("gradient_accumulation_steps"),
        epochs=float(value("num_train_epochs")),
        learning_rate=float(value("learning_rate")),
        beta=float(value("beta")),
        optimizer=str(value("optim")),
        recomputes=bool(checkpointing),
        compute_dtype=mixed_precision(settings, model) or model.dtype,
        shards=shards,
        keeps_master_weights=bool(settings.get("deepspeed")) and model.dtype != "float32",
        unread=unread,
    )


def trainer_value(settings: Settings, key: str) -> Any:
    """What a `DPOConfig` key is set to: as given, as in the original, or as in the libraries."""
    return {**_library_defaults(), **ORIGINAL_DEFAULTS, **settings}[key]


@functools.cache
def _library_defaults() -> dict[str, Any]:
    from trl import DPOConfig

    return {field.name: _default(field) for field in dataclasses.fields(DPOConfig)}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _sharding(settings: Settings) -> tuple[str, str]:
    if settings.get("fsdp"):
        return "weights", ""
    deepspeed = settings.get("deepspeed")
    if not deepspeed:
        return "", ""
    if not isinstance(deepspeed, dict):
        return "", f"the sharding in {deepspeed}"
    stage = (deepspeed.get("zero_optimization") or {}).get("stage", 0)
    return {1: "optimizer", 2: "gradients", 3: "weights"}.get(stage, ""), ""
