"""The method's findings over several embedded worlds, with their uncertainty.

    python benchmarks/findings.py --json benchmarks/results/findings.json

Each world is a model, pairs and an annotator's noise of its own. An arm's number is its sampled win rate
against the starting model; the mean and its standard error are taken over worlds, differences pair the
arms of one world. Finished worlds are kept in --work, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import numpy as np

from findings_world import BETA, FRACTIONS, WorldJob, measure_world
from harness import mean_over_worlds, measure_worlds, shown
from selective_dpo import __version__
from selective_dpo.storage.artifacts import write_json

ARMS = {
    "reference": "SFT against itself",
    "all": "all pairs, shuffled",
    "all-sorted": "all pairs, easy to hard",
    "selected": "easiest 50%, easy to hard (Selective DPO)",
    "easiest-shuffled": "easiest 50%, shuffled",
    "random": "random 50%, shuffled",
    "hardest": "hardest 50%, shuffled",
    "oracle": "oracle: flipped labels and ties removed",
}
EXPECTED = (("selected", "all"), ("selected", "random"))
"""Arm above arm, by at least two standard errors of the paired difference."""


def main() -> None:
    options = _options()
    jobs = [
        WorldJob(
            seed,
            options.work / f"world{seed}",
            tuple(options.betas),
            not options.no_sweep,
            options.annotator_temperature,
        )
        for seed in range(options.first_seed, options.first_seed + options.worlds)
    ]
    summary = summarize(measure_worlds(measure_world, jobs, workers=options.workers))
    summary |= {
        "name": "findings",
        "version": __version__,
        "machine": platform.machine(),
        "annotator_temperature": options.annotator_temperature,
        "seeds": [job.seed for job in jobs],
    }
    print(as_text(summary))
    if options.json:
        write_json(options.json, summary)


def summarize(worlds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, standard errors and paired differences over worlds."""
    rates = {
        name: np.array([world["arms"][name]["win_rate"] for world in worlds]) for name in worlds[0]["arms"]
    }
    fractions = {0.5: "selected", 1.0: "all-sorted"} | {each: f"easiest-{each:g}" for each in FRACTIONS}
    greedy = {
        name: np.array([world["greedy"][name]["win_rate"] for world in worlds])
        for name in worlds[0]["greedy"]
    }
    return {
        "worlds": len(worlds),
        "arms": {name: _mean(values) for name, values in rates.items()},
        "minus_all": {name: _mean(values - rates["all"]) for name, values in rates.items()},
        "expected": [
            {"above": high, "below": low, **_mean(rates[high] - rates[low])} for high, low in EXPECTED
        ],
        "fractions": {
            f"{fraction:g}": _mean(rates[name])
            for fraction, name in sorted(fractions.items())
            if name in rates
        },
        "betas": _beta_sweep(worlds),
        "greedy": {name: _mean(values) for name, values in greedy.items()},
        "greedy_selected_minus_all": _mean(greedy["selected"] - greedy["all"]),
        "between_seeds": {
            name: _mean(np.array([world["between_seeds"][name] for world in worlds]))
            for name in ("spearman", "overlap", "jaccard")
        },
        "flips_by_fifth": np.mean([world["flips_by_fifth"] for world in worlds], axis=0).tolist(),
        "ties_by_fifth": np.mean([world["ties_by_fifth"] for world in worlds], axis=0).tolist(),
        "per_world": worlds,
    }


def _beta_sweep(worlds: list[dict[str, Any]]) -> dict[str, Any]:
    """Win rate by beta for all pairs and the easiest half, and each at its own best beta.

    The best beta is chosen by the mean over the same worlds, so both bests are a little optimistic.
    """
    betas = sorted(worlds[0]["betas"], key=float)
    by_arm = {
        arm: {beta: np.array([world["betas"][beta][arm]["win_rate"] for world in worlds]) for beta in betas}
        for arm in ("selected", "all")
    }
    best = {arm: max(betas, key=lambda beta, arm=arm: by_arm[arm][beta].mean()) for arm in by_arm}
    return {
        "by_beta": {arm: {beta: _mean(by_arm[arm][beta]) for beta in betas} for arm in by_arm},
        "best": best,
        "best_selected_minus_best_all": _mean(
            by_arm["selected"][best["selected"]] - by_arm["all"][best["all"]]
        ),
    }


def _mean(values_W: np.ndarray) -> dict[str, float | None]:
    return {**mean_over_worlds(values_W), "above_0": int((values_W > 0).sum())}


def as_text(summary: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = [
        f"{summary['worlds']} worlds; sampled win rate against the SFT model, mean ± standard error",
        "",
        "| arm | win rate | minus all pairs |",
        "| --- | --- | --- |",
    ]
    for name, label in ARMS.items():
        difference = "" if name == "all" else _signed(summary["minus_all"][name])
        lines.append(f"| {label} | {shown(summary['arms'][name])} | {difference} |")
    lines += ["", "| fraction kept, easy to hard | win rate |", "| --- | --- |"]
    lines += [f"| {fraction} | {shown(each)} |" for fraction, each in summary["fractions"].items()]
    sweep = summary["betas"]
    lines += ["", "| beta | all pairs, shuffled | easiest 50%, easy to hard |", "| --- | --- | --- |"]
    lines += [
        f"| {beta} | {shown(sweep['by_beta']['all'][beta])} | {shown(each)} |"
        for beta, each in sweep["by_beta"]["selected"].items()
    ]
    best = sweep["best"]
    lines += [
        "",
        f"best against best (beta {best['selected']} and {best['all']}): "
        f"{_signed(sweep['best_selected_minus_best_all'])}",
        f"greedy answers, easiest half minus all pairs: {_signed(summary['greedy_selected_minus_all'])}",
        "between-seed agreement: "
        + ", ".join(f"{name} {shown(each)}" for name, each in summary["between_seeds"].items()),
        "flipped labels by fifth of difficulty, easiest first: " + _shares(summary["flips_by_fifth"]),
        "ties by fifth: " + _shares(summary["ties_by_fifth"]),
        "",
    ]
    for each in summary["expected"]:
        error = each["standard_error"]
        enough = error is not None and each["mean"] >= 2 * error
        verdict = "at least 2 standard errors" if enough else "NOT 2 standard errors"
        lines.append(f"{ARMS[each['above']]} above {ARMS[each['below']]}: {_signed(each)}, {verdict}")
    hardest = summary["arms"]["hardest"]
    error = hardest["standard_error"]
    is_below = error is not None and hardest["mean"] + 2 * error < 0.5
    relation = "below" if is_below else "NOT clearly below"
    lines.append(f"hardest half: {relation} the SFT model ({shown(hardest)})")
    return "\n".join(lines)


def _signed(each: dict[str, Any]) -> str:
    return shown(each, "+.3f")


def _shares(values: list[float]) -> str:
    return ", ".join(f"{value:.0%}" for value in values)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--worlds", type=int, default=8, help="number of world seeds (default 8)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="worlds at a time, one core each")
    parser.add_argument("--betas", type=float, nargs="*", default=[0.5, 1.0, 4.0], help=f"besides {BETA}")
    parser.add_argument("--no-sweep", action="store_true", help="leave the other fractions out")
    parser.add_argument("--annotator-temperature", type=float, default=1.2, help="of the label noise")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/findings"), help="finished worlds are kept here"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
