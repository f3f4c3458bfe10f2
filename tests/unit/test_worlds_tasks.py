"""Tasks of the embedded world: answers, prompt text and gold reward, each worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.errors import DataError
from selective_dpo.worlds.tasks import (
    OPERATIONS,
    Task,
    correct_answer,
    draw_tasks,
    edit_distance,
    gold_reward,
    parse_prompt,
    prompt_text,
    solve,
)

tasks = st.builds(
    Task,
    st.sampled_from(list(OPERATIONS)),
    st.lists(st.integers(0, 9), min_size=2, max_size=6).map(tuple),
)


@pytest.mark.parametrize(
    ("operation", "operands", "answer"),
    [
        ("copy", (0, 2, 5, 3), "a c f d"),
        ("reverse", (0, 2, 5, 3), "d f c a"),
        ("swap", (0, 2, 5, 3), "c a d f"),  # first with second, third with fourth
        ("swap", (0, 2, 5), "c a f"),  # the odd last one stays
        ("increment", (0, 2, 9, 3), "b d a e"),  # 9 + 1 = 10, modulo 10 = 0
        ("rotate", (0, 2, 5, 3), "c f d a"),
        ("sums", (4, 3, 5, 9), "e h c b"),  # 4, 7, 12 -> 2, 21 -> 1
        ("product", (1, 2, 3, 4), "c i g j"),  # 12 * 34 * 7 + 13 = 2869
        ("product", (2, 3, 4), "e i j"),  # 2 * 34 * 7 + 13 = 489
        ("product", (0, 0, 5), "a b d"),  # 0 * 5 * 7 + 13 = 13, written 013
        ("product", (9, 9, 9, 9), "i g c a"),  # 99 * 99 * 7 + 13 = 68620, whose last four digits are 8620
    ],
)
def test_correct_answers(operation: str, operands: tuple[int, ...], answer: str) -> None:
    assert correct_answer(Task(operation, operands)) == answer


def test_many_tasks_are_solved_at_once_as_one_by_one() -> None:
    digits = np.array([[1, 2, 3, 4, 5], [9, 9, 0, 9, 9]])
    for operation in OPERATIONS:
        one_by_one = [solve(operation, digits[row : row + 1])[0] for row in range(2)]
        np.testing.assert_array_equal(solve(operation, digits), one_by_one)
        np.testing.assert_array_equal(digits, [[1, 2, 3, 4, 5], [9, 9, 0, 9, 9]])


def test_prompt_text_separates_symbols_by_one_space() -> None:
    assert prompt_text(Task("reverse", (0, 2, 5, 3))) == "reverse : a c f d ="


@given(tasks)
def test_a_prompt_is_parsed_back_to_its_task(task: Task) -> None:
    assert parse_prompt(prompt_text(task)) == task


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "reverse",
        "reverse : =",
        "sort : a b =",
        "reverse a b =",
        "reverse : a b",
        "reverse : a z =",
        "= : a =",
    ],
)
def test_another_text_is_refused_with_what_a_prompt_looks_like(prompt: str) -> None:
    with pytest.raises(DataError, match='one is "copy : a b c ="'):
        parse_prompt(prompt)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("d f c a", 2.0),
        (" d f c a", 2.0),  # white space around does not matter
        ("d f c b", 1 - 1 / 4),  # one substitution, both of length 4
        ("d f c", 1 - 1 / 4),  # one insertion, the longer has 4
        ("d f c a a", 1 - 1 / 5),  # one deletion, the longer has 5
        ("f c a d", 1 - 2 / 4),  # delete the last d, insert it in front
        ("b b b b", 0.0),
        ("", 0.0),  # four insertions of 4
        ("copy", 0.0),  # one substitution and three insertions of 4
    ],
)
def test_gold_reward_of_reversing_acfd(answer: str, reward: float) -> None:
    assert gold_reward("reverse : a c f d =", answer) == reward


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance(left: str, right: str, distance: int) -> None:
    assert edit_distance(list(left), list(right)) == distance


@given(tasks, st.lists(st.sampled_from("abcdefghij:="), max_size=9))
def test_only_the_right_answer_is_worth_more_than_one(task: Task, symbols: list[str]) -> None:
    answer = " ".join(symbols)
    reward = gold_reward(prompt_text(task), answer)
    if answer == correct_answer(task):
        assert reward == 2.0
    else:
        assert 0.0 <= reward < 1.0


def test_drawn_tasks_are_distinct_and_avoid_the_excluded() -> None:
    operations = ["copy", "sums"]
    first = draw_tasks(60, np.random.default_rng(0), operations=operations, lengths=[2, 3])
    second = draw_tasks(60, np.random.default_rng(0), operations=operations, lengths=[2, 3], exclude=first)
    assert len(set(first) | set(second)) == 120
    assert {task.operation for task in first} == {"copy", "sums"}
    assert {len(task.operands) for task in first} == {2, 3}


def test_more_tasks_than_half_of_all_are_refused() -> None:
    # One operation on two digits: 100 tasks.
    with pytest.raises(ValueError, match="only 100 exist"):
        draw_tasks(51, np.random.default_rng(0), operations=["copy"], lengths=[2])


def test_judging_needs_no_model_library() -> None:
    code = (
        "import sys, selective_dpo.worlds.tasks; "
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
