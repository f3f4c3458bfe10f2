"""Random folds of the pairs that never split a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FOLDS = (0, 1)
"""The halves of the protocols that train their scorers."""


def assign_folds(prompt_ids_P: Sequence[str], *, seed: int, folds: int = len(FOLDS)) -> NDArray[np.int64]:
    """Fold (from 0) of each pair; pairs of one prompt share it.

    Prompts are put in random order and dealt, each with all its pairs, to the fold that has fewest
    pairs so far (the first of them on a tie). So folds differ by at most the size of the largest prompt, and
    for prompts with one pair each this is a random split. The result depends on the set of
    (prompt, number of pairs) and the seed only, not on the order of the rows.

    Shapes: prompt_ids_P [P], result [P] int64.

    Raises:
        ValueError: fewer distinct prompts than folds, so that a fold would be empty.
    """
    prompts, prompt_of_P, sizes = np.unique(
        np.asarray(prompt_ids_P, dtype=np.str_), return_inverse=True, return_counts=True
    )
    if len(prompts) < folds:
        raise ValueError(f"cannot split {len(prompts)} prompt(s) into {folds} folds: one each is needed")
    fold_of_prompt = np.empty(len(prompts), dtype=np.int64)
    pairs_in = [0] * folds
    for prompt in np.random.default_rng(seed).permutation(len(prompts)):
        fold = pairs_in.index(min(pairs_in))
        fold_of_prompt[prompt] = fold
        pairs_in[fold] += int(sizes[prompt])
    return fold_of_prompt[prompt_of_P]
