"""Whether the scorers have enough to train on and to measure, as often as wanted, before any does."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow.parquet as pq

from selective_dpo.config import Recipe
from selective_dpo.core.schedule import evaluation_steps
from selective_dpo.data.store import TOKENS
from selective_dpo.engine.processes import this_process
from selective_dpo.errors import ConfigError
from selective_dpo.pipeline.planning.batches import optimizer_steps
from selective_dpo.pipeline.planning.settings import training_settings
from selective_dpo.scoring.plan import ScorerRun, require_fold_sizes, split_pairs

if TYPE_CHECKING:
    from selective_dpo.pipeline.stages import Run


class ScorerSteps(NamedTuple):
    """When a scorer does what."""

    updates: int
    evaluated_after: tuple[int, ...]


def scorer_steps(recipe: Recipe, scorer: ScorerRun, pairs: int, processes: int) -> ScorerSteps:
    """The optimizer steps of a scorer that trains on `pairs` pairs, and those after which it is measured.

    Raises:
        ConfigError: it makes fewer steps than it is to be measured.
    """
    config = recipe.score
    settings = training_settings(config.trainer, recipe.model)
    updates = optimizer_steps(
        pairs,
        pairs_per_batch=settings.pairs_per_batch,
        accumulation=settings.accumulation,
        processes=processes,
        epochs=settings.epochs,
    )
    try:
        return ScorerSteps(updates, evaluation_steps(updates, config.evaluations))
    except ValueError as error:
        raise ConfigError(
            f"{scorer.name}: {error}: lower score.evaluations or the batch size "
            f"({settings.pairs_per_batch} x {settings.accumulation} x {processes} process(es))"
        ) from error


def require_room_for_evaluations(run: Run) -> None:
    """Check each scorer's fold, and its number of optimizer steps against `score.evaluations`; the pairs are
    prepared.

    Raises:
        DataError: a fold has fewer prompts than `score.min_fold_prompts`.
        ConfigError: a scorer makes fewer steps than it is to be measured.
    """
    # Before `accelerate launch` this process is alone, under it the recipe may not say how many there are.
    processes = max(run.recipe.launch.processes, this_process().num_processes)
    prompt_ids = pq.read_table(run.folder.pairs / TOKENS, columns=["prompt_id"])["prompt_id"].to_pylist()
    for scorer in run.scorer_runs:
        require_fold_sizes(prompt_ids, scorer, run.recipe.score.min_fold_prompts)
        scorer_steps(run.recipe, scorer, len(split_pairs(prompt_ids, scorer).train), processes)
