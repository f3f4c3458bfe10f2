"""What a training changed beside what it was for: in its answers, and in other text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.identity import require_same
from selective_dpo.stats.estimates import Estimate, clustered_mean

NGRAM = 4


def repeated_share(text: str) -> float:
    """Share of a text's word 4-grams that stood in it before; 0 of fewer than five words.

    "seq-rep-4" of Welleck et al. 2020 ("Neural text generation with unlikelihood training", ICLR), of words.
    """
    words = text.split()
    grams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class Change(NamedTuple):
    """A number of one policy, and how far it lies from the starting model's."""

    value: Estimate
    minus_start: Estimate | None
    """Paired by prompt or document; None for the starting model itself."""


def change(values: Mapping[str, Sequence[float]], start: Mapping[str, Sequence[float]] | None) -> Change:
    """Compare values by prompt (or document), several of each, with those of the starting model.

    The value is the mean over all, clustered by prompt; the difference that of the prompts' means.

    Raises:
        IdentityError: the two are not of the same prompts.
    """
    names = [name for name, several in values.items() for _ in several]
    value = clustered_mean(np.concatenate([np.asarray(each) for each in values.values()]), names)
    if start is None:
        return Change(value, None)
    ids = sorted(values)
    require_same(ids, sorted(start), what="the starting model's answers")
    return Change(value, clustered_mean(_means(values, ids) - _means(start, ids), ids))


def _means(values: Mapping[str, Sequence[float]], ids: Sequence[str]) -> NDArray[np.float64]:
    return np.array([float(np.mean(values[name])) for name in ids])


class TaskScore(NamedTuple):
    """A task's score for one policy, by document."""

    task: str
    metric: str
    higher_is_better: bool
    score: Change

    @property
    def verdict(self) -> str:
        """ "worse", "better" or "no clear change": whether the interval of the difference holds 0."""
        found = self.score.minus_start
        if found is None or not (found.low > 0.0 or found.high < 0.0):
            return "no clear change"
        return "better" if (found.value > 0.0) == self.higher_is_better else "worse"
