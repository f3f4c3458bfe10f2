"""Independent jobs on one machine, several at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from selective_dpo.distributed.launch import one_of_several, visible_gpus
from selective_dpo.distributed.progress import quieten_libraries
from selective_dpo.distributed.signals import (
    end_without_parent,
    interrupted_error,
    note_between_jobs,
    passing_on,
    starting_out_of_reach,
    stopping_at_once,
)
from selective_dpo.errors import (
    ConfigError,
    DiskError,
    Interrupted,
    NotFiniteError,
    RecordsError,
    SelectiveDPOError,
    disk_fault,
)

Job = TypeVar("Job")


def run_in_workers(
    work: Callable[[Job], None],
    jobs: Sequence[Job],
    *,
    workers: int,
    name: Callable[[Job], str],
    done: Callable[[Job], None] = lambda job: None,
) -> None:
    """Do `work` on each job, `workers` of them at a time in processes of their own; 1, or where several
    processes work on each job together: in this process.

    Workers share the machine: each takes one GPU in turn where there are any, else its share of the
    CPU's cores. A failing job does not stop the others; then the first error is raised, saying which
    job it was. Where several processes work on each job together, one that failed alone begins no other.
    SIGTERM is passed on to the workers, Ctrl-C as SIGTERM, and no further job is begun. Workers whose parent
    is killed end, too.

    Raises:
        Interrupted: SIGTERM came.
    """
    if workers == 1 or len(jobs) <= 1 or one_of_several():
        failures = _here(work, jobs, done)
    else:
        failures = _in_processes(work, jobs, workers, done)
    if failures:
        stopped = [failure for failure in failures if isinstance(failure[1], Interrupted)]
        job, error = (stopped or failures)[0]
        also = f" ({len(failures) - 1} more failed)" if len(failures) > 1 else ""
        if isinstance(error, SelectiveDPOError):
            raise type(error)(f"{name(job)}: {error}{also}") from error
        if fault := disk_fault(error):
            raise DiskError(f"{name(job)}: {fault}{also}") from error
        raise RuntimeError(f"{name(job)} failed{also}: {error}") from error


def _here(
    work: Callable[[Job], None], jobs: Sequence[Job], done: Callable[[Job], None]
) -> list[tuple[Job, Exception]]:
    failures: list[tuple[Job, Exception]] = []
    for job in jobs:
        try:
            work(job)
        except ConfigError:  # the next job has the same configuration
            raise
        except Exception as error:
            failures.append((job, error))
            # Of several processes that work on the job, the others know of these errors only. Of another one
            # they may still wait for this process, and would take the next job's messages for this one's.
            is_shared = not one_of_several() or isinstance(error, NotFiniteError | RecordsError)
            if isinstance(error, Interrupted) or not is_shared:
                break
        else:
            done(job)
    return failures


def _in_processes(
    work: Callable[[Job], None], jobs: Sequence[Job], workers: int, done: Callable[[Job], None]
) -> list[tuple[Job, Exception]]:
    context = multiprocessing.get_context("spawn")
    turns = context.Value("i", 0)
    failures: list[tuple[Job, Exception]] = []
    with (
        ProcessPoolExecutor(
            max_workers=min(workers, len(jobs)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(os.getpid(), turns, workers, torch.cuda.device_count()),
        ) as pool,
        passing_on(_own_children) as interrupted,
    ):
        with starting_out_of_reach():
            futures = {pool.submit(_work_on, work, job): job for job in jobs}
        for future in as_completed(futures):
            if interrupted():
                for each in futures:
                    each.cancel()
            error = interrupted_error() if future.cancelled() else future.exception()
            if interrupted() and isinstance(error, BrokenProcessPool):
                error = interrupted_error()  # SIGTERM came while a worker was starting
            if error is None:
                done(futures[future])
            elif isinstance(error, Exception):
                failures.append((futures[future], error))
            else:
                raise error
    return failures


def _work_on(work: Callable[[Job], None], job: Job) -> None:
    with stopping_at_once():
        work(job)


def _own_children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def _start_worker(parent: int, turns: object, workers: int, gpus: int) -> None:
    end_without_parent(parent)
    note_between_jobs()
    quieten_libraries()
    with turns.get_lock():  # type: ignore[attr-defined]
        number = turns.value  # type: ignore[attr-defined]
        turns.value = number + 1  # type: ignore[attr-defined]
    if gpus:
        devices = visible_gpus()
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
