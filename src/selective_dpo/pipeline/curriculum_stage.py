"""The stage between scores and policy: each arm's curriculum, from records or from outside difficulties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from selective_dpo.artifacts import MANIFEST, is_complete, read_json
from selective_dpo.config import SelectConfig
from selective_dpo.core.losses import chance_loss
from selective_dpo.core.records import LossTable
from selective_dpo.core.results import SELECTED
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.outside import Outside, outside_curriculum
from selective_dpo.curriculum.quarantine import read_quarantine
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.store import load_ids
from selective_dpo.engine.processes import this_process, wait_for_everyone
from selective_dpo.errors import RecordsError, name_some
from selective_dpo.pipeline import told
from selective_dpo.pipeline.certify import certificate
from selective_dpo.pipeline.jobs import (
    curriculum_key,
    has_curriculum,
    imported_inputs,
    record_digests,
    scorer_job,
)
from selective_dpo.pipeline.provenance import provenance
from selective_dpo.reporting.tables import label_for
from selective_dpo.scoring.score import collect_losses
from selective_dpo.scoring.scorer import COST, ScorerJob
from selective_dpo.training.arguments import ORIGINAL_DEFAULTS

if TYPE_CHECKING:
    from selective_dpo.pipeline.stages import Run


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
    folders = [job.folder for job in complete]

    @cache
    def losses() -> LossTable:
        # All arms accept partial records, or none does.
        return collect_losses(folders, allow_partial=run.recipe.select.allow_partial)

    def build(select: SelectConfig, origin: dict[str, Any], key: str) -> Curriculum:
        made = build_curriculum(
            losses(),
            select,
            provenance=origin,
            cost={"scorers": {job.run.name: read_json(job.folder / COST) for job in complete}},
            key=key,
            quarantined=read_quarantine([run.folder.reference, *folders]),
            chance_loss=chance_loss({**ORIGINAL_DEFAULTS, **run.recipe.score.trainer}),
        )
        absent = [job.run.name for job in missing]
        more = {"certificate": certificate(run), "missing_scorers": absent}
        return replace(made, facts={**made.facts, **more})

    return _make_curricula(run, record_digests(complete), build)


def import_curricula(run: Run, outside: Outside) -> Curriculum:
    """Build each arm's curriculum from difficulties that come from outside."""
    ids = load_ids(run.folder.pairs)

    def build(select: SelectConfig, origin: dict[str, Any], key: str) -> Curriculum:
        return outside_curriculum(
            outside, ids["pair_id"], ids["prompt_id"], select, provenance=origin, key=key
        )

    return _make_curricula(run, imported_inputs(run, outside.digest), build)


def _make_curricula(
    run: Run, inputs: dict[str, str], build: Callable[[SelectConfig, dict[str, Any], str], Curriculum]
) -> Curriculum:
    """`build` makes an arm's curriculum from its selection, provenance and key, where it is not there."""
    for name, (select, folder) in run.arms.items():
        key = curriculum_key(inputs, select)
        if has_curriculum(folder, key):
            continue
        if this_process().is_main_process:
            origin = provenance(run.recipe, inputs={"model": run.model_digest, **inputs})
            made = build(select, origin, key)
            made.save(folder)
            if name == SELECTED:
                run.tell(f"curriculum: {told.selected(made, label_for(select))}")
    wait_for_everyone()
    return Curriculum.load(run.folder.curriculum)
