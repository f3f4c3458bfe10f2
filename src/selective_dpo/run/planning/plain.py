"""The same work in plain batches, as TRL and the original have it: what a plan compares with.

Each pair takes two rows, prompt and all, padded to the longest row of the batch. Batches hold the pairs
that the order deals to them, and every batch goes through the reference as well as through the policy.
"""

from __future__ import annotations

from typing import NamedTuple

from selective_dpo.config import Recipe
from selective_dpo.run.planning.batches import Work, random_work, sequential_work
from selective_dpo.run.planning.costs import forward_flops, training_flops
from selective_dpo.run.planning.inputs import KeptPairs
from selective_dpo.run.planning.pricing import Models
from selective_dpo.run.planning.settings import trainer_value, training_settings


class PlainScorer(NamedTuple):
    """Tokens of one scorer, policy and reference together."""

    epoch: float
    """Of training, in batches of the recipe's size and in random order: expected."""
    evaluation: float
    """Of one evaluation, in batches of TRL's default size and in the order of the pairs."""


def plain_scorer(recipe: Recipe, train: KeptPairs, held_out: KeptPairs) -> PlainScorer:
    """What a scorer would compute for these halves."""
    settings = training_settings(recipe.score.trainer, recipe.model)
    processes, size = recipe.launch.processes, trainer_value({}, "per_device_eval_batch_size")
    epoch = random_work(train.lengths_P, len(train.pair_ids), settings.pairs_per_batch, processes)
    evaluation = sequential_work(held_out.lengths_P, size, processes)
    return PlainScorer(2 * epoch.tokens, 2 * evaluation.tokens)


def plain_epoch_flops(recipe: Recipe, pairs: KeptPairs, models: Models) -> float:
    """FLOPs of one DPO epoch on all pairs with the settings of `train`, in random order."""
    settings = training_settings(recipe.train.trainer, recipe.model)
    processes = recipe.launch.processes
    work: Work = random_work(pairs.lengths_P, len(pairs.pair_ids), settings.pairs_per_batch, processes)
    adapter = models.policy_adapter
    trained = training_flops(models.sizes, work, adapter=adapter, recomputes=settings.recomputes)
    return trained + forward_flops(models.sizes, work)
