"""What is kept of a finished training: weights as safetensors, and facts about the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_policy(trainer: Any, folder: Path) -> None:
    """Write the trained weights (or adapter) and tokenizer into `folder`, all processes taking part.

    transformers puts its training arguments beside them as a pickle, which nobody needs for using the
    model and nobody should have to trust: it is removed.
    """
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)


def trainer_facts(trainer: Any) -> dict[str, Any]:
    """What a training did, in numbers that do not depend on the machine's speed."""
    return {
        "optimizer_steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "processes": trainer.accelerator.num_processes,
        "device": trainer.accelerator.device.type,
        "trained_tokens": int(trainer._total_train_tokens),
    }
