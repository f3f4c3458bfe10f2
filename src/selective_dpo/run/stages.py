"""The stages of a run: what each one makes, from what, and when there is nothing to make.

    pairs -> reference -> scores -> curriculum -> policy -> evaluation
    pairs -> curriculum -> reference -> policy -> evaluation       where the recipe has a `curriculum: PATH`

A stage (`Stage`) gives the results that it makes. A result is a value (`Result`): where it goes, the key of
everything it is made from, and the function that makes it. How a result is looked up, locked, made, published
and announced is written once, in `complete`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pyarrow.parquet as pq
from pyarrow import Table
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.config import GuardConfig, Recipe, SelectConfig, SourceConfig
from selective_dpo.config.schema import BenchmarkName
from selective_dpo.config.trainer_options import PAIRS_PER_UPDATE
from selective_dpo.curriculum.agreement import scorer_check
from selective_dpo.curriculum.audit import audit
from selective_dpo.curriculum.balance import read_attributes
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.export import SFT, write_sft
from selective_dpo.curriculum.import_ import (
    Outside,
    imported_from,
    imported_in_words,
    outside_curriculum,
)
from selective_dpo.curriculum.issues import issues_of_losses
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.table import ACTION, TABLE, Curriculum
from selective_dpo.data.prepare import prepare_pairs
from selective_dpo.data.store import (
    PAIRS,
    TOKENS,
    load_ids,
    load_summary,
    load_tokens,
    pairs_file,
    require_known,
)
from selective_dpo.difficulty.held_out import evaluation_steps
from selective_dpo.difficulty.protocols import ScorerRun, planned_runs, require_fold_sizes, split_pairs
from selective_dpo.difficulty.scorer import COST, ScorerJob, collect_losses, run_scorer
from selective_dpo.difficulty.step_scorers import OneStepJob, gradient_pass, run_step_scorer
from selective_dpo.distributed.processes import (
    held_by_main,
    publish_from_main,
    this_process,
    wait_for_everyone,
    whole_on_each_process,
)
from selective_dpo.distributed.progress import Progress
from selective_dpo.distributed.workers import run_in_workers
from selective_dpo.errors import ConfigError, RecordsError, name_some
from selective_dpo.evaluation.benchmarks import (
    answer_questions,
    model_name,
    question_file,
    read_questions,
    write_answers,
)
from selective_dpo.evaluation.evaluate import Arm, evaluate_arms, held_out_metrics
from selective_dpo.evaluation.generate import encode_prompt
from selective_dpo.evaluation.results import (
    REFERENCE,
    SELECTED,
    PreferenceMetrics,
    from_json,
    repeat_name,
)
from selective_dpo.evaluation.side_effects import (
    MAX_DOCUMENTS,
    read_documents,
    run_tasks,
    task_line,
    task_scores,
)
from selective_dpo.identity import Text, positions_of
from selective_dpo.logprobs.compute import pair_logps
from selective_dpo.logprobs.nonfinite import read_quarantine
from selective_dpo.logprobs.reference import (
    load_reference,
    publish_logps,
    publish_reference,
    require_finite_reference,
    without_quarantined,
)
from selective_dpo.logprobs.rows import part_lengths
from selective_dpo.losses import chance_loss
from selective_dpo.models import load_policy, loading
from selective_dpo.report.tables import (
    audit_text,
    check_note,
    displacement_notes,
    label_for,
    movement_note,
    seeds_note,
    side_effect_notes,
)
from selective_dpo.run.certified import certificate, scorers_until_stable
from selective_dpo.run.keys import (
    Run,
    action_inputs,
    attribute_inputs,
    benchmark_key,
    check_inputs,
    check_run,
    curriculum_key,
    evaluation_key,
    gradient_job,
    guard_key,
    has_curriculum,
    imported_inputs,
    input_digests,
    limits_of,
    prepared_key,
    prompts_to_answer,
    provenance,
    record_digests,
    reference_block,
    reference_key,
    remember_inputs,
    require_same_inputs,
    scorer_job,
    trained_ids,
    training_job,
    trainings,
    weight_digests,
)
from selective_dpo.storage.artifacts import MANIFEST, is_complete, read_json, read_manifest
from selective_dpo.storage.locks import lock_beside
from selective_dpo.training.arguments import (
    ORIGINAL_DEFAULTS,
    autocast_dtype,
    optimizer_steps,
    passes_spread,
    training_settings,
    weights_dtype,
)
from selective_dpo.training.checkpointing import CheckpointPlan, discard_checkpoints
from selective_dpo.training.train import TrainingJob, train_policy


class Result(NamedTuple):
    """Something that a stage publishes whole: a folder, or the table of a curriculum."""

    name: str
    path: Path
    key: str
    """Digest of everything that decides it."""
    make: Callable[[], object]
    """Publishes it under its key. All processes of a distributed run call it together."""
    describe: Callable[[], str]
    """What to show when it is made: a line, several, or none."""
    checkpoints: CheckpointPlan | None = None
    """Where its training keeps checkpoints. Results that have them can be made in worker processes."""
    label: str = ""
    """The selection that a policy is trained on, in words; a scorer has none."""

    def is_complete(self) -> bool:
        """Whether it is published, intact, and made from the same inputs."""
        if self.path.name == TABLE:
            return has_curriculum(self.path.parent, self.key)
        return is_complete(self.path, key=self.key)


Stage = Callable[[Run], Iterator[Sequence[Result]]]
"""What a step of a run makes. Each sequence is made before the next one is asked for, so that its keys may
depend on it."""


def stages_of(recipe: Recipe) -> dict[str, Stage]:
    """All stages of a recipe, by name, in their order: each is made from the results of those before it."""
    first: dict[str, Stage] = {"pairs": _pairs}
    if recipe.curriculum:  # difficulty comes from outside: only pairs that are trained on need a reference
        first |= {"curriculum": _imported_curricula, "reference": _references}
    else:
        first |= {"reference": _references, "scores": _scores}
        first |= {"check": _check} if recipe.score.check else {}
        first |= {"curriculum": _curricula}
    return {**first, "policy": _policies, "evaluation": _evaluation}


def bring_up(run: Run, name: str) -> None:
    """Complete the stage `name`, and before it all that it is made from.

    Raises:
        SelectiveDPOError: anything that the user has to mend.
    """
    for stage, results_of in stages_of(run.recipe).items():
        for results in results_of(run):
            complete(run, results)
        if stage == name:
            return


def complete(run: Run, results: Sequence[Result]) -> None:
    """Make those of `results` that are not there; all of them are of one kind.

    Trainings share the machine's worker processes (`launch.workers`); anything else is made here. Each is
    made under a lock of its own, held by the process that does the work: a worker may outlive its command.

    Raises:
        BusyError: another process is making one of them.
        ConfigError: trainings that are complete were made by another number of processes.
    """
    there = [result for result in results if result.is_complete()]
    missing = [result for result in results if result not in there]
    for result in there:  # a process that was killed right after publishing
        if result.checkpoints is not None and this_process().is_main_process:
            discard_checkpoints(result.checkpoints.folder)
    if not missing:
        return
    if missing[0].checkpoints is None:
        for result in missing:
            _make(result)
            if text := result.describe():
                run.tell(text)
        return
    _require_same_processes(run, there)
    if missing[0].label:
        run.tell(f"training: {'; '.join(result.label for result in missing)}")
    else:
        run.tell(f"scores: {len(missing)} of {len(results)} scorers to train")
    started, finished = time.monotonic(), 0

    def tell_done(result: Result) -> None:
        nonlocal finished
        finished += 1
        left = (time.monotonic() - started) / finished * (len(missing) - finished)
        rest = f" ({finished} of {len(missing)}, about {left:,.0f} s left)" if left else ""
        run.tell(f"  {result.describe()}{rest}")

    run_in_workers(
        _make,
        missing,
        workers=run.recipe.launch.workers,
        name=lambda result: result.name,
        done=tell_done,
    )
    if run.folder.tracking.is_dir():
        run.tell(f"  trackers' files: {run.folder.tracking}")


def _make(result: Result) -> None:
    with held_by_main(lock_beside(result.path), what=str(result.path)):
        if not result.is_complete():  # it may have been made since it was looked for
            wait_for_everyone()
            result.make()


def _require_same_processes(run: Run, complete: Sequence[Result]) -> None:
    """Refuse to train beside results that another number of processes has trained.

    The same settings on more processes are more pairs in an update: the results would not be of one kind.
    With `pairs_per_update` they are as many.

    Raises:
        ConfigError: the numbers are named.
    """
    now = this_process().num_processes
    for result in complete:
        is_scorer = result.path.is_relative_to(run.folder.root / "scores")
        if PAIRS_PER_UPDATE in (run.recipe.score if is_scorer else run.recipe.train).trainer:
            continue
        then = read_json(result.path / "cost.json")["processes"]
        if then != now:
            raise ConfigError(
                f"{result.path} was trained by {then} process(es), and now there are {now}, which with the "
                "same settings makes another number of pairs in an update: start as many as before, or set "
                "pairs_per_update, which keeps it, and pass --fresh"
            )


# ----------------------------------------------------------------------------------------------------
# pairs: the sources become prepared, tokenized pairs.


def _pairs(run: Run) -> Iterator[Sequence[Result]]:
    """The training pairs, and the held-out ones where the recipe has any.

    Raises:
        ConfigError: too few pairs for the scorers' evaluations, or a pair to exclude is not in the data.
        RunChangedError: model, tokenizer, template or data are not those that the run began with.
    """
    inputs = input_digests(run)
    require_same_inputs(run, inputs)
    yield from _prepared(run)
    run.claim()
    remember_inputs(run, inputs)


def prepare(run: Run) -> None:
    """Prepare the pairs in a folder that does not become a run: that of a plan, or of `doctor`.

    Raises:
        ConfigError: too few pairs for the scorers' evaluations, or a pair to exclude is not in the data.
    """
    for results in _prepared(run):
        complete(run, results)


def _prepared(run: Run) -> Iterator[Sequence[Result]]:
    data, folder = run.recipe.data, run.folder
    train = _prepared_pairs(run, data.train, folder.pairs, exclude=None)
    if not train.is_complete():  # the run's first result
        run.check(run)
    yield [train]
    if data.test:
        yield [_prepared_pairs(run, data.test, folder.test_pairs, exclude=folder.pairs)]
    require_known(data.exclude, [folder.pairs, folder.test_pairs] if data.test else [folder.pairs])
    _require_enough_pairs(run)


def _prepared_pairs(
    run: Run, sources: Sequence[SourceConfig], folder: Path, *, exclude: Path | None
) -> Result:
    """`exclude` is the folder of the training pairs where held-out ones are prepared."""
    key = prepared_key(run, sources, exclude=exclude)

    def make() -> None:
        if this_process().is_main_process:
            limits, prompts = limits_of(run, exclude)
            with Progress(0, folder.name, unit="rows") as progress:
                prepare_pairs(
                    sources,
                    limits,
                    run.tokenizer,
                    folder,
                    key=key,
                    exclude_prompts=prompts,
                    progress=progress.advance,
                )
        wait_for_everyone()

    return Result(folder.name, folder, key, make, lambda: f"{folder.name}: {load_summary(folder).describe()}")


class ScorerSteps(NamedTuple):
    """When a scorer does what."""

    updates: int
    evaluated_after: tuple[int, ...]


def scorer_steps(recipe: Recipe, scorer: ScorerRun, pairs: int, processes: int) -> ScorerSteps:
    """The optimizer steps of a scorer that trains on `pairs` pairs, and those after which it is measured.

    Raises:
        ConfigError: it makes fewer steps than it is to be measured.
    """
    settings = training_settings(recipe.score.trainer, recipe.model, processes)
    updates = optimizer_steps(pairs, settings, processes)
    try:
        return ScorerSteps(updates, evaluation_steps(updates, recipe.score.evaluations))
    except ValueError as error:
        raise ConfigError(
            f"{scorer.name}: {error}: lower score.evaluations or the batch size "
            f"({settings.pairs_per_batch} x {settings.accumulation} x {processes} process(es))"
        ) from error


def _require_enough_pairs(run: Run) -> None:
    """Refuse too few pairs for the scorers, before the first one is trained.

    Raises:
        DataError: a fold has fewer prompts than `score.min_fold_prompts`.
        ConfigError: a scorer makes fewer steps than it is to be measured.
    """
    # Before `accelerate launch` this process is alone, under it the recipe may not say how many there are.
    processes = max(run.recipe.launch.processes, this_process().num_processes)
    prompt_ids = pq.read_table(run.folder.pairs / TOKENS, columns=["prompt_id"])["prompt_id"].to_pylist()
    for scorer in run.scorer_runs:
        if run.recipe.score.protocol == "one-step":
            split_pairs(prompt_ids, scorer)
        else:
            require_fold_sizes(prompt_ids, scorer, run.recipe.score.min_fold_prompts)
            scorer_steps(run.recipe, scorer, len(split_pairs(prompt_ids, scorer).train), processes)


# ----------------------------------------------------------------------------------------------------
# reference: the starting policy's log-probs of the pairs, once for everything that follows.


def _references(run: Run) -> Iterator[Sequence[Result]]:
    yield [_reference(run, run.folder.pairs, run.folder.reference)]
    if run.recipe.data.test:
        yield [_reference(run, run.folder.test_pairs, run.folder.test_reference)]
    if run.recipe.curriculum:  # else the pairs without a finite reference are not selected
        require_finite_reference(run.folder.reference)


def _reference(run: Run, pairs: Path, folder: Path) -> Result:
    recipe, key = run.recipe, reference_key(run, pairs)

    def make() -> None:
        tokens = load_tokens(pairs)
        if recipe.score.protocol == "one-step" and pairs == run.folder.pairs and not recipe.curriculum:
            # The forward passes that the gradients need anyway.
            logps = gradient_pass(gradient_job(run, run.scorer_runs[0].seed))
            publish_logps(folder, key=key, logps=logps, tokens=tokens)
            return
        trained = trained_ids(run) if pairs == run.folder.pairs else None
        if trained is not None:
            tokens = tokens.select(positions_of(trained, list(tokens["pair_id"]), what="reference"))
        block = reference_block(run)
        with whole_on_each_process():
            model = load_policy(recipe.model)
        if weights_dtype(recipe.model, block.lora, block.trainer) == "float32":
            model.float()  # as the policies that it is compared with
        publish_reference(
            folder,
            key=key,
            model=model,
            tokens=tokens,
            tokens_per_batch=recipe.score.tokens_per_batch,
            pad_token_id=run.tokenizer.pad_token_id,
            autocast_dtype=autocast_dtype(block.trainer, recipe.model),
            spread=passes_spread(recipe.model, block.trainer),
        )

    def describe() -> str:
        pairs = len(load_reference(folder).pair_ids) + len(read_quarantine([folder]))
        return f"{folder.name}: {pairs:,} pairs{_set_aside(folder)}"

    return Result(folder.name, folder, key, make, describe)


def _set_aside(folder: Path) -> str:
    aside = read_quarantine([folder])
    return f"; {len(aside):,} of them not finite, set aside: {name_some(aside)}" if aside else ""


# ----------------------------------------------------------------------------------------------------
# scores: each scorer learns from one half of the pairs, and measures the other half.


def _scores(run: Run) -> Iterator[Sequence[Result]]:
    certified = run.recipe.score.protocol == "certified"
    for scorers in scorers_until_stable(run) if certified else [planned_runs(run.recipe.score)]:
        yield scorer_results(run, scorers)
    if run.recipe.score.protocol == "one-step" and this_process().is_main_process:
        for scorer in run.scorer_runs:
            discard_checkpoints(gradient_job(run, scorer.seed).work)


def scorer_results(run: Run, scorers: Sequence[ScorerRun]) -> list[Result]:
    """The records of these scorers; the reference is complete."""
    results = []
    for job in (scorer_job(run, scorer) for scorer in scorers):
        name, folder, key = job.run.name, job.folder, job.key
        if isinstance(job, OneStepJob):
            make, describe = partial(run_step_scorer, job), partial(_stepped, job)
            results.append(Result(name, folder, key, make, describe))
        else:
            make, describe = partial(run_scorer, job), partial(_measured, job)
            results.append(Result(name, folder, key, make, describe, job.checkpoints))
    return results


def _stepped(job: OneStepJob) -> str:
    """Of a split, said once: with its last fold."""
    if job.run.fold < job.run.folds - 1:
        return ""
    folders = [job.folder.parent / job.run._replace(fold=fold).name for fold in range(job.run.folds)]
    costs = [read_json(folder / COST) for folder in folders]
    pairs, seconds = (sum(cost[name] for cost in costs) for name in ("held_out_pairs", "seconds"))
    aside = "".join(_set_aside(folder) for folder in folders)
    made = f"scores: one-step, seed {job.run.seed}: {pairs:,} pairs in {len(folders)} folds"
    return f"{made}, {seconds:.0f} s{aside}"


def _measured(job: ScorerJob) -> str:
    cost = read_json(job.folder / COST)
    return (
        f"{job.run.name}: {cost['train_pairs']:,} pairs trained, {cost['held_out_pairs']:,} measured "
        f"{cost['evaluations']} times, {cost['seconds']:.0f} s{_set_aside(job.folder)}"
    )


# ----------------------------------------------------------------------------------------------------
# check: one-step beside scorers that were really trained, on some of the pairs.


def _check(run: Run) -> Iterator[Sequence[Result]]:
    checked = check_run(run)
    for stage in (_pairs, _references, _scores):
        yield from stage(checked)


def _checked(run: Run, losses: LossTable) -> dict[str, Any] | None:
    """What the check says of these losses of one-step; None where the recipe asks for none."""
    if not run.recipe.score.check:
        return None
    checked = check_run(run)
    trained = collect_losses([checked.folder.scores(scorer) for scorer in checked.scorer_runs])
    return scorer_check(losses, trained)


# ----------------------------------------------------------------------------------------------------
# curriculum: difficulty, agreement, selection and order, for the run's own arm and for each control.


def build_curricula(run: Run) -> None:
    """Build each arm's curriculum from the records that are there, without running a scorer.

    Raises:
        RecordsError: scorers are missing and the recipe does not allow a partial set.
    """
    for results in _curricula(run):
        complete(run, results)


def _curricula(run: Run) -> Iterator[Sequence[Result]]:
    """From the scorers' records."""
    if not (run.folder.reference / MANIFEST).is_file():
        raise RecordsError(f"nothing was scored yet in {run.folder.root}: run `selective-dpo score` first")
    jobs = [scorer_job(run, scorer) for scorer in run.scorer_runs]
    there = [job for job in jobs if is_complete(job.folder, key=job.key)]
    missing = [job.run.name for job in jobs if job not in there]
    if missing and not (run.recipe.select.allow_partial and there):
        names = name_some(missing)
        raise RecordsError(f"records are missing of {names}: score them, or pass --select.allow_partial true")
    run.claim()
    folders = [job.folder for job in there]
    if any(select.source for select, _ in run.arms.values()):  # they know nothing of this model
        require_finite_reference(run.folder.reference)

    @cache
    def losses() -> LossTable:
        # All arms accept partial records, or none does.
        criteria = {select.aggregate for select, _ in run.arms.values()}
        is_partial = run.recipe.select.allow_partial
        return collect_losses(folders, allow_partial=is_partial, criteria=criteria)

    @cache
    def issues() -> Table:
        return issues_of_losses(losses(), pairs_file(run.folder.pairs), run.recipe.issues)

    def build(select: SelectConfig, origin: dict[str, Any], key: str) -> Curriculum:
        made = build_curriculum(
            losses(),
            select,
            provenance=origin,
            cost={"scorers": {job.run.name: read_json(job.folder / COST) for job in there}},
            key=key,
            quarantined=read_quarantine([run.folder.reference, *folders]),
            chance_loss=chance_loss({**ORIGINAL_DEFAULTS, **run.recipe.score.trainer}),
            issues=issues() if select.action else None,
            attributes=partial(read_attributes, run.folder.pairs / PAIRS),
        )
        more = {"certificate": certificate(run), "missing_scorers": missing, "check": _checked(run, losses())}
        return replace(made, facts={**made.facts, **more})

    yield _curriculum_results(run, record_digests(there) | check_inputs(run), build)


def _imported_curricula(run: Run) -> Iterator[Sequence[Result]]:
    """From difficulties that come from outside.

    Raises:
        IdentityError: no pair has a difficulty in the recipe's `curriculum`.
    """
    outside: Outside = run.outside  # type: ignore[assignment]  # the recipe has a curriculum
    yield _curriculum_results(run, imported_inputs(run, outside.digest), partial(_import, run, outside))


def _import(run: Run, outside: Outside, select: SelectConfig, origin: dict[str, Any], key: str) -> Curriculum:
    ids, select = load_ids(run.folder.pairs), select.model_copy(update={"source": ""})
    return outside_curriculum(
        outside,
        ids["pair_id"],
        ids["prompt_id"],
        select,
        provenance=origin,
        key=key,
        attributes=partial(read_attributes, run.folder.pairs / PAIRS),
    )


def _curriculum_results(
    run: Run,
    inputs: Mapping[str, str],
    build: Callable[[SelectConfig, dict[str, Any], str], Curriculum],
) -> list[Result]:
    """`build` makes a curriculum from an arm's selection, its provenance and its key.

    An arm with a `source` of its own is made from that.
    """

    def result(name: str, select: SelectConfig, folder: Path) -> Result:
        made_from, made_by = inputs, build
        if select.source and (outside := run.outside_of(select)):
            made_from, made_by = imported_inputs(run, outside.digest), partial(_import, run, outside)
        made_from = {**made_from, **action_inputs(run, select), **attribute_inputs(run, select)}
        key = curriculum_key(made_from, select)

        def make() -> None:
            if this_process().is_main_process:
                origin = provenance(run.recipe, inputs={"model": run.model_digest, **made_from})
                made = made_by(select, origin, key)
                if "sft" in select.action.values():  # before the curriculum, which says that all is there
                    write_sft(made, pairs_file(run.folder.pairs), folder / SFT)
                made.save(folder)
            wait_for_everyone()

        def describe() -> str:
            if name != SELECTED:
                return ""
            lines = [f"curriculum: {_selected(folder, label_for(select))}"]
            facts = Curriculum.load(folder).facts
            notes = [_actions_note(folder) if select.action else ""]
            notes += [movement_note(facts.get("agreement") or {}), check_note(facts.get("check"))]
            lines += filter(None, notes)
            if 0 < facts["selected"] < facts["pairs"]:
                lines += audit_text(audit(Curriculum.load(folder), run.folder.pairs / PAIRS)).splitlines()
            return "\n  ".join(lines)

        return Result(name, folder / TABLE, key, make, describe)

    return [result(name, select, folder) for name, (select, folder) in run.arms.items()]


def _actions_note(folder: Path) -> str:
    """How many pairs had which action done to them."""
    counts = Curriculum.load(folder).table[ACTION].drop_null().value_counts().to_pylist()
    done = sorted((each["values"], each["counts"]) for each in counts if each["values"])
    sft = f" (sft: {folder / SFT})" if "sft" in dict(done) else ""
    return "actions: " + (", ".join(f"{name} {count:,}" for name, count in done) or "none") + sft


def _selected(folder: Path, label: str) -> str:
    """What a curriculum holds; `label` is its selection in words."""
    facts = Curriculum.load(folder).facts
    parts = [f"{facts['selected']:,} of {facts['pairs']:,} pairs, {label}"]
    if imported := imported_from(facts):
        parts.append(imported_in_words(imported))
    if facts["quarantined"]:
        parts.append(f"{facts['quarantined']:,} more not finite, not selected")
    if facts.get("missing_scorers"):
        parts.append(f"WITHOUT the records of {name_some(facts['missing_scorers'], limit=12)}")
    return "; ".join(parts)


# ----------------------------------------------------------------------------------------------------
# policy: DPO along each arm's curriculum, and along the run's own with each further training seed.


def _policies(run: Run) -> Iterator[Sequence[Result]]:
    jobs = [training_job(run, name) for name in trainings(run)]
    yield [
        Result(
            job.name,
            job.folder,
            job.key,
            partial(train_policy, job),
            partial(_trained, job),
            job.checkpoints,
            job.label,
        )
        for job in jobs
    ]


def _trained(job: TrainingJob) -> str:
    cost = read_json(job.folder / "cost.json")
    return f"{job.label}: {cost['optimizer_steps']:,} updates, {cost['seconds']:.0f} s"


# ----------------------------------------------------------------------------------------------------
# evaluation: every arm on held-out pairs, and its answers against the starting model's.


def _evaluation(run: Run) -> Iterator[Sequence[Result]]:
    """In a distributed run all processes share the held-out pairs' forward passes; answers are generated by
    each, and the main process's are kept."""
    _require_spread(run)
    key = evaluation_key(run)

    def make() -> None:
        arms = [_arm(run, name) for name in trainings(run)]
        several = len(run.arms)
        measure = _held_out_measure(run)
        reference = Arm(REFERENCE, "starting model", 0, 0, lambda: load_arm(run, None), measure)
        with whole_on_each_process():
            evaluation = evaluate_arms(
                arms[:several],
                reference,
                tokenizer=run.tokenizer,
                prompts=prompts_to_answer(run),
                config=run.recipe.evaluate,
                repeats=arms[several:],
                encode=partial(_encode, run),
                documents=_documents(run),
            )
        with publish_from_main(run.folder.evaluation, kind="evaluation", key=key) as folder:
            evaluation.write(folder)

    yield [Result("evaluation", run.folder.evaluation, key, make, partial(_evaluated, run))]
    for name in run.recipe.evaluate.benchmarks:
        yield [_benchmark(run, name, arm) for arm in (REFERENCE, *trainings(run))]
    if run.recipe.evaluate.guard is not None:
        for arm in (REFERENCE, *trainings(run)):  # the starting model first: the others are told beside it
            yield [_guard(run, run.recipe.evaluate.guard, arm)]


def _documents(run: Run) -> dict[str, list[int]]:
    """Tokens of other text: of `evaluate.text`, else the prompts of the held-out pairs or those answered."""
    if run.recipe.evaluate.text:
        texts = read_documents(Path(run.recipe.evaluate.text))
        return {name: list(run.tokenizer(text)["input_ids"]) for name, text in texts.items()}
    if run.recipe.data.test:
        tokens = load_tokens(run.folder.test_pairs)
        prompts = dict(zip(tokens["prompt_id"], tokens["prompt_ids"], strict=True))
        return {name: list(prompts[name]) for name in sorted(prompts)[:MAX_DOCUMENTS]}
    asked = {prompt.prompt_id: prompt.text for prompt in prompts_to_answer(run)}
    return {name: _encode(run, asked[name]) for name in sorted(asked)[:MAX_DOCUMENTS]}


def _guard(run: Run, config: GuardConfig, arm: str) -> Result:
    """One arm's scores of the harness's tasks; in a distributed run the main process alone has them run."""
    folder, key = run.folder.guard(arm), guard_key(run, config, arm)
    policies = {name: training.policy for name, training in trainings(run).items()}

    def make() -> None:
        policy = policies.get(arm)
        adapter = policy if policy and (policy / "adapter_config.json").is_file() else None
        with publish_from_main(folder, kind="guard", key=key) as partial_folder:
            if this_process().is_main_process:
                run_tasks(
                    config,
                    partial_folder,
                    model=run.recipe.model.path if policy is None or adapter else str(policy),
                    adapter=adapter,
                    tokenizer=policies[SELECTED],
                    dtype=run.recipe.model.dtype,
                    device=str(this_process().device),
                )

    def describe() -> str:
        start = None if arm == REFERENCE else run.folder.guard(REFERENCE)
        return "\n  ".join([f"guard: {arm}", *map(task_line, task_scores(folder, start))])

    return Result(f"guard {arm}", folder, key, make, describe)


def _benchmark(run: Run, name: BenchmarkName, arm: str) -> Result:
    """One arm's answers to a benchmark's questions: each arm's are kept as soon as they are there."""
    benchmark, folder = run.recipe.evaluate.benchmarks[name], run.folder.benchmark(name, arm)
    model, key = model_name(run.recipe.name, arm), benchmark_key(run, name, arm)

    def make() -> None:
        questions = read_questions(name, question_file(name, benchmark.source))
        policy = None if arm == REFERENCE else trainings(run)[arm].policy
        with whole_on_each_process():
            answers = answer_questions(
                load_arm(run, policy),
                run.tokenizer,
                name,
                questions,
                benchmark,
                run.recipe.evaluate.generation,
                stream=arm,
                encode=partial(_encode, run),
            )
        with publish_from_main(folder, kind="benchmark", key=key) as partial_folder:
            write_answers(partial_folder, name, model, questions, answers)

    return Result(f"{name} {arm}", folder, key, make, lambda: f"{name}: answers of {arm} in {folder}")


def _encode(run: Run, text: Text) -> list[int]:
    """A prompt's token ids, as those of the training pairs."""
    empty_system_message = run.recipe.data.empty_system_message
    return encode_prompt(run.tokenizer, text, empty_system_message=empty_system_message)


def _evaluated(run: Run) -> str:
    results = from_json(read_json(run.folder.evaluation / "results.json"))
    lines = [f"evaluation: {len(trainings(run))} arm(s), {results.prompts:,} prompts answered"]
    lines += [seeds_note(results)] if results.repeats else []
    notes = (*results.judge_notes, *displacement_notes(results), *side_effect_notes(results))
    return "\n  ".join([*lines, *notes])


def _require_spread(run: Run) -> None:
    """Refuse to show how far trainings lie apart that no seed could change."""
    names = [SELECTED, *map(repeat_name, run.recipe.evaluate.training_seeds)]
    weights = [weight_digests(read_manifest(trainings(run)[name].policy).files) for name in names]
    if any(one == other for one, other in itertools.combinations(weights, 2)):
        raise ConfigError(
            "trainings with different seeds gave equal weights, so nothing in them is random: leave "
            "evaluate.training_seeds out"
        )


def _arm(run: Run, name: str) -> Arm:
    training = trainings(run)[name]
    updates = int(read_json(training.policy / "cost.json")["optimizer_steps"])
    pairs = len(Curriculum.load(training.curriculum).order)
    measure = _held_out_measure(run)
    return Arm(name, training.label, pairs, updates, lambda: load_arm(run, training.policy), measure)


def load_arm(run: Run, policy: Path | None) -> Any:
    """The starting model, or a trained policy: its own weights, or the starting model with its adapter."""
    config = run.recipe.model
    if policy is None or (policy / "adapter_config.json").is_file():
        model = load_policy(config)
        add_fused_lm_head(model)
        if policy is not None:
            with loading("adapter", str(policy)):
                model = peft.PeftModel.from_pretrained(model, policy)
    else:
        model = load_policy(config.model_copy(update={"path": str(policy), "revision": "main"}))
        add_fused_lm_head(model)
    return model.to(this_process().device)


def _held_out_measure(run: Run) -> Callable[[Any], PreferenceMetrics] | None:
    if not run.recipe.data.test:
        return None
    tokens = without_quarantined(load_tokens(run.folder.test_pairs), run.folder.test_reference)
    reference = load_reference(run.folder.test_reference)
    prompt_ids = dict(zip(tokens["pair_id"], tokens["prompt_id"], strict=True))
    tokens_P2 = np.stack(part_lengths(tokens)[1:], axis=1)
    settings = {**ORIGINAL_DEFAULTS, **run.recipe.train.trainer}

    def measure(model: Any) -> PreferenceMetrics:
        logps = pair_logps(
            model,
            tokens,
            tokens_per_batch=run.recipe.evaluate.tokens_per_batch,
            pad_token_id=run.tokenizer.pad_token_id,
            autocast_dtype=autocast_dtype(settings, run.recipe.model),
            what="held-out pairs",
        )
        return held_out_metrics(logps, reference, tokens_P2, prompt_ids, settings)

    return measure
