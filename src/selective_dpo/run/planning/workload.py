"""The jobs of a run, and how much each one has to compute."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

from selective_dpo.config import SelectConfig
from selective_dpo.curriculum.build import rule_of
from selective_dpo.curriculum.select import rank_window, size_of
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.difficulty.protocols import ScorerRun
from selective_dpo.evaluation.results import SELECTED
from selective_dpo.identity import positions_of
from selective_dpo.run.keys import Run, trainings
from selective_dpo.run.planning.batches import NO_WORK, Work
from selective_dpo.run.planning.dealing import dealing_of, expected_work, ordered_work
from selective_dpo.run.planning.forwarding import Forwarding
from selective_dpo.run.planning.inputs import Inputs, KeptPairs
from selective_dpo.run.planning.scorer_work import epochs_done, scorer_work, updates_of
from selective_dpo.run.planning.settings import trainer_value, training_settings
from selective_dpo.run.stages import scorer_steps

Kind = Literal["reference", "scorer", "policy", "held-out", "answers"]


class Workload(NamedTuple):
    """One job. What is not known is None."""

    kind: Kind
    folder: Path
    """Where its result goes."""
    cached: bool
    """It is there already."""
    pairs: int | None = None
    """Pairs trained on, or whose log-probs are computed; prompts that are answered."""
    held_out: int | None = None
    """Pairs measured at every evaluation."""
    updates: int | None = None
    evaluated_after: tuple[int, ...] | None = None
    """Optimizer steps after which the held-out pairs are measured."""
    trained: Work | None = None
    forwarded: Work | None = None
    """Computed without gradients."""
    rows_per_pair: int = 2
    """1 where prompt, chosen and rejected share a row."""
    longest: int | None = None
    """Tokens of the longest row."""


def workloads(
    run: Run, inputs: Inputs | None, cached: Collection[Path], forwarding: Forwarding
) -> list[Workload]:
    """Every job of `run`, in the order they are done; `cached` are the results that are there.

    Raises:
        ConfigError: too few updates for the evaluations, or a selection that fits no pair.
        DataError: too few prompts to halve.
    """
    pairs, test = (inputs.pairs, inputs.test) if inputs else (None, None)
    has_test = bool(run.recipe.data.test)
    referenced = inputs.referenced if inputs else None
    jobs = [_reference(run, run.folder.reference, referenced, cached, forwarding)]
    jobs += [_reference(run, run.folder.test_reference, test, cached, forwarding)] if has_test else []
    jobs += [_scorer(run, scorer, pairs, cached, forwarding) for scorer in run.scorer_runs]
    jobs += [_policy(run, name, inputs, cached, forwarding) for name in trainings(run)]
    jobs += [_held_out(run, test, cached, forwarding)] if has_test else []
    if run.recipe.evaluate.generation.prompts:
        jobs.append(_answers(run, inputs, cached))
    return jobs


def selected_count(select: SelectConfig, pairs: int) -> int | None:
    """How many of `pairs` scored pairs a selection keeps; None for a threshold, which needs the scores."""
    rule = rule_of(select)
    if select.rule == "below":
        return None
    if select.rule == "random":
        return size_of(pairs, rule)
    low, high = rank_window(pairs, rule)
    return high - low


def _reference(
    run: Run, folder: Path, pairs: KeptPairs | None, cached: Collection[Path], forwarding: Forwarding
) -> Workload:
    known = folder in cached
    if pairs is None:
        return Workload("reference", folder, known, rows_per_pair=forwarding.rows_per_pair)
    return Workload(
        "reference",
        folder,
        known,
        pairs=len(pairs.pair_ids),
        forwarded=forwarding.work(pairs, run.recipe.score.tokens_per_batch),
        rows_per_pair=forwarding.rows_per_pair,
        longest=pairs.longest_row(forwarding.rows_per_pair),
    )


def _scorer(
    run: Run, scorer: ScorerRun, pairs: KeptPairs | None, cached: Collection[Path], forwarding: Forwarding
) -> Workload:
    folder = run.folder.scores(scorer)
    rows = dealing_of(run.recipe, "score", forwarding).rows_per_pair
    if pairs is None:
        return Workload("scorer", folder, folder in cached, rows_per_pair=rows)
    work = scorer_work(run.recipe, scorer, pairs, forwarding)
    count = len(work.split.train)
    updates, evaluated_after = scorer_steps(run.recipe, scorer, count, run.recipe.launch.processes)
    return Workload(
        "scorer",
        folder,
        folder in cached,
        pairs=count,
        held_out=len(work.split.held_out),
        updates=updates,
        evaluated_after=evaluated_after,
        trained=work.trained,
        forwarded=work.measured.times(run.recipe.score.evaluations),
        rows_per_pair=rows,
        longest=pairs.longest_row(rows),
    )


def _policy(
    run: Run, name: str, inputs: Inputs | None, cached: Collection[Path], forwarding: Forwarding
) -> Workload:
    training = trainings(run)[name]
    dealing = dealing_of(run.recipe, "train", forwarding)
    place, folder = training.policy, training.curriculum
    job = Workload("policy", place, place in cached, rows_per_pair=dealing.rows_per_pair)
    if inputs is None:
        return job
    pairs, test = inputs.pairs, inputs.test
    job = job._replace(longest=pairs.longest_row(dealing.rows_per_pair))
    arm = name if training.seed is None else SELECTED
    order = Curriculum.load(folder).order if folder in cached else inputs.orders.get(arm)
    if order is not None:
        count = len(order)
        at = positions_of(order, pairs.pair_ids, what=f"curriculum in {folder}")
        epoch = ordered_work(pairs.rows(at).parts, dealing)
    else:
        known = selected_count(training.select, len(pairs.pair_ids))
        if known is None:
            return job
        count = known
        epoch = expected_work(pairs.parts, count, dealing)
    settings = training_settings(run.recipe.train.trainer, run.recipe.model)
    updates = updates_of(settings, count, dealing.processes)
    measured = NO_WORK
    evaluations = _trainer_evaluations(run, updates, settings.epochs)
    if evaluations and test is not None:
        size = trainer_value(run.recipe.train.trainer, "per_device_eval_batch_size")
        measured = ordered_work(test.parts, dealing.evaluates(size)).times(evaluations)
    return job._replace(
        pairs=count,
        updates=updates,
        trained=epoch.times(epochs_done(settings, count, updates, dealing.processes)),
        forwarded=measured,
    )


def _held_out(run: Run, test: KeptPairs | None, cached: Collection[Path], forwarding: Forwarding) -> Workload:
    folder = run.folder.evaluation
    if test is None:
        return Workload("held-out", folder, folder in cached, rows_per_pair=forwarding.rows_per_pair)
    once = forwarding.work(test, run.recipe.evaluate.tokens_per_batch)
    return Workload(
        "held-out",
        folder,
        folder in cached,
        pairs=len(test.pair_ids),
        forwarded=once.times(len(trainings(run)) + 1),  # the starting model is measured too
        rows_per_pair=forwarding.rows_per_pair,
        longest=test.longest_row(forwarding.rows_per_pair),
    )


def _answers(run: Run, inputs: Inputs | None, cached: Collection[Path]) -> Workload:
    """Answers at their longest. Each new token attends to all before it, so a row costs about half of its
    length squared; the whole is counted, as everywhere."""
    folder, generation = run.folder.evaluation, run.recipe.evaluate.generation
    if inputs is None:
        return Workload("answers", folder, folder in cached)
    lengths_G = inputs.prompt_lengths_G + generation.max_new_tokens
    once = Work(float(lengths_G.sum()), float((lengths_G**2).sum()))
    return Workload(
        "answers",
        folder,
        folder in cached,
        pairs=len(lengths_G),
        forwarded=once.times(generation.samples * (len(trainings(run)) + 1)),
        longest=int(lengths_G.max(initial=0)),
    )


def _trainer_evaluations(run: Run, updates: int, epochs: float) -> int:
    """How often the training stage evaluates on the way, by transformers' own options."""
    given = run.recipe.train.trainer
    strategy, delay = given.get("eval_strategy", "no"), float(given.get("eval_delay", 0))
    if strategy == "no":
        return 0
    first = int(bool(given.get("eval_on_start", False)))
    if strategy == "epoch":
        return first + len([epoch for epoch in range(1, int(epochs) + 1) if epoch >= delay])
    every = given.get("eval_steps") or given.get("logging_steps", 10)
    step: int = max(1, math.ceil(every * updates) if every < 1 else int(every))
    # The last update is evaluated as well, if it is not anyway.
    steps = {*range(step, updates + 1, step), updates}
    return first + len([at for at in steps if at >= delay])
