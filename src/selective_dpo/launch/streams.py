"""Standard output and error that end no work: neither by a character nor by a reader that has gone.

A command is judged by what it does. If nobody reads its words any more (`| head -1`), it goes on without
them, and its exit code says what became of it.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


def settle_streams() -> None:
    """Make this process's standard output and error such; for the beginning of a program."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # closed by whoever has started this process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
            continue
        try:
            patient = _Patient(stream.fileno(), name)
        except (OSError, AttributeError):  # put in its place by a program around this one
            continue
        stream.flush()
        settled = io.TextIOWrapper(
            io.BufferedWriter(patient),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering or stream.write_through,
        )
        setattr(sys, name, settled)


class _Patient(io.FileIO):
    """Writes to a descriptor until that fails, and nowhere after that."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._called = f"standard {'output' if name == 'stdout' else 'error'}"
        self._has_failed = False

    def write(self, content: Any, /) -> int:
        if not self._has_failed:
            try:
                return super().write(content)
            except BrokenPipeError:
                self._has_failed = True
            except OSError as error:
                # Said once; else it would be said again when the process ends, by Python.
                self._has_failed = True
                error.filename = self._called
                raise
        return memoryview(content).nbytes
