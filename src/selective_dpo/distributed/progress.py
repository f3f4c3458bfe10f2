"""Progress of long work: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from typing import NoReturn, Self

from tqdm import tqdm

from selective_dpo.distributed.processes import this_process

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
        self._bar: tqdm[NoReturn] | None = None
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(total=total or None, desc=what, unit=f" {unit}", leave=False, initial=done)

    def __enter__(self) -> Self:
        return self

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            sys.stderr.write(self._line())
            sys.stderr.flush()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> str:
        elapsed = time.monotonic() - self._started
        rate = (self._done - self._done_before) / elapsed if elapsed > 0 else 0.0
        one = self._unit.removesuffix("s")
        speed = f"{1 / rate:,.1f} s/{one}" if 0 < rate < 1 else f"{rate:,.1f} {self._unit}/s"
        line = f"{self._what}: {self._done:,} {self._unit}, {speed}"
        if self._total and rate > 0:
            line += f", {self._done / self._total:.0%}, {(self._total - self._done) / rate:,.0f} s left"
        return f"{line}\n"


_LIBRARIES = r"(accelerate|datasets|huggingface_hub|peft|torch|transformers|trl)(\..*)?$"


def quieten_libraries() -> None:
    """Silence progress bars, notices and telemetry of the libraries underneath; errors still show.

    Called by the command line and by worker processes, never on import: a program that uses this
    package as a library keeps its own settings.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed sets its logger's level itself, when transformers imports it, and writes to standard output.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # It says what it lacks when it is imported, which the libraries below may do.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # What they will change in their next versions is for this package to follow, not for its users.
    warnings.filterwarnings("ignore", category=FutureWarning, module=_LIBRARIES)
    from datasets.utils import logging as datasets_logging
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets_logging.set_verbosity_error()
    disable_progress_bar()
    for name in ("trl", "peft", "accelerate", "torch.distributed", "tensorboard"):
        logging.getLogger(name).setLevel(logging.ERROR)
