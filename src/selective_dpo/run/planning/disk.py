"""The disk that a run needs: what it keeps, and what its trainings need while they last.

Not counted: tables, logs, tokenizers and the like; what DeepSpeed and FSDP write besides weights and states;
checkpoints that failed trainings have left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from selective_dpo.config import Recipe
from selective_dpo.difficulty.protocols import planned_runs
from selective_dpo.run.planning.costs import checkpoint_bytes, saved_bytes
from selective_dpo.run.planning.pricing import Models
from selective_dpo.run.planning.settings import training_settings
from selective_dpo.training.arguments import weights_dtype
from selective_dpo.training.checkpointing import KEPT


class Disk(NamedTuple):
    """Bytes in a run's folder."""

    results: float
    """Trained weights: policies, and scorers where they are kept."""
    checkpoints: float
    """The most that there are at a time. They go with the end of their training."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.results + self.checkpoints

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return {**self._asdict(), "total": self.total}


def disk_need(recipe: Recipe, models: Models | None) -> Disk | None:
    """What a run with these models takes; None if they are not known."""
    if models is None:
        return None
    policies = 1 + len(recipe.evaluate.controls) + len(recipe.evaluate.training_seeds)
    scorers = 0 if recipe.curriculum else len(planned_runs(recipe.score))
    dtype = recipe.model.dtype
    results = policies * saved_bytes(models.sizes, adapter=models.policy_adapter, dtype=dtype)
    if recipe.score.keep_scorers:
        results += scorers * saved_bytes(models.sizes, adapter=models.scorer_adapter, dtype=dtype)
    stages = (
        (recipe.score, models.scorer_adapter, scorers),
        (recipe.train, models.policy_adapter, policies),
    )
    launch = recipe.launch
    checkpoints = 0.0
    if launch.checkpoint_minutes or launch.checkpoint_steps:
        for block, adapter, jobs in stages:
            settings = training_settings(block.trainer, recipe.model)
            held = weights_dtype(recipe.model, block.lora, block.trainer)
            one = checkpoint_bytes(models.sizes, settings, adapter=adapter, dtype=held)
            # Of each training under way: those that are kept, and the next one while it is written.
            checkpoints = max(checkpoints, min(launch.workers, jobs) * (KEPT + 1) * one)
    return Disk(results, checkpoints)
