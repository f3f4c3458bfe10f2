"""What is kept of a finished training: weights as safetensors, and facts about the run."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from selective_dpo.errors import ConfigError, ModelError, name_some
from selective_dpo.models import shown_path
from selective_dpo.storage.artifacts import read_json, write_json
from selective_dpo.training.checkpointing import disk_reason, from_main

_PEFT_SETS = ("target_modules", "exclude_modules")


def save_policy(trainer: Any, folder: Path, *, dtype: str) -> None:
    """Write the trained weights (or adapter) and tokenizer into `folder`, all processes taking part.

    Weights that are spread over processes are gathered, whatever the settings say of checkpoints. Those of a
    whole model are written in `dtype`, the starting model's, although they may have been trained in float32.
    transformers' pickled arguments and PEFT's card, which holds the base's path, are removed.

    Args:
        trainer: a `ResumableTrainer`; its `weights` are what must be there in the end.

    Raises:
        ConfigError: a weight is not finite; on all processes.
        ModelError: some weights are not there; on all processes.
        OSError: the disk is full, or refuses in another way.
    """
    adapter_only = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    state, wanted = _gathered(trainer, adapter_only=adapter_only), trainer.weights
    absent: list[str] = []
    diverged = False
    if trainer.args.should_save:
        absent = sorted(name for name in wanted if name not in state or state[name].numel() < wanted[name])
        diverged = not all(bool(state[name].isfinite().all()) for name in wanted.keys() & state.keys())
    absent, diverged = from_main((absent, diverged))
    if absent:
        raise ModelError(
            f"the trained weights could not be saved whole (without {len(absent):,} of {len(wanted):,}, "
            f"{name_some(absent, limit=2)}); nothing was published, and the training's checkpoints are kept: "
            "run the same command again, without sharding if it repeats"
        )
    if diverged:
        raise ConfigError(
            f"the training diverged: weights are not finite after {trainer.state.global_step:,} updates; "
            "lower learning_rate, or use bfloat16 or float32 instead of float16"
        )
    if not trainer.args.should_save:
        return
    try:
        trainer._save(str(folder), state if adapter_only else _cast(state, getattr(torch, dtype)))
    except Exception as error:
        reason = disk_reason(error)
        if isinstance(error, OSError) or not reason:
            raise
        raise OSError(errno.ENOSPC, reason, str(folder)) from error
    for name in ("training_args.bin", "README.md"):
        (folder / name).unlink(missing_ok=True)
    _tidy(folder / "adapter_config.json", folder / "config.json", dtype)


def _gathered(trainer: Any, *, adapter_only: bool) -> dict[str, Tensor]:
    """The state of the whole model, on the main process at least; all processes must call this."""
    if not trainer.is_deepspeed_enabled:
        return dict(trainer.accelerator.get_state_dict(trainer.model))
    engine = trainer.model_wrapped
    if engine.zero_optimization_partition_weights():
        # accelerate gathers only where DeepSpeed's settings say so, and by default they do not.
        return dict(engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapter_only) or {})
    return dict(trainer.accelerator.get_state_dict(engine))


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    done: dict[tuple[int, torch.Size], Tensor] = {}
    cast = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in done:
            done[key] = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor
        cast[name] = done[key]  # weights that are tied to each other stay so
    return cast


def _tidy(adapter: Path, model: Path, dtype: str) -> None:
    """The same policy is to have the same files everywhere.

    PEFT writes its sets in the order they happen to have, and where the base lies on this machine: of a
    local base `./NAME` is kept, which no one takes for a name on the hub; it is found from the folder that
    holds it. transformers names the type that the weights had in training.
    """
    if adapter.is_file():
        content = read_json(adapter)
        sets = {name: sorted(content[name]) for name in _PEFT_SETS if isinstance(content.get(name), list)}
        base = content["base_model_name_or_path"]
        write_json(adapter, {**content, **sets, "base_model_name_or_path": base and shown_path(base)})
    if model.is_file():
        write_json(model, {**read_json(model), "dtype": dtype})


def training_log(trainer: Any) -> dict[str, Any]:
    """For `trainer_log.json`: the trainer's log, with null for what is not finite, and without what depends
    on the clock (the time taken is in `cost.json`): the same training has the same log.

    A gradient norm, for one, is infinite where float16 training skips a step.
    """
    history = [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in sorted(entry.items())  # a checkpoint does not keep the order of names
            if not name.endswith(("_runtime", "_per_second"))
        }
        for entry in trainer.state.log_history
    ]
    return {"log_history": history}


def trainer_facts(trainer: Any) -> dict[str, Any]:
    """What a training did, in numbers that do not depend on the machine's speed."""
    return {
        "optimizer_steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "processes": trainer.accelerator.num_processes,
        "device": trainer.accelerator.device.type,
        "trained_tokens": int(trainer._total_train_tokens),
    }
