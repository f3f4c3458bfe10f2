"""One-step difficulty beside trained scorers, over several embedded worlds.

    python benchmarks/one_step.py --json benchmarks/results/one_step.json

In each world five seeds of scorers are trained as `paper` trains them. Three of them are `paper`; the other
two no protocol has seen, and the agreement of `paper`, `fast` and `one-step` is measured with these. Then:
how well each finds the labels that the world's own truth calls wrong, and the ties; the win rate of policies
that are trained on each easiest half, in several random orders, since one order spreads as much as the
protocols differ; whether `p_wrong` is calibrated; and where one-step is expected to fail, scorers that train
hard.

A figure's standard error is over worlds. Finished worlds are kept in --work, so an interrupted run continues.
Eight worlds take about an hour on two cores.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness import mean_over_worlds, measure_worlds, shown
from one_step_world import WorldJob, measure_world
from selective_dpo import __version__
from selective_dpo.storage.artifacts import write_json

PROTOCOLS = ("paper", "fast", "one-step")
CALIBRATED = {
    "fresh": "a fresh label of the same annotator contradicts the pair's",
    "flipped": "the label contradicts the truth, ties left out",
}


def main() -> None:
    options = _options()
    seeds = range(options.first_seed, options.first_seed + options.worlds)
    jobs = [WorldJob(seed, options.work / f"world{seed}", options.orders) for seed in seeds]
    summary = summarize(measure_worlds(measure_world, jobs, workers=options.workers))
    summary |= {"name": "one-step", "version": __version__, "machine": platform.machine()}
    print(as_text(summary))
    if options.json:
        write_json(options.json, summary)


def summarize(worlds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard errors over worlds; differences pair the protocols of one world."""
    arms = worlds[0]["win_rates"]
    rates = {name: np.array([np.mean(world["win_rates"][name]) for world in worlds]) for name in arms}
    agreement = _means(worlds, "agreement")
    per_world = [{name: found["spearman"] for name, found in world["agreement"].items()} for world in worlds]
    by_order = [np.std(world["win_rates"][name], ddof=1) for world in worlds for name in PROTOCOLS]
    return {
        "worlds": len(worlds),
        "pairs": [world["pairs"] for world in worlds],
        "agreement": agreement,
        "one_step_minus_two_trained_seeds": mean_over_worlds(
            spearman["one-step"] - spearman["two trained seeds"] for spearman in per_world
        ),
        "labels": _means(worlds, "labels"),
        "auc_flipped_minus_paper": {
            name: mean_over_worlds(
                [
                    world["labels"][name]["auc_flipped"] - world["labels"]["paper"]["auc_flipped"]
                    for world in worlds
                ]
            )
            for name in ("fast", "one-step")
        },
        "win_rates": {name: mean_over_worlds(values) for name, values in rates.items()},
        "win_rate_minus_paper": {
            name: mean_over_worlds(rates[name] - rates["paper"]) for name in arms if name != "paper"
        },
        "spread_between_orders": float(np.sqrt(np.mean(np.square(by_order)))),
        "away": _means(worlds, "away"),
        "sizes": _means(worlds, "sizes"),
        "calibration": {name: _calibration(worlds, name) for name in ("fresh", "flipped")},
        "per_world": list(worlds),
    }


def _calibration(worlds: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    found = [world["calibration"][name] for world in worlds]
    bins = {key: np.mean([each[key] for each in found], axis=0).tolist() for key in ("predicted", "observed")}
    return bins | {
        key: mean_over_worlds(each[key] for each in found) for key in ("brier", "brier_of_constant")
    }


def _means(worlds: Sequence[dict[str, Any]], part: str) -> dict[str, Any]:
    return {
        name: {
            figure: mean_over_worlds([world[part][name][figure] for world in worlds])
            for figure in worlds[0][part][name]
        }
        for name in worlds[0][part]
    }


def as_text(summary: dict[str, Any]) -> str:
    """The tables that are printed."""
    lines = [f"{summary['worlds']} worlds; means, and in brackets standard errors over worlds", ""]
    lines += _table(summary["agreement"], "agreement with a fresh trained seed")
    lines += [f"one-step minus two trained seeds: {shown(summary['one_step_minus_two_trained_seeds'])}", ""]
    lines += _table(summary["labels"], "wrong labels")
    for name, found in summary["auc_flipped_minus_paper"].items():
        lines.append(f"AUC for flipped labels, {name} minus paper: {shown(found)}")
    lines += ["", "win rate against the starting model, and minus paper's in shuffled order"]
    for name, found in summary["win_rates"].items():
        minus = summary["win_rate_minus_paper"].get(name)
        lines.append(f"  {name:<28} {shown(found)}  {shown(minus) if minus else ''}")
    lines += [f"  standard deviation between orders: {summary['spread_between_orders']:.3f}", ""]
    lines += _table(summary["away"], "scorers trained otherwise")
    lines += _table(summary["sizes"], "few pairs: Spearman of two splits, of two seeds")
    for name, found in summary["calibration"].items():
        lines.append(f"p_wrong by tenths, predicted and true: {CALIBRATED[name]}")
        both = zip(found["predicted"], found["observed"], strict=True)
        lines += [f"  {predicted:.3f} {observed:.3f}" for predicted, observed in both]
        errors = (shown(found[key]) for key in ("brier", "brier_of_constant"))
        lines.append("  mean squared error {}, a constant's {}".format(*errors))
    return "\n".join(lines)


def _table(rows: dict[str, dict[str, Any]], title: str) -> list[str]:
    columns = list(next(iter(rows.values())))
    head = f"{title:<40}" + "".join(f"{column:>26}" for column in columns)
    lines = [head]
    for name, row in rows.items():
        lines.append(f"  {name:<38}" + "".join(f"{shown(row[column]):>26}" for column in columns))
    return [*lines, ""]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--orders", type=int, default=4, help="training orders of each arm")
    parser.add_argument("--workers", type=int, default=2, help="worlds at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/one-step"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
