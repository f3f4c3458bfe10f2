"""One check of a run, and comparisons that name some of the ids that differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selective_dpo.errors import SelectiveDPOError, name_some

DAMAGE = (
    SelectiveDPOError,
    OSError,
    pa.ArrowException,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RecursionError,
    MemoryError,  # a damaged length
)
"""What reading a damaged file may raise, somewhere: verifying goes on with the next check."""

_ABSENT = "absent"


@dataclass
class Check:
    """What was checked, and what was found to be wrong."""

    name: str
    counted: str = ""
    """What was looked at, in numbers."""
    problems: list[str] = field(default_factory=list)
    """A line each: the artifact, what is wrong with it, examples."""

    @property
    def status(self) -> str:
        """`ok`, `absent` or `WRONG`."""
        if self.problems:
            return "WRONG"
        return _ABSENT if self.counted.startswith(_ABSENT) else "ok"

    def absent(self, why: str = "") -> None:
        """There is nothing to check yet."""
        self.counted = f"{_ABSENT}: {why}" if why else _ABSENT

    def wrong(self, artifact: str, problem: str) -> None:
        """Add a problem."""
        self.problems.append(" ".join(f"{artifact}: {problem}".split()))

    def require(self, holds: bool, artifact: str, problem: str) -> None:
        """Add a problem unless `holds`."""
        if not holds:
            self.wrong(artifact, problem)

    def equal(self, artifact: str, what: str, found: object, wanted: object) -> None:
        """`found` in `artifact` must be `wanted`."""
        self.require(found == wanted, artifact, f"{what} is {_show(found)} and should be {_show(wanted)}")

    def same_ids(self, artifact: str, found: Sequence[str], wanted: Sequence[str], of: str) -> bool:
        """`found` must hold each of the distinct ids `wanted` once; `of` says whose those are."""
        before = len(self.problems)
        have, want = set(found), set(wanted)
        if len(have) < len(found):
            seen: set[str] = set()
            repeated = dict.fromkeys(item for item in found if item in seen or seen.add(item))  # type: ignore[func-returns-value]
            self.wrong(artifact, f"{len(repeated):,} ids stand more than once: {name_some(repeated)}")
        for ids, words in ((want - have, f"of {of} are missing"), (have - want, f"are not those of {of}")):
            if ids:
                self.wrong(artifact, f"{len(ids):,} ids {words}: {name_some(sorted(ids))}")
        return len(self.problems) == before

    def at_no_row(
        self, artifact: str, ids: Sequence[str] | NDArray[Any], is_wrong: NDArray[np.bool_], problem: str
    ) -> None:
        """`is_wrong` [P] must hold for none of `ids` [P]; the problem names those for which it does."""
        if is_wrong.any():
            named = dict.fromkeys(str(ids[row]) for row in np.flatnonzero(is_wrong).tolist())
            self.wrong(artifact, f"{problem} for {len(named):,} ids: {name_some(named)}")


class Checks:
    """All checks of one run, in order."""

    def __init__(self) -> None:
        self.done: list[Check] = []

    @contextlib.contextmanager
    def of(self, name: str, artifact: str = "") -> Iterator[Check]:
        """A new check. Whatever is so damaged that it cannot be looked at is a problem of this one only."""
        check = Check(name)
        self.done.append(check)
        try:
            yield check
        except DAMAGE as error:
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            if isinstance(error, KeyError):
                reason = f"{reason} is missing"
            check.wrong(artifact or name, f"cannot be checked: {reason[:300]}")


def counts_in_words(counts: Mapping[str, int]) -> str:
    """`identical 7, too long 4`."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _show(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."
