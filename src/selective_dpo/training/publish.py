"""What is kept of a finished training: weights as safetensors, and facts about the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from selective_dpo.errors import ConfigError


def save_policy(trainer: Any, folder: Path) -> None:
    """Write the trained weights (or adapter) and tokenizer into `folder`, all processes taking part.

    transformers puts its training arguments beside them as a pickle, which nobody needs for using the
    model and nobody should have to trust: it is removed.
    """
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)


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
    """For `trainer_log.json`: the trainer's log, with null for what is not finite.

    A gradient norm, for one, is infinite where float16 training skips a step.
    """
    history = [
        {name: value if _is_json(value) else None for name, value in entry.items()}
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


def _is_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
