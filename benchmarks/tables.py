"""From records files to an exported curriculum: seconds and memory of each step, at 2 million pairs.

    python benchmarks/tables.py --pairs 2000000 --json tables.json

Records of 3 seeds x 2 folds x 5 evaluations are written to a temporary folder in the scorers' format. One
process of its own then takes them all the way; its steps are timed and its largest resident memory is
read after each. What it wrote is compared with plain computations made another way.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import scipy.stats

from selective_dpo.curriculum import build
from selective_dpo.curriculum.export import export_curriculum
from selective_dpo.curriculum.records import read_loss_table
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.storage.artifacts import write_json
from tables_data import BYTES_PER_PAIR, EVALUATIONS, SEEDS, write_files

PARTS_OF_BUILD = {
    "difficulty": "aggregation",
    "agreement": "agreement",
    "apply_rule": "selection",
    "training_positions": "order",
}
"""Functions of `curriculum.build`, and what the table calls them."""
TARGET_STEPS = ("aggregation", "agreement", "selection", "order", "export csv")
TARGET_SECONDS, TARGET_GIGABYTES = 60.0, 6.0
SAMPLE = 2000
TOLERANCE = 1e-12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, help="make the temporary folder here")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = compare(Path(name), options.pairs)
    show(result)
    if options.json:
        write_json(options.json, {"results": [result]})


def compare(folder: Path, pairs: int) -> dict[str, Any]:
    """Make the files, measure in a process of its own, check what it wrote."""
    require_disk(folder, pairs * BYTES_PER_PAIR)
    print(f"writing {pairs * len(SEEDS) * EVALUATIONS:,} records of {pairs:,} pairs", flush=True)
    paths = write_files(folder, pairs)
    size = sum(path.stat().st_size for path in paths)
    print(f"  {len(paths)} files, {size / 1e9:.2f} GB", flush=True)
    command = [sys.executable, __file__, "--measure", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout)
    return {
        "name": "tables",
        "max_abs_diff": check(folder, paths, pairs),
        "details": {
            "pairs": pairs,
            "records": pairs * len(SEEDS) * EVALUATIONS,
            "records_gigabytes": size / 1e9,
            **measured,
            "target_steps": list(TARGET_STEPS),
            "target_steps_seconds": sum(measured["seconds"][name] for name in TARGET_STEPS),
            "target_steps_cpu_seconds": sum(measured["cpu_seconds"][name] for name in TARGET_STEPS),
            "machine": {"cpu": platform.machine(), "cores": len(os.sched_getaffinity(0))},
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "pyarrow": pa.__version__,
            },
        },
    }


def require_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.2 * needed:
        sys.exit(
            f"about {needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free: use --folder"
        )


def measure(folder: Path) -> dict[str, Any]:
    """Read, build, save, load and export; seconds and, so far, largest memory of each step."""
    meter = Meter()
    paths = sorted(folder.glob("seed*/records.parquet"))
    table = meter.step("read records", read_loss_table, paths)
    with meter.parts_of_build():
        made = meter.step("build, all in all", build.build_curriculum, table)
    meter.step("save", made.save, folder)
    loaded = meter.step("load", Curriculum.load, folder)
    meter.step("export csv", export_curriculum, loaded, folder / "out.csv", "csv")
    meter.step("export parquet", export_curriculum, loaded, folder / "out.parquet", "parquet")
    return {
        "seconds": meter.seconds,
        "cpu_seconds": meter.cpu_seconds,
        "gigabytes": meter.gigabytes,
        "peak_gigabytes": peak_gigabytes(),
    }


class Meter:
    """Times steps by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.gigabytes: dict[str, float] = {"before": peak_gigabytes()}

    def step(self, name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started, started_cpu = time.perf_counter(), time.process_time()
        result = work(*args, **kwargs)
        self.seconds[name] = time.perf_counter() - started
        self.cpu_seconds[name] = time.process_time() - started_cpu
        self.gigabytes[name] = peak_gigabytes()
        return result

    @contextmanager
    def parts_of_build(self) -> Iterator[None]:
        """Inside, `build_curriculum` is as always, and its parts are steps as well."""

        wrapped = {
            name: partial(self.step, label, getattr(build, name)) for name, label in PARTS_OF_BUILD.items()
        }
        with mock.patch.multiple(build, **wrapped):
            yield


def peak_gigabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def check(folder: Path, paths: list[Path], pairs: int) -> float:
    """Compare the curriculum and its CSV with plain computations; the largest difference of a number.

    The sample's records are picked from the files by id and averaged one pair at a time. Ranks, selection
    and the agreement between two seeds are made anew for all pairs, with NumPy's sort and SciPy.
    """
    table = pq.read_table(folder / "curriculum.parquet")
    facts = json.loads((folder / "curriculum.json").read_text())
    require(len(table) == facts["pairs"] == pairs, "every pair has a row")
    differences = [*sample_differences(table, paths), *csv_differences(table, folder / "out.csv")]
    difficulty = table["difficulty"].to_numpy()
    ids = table["pair_id"].to_numpy(zero_copy_only=False).astype(np.bytes_)
    rank = np.empty(pairs, dtype=np.int64)
    rank[np.lexsort((ids, difficulty))] = np.arange(pairs)
    require(np.array_equal(table["rank"].to_numpy(), rank), "ranks by difficulty, then id")
    half = math.floor(pairs / 2 + 0.5)
    require(np.array_equal(np.asarray(table["selected"]), rank < half), "the easiest half is selected")
    require(np.array_equal(table["position"].to_numpy(), np.where(rank < half, rank, -1)), "easy to hard")
    differences += agreement_differences(table, facts["agreement"], half)
    require(max(differences) <= TOLERANCE, f"numbers agree to {TOLERANCE:g}: {max(differences):.1e}")
    return max(differences)


def sample_differences(table: pa.Table, paths: list[Path]) -> list[float]:
    rows = np.random.default_rng(1).choice(len(table), size=min(SAMPLE, len(table)), replace=False)
    sample = table.take(rows).to_pylist()
    wanted = pa.array([row["pair_id"] for row in sample])
    losses: dict[str, list[float]] = {row["pair_id"]: [] for row in sample}
    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1 << 20, columns=["pair_id", "loss"]):
                for found in batch.filter(pc.is_in(batch["pair_id"], wanted)).to_pylist():
                    losses[found["pair_id"]].append(found["loss"])
    differences = []
    for row in sample:
        own = losses[row["pair_id"]]
        require(len(own) == row["count"] == len(SEEDS) * EVALUATIONS, "a pair has all of its records")
        mean = math.fsum(own) / len(own)
        spread = math.sqrt(math.fsum((loss - mean) ** 2 for loss in own) / len(own))
        differences += [abs(row["difficulty"] - mean), abs(row["spread"] - spread)]
        kept = [value for name, value in row.items() if name.startswith("loss_")]
        require(sorted(kept) == sorted(own), "the losses of a pair are its own")
    return differences


def csv_differences(table: pa.Table, path: Path) -> list[float]:
    written = pyarrow.csv.read_csv(path)
    require(written["pair_id"].equals(table["pair_id"]), "the CSV has every pair")
    return [float(np.abs(written["learning_order"].to_numpy() - table["difficulty"].to_numpy()).max())]


def agreement_differences(table: pa.Table, agreement: dict[str, Any], half: int) -> list[float]:
    columns = [
        [table[f"loss_seed{seed}_evaluation{number}"].to_numpy() for number in range(1, EVALUATIONS + 1)]
        for seed in SEEDS[:2]
    ]
    first, second = (np.mean(own, axis=0) for own in columns)
    between = agreement["seeds"][0]
    sets = [np.argsort(own, kind="stable")[:half] for own in (first, second)]
    overlap = len(np.intersect1d(*sets, assume_unique=True)) / half
    last = scipy.stats.spearmanr(columns[0][-1], columns[1][-1]).statistic
    return [
        abs(between["spearman"]["value"] - scipy.stats.spearmanr(first, second).statistic),
        abs(between["overlap"]["value"] - overlap),
        abs(agreement["spearman"][EVALUATIONS - 1][2 * EVALUATIONS - 1] - last),
    ]


def require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"not true: {what}")


def show(result: dict[str, Any]) -> None:
    details = result["details"]
    # On a busy machine the time of the processor says more than that of the clock.
    print(f"\n{'step':<20}{'seconds':>10}{'of CPU':>10}{'peak GB so far':>18}")
    for name, seconds in details["seconds"].items():
        cpu, peak = details["cpu_seconds"][name], details["gigabytes"][name]
        print(f"{name:<20}{seconds:>10.1f}{cpu:>10.1f}{peak:>18.2f}")
    print(
        f"\n{' + '.join(TARGET_STEPS)}: {details['target_steps_seconds']:.1f} s, "
        f"{details['target_steps_cpu_seconds']:.1f} s of CPU (target about "
        f"{TARGET_SECONDS:.0f}), peak memory {details['peak_gigabytes']:.2f} GB (target "
        f"{TARGET_GIGABYTES:.0f}), on {details['machine']['cores']} cores\n"
        f"results differ from plain computations by at most {result['max_abs_diff']:.1e}"
    )


if __name__ == "__main__":
    main()
