"""Progress of long work: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from selective_dpo.engine.processes import this_process

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts pairs; shows rate and time left. Only the main process shows anything.

    A `total` of 0 means that it is not known; `done` of it were done before.
    """

    def __init__(self, total: int, what: str, *, unit: str = "pairs", done: int = 0) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._done = self._done_before = done
        self._started = self._last_line = time.monotonic()
        self._shown = this_process().is_main_process
        terminal = self._shown and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total or None, desc=what, unit=f" {unit}", leave=False, initial=done)
            if terminal
            else None
        )

    def __enter__(self) -> Self:
        return self

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> None:
        if not self._shown:
            return
        elapsed = time.monotonic() - self._started
        rate = (self._done - self._done_before) / elapsed if elapsed > 0 else 0.0
        line = f"{self._what}: {self._done:,} {self._unit}, {rate:,.1f} {self._unit}/s"
        if self._total and rate > 0:
            line += f", {self._done / self._total:.0%}, {(self._total - self._done) / rate:,.0f} s left"
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
