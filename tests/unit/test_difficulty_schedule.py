from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.difficulty.held_out import evaluation_steps


@pytest.mark.parametrize(
    ("total", "evaluations", "steps"),
    [
        (100, 5, (20, 40, 60, 80, 100)),
        # 7 * k / 5 = 1.4, 2.8, 4.2, 5.6, 7
        (7, 5, (1, 3, 4, 6, 7)),
        # 3 * 1 / 2 = 1.5 is rounded up
        (3, 2, (2, 3)),
        (5, 5, (1, 2, 3, 4, 5)),
        (9, 1, (9,)),
    ],
)
def test_steps_by_hand(total: int, evaluations: int, steps: tuple[int, ...]) -> None:
    assert evaluation_steps(total, evaluations) == steps


@given(st.integers(1, 10_000), st.integers(1, 60))
def test_exactly_so_many_distinct_steps_evenly_spaced_the_last_at_the_end(
    total: int, evaluations: int
) -> None:
    if total < evaluations:
        with pytest.raises(ValueError, match=f"{total} optimizer steps have no room for {evaluations}"):
            evaluation_steps(total, evaluations)
        return
    steps = evaluation_steps(total, evaluations)
    assert len(set(steps)) == evaluations and steps[-1] == total and steps[0] >= 1
    gaps = [after - before for before, after in zip((0, *steps), steps, strict=False)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("evaluations", [0, -1])
def test_there_is_at_least_one_evaluation(evaluations: int) -> None:
    with pytest.raises(ValueError, match="no room"):
        evaluation_steps(10, evaluations)
