"""The answer of one check."""

from __future__ import annotations

from typing import Literal, NamedTuple

Status = Literal["ok", "warn", "FAIL"]


class Check(NamedTuple):
    """What was found, and what to do about it."""

    status: Status
    name: str
    found: str
    remedy: str = ""
    """Empty for `ok`."""

    def line(self) -> str:
        """One line of text."""
        words = f"{self.status:<5} {self.name}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")
        return " ".join(words.split()) if "\n" in words else words


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check("ok", name, found)


def warn(name: str, found: str, remedy: str) -> Check:
    """A run would go through; perhaps not as wanted."""
    return Check("warn", name, found, remedy)


def fail(name: str, found: str, remedy: str = "") -> Check:
    """A run would stop here. An error's own text holds its remedy."""
    return Check("FAIL", name, found, remedy)
