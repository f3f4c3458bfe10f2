"""A function of each item, in order, by forked processes that have so many seconds and bytes for it.

Processes are forked, as those of PyTorch's `DataLoader` and `datasets.map` are: they start in milliseconds,
get the function as it is, and do not run the caller's script again.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from selective_dpo.distributed.signals import end_without_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_WORKERS = 16
"""The process that reads and writes keeps about ten busy; many more would wait for it."""

MAX_WORKER_MEMORY = 8 << 30
"""Bytes that a process may take besides what it has when it starts."""

_ITEMS_AHEAD = 2
"""Items for each process that are taken and not yet done."""

_work: Callable[[Any], Any]
"""What a forked process does with each item."""


def map_in_processes(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int | None = None,
    seconds: float,
    stopped: Callable[[Sequence[Item]], Exception],
) -> Generator[Result, None, None]:
    """`work` of each item, in order, by `workers` processes; None: one for each core.

    An error of `work` is raised where its result would have been. Where an item takes more than `seconds`, or
    a process is ended from outside, the error is `stopped` of the items that were not done, the oldest first.
    0 workers, and systems other than Linux: this process does the work, without limits.
    """
    workers = min(_cores(), MAX_WORKERS) if workers is None else workers
    if workers == 0 or sys.platform != "linux":
        yield from map(work, items)
        return
    items = iter(items)
    first = list(islice(items, workers))
    if not first:
        return
    not_done: deque[Item] = deque()
    futures: deque[Future[Result]] = deque()
    try:
        with _pool(work, len(first)) as pool:
            for item in chain(first, items):
                not_done.append(item)
                futures.append(pool.submit(_do, item))
                if len(futures) > _ITEMS_AHEAD * workers:
                    yield futures.popleft().result(seconds)
                    not_done.popleft()
            for future in futures:
                yield future.result(seconds)
                not_done.popleft()
    except (TimeoutError, BrokenProcessPool) as error:
        raise stopped(not_done) from error


@contextmanager
def _pool(work: Callable[[Any], Any], workers: int) -> Iterator[ProcessPoolExecutor]:
    before = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_start, initargs=(work, os.getpid())
    )
    with warnings.catch_warnings(), _tokenizers_on_one_core():
        # Python 3.12 warns of forks beside threads: here none of them is needed after it.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool.submit(os.getpid)  # starts all processes
    processes = [child for child in multiprocessing.active_children() if child not in before]
    try:
        yield pool
    finally:
        # They have nothing to lose: no result is waited for, or there was an error.
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _tokenizers_on_one_core() -> Iterator[None]:
    """For processes that are started inside: together they keep the cores busy already."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    gc.freeze()  # else each collection goes through, and so copies, all that the parent has loaded
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent gets them as well, and ends this process
    end_without_parent(parent)
    _limit_memory()


def _limit_memory() -> None:
    import resource  # not on every system

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MAX_WORKER_MEMORY
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _do(item: Any) -> Any:
    return _work(item)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
