"""Chunks finished in processes of their own, in order.

Chat templates are rendered by Python, one core's work, and the tokenizer's threads only help with the rest:
so whole chunks are spread over processes. They are programs of their own (`worker_main`) and neither forks,
which threads of this process would not survive unharmed, nor `multiprocessing`'s children, which would
run the caller's script again.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing import Pipe

from selective_dpo.data.finishing import FinishedChunk, Finisher
from selective_dpo.data.store import RowOutcome
from selective_dpo.errors import RunawayTemplateError

MOST_WORKERS = 16
"""The process that reads and writes keeps about ten busy; many more would wait for it."""
CHUNKS_ALONE = 4
"""Finished here before workers are started, which takes a second or two: small data never need them."""
_CHUNKS_AHEAD = 2
"""Chunks for each worker that are judged and not yet written; memory holds no more."""

_OUT_OF_TIME = getattr(signal, "SIGPROF", 0)
"""What ends a worker that a template keeps busy (see `render_limits`)."""

Chunk = Sequence[RowOutcome]


def finish_chunks(
    finisher: Finisher, chunks: Iterable[Chunk], *, workers: int | None = None
) -> Iterator[FinishedChunk]:
    """`finisher.finish` of each chunk, in order, by `workers` processes; None: as many as there are cores.

    What comes out does not depend on the number of processes. An error is raised where its chunk's result
    would have been.
    """
    workers = min(_cores(), MOST_WORKERS) if workers is None else workers
    chunks = iter(chunks)
    for chunk in islice(chunks, CHUNKS_ALONE):
        yield finisher.finish(chunk)
    first = next(chunks, None)
    if first is None:
        return
    if workers == 1 or not _can_be_sent(finisher):
        yield finisher.finish(first)
        yield from map(finisher.finish, chunks)
        return
    with _started(finisher, workers) as pool, ThreadPoolExecutor(workers) as threads:
        pending: deque[Future[FinishedChunk]] = deque([threads.submit(pool.finish, first)])
        try:
            for chunk in chunks:
                pending.append(threads.submit(pool.finish, chunk))
                if len(pending) > _CHUNKS_AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            # After an error, or where the caller has had enough: what waits is not begun.
            threads.shutdown(wait=False, cancel_futures=True)
            pool.end()


class _Worker:
    """One process that finishes a chunk at a time."""

    def __init__(self, finisher: Finisher) -> None:
        paths = [os.path.abspath(path) for path in sys.path]  # noqa: PTH100 (entries of any kind, as they are)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        # The processes share the cores already.
        environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "selective_dpo.data.worker_main", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        self._unsent: Finisher | None = finisher

    def finish(self, chunk: Chunk) -> FinishedChunk:
        try:
            # Not sent at the start, so that all workers load it at the same time.
            if self._unsent is not None:
                self._ours.send(self._unsent)
                self._unsent = None
            self._ours.send(chunk)
            answer = self._ours.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            if code == -_OUT_OF_TIME:
                raise RunawayTemplateError(
                    f"rows {chunk[0].row:,} of {chunk[0].source} to {chunk[-1].row:,} of {chunk[-1].source}: "
                    "the chat template takes too long on one of them; use another template"
                ) from error
            raise RuntimeError(f"a process that tokenizes pairs ended early: exit code {code}") from error
        if isinstance(answer, Exception):
            raise answer
        finished: FinishedChunk = answer
        return finished

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._ours.close()


class _Pool:
    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            self._idle.put(worker)

    def finish(self, chunk: Chunk) -> FinishedChunk:
        worker = self._idle.get()
        try:
            return worker.finish(chunk)
        finally:
            self._idle.put(worker)

    def end(self) -> None:
        for worker in self._workers:
            worker.end()


@contextlib.contextmanager
def _started(finisher: Finisher, workers: int) -> Iterator[_Pool]:
    pool = _Pool([_Worker(finisher) for _ in range(workers)])
    try:
        yield pool
    finally:
        pool.end()


def _can_be_sent(finisher: Finisher) -> bool:
    # Another process can only load a class that it finds by name; handing on a pipe is for POSIX.
    return os.name == "posix" and type(finisher.tokenizer).__module__.startswith("transformers.")


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
