"""Which rows of several sources are used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ALL_SOURCES = 0
_FIRST_SOURCE = 1


def sample_rows(
    counts_S: Sequence[int], fractions_S: Sequence[float], *, max_rows: int = 0, seed: int = 0
) -> list[NDArray[np.bool_]]:
    """For each source a mask over its rows: True for those that are used, in their original order.

    From source s, round(fraction * rows) rows are drawn without replacement (at least one, if it has any),
    by a generator seeded with (seed, s): so what one source gives does not depend on the others. Of the
    rows drawn, `max_rows` (0: all) are then drawn evenly over all sources.
    """
    masks = [
        _draw(count, max(1, int(fraction * count + 0.5)), _generator(seed, _FIRST_SOURCE + index))
        for index, (count, fraction) in enumerate(zip(counts_S, fractions_S, strict=True))
    ]
    used = np.concatenate([*masks, np.zeros(0, dtype=np.bool_)])
    drawn = np.flatnonzero(used)
    if 0 < max_rows < len(drawn):
        used[drawn] = _draw(len(drawn), max_rows, _generator(seed, _ALL_SOURCES))
    return np.split(used, np.cumsum(counts_S)[:-1]) if counts_S else []


def _draw(count: int, size: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    mask = np.zeros(count, dtype=np.bool_)
    if size >= count:
        mask[:] = True
    else:
        mask[generator.choice(count, size=size, replace=False)] = True
    return mask


def _generator(seed: int, stream: int) -> np.random.Generator:
    # NumPy takes no negative seeds, a recipe may hold one: it is read as 64 bits.
    return np.random.default_rng([seed % 2**64, stream])
