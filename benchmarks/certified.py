"""How often `certified` stops too early, on simulated records whose truth is known.

    python benchmarks/certified.py --json PATH

A pair's loss under a seed is the pair's own difficulty plus noise of that seed. `rho`, the correlation of two
seeds' losses, puts the true overlap with a repetition below, at or above the target of 0.95. Seeds are added
from two to six, as `certified` does, until the prediction (`point`) or the lower end of its interval
(`bound`, the rule in use) reaches the target. A stopped run is wrong if the set that it selected overlaps
with those of fresh repetitions by less than the target, on average over 40 of them.

Twice: with noise that is drawn for each pair alone, as the interval assumes; and with half of its variance
from something that all pairs of a seed share, a taste for length of a strength of its own.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.stability import (
    SEED_NOISE_FREEDOM,
    TARGET,
    Prediction,
    is_stable,
    predict_overlap,
)

RHOS = (0.88, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
"""Two seeds' easiest halves share .886 to .968 with two fresh ones' and six seeds' .933 to .982."""
SHARED = {"independent": 0.0, "shared taste": 0.5}
"""What the seeds' noise is made of -> the share of its variance that comes from a taste for length."""
MOST_SEEDS = 6
REPETITIONS = 40


class World(NamedTuple):
    """Where the records of one run come from."""

    difficulty_P: NDArray[np.float64]
    length_P: NDArray[np.float64]
    noise: float
    """Variance of a seed's noise; that of the difficulties is 1."""
    shared: float

    def losses(self, seeds: int, generator: np.random.Generator) -> NDArray[np.float64]:
        """Losses of fresh seeds, [P, S]. Seeds are unequally noisy, as the interval has it."""
        variance_S = self.noise * generator.chisquare(SEED_NOISE_FREEDOM, size=seeds) / SEED_NOISE_FREEDOM
        own_PS = generator.normal(size=(len(self.difficulty_P), seeds))
        taste_PS = self.length_P[:, None] * generator.normal(size=seeds)
        noise_PS = math.sqrt(1 - self.shared) * own_PS + math.sqrt(self.shared) * taste_PS
        return np.asarray(self.difficulty_P[:, None] + noise_PS * np.sqrt(variance_S))


class Stop(NamedTuple):
    """Where a rule stopped."""

    seeds: int
    overlap: float
    """Of the selected set with those of fresh repetitions, on average."""


class Outcome(NamedTuple):
    """One run by both rules. None: it never stopped."""

    point: Stop | None
    bound: Stop | None
    held: bool
    """Whether the interval after two seeds holds the overlap with one fresh repetition."""


def main() -> None:
    options = _options()
    result = {
        "name": "certified",
        "target": TARGET,
        "pairs": options.pairs,
        "runs of each rho": options.runs,
        "noise": {
            name: {str(rho): measure(rho, shared, options.pairs, options.runs) for rho in RHOS}
            for name, shared in SHARED.items()
        },
    }
    result["all rhos"] = {name: _summed(list(by_rho.values())) for name, by_rho in result["noise"].items()}
    print(as_text(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(rho: float, shared: float, pairs: int, runs: int, replicates: int = 200) -> dict[str, Any]:
    """Counts over `runs` simulated runs whose seeds correlate by `rho`."""
    generator = np.random.default_rng([int(1e4 * rho), int(100 * shared), pairs])
    outcomes = [simulate(rho, shared, pairs, replicates, generator) for _ in range(runs)]
    return {
        "runs": runs,
        "held": sum(each.held for each in outcomes),
        **{rule: _counted([getattr(each, rule) for each in outcomes]) for rule in ("point", "bound")},
    }


def simulate(
    rho: float, shared: float, pairs: int, replicates: int, generator: np.random.Generator
) -> Outcome:
    """One run, with seeds added until both rules have stopped or there is no further seed."""
    world = World(generator.normal(size=pairs), generator.normal(size=pairs), 1 / rho - 1, shared)
    losses_PS = world.losses(MOST_SEEDS, generator)
    point, bound, held = None, None, False
    for seeds in range(2, MOST_SEEDS + 1):
        prediction = _predict(losses_PS[:, :seeds], replicates)
        overlaps = None
        if seeds == 2:
            overlaps = _overlaps(world, losses_PS[:, :seeds], generator)
            held = bool(prediction.repetition.low <= overlaps[0] <= prediction.repetition.high)
        by_point, by_bound = prediction.repetition.value >= TARGET, is_stable(prediction)
        if (by_point and point is None) or by_bound:
            overlaps = _overlaps(world, losses_PS[:, :seeds], generator) if overlaps is None else overlaps
            stop = Stop(seeds, float(overlaps.mean()))
            point = point or (stop if by_point else None)
            bound = stop if by_bound else None
        if bound is not None:
            break
    return Outcome(point, bound, held)


def _predict(losses_PS: NDArray[np.float64], replicates: int) -> Prediction:
    ids_P = np.array([f"p{place:06d}" for place in range(len(losses_PS))])
    seeds = tuple(range(losses_PS.shape[1]))
    return predict_overlap(LossTable(ids_P, ids_P, seeds, (1,), losses_PS[:, :, None]), replicates=replicates)


def _overlaps(
    world: World, losses_PS: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Overlap of the easiest half with that of each of `REPETITIONS` fresh repetitions."""
    seeds = losses_PS.shape[1]
    own_P = _easiest_half(losses_PS)
    return np.array(
        [(own_P & _easiest_half(world.losses(seeds, generator))).sum() for _ in range(REPETITIONS)]
    ) / int(own_P.sum())


def _easiest_half(losses_PS: NDArray[np.float64]) -> NDArray[np.bool_]:
    mean_P = losses_PS.mean(axis=1)
    chosen_P = np.zeros(len(mean_P), dtype=np.bool_)
    chosen_P[np.argsort(mean_P)[: len(mean_P) // 2]] = True
    return chosen_P


def _counted(stops: list[Stop | None]) -> dict[str, Any]:
    stopped = [stop for stop in stops if stop is not None]
    return {
        "stopped": len(stopped),
        "wrong": sum(stop.overlap < TARGET for stop in stopped),
        "seeds": {str(seeds): sum(stop.seeds == seeds for stop in stopped) for seeds in range(2, 7)},
    }


def _summed(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all rhos, each as likely as the others; shares."""
    runs = sum(each["runs"] for each in counts)
    found: dict[str, Any] = {"held": sum(each["held"] for each in counts) / runs}
    for rule in ("point", "bound"):
        stopped, wrong = (sum(each[rule][what] for each in counts) for what in ("stopped", "wrong"))
        found[rule] = {"stopped": stopped / runs, "wrong of the stopped": wrong / max(1, stopped)}
    return found


def as_text(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| noise of a seed | rho | interval held | stopped by the prediction | of them wrong "
        "| stopped by the lower bound | of them wrong |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, by_rho in result["noise"].items():
        for rho, each in by_rho.items():
            cells = [name, rho, f"{each['held'] / each['runs']:.0%}"]
            for rule in ("point", "bound"):
                stopped, wrong = each[rule]["stopped"], each[rule]["wrong"]
                cells += [f"{stopped / each['runs']:.0%}", f"{wrong / stopped:.0%}" if stopped else "-"]
            lines.append(f"| {' | '.join(cells)} |")
        total = result["all rhos"][name]
        cells = [name, "all", f"{total['held']:.0%}"]
        for rule in ("point", "bound"):
            cells += [f"{total[rule]['stopped']:.0%}", f"{total[rule]['wrong of the stopped']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="simulated runs of each rho and noise")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of a run")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
