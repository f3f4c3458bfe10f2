"""Two ways of doing one thing, timed in turn, and the ratio with its spread."""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from selective_dpo.distributed.workers import run_in_workers
from selective_dpo.storage.artifacts import read_json, write_json


class Round(NamedTuple):
    """Seconds of one pair of runs."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """How many times longer theirs takes."""
        return self.theirs / self.ours


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every comparison of two sides can be told."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)


def interleave(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> list[Round]:
    """Run A B A B ...; a warm-up of each comes first and is not counted.

    On a shared machine speed drifts; runs side by side in time see the same drift, so their ratio holds
    where neither absolute time does.
    """
    measured = []
    for number in range(rounds + 1):
        found = Round(seconds_of(ours, device, clock), seconds_of(theirs, device, clock))
        if number:
            measured.append(found)
    return measured


def summary(
    name: str, rounds: list[Round], *, max_abs_diff: float, details: dict[str, Any]
) -> dict[str, Any]:
    """The numbers of a comparison, as every benchmark writes them."""
    ratios = [each.ratio for each in rounds]
    return {
        "name": name,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": len(rounds),
        "max_abs_diff": max_abs_diff,
        "details": {
            **details,
            "seconds": [each._asdict() for each in rounds],
            "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
            "torch": torch.__version__,
        },
    }


def measure_worlds(
    measure: Callable[[Any], None], jobs: Sequence[Any], *, workers: int
) -> list[dict[str, Any]]:
    """`measure` each job, several at a time, and return what they wrote to their `result`."""
    run_in_workers(
        measure,
        jobs,
        workers=workers,
        name=lambda job: f"world {job.seed}",
        done=lambda job: print(f"world {job.seed} done", flush=True),
    )
    return [read_json(job.result) for job in jobs]


def mean_over_worlds(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and standard error; a single world has no error that anyone knows."""
    values_W = np.array(list(values), dtype=float)
    error = float(values_W.std(ddof=1) / math.sqrt(len(values_W))) if len(values_W) > 1 else None
    return {"mean": float(values_W.mean()), "standard_error": error}


def shown(found: dict[str, Any], spec: str = ".3f") -> str:
    """What `mean_over_worlds` gave, for a table."""
    error = found["standard_error"]
    return f"{found['mean']:{spec}} " + ("(one world)" if error is None else f"± {error:{spec[-3:]}}")


def show(results: list[dict[str, Any]], path: Path | None) -> None:
    """Print a line per comparison, and write all of them where asked."""
    for each in results:
        print(
            f"{each['name']:<28} {each['ratio_median']:6.2f}x  (of {each['rounds']} rounds "
            f"{each['ratio_min']:.2f} to {each['ratio_max']:.2f}), results differ by at most "
            f"{each['max_abs_diff']:.1e}"
        )
    if path is not None:
        write_json(path, json.loads(json.dumps({"results": results})))


def seconds_of(
    work: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of `work` by `clock`, with everything that it started on the GPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started
