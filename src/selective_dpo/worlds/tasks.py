"""List-transformation tasks: prompt text, correct answer and gold reward. Pure Python and NumPy.

Letters a-j stand for the digits 0-9. Shapes: B tasks of N operands each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.errors import DataError

LETTERS = "abcdefghij"
BASE = len(LETTERS)
COLON, EQUALS = ":", "="
_DIGIT_OF = {letter: digit for digit, letter in enumerate(LETTERS)}

Digits = NDArray[np.int64]


class Task(NamedTuple):
    """One instruction: apply `operation` (a key of `OPERATIONS`) to `operands`, digits 0-9."""

    operation: str
    operands: tuple[int, ...]


def _swap(digits_BN: Digits) -> Digits:
    """Exchange first and second, third and fourth ...; an odd last one stays."""
    swapped = digits_BN.copy()
    even = digits_BN.shape[1] // 2 * 2
    swapped[:, 0:even:2] = digits_BN[:, 1:even:2]
    swapped[:, 1:even:2] = digits_BN[:, 0:even:2]
    return swapped


def _product(digits_BN: Digits) -> Digits:
    """First half times second half, times 7 plus 13; the last N decimal digits, zeros in front kept.

    The halves are read as decimal numbers; with odd N the first is the shorter.
    """
    size = digits_BN.shape[1]
    half = size // 2
    result_B = _number(digits_BN[:, :half]) * _number(digits_BN[:, half:]) * 7 + 13
    place_N = BASE ** np.arange(size - 1, -1, -1, dtype=np.int64)
    return np.asarray(result_B[:, None] // place_N % BASE, dtype=np.int64)


def _number(digits_BN: Digits) -> Digits:
    place_N = BASE ** np.arange(digits_BN.shape[1] - 1, -1, -1, dtype=np.int64)
    return np.asarray(digits_BN @ place_N, dtype=np.int64)


OPERATIONS: Mapping[str, Callable[[Digits], Digits]] = MappingProxyType(
    {
        "copy": lambda digits_BN: digits_BN.copy(),
        "reverse": lambda digits_BN: digits_BN[:, ::-1].copy(),
        "swap": _swap,
        "increment": lambda digits_BN: (digits_BN + 1) % BASE,
        # One place to the left; the first becomes the last.
        "rotate": lambda digits_BN: np.roll(digits_BN, -1, axis=1),
        # Running sums modulo 10.
        "sums": lambda digits_BN: np.asarray(np.cumsum(digits_BN, axis=1) % BASE, dtype=np.int64),
        "product": _product,
    }
)
"""Name in the prompt -> function of digits [B, N] to digits [B, N]. The small model learns the first five;
the last two are beyond it."""


def solve(operation: str, digits_BN: Digits) -> Digits:
    """The correct answers to B tasks of one operation and length; digits [B, N] to digits [B, N]."""
    return OPERATIONS[operation](np.asarray(digits_BN, dtype=np.int64))


def to_text(digits: Iterable[int]) -> str:
    """Digits as letters with spaces between: (3, 5, 2) is "d f c"."""
    return " ".join(LETTERS[digit] for digit in digits)


def prompt_text(task: Task) -> str:
    """The instruction as the model reads it, such as "reverse : a c f d ="."""
    return f"{task.operation} {COLON} {to_text(task.operands)} {EQUALS}"


def correct_answer(task: Task) -> str:
    """The one right answer to a task, as text."""
    return to_text(solve(task.operation, np.array([task.operands]))[0])


def parse_prompt(prompt: str) -> Task:
    """The task that a prompt asks for, the inverse of `prompt_text`.

    Raises:
        DataError: not a prompt of this world.
    """
    symbols = prompt.split()
    operation, operands = symbols[:1], symbols[2:-1]
    if (
        operation
        and operation[0] in OPERATIONS
        and symbols[1:2] == [COLON]
        and symbols[-1] == EQUALS
        and operands
        and all(symbol in _DIGIT_OF for symbol in operands)
    ):
        return Task(operation[0], tuple(_DIGIT_OF[symbol] for symbol in operands))
    raise DataError(f'not a prompt of the embedded world: {prompt!r}; one is "copy : a b c ="')


def gold_reward(prompt: str, answer: str) -> float:
    """How good an answer is, in [0, 2]: 1 - edit distance / longer length, plus 1 if it is exactly right.

    Edit distance counts insertions, deletions and substitutions of symbols (Levenshtein).

    Raises:
        DataError: `prompt` is not one of this world.
    """
    correct = correct_answer(parse_prompt(prompt)).split()
    given = answer.split()
    if given == correct:
        return 2.0
    return 1.0 - edit_distance(correct, given) / max(len(correct), len(given))


def edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Least number of insertions, deletions and substitutions that turn `left` into `right`."""
    previous = list(range(len(right) + 1))
    for row, symbol in enumerate(left, start=1):
        current = [row]
        for column, other in enumerate(right, start=1):
            current.append(
                min(
                    previous[column] + 1,
                    current[column - 1] + 1,
                    previous[column - 1] + (symbol != other),
                )
            )
        previous = current
    return previous[-1]


def draw_tasks(
    count: int,
    generator: np.random.Generator,
    *,
    operations: Sequence[str],
    lengths: Sequence[int],
    exclude: Collection[Task] = (),
) -> list[Task]:
    """`count` distinct random tasks, none of them in `exclude`; operation and length uniform.

    Raises:
        ValueError: there are fewer than twice as many tasks as asked for, so that drawing might not end.
    """
    available = len(operations) * sum(BASE**length for length in lengths)
    if available < 2 * (count + len(exclude)):
        raise ValueError(f"{count + len(exclude):,} distinct tasks wanted, only {available:,} exist")
    taken = set(exclude)
    drawn: list[Task] = []
    while len(drawn) < count:
        operation = operations[int(generator.integers(len(operations)))]
        length = lengths[int(generator.integers(len(lengths)))]
        task = Task(operation, tuple(generator.integers(BASE, size=length).tolist()))
        if task not in taken:
            taken.add(task)
            drawn.append(task)
    return drawn
