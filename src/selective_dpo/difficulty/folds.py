"""Random halves of the pairs that never split a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FOLDS = (0, 1)


def assign_folds(prompt_ids_P: Sequence[str], *, seed: int) -> NDArray[np.int64]:
    """Fold (0 or 1) of each pair; pairs of one prompt share it.

    Prompts are put in random order and dealt, each with all its pairs, to the fold that has fewer
    pairs so far (fold 0 on a tie). So the halves differ by at most the size of the largest prompt, and
    for prompts with one pair each this is a random half split. The result depends on the set of
    (prompt, number of pairs) and the seed only, not on the order of the rows.

    Shapes: prompt_ids_P [P], result [P] int64.

    Raises:
        ValueError: fewer than two distinct prompts, so that one half would be empty.
    """
    prompts, prompt_of_P, sizes = np.unique(
        np.asarray(prompt_ids_P, dtype=np.str_), return_inverse=True, return_counts=True
    )
    if len(prompts) < len(FOLDS):
        raise ValueError(f"cannot halve {len(prompts)} prompt(s): at least two are needed")
    fold_of_prompt = np.empty(len(prompts), dtype=np.int64)
    pairs_in = [0, 0]
    for prompt in np.random.default_rng(seed).permutation(len(prompts)):
        fold = 0 if pairs_in[0] <= pairs_in[1] else 1
        fold_of_prompt[prompt] = fold
        pairs_in[fold] += int(sizes[prompt])
    return fold_of_prompt[prompt_of_P]
