"""The program of a worker: gets a `Finisher`, then chunks, and answers each with what it became."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

from selective_dpo.data.prepare import FinishedChunk, Finisher
from selective_dpo.data.store import RowOutcome
from selective_dpo.errors import SelectiveDPOError


def main(descriptor: int) -> None:
    """Serve the process at the other end of a pipe until it closes it, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process is interrupted as well, and ends this one
    with Connection(descriptor) as pipe:
        finisher: Finisher = pipe.recv()
        while True:
            try:
                chunk = pipe.recv()
            except EOFError:
                return
            pipe.send(_answer(finisher, chunk))


def _answer(finisher: Finisher, chunk: Sequence[RowOutcome]) -> FinishedChunk | Exception:
    try:
        return finisher.finish(chunk)
    except SelectiveDPOError as error:
        return error
    except Exception as error:  # of any class: not each of them can be sent
        traceback.print_exc()
        return RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
