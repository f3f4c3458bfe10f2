"""All scorers of a protocol: run those that are missing, collect what they measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from selective_dpo.artifacts import is_complete
from selective_dpo.core.records import LossTable, Records
from selective_dpo.curriculum.quarantine import read_quarantine
from selective_dpo.curriculum.records_io import concat_records, read_records
from selective_dpo.curriculum.records_table import read_loss_table
from selective_dpo.engine.processes import making
from selective_dpo.errors import name_some
from selective_dpo.launch.workers import run_in_workers
from selective_dpo.scoring.scorer import RECORDS, ScorerJob, run_scorer

logger = logging.getLogger(__name__)


def run_scorers(
    jobs: Sequence[ScorerJob], *, workers: int, done: Callable[[ScorerJob], None] = lambda job: None
) -> None:
    """Run scorers one after the other, or in `workers` processes; `done` is told of each finished one.

    A failing scorer does not undo the others: theirs is published, and the error names the one.
    """
    run_in_workers(_run_alone, jobs, workers=workers, name=lambda job: job.run.name, done=done)


def _run_alone(job: ScorerJob) -> None:
    # By the process that does the work: a worker may outlive the command that started it.
    with making(job.folder):
        if not is_complete(job.folder, key=job.key):
            run_scorer(job)


def collect_losses(folders: Sequence[Path], *, allow_partial: bool = False) -> LossTable:
    """The losses that several scorers measured, by pair, seed and evaluation (see `read_loss_table`).

    A pair that any of them set aside is not among them.
    """
    return read_loss_table(
        [folder / RECORDS for folder in folders],
        allow_partial=allow_partial,
        without=read_quarantine(folders),
    )


def collect_records(folders: Sequence[Path]) -> Records:
    """The records of several scorers with all their columns, sorted by pair, seed and evaluation.

    A pair that any of them set aside has none, and a warning names it.
    """
    records = concat_records([read_records(folder / RECORDS) for folder in folders])
    quarantined = read_quarantine(folders)
    if quarantined:
        logger.warning("%s pair(s) not finite, without records: %s", len(quarantined), name_some(quarantined))
    kept = np.flatnonzero(~np.isin(records.pair_id, list(quarantined)))
    by_key = (records.evaluation[kept], records.seed[kept], records.pair_id[kept])
    order = kept[np.lexsort(by_key)]
    return Records(**{name: column[order] for name, column in vars(records).items()})
