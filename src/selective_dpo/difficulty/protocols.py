"""Which scorers a protocol makes, and which pairs each one may see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.config import ScoreConfig
from selective_dpo.difficulty import one_step
from selective_dpo.difficulty.folds import FOLDS, assign_folds
from selective_dpo.errors import DataError


class ScorerRun(NamedTuple):
    """One scorer: trained on the pairs outside `fold`, measured on those in it."""

    seed: int
    fold: int
    folds: int = len(FOLDS)
    """Into how many the pairs are split."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"seed{self.seed}-fold{self.fold}"


class Split(NamedTuple):
    """Row numbers of the pairs that one scorer learns from, and of those that it measures."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def planned_runs(config: ScoreConfig) -> tuple[ScorerRun, ...]:
    """All scorers, in the order they are run: all folds of a seed before the next seed."""
    folds = one_step.FOLDS if config.protocol == "one-step" else len(FOLDS)
    return tuple(ScorerRun(seed, fold, folds) for seed in config.seeds for fold in range(folds))


def require_fold_sizes(prompt_ids_P: Sequence[str], run: ScorerRun, fewest: int) -> None:
    """Refuse a fold of fewer than `fewest` prompts; pairs of one prompt are not independent of each other.

    Raises:
        DataError: `run` would measure such a fold; or there are fewer prompts than folds.
    """
    held_out = split_pairs(prompt_ids_P, run).held_out
    prompts = len({prompt_ids_P[row] for row in held_out})
    if prompts < fewest:
        raise DataError(
            f"{run.name}: its fold has {len(held_out):,} pairs of {prompts:,} prompt(s), fewer than "
            f"score.min_fold_prompts = {fewest}: a scorer would learn and measure next to nothing; give "
            "pairs of more prompts, or lower that key"
        )


def split_pairs(prompt_ids_P: Sequence[str], run: ScorerRun) -> Split:
    """The pairs outside the fold of `run`, and those in it: no prompt has pairs in both.

    Raises:
        DataError: there are fewer prompts than folds.
    """
    try:
        folds_P = assign_folds(prompt_ids_P, seed=run.seed, folds=run.folds)
    except ValueError as error:
        raise DataError(f"{error}; give more pairs") from error
    return Split(np.flatnonzero(folds_P != run.fold), np.flatnonzero(folds_P == run.fold))
