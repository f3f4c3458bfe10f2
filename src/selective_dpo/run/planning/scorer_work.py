"""What one scorer computes: its training, and one evaluation of the pairs that it is held out from."""

from __future__ import annotations

import math
from typing import NamedTuple

from selective_dpo.config import Recipe
from selective_dpo.difficulty.protocols import ScorerRun, Split, split_pairs
from selective_dpo.run.planning.batches import Work, epoch_batches, optimizer_steps
from selective_dpo.run.planning.dealing import dealing_of, expected_work
from selective_dpo.run.planning.forwarding import Forwarding
from selective_dpo.run.planning.inputs import KeptPairs
from selective_dpo.run.planning.settings import TrainingSettings, training_settings


class ScorerWork(NamedTuple):
    """One scorer's work."""

    split: Split
    epochs: float
    """Epochs of its half that it trains."""
    trained: Work
    """Forward and backward, over all epochs."""
    measured: Work
    """Forward, of one evaluation."""


def scorer_work(recipe: Recipe, scorer: ScorerRun, pairs: KeptPairs, forwarding: Forwarding) -> ScorerWork:
    """The work of `scorer` on the prepared `pairs`.

    Raises:
        DataError: too few prompts to halve.
    """
    split = split_pairs(pairs.prompt_ids, scorer)
    count, processes = len(split.train), recipe.launch.processes
    settings = training_settings(recipe.score.trainer, recipe.model)
    epochs = epochs_done(settings, count, updates_of(settings, count, processes), processes)
    epoch = expected_work(pairs.rows(split.train).parts, count, dealing_of(recipe, "score", forwarding))
    measured = forwarding.work(pairs.rows(split.held_out), recipe.score.tokens_per_batch)
    return ScorerWork(split, epochs, epoch.times(epochs), measured)


def updates_of(settings: TrainingSettings, pairs: int, processes: int) -> int:
    """Optimizer steps of a stage that trains on `pairs` pairs."""
    return optimizer_steps(
        pairs,
        pairs_per_batch=settings.pairs_per_batch,
        accumulation=settings.accumulation,
        processes=processes,
        epochs=settings.epochs,
    )


def epochs_done(settings: TrainingSettings, pairs: int, updates: int, processes: int) -> float:
    """Epochs that `updates` make up: part of an epoch is trained in whole updates."""
    if settings.epochs == int(settings.epochs):
        return settings.epochs
    epoch = epoch_batches(pairs, settings.pairs_per_batch, processes)
    batches = updates * settings.accumulation * processes
    return min(math.ceil(settings.epochs), batches / max(1, epoch.full + (epoch.rest > 0)))
