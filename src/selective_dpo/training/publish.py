"""What is kept of a finished training: weights as safetensors, and facts about the run."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import torch

from selective_dpo.artifacts import read_json, write_json
from selective_dpo.engine.models import shown_path
from selective_dpo.errors import ConfigError
from selective_dpo.training.sealing import in_short, is_of_the_disk

_PEFT_SETS = ("target_modules", "exclude_modules")


def save_policy(trainer: Any, folder: Path) -> None:
    """Write the trained weights (or adapter) and tokenizer into `folder`, all processes taking part.

    transformers puts its training arguments beside them as a pickle, which nobody needs for using the
    model and nobody should have to trust, and PEFT a card with the base's path: both are removed.

    Raises:
        OSError: the disk is full, or refuses in another way.
    """
    try:
        trainer.save_model(str(folder))
    except Exception as error:
        if is_of_the_disk(error) and not isinstance(error, OSError):
            raise OSError(errno.ENOSPC, in_short(error), str(folder)) from error
        raise
    for name in ("training_args.bin", "README.md"):
        (folder / name).unlink(missing_ok=True)
    _tidy(folder / "adapter_config.json")


def _tidy(config: Path) -> None:
    """PEFT writes its sets in the order they happen to have, and where the base lies on this machine.

    The same adapter is to have the same file everywhere. Of a local base it keeps `./NAME`, which no one
    takes for a name on the hub: it is found from the folder that holds it.
    """
    if config.is_file():
        content = read_json(config)
        sets = {name: sorted(content[name]) for name in _PEFT_SETS if isinstance(content.get(name), list)}
        base = content["base_model_name_or_path"]
        named = {"base_model_name_or_path": base and shown_path(base)}
        write_json(config, {**content, **sets, **named})


def require_finite_weights(trainer: Any, *, settings: str) -> None:
    """Refuse a training that ended in NaN or infinity; all processes must call this together.

    Args:
        settings: the recipe's key of the trainer settings, for the message.

    Raises:
        ConfigError: a trained weight is not finite, on any process.
    """
    trained = [weight.detach() for weight in trainer.model.parameters() if weight.requires_grad]
    # Of a weight that is spread over processes, each one looks at its own part.
    parts = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in trained]
    bad = sum(int(not torch.isfinite(part).all()) for part in parts)
    counts = trainer.accelerator.gather(torch.tensor([bad], device=trainer.accelerator.device))
    if int(counts.sum()):
        raise ConfigError(
            f"the training diverged: weights are not finite after {trainer.state.global_step:,} updates; "
            f"lower {settings}.learning_rate, or use bfloat16 or float32 instead of float16"
        )


def training_log(trainer: Any) -> dict[str, Any]:
    """For `trainer_log.json`: the trainer's log, with null for what is not finite, and without what depends
    on the clock (the time taken is in `cost.json`): the same training has the same log.

    A gradient norm, for one, is infinite where float16 training skips a step.
    """
    history = [
        # Sorted, since a checkpoint does not keep the order of names.
        {
            name: entry[name] if _is_json(entry[name]) else None
            for name in sorted(entry)
            if not _is_clock(name)
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


def _is_clock(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second"))


def _is_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
