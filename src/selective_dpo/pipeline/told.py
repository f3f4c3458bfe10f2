"""What the user is told of a finished stage, a line each."""

from __future__ import annotations

from pathlib import Path

from selective_dpo.artifacts import read_json
from selective_dpo.curriculum.outside import imported_from, imported_in_words
from selective_dpo.curriculum.quarantine import read_quarantine
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import name_some
from selective_dpo.scoring.scorer import COST, ScorerJob
from selective_dpo.training.train import TrainingJob


def referenced(folder: Path, pairs: int) -> str:
    """Of the reference's log-probs in `folder`."""
    return f"{folder.name}: {pairs:,} pairs{_set_aside(folder)}"


def measured(job: ScorerJob) -> str:
    """Of a scorer."""
    cost = read_json(job.folder / COST)
    return (
        f"{job.run.name}: {cost['train_pairs']:,} pairs trained, {cost['held_out_pairs']:,} measured "
        f"{cost['evaluations']} times, {cost['seconds']:.0f} s{_set_aside(job.folder)}"
    )


def selected(curriculum: Curriculum, label: str) -> str:
    """Of a curriculum; `label` is its selection in words."""
    facts = curriculum.facts
    parts = [f"{facts['selected']:,} of {facts['pairs']:,} pairs, {label}"]
    if imported := imported_from(facts):
        parts.append(imported_in_words(imported))
    if facts["quarantined"]:
        parts.append(f"{facts['quarantined']:,} more not finite, not selected")
    if facts.get("missing_scorers"):
        parts.append(f"WITHOUT the records of {name_some(facts['missing_scorers'], limit=12)}")
    return "; ".join(parts)


def trained(job: TrainingJob) -> str:
    """Of a policy."""
    cost = read_json(job.folder / "cost.json")
    return f"{job.label}: {cost['optimizer_steps']:,} updates, {cost['seconds']:.0f} s"


def _set_aside(folder: Path) -> str:
    aside = read_quarantine([folder])
    return f"; {len(aside):,} of them not finite, set aside: {name_some(aside)}" if aside else ""
