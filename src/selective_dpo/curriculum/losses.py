"""The losses that a curriculum carries, as the table that core functions compute on."""

from __future__ import annotations

import numpy as np

from selective_dpo.core.records import LossTable
from selective_dpo.core.selection import ascending
from selective_dpo.curriculum.arrow_columns import text_array
from selective_dpo.curriculum.table import Curriculum, loss_column
from selective_dpo.errors import ArtifactError


def curriculum_losses(curriculum: Curriculum) -> LossTable:
    """The losses by pair, seed and evaluation, NaN where there is no record; rows sorted by pair id.

    Pairs that were set aside as not finite are not among them.

    Raises:
        ArtifactError: the table lacks the losses of a seed and evaluation that the facts name.
    """
    curriculum = curriculum.measured
    seeds, evaluations = (tuple(curriculum.facts[name]) for name in ("seeds", "evaluations"))
    pair_ids, prompt_ids = (text_array(curriculum.table[name]) for name in ("pair_id", "prompt_id"))
    losses = np.empty((len(pair_ids), len(seeds), len(evaluations)))
    for s, seed in enumerate(seeds):
        for e, evaluation in enumerate(evaluations):
            name = loss_column(seed, evaluation)
            if name not in curriculum.table.column_names:
                raise ArtifactError(f"the curriculum has no column {name!r}, which its facts name")
            losses[:, s, e] = curriculum.table[name].to_numpy()
    order = ascending(pair_ids)
    return LossTable(pair_ids[order], prompt_ids[order], seeds, evaluations, losses[order])
