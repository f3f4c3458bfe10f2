"""A curriculum's losses come back as the table it was built from."""

from __future__ import annotations

import numpy as np
import pytest

from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.table import Curriculum, curriculum_losses, loss_column
from selective_dpo.errors import ArtifactError


def table_of(pairs: int = 6) -> LossTable:
    ids = np.array([f"p{index}" for index in range(pairs)])
    prompts = np.array([f"q{index // 2}" for index in range(pairs)])
    losses = np.random.default_rng(0).uniform(size=(pairs, 2, 3))
    losses[1, 0, 2] = np.nan
    return LossTable(ids, prompts, (41, 43), (1, 2, 3), losses)


def test_losses_come_back() -> None:
    table = table_of()
    curriculum = build_curriculum(table, {"allow_partial": True})
    back = curriculum_losses(curriculum)
    assert (back.seeds_S, back.evaluations_E) == (table.seeds_S, table.evaluations_E)
    np.testing.assert_array_equal(back.pair_ids_P, table.pair_ids_P)
    np.testing.assert_array_equal(back.prompt_ids_P, table.prompt_ids_P)
    np.testing.assert_array_equal(back.losses_PSE, table.losses_PSE)


def test_a_missing_column_is_named() -> None:
    curriculum = build_curriculum(table_of(), {"allow_partial": True})
    name = loss_column(43, 2)
    lacking = Curriculum(curriculum.table.drop_columns([name]), curriculum.facts)
    with pytest.raises(ArtifactError, match=name):
        curriculum_losses(lacking)
