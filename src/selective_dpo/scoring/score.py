"""All scorers of a protocol: run those that are missing, collect what they measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from selective_dpo.core.records import LossTable, Records
from selective_dpo.curriculum.records_io import concat_records, read_records
from selective_dpo.curriculum.records_table import read_loss_table
from selective_dpo.launch.workers import run_in_workers
from selective_dpo.scoring.scorer import RECORDS, ScorerJob, run_scorer


def run_scorers(
    jobs: Sequence[ScorerJob], *, workers: int, done: Callable[[ScorerJob], None] = lambda job: None
) -> None:
    """Run scorers one after the other, or in `workers` processes; `done` is told of each finished one.

    A failing scorer does not undo the others: theirs is published, and the error names the one.
    """
    run_in_workers(run_scorer, jobs, workers=workers, name=lambda job: job.run.name, done=done)


def collect_losses(folders: Sequence[Path], *, allow_partial: bool = False) -> LossTable:
    """The losses that several scorers measured, by pair, seed and evaluation (see `read_loss_table`)."""
    return read_loss_table([folder / RECORDS for folder in folders], allow_partial=allow_partial)


def collect_records(folders: Sequence[Path]) -> Records:
    """The records of several scorers with all their columns, sorted by pair, seed and evaluation."""
    records = concat_records([read_records(folder / RECORDS) for folder in folders])
    order = np.lexsort((records.evaluation, records.seed, records.pair_id))
    return Records(**{name: column[order] for name, column in vars(records).items()})
