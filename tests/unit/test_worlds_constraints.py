"""Instructions with a demand, and the program that checks the answers. Rewards are worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from selective_dpo.errors import DataError
from selective_dpo.worlds.constraints import (
    FAMILIES,
    TOPICS,
    Instruction,
    draw_instructions,
    gold_reward,
    parse_prompt,
    prompt_text,
)


@pytest.mark.parametrize(
    ("family", "demand", "answer", "reward"),
    [
        ("words", "3", "It is wet.", 2.0),  # three words: entirely, 1 + 1
        ("words", "3", "Wet.", 1 / 3),  # one of three
        ("words", "3", "It isn't dry and it's well-known.", 0.5),  # six words: 1 - 3 / 6
        ("sentences", "2", "It falls. It wets!", 2.0),
        ("sentences", "2", 'He said "yes." It stopped. I left', 2 / 3),  # three: 1 - 1 / 3
        ("lines", "3", "drop\n\ncloud\nsky\n", 2.0),
        ("lines", "3", "drop, cloud, sky", 1 / 3),
        ("commas", "3", "drop, cloud, sky", 2.0),
        ("commas", "3", "drop, cloud", 2 / 3),
        ("commas", "3", "Here are some words, cloud, sky", 2 / 3),  # two of three parts are short
        ("commas", "3", ",,", 0.0),
        ("capitals", "", "RAIN IS WET.", 2.0),
        ("capitals", "", "RAin", 0.5),
        ("small", "", "rain is wet.", 2.0),
        ("small", "", "Rain", 0.75),
        ("word", "warm", "A warm rain.", 2.0),
        ("word", "warm", "A warmer rain.", 0.0),  # another word
        ("first word", "warm", "Warm rain fell.", 2.0),
        ("first word", "warm", "The warm rain fell.", 0.5),
        ("last word", "warm", "The rain was warm!", 2.0),
        ("last word", "warm", "The rain was cold.", 0.0),
        ("question", "", "Is rain wet?", 2.0),
        ("question", "", "Is rain wet? Yes.", 0.5),
        ("question", "", "Rain is wet.", 0.0),
        ("quotes", "", '"Rain is wet."', 2.0),
        ("quotes", "", 'He said "rain".', 0.5),
        ("quotes", "", "Rain is wet.", 0.0),
        ("letter", "a", "It is wet.", 2.0),
        ("letter", "a", "A rain is wet.", 0.5),  # two of four words lack it
    ],
)
def test_rewards(family: str, demand: str, answer: str, reward: float) -> None:
    prompt = prompt_text(Instruction(family, "rain", demand))
    assert gold_reward(prompt, answer) == pytest.approx(reward)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_without_words_is_worth_nothing(family: str) -> None:
    prompt = prompt_text(Instruction(family, "rain", FAMILIES[family].demands[0]))
    assert gold_reward(prompt, " ?! \n") == 0.0


def test_every_instruction_is_read_back_from_its_text() -> None:
    instructions = [
        Instruction(name, topic, demand)
        for name, family in FAMILIES.items()
        for topic in TOPICS
        for demand in family.demands
    ]
    assert [parse_prompt(prompt_text(each)) for each in instructions] == instructions
    assert len({prompt_text(each) for each in instructions}) == len(instructions)


def test_other_texts_are_refused() -> None:
    with pytest.raises(DataError, match="not an instruction of the constraints' world"):
        gold_reward("Write one short question about a unicorn.", "Is it?")


def test_instructions_are_distinct_and_of_every_family() -> None:
    drawn = draw_instructions(300, np.random.default_rng(0))
    assert len(set(drawn)) == 300
    assert {each.family for each in drawn} == set(FAMILIES)
    assert drawn == draw_instructions(300, np.random.default_rng(0))
    with pytest.raises(ValueError, match="ask for at most 3"):  # 60 topics of 12 families: 720, by half
        draw_instructions(400, np.random.default_rng(0))
