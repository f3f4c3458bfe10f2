"""Instructions whose answers a program can check: "in exactly three words", "in capital letters" ...

They are what the embedded world's list tasks are, for a language model that reads English. An instruction is
about an everyday topic and demands one property of the answer's form. The checker reads the form alone: it
does not know whether an answer is true, or makes sense. All texts are this project's own. Pure Python, NumPy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from selective_dpo.errors import DataError

TOPICS = (
    *("a bicycle", "a birthday", "a bridge", "a candle", "a castle", "a cat", "a clock", "a desert", "a dog"),
    *(
        "a doctor",
        "a farm",
        "a forest",
        "a garden",
        "a guitar",
        "a hammer",
        "a hospital",
        "a horse",
        "a house",
    ),
    *("a kitchen", "a library", "a market", "a mirror", "a mountain", "a museum", "a river", "a school"),
    *("a ship", "a storm", "a teacher", "a train", "a village", "a window", "an apple", "an elephant"),
    *("an island", "an umbrella", "bread", "breakfast", "chess", "coffee", "cooking", "football", "honey"),
    *("friendship", "music", "rain", "sleep", "snow", "spring", "summer", "swimming", "tea", "the moon"),
    *("the sea", "the sun", "time", "travel", "water", "winter", "work"),
)
WORDS = (
    *("always", "because", "blue", "bright", "children", "every", "family", "green", "happy", "many"),
    *("morning", "never", "often", "old", "people", "quickly", "quiet", "small", "sometimes", "together"),
    *("warm", "without"),
)
EXACT = 2.0
"""The reward of an answer that does what was demanded entirely."""


class Instruction(NamedTuple):
    """One instruction: a family (a key of `FAMILIES`), a topic, and the number or word demanded, as text."""

    family: str
    topic: str
    demand: str


class Family(NamedTuple):
    """One kind of demand."""

    template: str
    """The instruction's text, with `{topic}` and, where something is demanded, `{demand}`."""
    demands: tuple[str, ...]
    """What may be demanded; one empty text where there is nothing to choose."""
    degree: Callable[[str, str], float]
    """(answer, demand) -> how far the answer does what was demanded, in [0, 1]; 1: entirely."""


def _closeness(count: int, demand: str) -> float:
    """1 where `count` is the number demanded, and less the further it is from it."""
    wanted = int(demand)
    return 1.0 - abs(count - wanted) / max(count, wanted)


def _words(answer: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", answer.lower())


def _sentences(answer: str) -> int:
    """Pieces that end in a full stop, a question mark or an exclamation mark, and what is left at the end."""
    return len([piece for piece in re.split(r"(?<=[.!?])[\"'”)]*\s+", answer.strip()) if piece])


def _share_of_letters(answer: str, wanted: Callable[[str], bool]) -> float:
    letters = [letter for letter in answer if letter.isalpha()]
    return sum(map(wanted, letters)) / len(letters) if letters else 0.0


def _place_of_word(answer: str, demand: str, place: int) -> float:
    """1 where the word stands at `place`, one half where it stands elsewhere."""
    words = _words(answer)
    return 1.0 if words and words[place] == demand else 0.5 * (demand in words)


def _quotes(answer: str, demand: str) -> float:
    """1 where all of the answer stands in one pair of quotes, one half where it has such a pair somewhere."""
    inner = re.search(r'"[^"]+"', answer)
    return 0.0 if inner is None else 1.0 if inner.group() == answer.strip() else 0.5


def _question(answer: str, demand: str) -> float:
    """1 for one sentence that ends in a question mark, one half for a question mark anywhere."""
    asks = answer.rstrip("\"' \n").endswith("?") and _sentences(answer) == 1
    return 1.0 if asks else 0.5 * ("?" in answer)


def _without_letter(answer: str, demand: str) -> float:
    """The share of the words that lack the letter."""
    words = _words(answer)
    return sum(demand not in word for word in words) / len(words) if words else 0.0


def _lines(answer: str, demand: str) -> float:
    return _closeness(len([line for line in answer.splitlines() if line.strip()]), demand)


def _parts(answer: str, demand: str) -> float:
    """Closeness of the number of parts between commas, times the share of parts of at most two words."""
    parts = [part for part in answer.split(",") if part.strip()]
    if not parts:
        return 0.0
    short = sum(len(_words(part)) <= 2 for part in parts) / len(parts)
    return _closeness(len(parts), demand) * short


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "words": Family(
            "Describe {topic} in exactly {demand} words.",
            ("3", "4", "5"),
            lambda answer, demand: _closeness(len(_words(answer)), demand),
        ),
        "sentences": Family(
            "Write exactly {demand} short sentences about {topic}.",
            ("2", "3"),
            lambda answer, demand: _closeness(_sentences(answer), demand),
        ),
        "lines": Family(
            "List {demand} words that have to do with {topic}, each on a line of its own.", ("3", "4"), _lines
        ),
        "commas": Family(
            "List {demand} words that have to do with {topic}, with commas between them.", ("3", "4"), _parts
        ),
        "capitals": Family(
            "Write one short sentence about {topic} in capital letters only.",
            ("",),
            lambda answer, demand: _share_of_letters(answer, str.isupper),
        ),
        "small": Family(
            "Write one short sentence about {topic} without any capital letter.",
            ("",),
            lambda answer, demand: _share_of_letters(answer, str.islower),
        ),
        "word": Family(
            'Write one short sentence about {topic} that contains the word "{demand}".',
            WORDS,
            lambda answer, demand: float(demand in _words(answer)),
        ),
        "first word": Family(
            'Write one short sentence about {topic}. Its first word must be "{demand}".',
            WORDS,
            lambda answer, demand: _place_of_word(answer, demand, 0),
        ),
        "last word": Family(
            'Write one short sentence about {topic}. Its last word must be "{demand}".',
            WORDS,
            lambda answer, demand: _place_of_word(answer, demand, -1),
        ),
        "question": Family("Write one short question about {topic}.", ("",), _question),
        "quotes": Family("Write one short sentence about {topic} in double quotes.", ("",), _quotes),
        "letter": Family(
            'Write one short sentence about {topic} without the letter "{demand}".',
            ("a", "i", "o", "s"),
            _without_letter,
        ),
    }
)
"""Name -> family. Counting words and avoiding a letter are beyond a small model; the rest it can learn."""

_PATTERNS = {
    name: re.compile(
        re.escape(family.template)
        .replace(r"\{topic\}", "(?P<topic>.+)")
        .replace(r"\{demand\}", f"(?P<demand>{'|'.join(family.demands)})")
    )
    for name, family in FAMILIES.items()
}


def prompt_text(instruction: Instruction) -> str:
    """The instruction as the model reads it."""
    family = FAMILIES[instruction.family]
    return family.template.format(topic=instruction.topic, demand=instruction.demand)


def parse_prompt(prompt: str) -> Instruction:
    """The instruction that a prompt gives, the inverse of `prompt_text`.

    Raises:
        DataError: not a prompt of this world.
    """
    for name, pattern in _PATTERNS.items():
        found = pattern.fullmatch(prompt)
        if found and found["topic"] in TOPICS:
            return Instruction(name, found["topic"], found.groupdict().get("demand", ""))
    raise DataError(f"not an instruction of the constraints' world: {prompt[:200]!r}")


def gold_reward(prompt: str, answer: str) -> float:
    """How far an answer does what was demanded, in [0, 2]: its family's degree, plus 1 where that is 1.

    An answer without a letter or digit has 0.

    Raises:
        DataError: `prompt` is not one of this world.
    """
    instruction = parse_prompt(prompt)
    if not _words(answer):
        return 0.0
    degree = FAMILIES[instruction.family].degree(answer, instruction.demand)
    return EXACT if degree == 1.0 else degree


def draw_instructions(count: int, generator: np.random.Generator) -> list[Instruction]:
    """`count` distinct random instructions; the family is uniform, then its topic and demand.

    Raises:
        ValueError: a family has fewer than twice as many instructions as its share of those asked for.
    """
    names = list(FAMILIES)
    available = len(TOPICS) * len(names)
    if available < 2 * count:
        raise ValueError(f"{count:,} distinct instructions wanted; ask for at most {available // 2:,}")
    drawn: dict[Instruction, None] = {}
    while len(drawn) < count:
        name = names[int(generator.integers(len(names)))]
        demands = FAMILIES[name].demands
        topic = TOPICS[int(generator.integers(len(TOPICS)))]
        drawn[Instruction(name, topic, demands[int(generator.integers(len(demands)))])] = None
    return list(drawn)
