"""The recipe of a run on an embedded world: an ordinary one, with settings found for so small a model.

beta is 2 because log-ratios are sums over 4 to 7 tokens here: a language model's beta of 0.01 to 0.5
saturates too late and over-optimizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selective_dpo.config import Recipe
from selective_dpo.worlds.world import World

_OPTIMIZER: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "activation_checkpointing": False,
    "bf16": False,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "linear",
    "logging_steps": 5,
}
SCORE_TRAINER: dict[str, Any] = {**_OPTIMIZER, "beta": 2.0, "learning_rate": 2e-4, "num_train_epochs": 1}
TRAIN_TRAINER: dict[str, Any] = {**_OPTIMIZER, "beta": 2.0, "learning_rate": 3e-4, "num_train_epochs": 4}
CONTROLS: dict[str, dict[str, Any]] = {
    "all": {"rule": "all", "order": "shuffled"},
    "random": {"rule": "random", "fraction": 0.5, "order": "shuffled"},
    "hardest": {"rule": "hardest", "fraction": 0.5, "order": "shuffled"},
}
"""What Selective DPO is compared with: selections that are trained on in the same way."""


def world_recipe(
    world: World,
    *,
    name: str,
    output_dir: Path,
    controls: dict[str, dict[str, Any]] | None = None,
    workers: int = 1,
) -> Recipe:
    """Score, select the easiest half, train easy to hard, and judge against the starting model.

    The recipe names the world's model and pairs; the truth about the pairs is not in it. `controls`
    replaces `CONTROLS`.
    """
    return Recipe.model_validate(
        {
            "name": name,
            "output_dir": str(output_dir),
            "model": {"path": str(world.model), "dtype": "float32"},
            "data": {
                "train": [{"path": str(world.pairs)}],
                "test": [{"path": str(world.test_pairs)}],
                "max_length": 32,
                "max_prompt_length": 16,
            },
            "score": {"protocol": "paper", "lora": None, "trainer": SCORE_TRAINER},
            "select": {"fraction": 0.5},
            "train": {"trainer": TRAIN_TRAINER},
            "evaluate": {
                "generation": {
                    "prompts": 600,
                    "source": str(world.test_prompts),
                    "samples": 4,
                    "max_new_tokens": 10,
                    "batch_size": 1200,
                },
                "judge": "embedded-world",
                "controls": CONTROLS if controls is None else controls,
            },
            "launch": {"workers": workers},
        }
    )
