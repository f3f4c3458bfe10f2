"""The stages of a run. Each one makes its result unless a complete one with the same key is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from selective_dpo.artifacts import MANIFEST, is_complete, read_json
from selective_dpo.config import Recipe, SelectConfig
from selective_dpo.core.losses import chance_loss
from selective_dpo.core.records import LossTable
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.quarantine import read_quarantine
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.store import load_tokens, require_known
from selective_dpo.engine.models import load_policy, load_tokenizer, model_digest
from selective_dpo.engine.processes import making, this_process, wait_for_everyone
from selective_dpo.engine.reference import publish_reference
from selective_dpo.errors import ConfigError, RecordsError, name_some
from selective_dpo.launch.workers import run_in_workers
from selective_dpo.pipeline import told
from selective_dpo.pipeline.certify import certificate, certified_runs, ensure_certified
from selective_dpo.pipeline.jobs import (
    curriculum_key,
    has_curriculum,
    record_digests,
    reference_key,
    scorer_arguments,
    scorer_job,
    training_job,
)
from selective_dpo.pipeline.pairs_stage import ensure_prepared
from selective_dpo.pipeline.provenance import provenance
from selective_dpo.pipeline.room import require_room_for_evaluations
from selective_dpo.pipeline.run_directory import RunDirectory
from selective_dpo.pipeline.unchanged import (
    input_digests,
    remember_inputs,
    require_same_inputs,
    require_same_processes,
)
from selective_dpo.reporting.tables import label_for
from selective_dpo.scoring.plan import ScorerRun, planned_runs
from selective_dpo.scoring.score import collect_losses, run_scorers
from selective_dpo.scoring.scorer import COST, ScorerJob
from selective_dpo.training.arguments import ORIGINAL_DEFAULTS, autocast_dtype
from selective_dpo.training.checkpoints import discard_checkpoints
from selective_dpo.training.train import TrainingJob, train_policy

Job = TypeVar("Job", ScorerJob, TrainingJob)

SELECTED = "selected"
"""Name of the run's own arm, beside its controls."""


@dataclass(frozen=True)
class Run:
    """A recipe in its folder. All processes of a distributed run build the same one."""

    recipe: Recipe
    folder: RunDirectory
    say: Callable[[str], object] = print
    """Told one line per stage."""
    fresh: bool = False
    """Whether changed inputs are accepted."""

    @cached_property
    def model_digest(self) -> str:
        """What identifies the starting policy's weights."""
        return model_digest(self.recipe.model)

    @cached_property
    def tokenizer(self) -> Any:
        """The starting policy's tokenizer."""
        return load_tokenizer(self.recipe.model)

    @property
    def scorer_runs(self) -> tuple[ScorerRun, ...]:
        """The protocol's scorers; of `certified`, those that are known to be needed."""
        if self.recipe.score.protocol == "certified":
            return certified_runs(self)
        return planned_runs(self.recipe.score)

    @property
    def arms(self) -> dict[str, tuple[SelectConfig, Path]]:
        """Selection and folder of the run's own arm and of each control."""
        own = self.recipe.select
        # Controls come from the same records: incomplete ones are accepted for all arms or for none.
        controls = {
            name: select.model_copy(update={"allow_partial": own.allow_partial})
            for name, select in self.recipe.evaluate.controls.items()
        }
        return {SELECTED: (own, self.folder.root)} | {
            name: (select, self.folder.control(name)) for name, select in controls.items()
        }

    def claim(self) -> None:
        """Write down once whose folder this is (see `RunDirectory.claim`)."""
        if this_process().is_main_process:
            self.folder.claim(self.recipe)

    def tell(self, line: str) -> None:
        """Say something once, whatever the number of processes."""
        if this_process().is_main_process:
            self.say(line)


def ensure_pairs(run: Run) -> None:
    """Prepare the training pairs, and the held-out ones where the recipe has any.

    Raises:
        ConfigError: too few pairs for the scorers' evaluations, or a pair to exclude is not in the data.
        RunChangedError: model, tokenizer, template or data are not those that the run began with.
    """
    inputs = input_digests(run)
    require_same_inputs(run, inputs)
    ensure_prepared(run, run.recipe.data.train, run.folder.pairs, exclude=None)
    if run.recipe.data.test:
        ensure_prepared(run, run.recipe.data.test, run.folder.test_pairs, exclude=run.folder.pairs)
    prepared = [run.folder.pairs, *([run.folder.test_pairs] if run.recipe.data.test else [])]
    require_known(run.recipe.data.exclude, prepared)
    require_room_for_evaluations(run)
    run.claim()
    remember_inputs(run, inputs)


def ensure_reference(run: Run) -> None:
    """The starting policy's log-probs of all prepared pairs, once for everything that follows."""
    ensure_pairs(run)
    _ensure_reference_of(run, run.folder.pairs, run.folder.reference)
    if run.recipe.data.test:
        _ensure_reference_of(run, run.folder.test_pairs, run.folder.test_reference)


def ensure_scores(run: Run, *, only: tuple[str, ...] = ()) -> None:
    """Run the protocol's scorers that are missing; `only` names some of them.

    Raises:
        ConfigError: `only` names a scorer that the protocol does not have.
    """
    planned = planned_runs(run.recipe.score)
    unknown = sorted(set(only) - {scorer.name for scorer in planned})
    if unknown:
        known = ", ".join(scorer.name for scorer in planned)
        raise ConfigError(f"no scorer named {name_some(unknown)}; this recipe has {known}")
    ensure_reference(run)
    if only:
        _score(run, [scorer for scorer in planned if scorer.name in only])
    elif run.recipe.score.protocol == "certified":
        ensure_certified(run, lambda scorers: _score(run, scorers))
    else:
        _score(run, planned)


def _score(run: Run, scorers: Sequence[ScorerRun]) -> None:
    jobs = [scorer_job(run, scorer) for scorer in scorers]
    complete, missing = _by_completeness(jobs)
    if not missing:
        return
    require_same_processes(complete)
    run.tell(f"scores: {len(missing)} of {len(jobs)} scorers to train")
    wait_for_everyone()
    workers = run.recipe.launch.workers
    run_scorers(missing, workers=workers, done=lambda job: run.tell(f"  {told.measured(job)}"))
    _tell_tracking(run)


def ensure_curriculum(run: Run) -> Curriculum:
    """Records -> difficulty, agreement, selection and order, for the run's arm and its controls.

    Raises:
        RecordsError: scorers are missing and the recipe does not allow a partial set.
    """
    ensure_scores(run)
    return build_curricula(run)


def build_curricula(run: Run) -> Curriculum:
    """Build each arm's curriculum from the records that are there, without running a scorer."""
    if not (run.folder.reference / MANIFEST).is_file():
        raise RecordsError(f"nothing was scored yet in {run.folder.root}: run `selective-dpo score` first")
    complete: list[ScorerJob] = []
    missing: list[ScorerJob] = []
    for scorer in run.scorer_runs:
        job = scorer_job(run, scorer)
        (complete if is_complete(job.folder, key=job.key) else missing).append(job)
    if missing and not (run.recipe.select.allow_partial and complete):
        names = name_some(job.run.name for job in missing)
        raise RecordsError(f"records are missing of {names}: score them, or pass --select.allow_partial true")
    run.claim()
    inputs = record_digests(complete)
    losses: LossTable | None = None
    for name, (select, folder) in run.arms.items():
        key = curriculum_key(inputs, select)
        if has_curriculum(folder, key):
            continue
        if this_process().is_main_process:
            # All arms accept partial records, or none does.
            folders = [job.folder for job in complete]
            losses = losses or collect_losses(folders, allow_partial=select.allow_partial)
            cost = {job.run.name: read_json(job.folder / COST) for job in complete}
            origin = provenance(run.recipe, inputs={"model": run.model_digest, **inputs})
            made = build_curriculum(
                losses,
                select,
                provenance=origin,
                cost={"scorers": cost},
                key=key,
                quarantined=read_quarantine([run.folder.reference, *folders]),
                chance_loss=chance_loss({**ORIGINAL_DEFAULTS, **run.recipe.score.trainer}),
            )
            absent = [job.run.name for job in missing]
            more = {"certificate": certificate(run), "missing_scorers": absent}
            made = replace(made, facts={**made.facts, **more})
            made.save(folder)
            if name == SELECTED:
                run.tell(f"curriculum: {told.selected(made, label_for(select))}")
    wait_for_everyone()
    return Curriculum.load(run.folder.curriculum)


def ensure_policy(run: Run) -> None:
    """Train the run's policy, and its controls', where they are missing."""
    ensure_curriculum(run)
    jobs = [training_job(run, name) for name in run.arms]
    complete, missing = _by_completeness(jobs)
    if not missing:
        return
    require_same_processes(complete)
    run.tell(f"training: {'; '.join(job.label for job in missing)}")
    wait_for_everyone()
    run_in_workers(
        _train_alone,
        missing,
        workers=run.recipe.launch.workers,
        name=lambda job: job.name,
        done=lambda job: run.tell(f"  {told.trained(job)}"),
    )
    _tell_tracking(run)


def _by_completeness(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """The jobs that are done, and those to do. Checkpoints that a killed process left of a done one go."""
    complete = [job for job in jobs if is_complete(job.folder, key=job.key)]
    if this_process().is_main_process:
        for job in complete:
            if job.checkpoints is not None:
                discard_checkpoints(job.checkpoints.folder)
    return complete, [job for job in jobs if job not in complete]


def _train_alone(job: TrainingJob) -> None:
    # By the process that does the work: a worker may outlive the command that started it.
    with making(job.folder):
        if not is_complete(job.folder, key=job.key):
            train_policy(job)


def _ensure_reference_of(run: Run, pairs: Path, folder: Path) -> None:
    recipe = run.recipe
    key = reference_key(run, pairs)
    if is_complete(folder, key=key):
        return
    with making(folder):
        if is_complete(folder, key=key):
            return
        wait_for_everyone()
        tokens = load_tokens(pairs)
        publish_reference(
            folder,
            key=key,
            model=load_policy(recipe.model),
            tokens=tokens,
            tokens_per_batch=recipe.score.tokens_per_batch,
            pad_token_id=run.tokenizer.pad_token_id,
            autocast_dtype=autocast_dtype(scorer_arguments(run)),
        )
        run.tell(told.referenced(folder, len(tokens)))


def _tell_tracking(run: Run) -> None:
    if run.folder.tracking.is_dir():
        run.tell(f"  trackers' files: {run.folder.tracking}")
