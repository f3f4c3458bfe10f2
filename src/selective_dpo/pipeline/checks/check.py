"""The answer of one check."""

from __future__ import annotations

from typing import Literal, NamedTuple

from selective_dpo.errors import ConfigError, SelectiveDPOError

Status = Literal["ok", "warn", "FAIL"]


class Check(NamedTuple):
    """What was found, and what to do about it."""

    status: Status
    name: str
    found: str
    remedy: str = ""
    """Empty for `ok`."""
    cause: SelectiveDPOError | None = None
    """The error that a run would end in, where one was met."""

    def line(self) -> str:
        """One line of text."""
        words = f"{self.status:<5} {self.name}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")
        return " ".join(words.split()) if "\n" in words else words

    def error(self) -> SelectiveDPOError:
        """A failed check as the error for whoever goes on all the same."""
        told = f"{self.name}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")
        return self.cause or ConfigError(told)


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check("ok", name, found)


def warn(name: str, found: str, remedy: str) -> Check:
    """A run would go through; perhaps not as wanted."""
    return Check("warn", name, found, remedy)


def fail(name: str, found: str, remedy: str = "") -> Check:
    """A run would stop here."""
    return Check("FAIL", name, found, remedy)


def refused(name: str, error: SelectiveDPOError) -> Check:
    """A run would stop here, with this error; its text holds the remedy."""
    return Check("FAIL", name, str(error), cause=error)
