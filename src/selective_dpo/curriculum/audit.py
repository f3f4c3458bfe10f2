"""What a selection kept and dropped: by source, script and truncation, and in length and score."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.adapters import KEPT, contents_of
from selective_dpo.identity import positions_of
from selective_dpo.stats.estimates import Estimate, clustered_mean, clustered_share

_READ = 200
"""Letters of a chosen answer by which its script is told."""

_BATCH = 5_000

_COLUMNS = ("source", "truncated", "chosen_tokens", "rejected_tokens", "score_chosen", "score_rejected")


class GroupShare(NamedTuple):
    """How much of one group of the pairs was selected."""

    what: str
    """"source", "script" or "truncated"."""
    name: str
    pairs: int
    kept: Estimate
    """Share selected, clustered by prompt."""

    def loses_more(self, average: float) -> bool:
        """Whether it surely loses twice what all pairs lose, or keeps less than half of what they keep.

        `average` is the share of all pairs that is kept. Surely: the interval is on that side.
        """
        return 1.0 - self.kept.high > 2.0 * (1.0 - average) or self.kept.high < average / 2.0


class MeanDifference(NamedTuple):
    """A mean over the kept and over the dropped pairs."""

    what: str
    kept: Estimate
    dropped: Estimate


class Audit(NamedTuple):
    """What a selection did to the data."""

    average: float
    """Share of the pairs that was selected."""
    groups: tuple[GroupShare, ...]
    means: tuple[MeanDifference, ...]

    @property
    def warnings(self) -> list[str]:
        """A line for each source or script that loses more than twice the average."""
        return [
            f"{group.what} {group.name} keeps {100 * group.kept.value:.0f}% of its {group.pairs:,} pairs, "
            f"all pairs {100 * self.average:.0f}%: if it matters, give select.quota or select.balance"
            for group in self.groups
            if group.what != "truncated" and group.loses_more(self.average)
        ]


def audit(curriculum: Curriculum, pairs: Path) -> Audit:
    """Compare the selected pairs with the others, by the columns of the run's `pairs.parquet`.

    Groups of which all pairs are part are left out, as are scores where no pair has them.

    Raises:
        IdentityError: a pair of the curriculum is not in `pairs`.
    """
    table = curriculum.measured.table
    ids = table["pair_id"].to_pylist()
    is_kept_P = np.asarray(table["selected"], dtype=np.bool_)
    prompts_P = np.array(table["prompt_id"].to_pylist(), dtype=np.str_)
    columns, scripts = _read(pairs, ids)
    named = {
        "source": np.array([name or "" for name in columns["source"].to_pylist()], dtype=np.str_),
        "script": scripts,
        "truncated": np.where(np.asarray(columns["truncated"], dtype=np.bool_), "truncated", "whole"),
    }
    groups = [
        GroupShare(what, name, int(is_in_P.sum()), clustered_share(is_kept_P[is_in_P], prompts_P[is_in_P]))
        for what, names_P in named.items()
        if len(set(names_P.tolist())) > 1
        for name in sorted(set(names_P.tolist()))
        for is_in_P in [names_P == name]
    ]
    number = {name: np.asarray(columns[name].to_numpy(), dtype=np.float64) for name in _COLUMNS[2:]}
    differences = {
        "chosen minus rejected tokens": number["chosen_tokens"] - number["rejected_tokens"],
        "tokens of the chosen answer": number["chosen_tokens"],
        "score gap": number["score_chosen"] - number["score_rejected"],
    }
    means = [
        MeanDifference(what, *(_mean(values_P, side_P, prompts_P) for side_P in (is_kept_P, ~is_kept_P)))
        for what, values_P in differences.items()
        if np.isfinite(values_P[is_kept_P]).any() and np.isfinite(values_P[~is_kept_P]).any()
    ]
    return Audit(float(is_kept_P.mean()), tuple(groups), tuple(means))


def _mean(values_P: NDArray[np.float64], side_P: NDArray[np.bool_], prompts_P: NDArray[np.str_]) -> Estimate:
    at_P = side_P & np.isfinite(values_P)
    return clustered_mean(values_P[at_P], prompts_P[at_P])


def _read(pairs: Path, ids: Sequence[str]) -> tuple[pa.Table, NDArray[np.str_]]:
    """Rows of `pairs` in the order of `ids`, and each chosen answer's script; texts are read in batches."""
    parts, found, scripts = [], list[str](), list[str]()
    with pq.ParquetFile(pairs) as file:
        for batch in file.iter_batches(_BATCH, columns=["pair_id", "status", "chosen", *_COLUMNS]):
            kept = batch.filter(pc.equal(batch["status"], KEPT))
            found += kept["pair_id"].to_pylist()
            scripts += [script_of(json.loads(text)) for text in kept["chosen"].to_pylist()]
            parts.append(kept.select(list(_COLUMNS)))
    at_P = positions_of(list(ids), found, what="curriculum and pairs.parquet")
    return pa.Table.from_batches(parts).take(pa.array(at_P)), np.array(scripts, dtype=np.str_)[at_P]


def script_of(text: Any) -> str:
    """The script that most of a text's first letters are of, in Unicode's words: LATIN, CYRILLIC, CJK ...

    Japanese counts as one of its three, whichever is most. A text without letters: "none".
    """
    letters = chain.from_iterable((each for each in part if each.isalpha()) for part in contents_of(text))
    first = [letter for letter, _ in zip(letters, range(_READ), strict=False)]
    counts = Counter(unicodedata.name(letter, "unknown").split()[0] for letter in first)
    return max(sorted(counts), key=counts.__getitem__, default="none")
