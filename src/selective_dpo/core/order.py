"""In which order the selected pairs are trained on."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from selective_dpo.core.selection import Selection, ascending, require_seed

Order = Literal["easy-to-hard", "hard-to-easy", "shuffled"]
NOT_SELECTED = -1
_STREAM = 2  # `random` and `shuffled` may share a seed and must still be independent draws.


def training_positions(
    selection: Selection, pair_ids_P: NDArray[np.str_], order: Order = "easy-to-hard", seed: int = 0
) -> NDArray[np.int64]:
    """Place of each pair [P] in the training order, from 0; `NOT_SELECTED` for the others.

    `shuffled` is a permutation of the selected ids in ascending order: it depends on which pairs are
    selected and on `seed`, neither on the rows' order nor on the difficulties.
    """
    if order == "shuffled":
        by_id = ascending(pair_ids_P)
        first_to_last = by_id[selection.selected_P[by_id]]
        generator = np.random.default_rng([_STREAM, require_seed(seed)])
        first_to_last = generator.permutation(first_to_last)
    elif order in ("easy-to-hard", "hard-to-easy"):
        by_rank = np.empty(len(pair_ids_P), dtype=np.int64)
        by_rank[selection.rank_P] = np.arange(len(pair_ids_P))
        first_to_last = by_rank[selection.selected_P[by_rank]]
        if order == "hard-to-easy":
            first_to_last = first_to_last[::-1]
    else:
        raise ValueError(f"unknown order {order!r}")
    position_P = np.full(len(pair_ids_P), NOT_SELECTED, dtype=np.int64)
    position_P[first_to_last] = np.arange(len(first_to_last))
    return position_P
