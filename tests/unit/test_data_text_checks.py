"""Texts that are degenerate, and preferences that contradict each other under nearly equal prompts."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from selective_dpo.data.text_checks import COLUMNS, check_texts, compression_ratio, is_degenerate

PROSE = (
    "The tide rises and falls because the moon pulls on the water that faces it more strongly than on the "
    "earth, and on the earth more strongly than on the water behind. Coasts, winds and the depth of a bay "
    "decide how much of that anybody on a beach gets to see."
)


def test_prose_is_not_degenerate_and_a_loop_is() -> None:
    assert compression_ratio(PROSE) < 2.5
    assert compression_ratio("and again " * 60) > 10
    assert compression_ratio("no no no") == 0.0  # too short to say anything
    # A loop at the end of a long answer is found in its own window.
    assert compression_ratio(PROSE * 1 + " x" * 2000) > 10


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (PROSE, "No.", False),
        (PROSE, " \n ", True),
        ("Yes, it is.", "yes,  IT is.", True),
        ("I " * 400, PROSE, True),
    ],
)
def test_degenerate_pairs(chosen: str, rejected: str, expected: bool) -> None:
    assert is_degenerate(chosen, rejected, 4.0) is expected


def batch(*rows: tuple[str, str, str]) -> pa.RecordBatch:
    columns = [[f"{number}" for number in range(len(rows))]]
    columns += [[json.dumps(row[part]) for row in rows] for part in range(3)]
    return pa.RecordBatch.from_arrays([pa.array(column) for column in columns], names=list(COLUMNS))


def found(*rows: tuple[str, str, str], similar: float = 0.8) -> list[bool]:
    return check_texts(
        lambda: [batch(*rows)], repetition=4.0, similar_prompts=similar
    ).contradicting_P.tolist()


def test_the_same_answers_in_the_other_order_contradict_under_nearly_the_same_prompt() -> None:
    one = ("What causes the tides on earth?", "The moon.", "The wind.")
    # Other case and punctuation; then one word of seven is another: Jaccard 5 / 7.
    assert found(one, ("what causes the tides on Earth", "the wind.", "The  moon.")) == [True, True]
    other = ("What makes the tides on earth?", "The wind.", "The moon.")
    assert found(one, other) == [False, False]
    assert found(one, other, similar=0.7) == [True, True]


def test_what_agrees_or_is_about_something_else_does_not_contradict() -> None:
    one = ("What causes the tides on earth?", "The moon.", "The wind.")
    assert found(one, ("What causes the tides on earth", "The moon.", "The wind.")) == [False, False]
    assert found(one, ("What moves a sail?", "The wind.", "The moon.")) == [False, False]


def test_messages_are_read_as_their_contents() -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = [("Why?", said("A"), said("B")), ("Why?", said("B"), said("A"))]
    assert found(*rows) == [True, True]  # type: ignore[arg-type]
