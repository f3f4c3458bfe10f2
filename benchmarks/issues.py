"""Wrong labels: is `p_wrong` calibrated, are planted ones found, and does the bound on false alarms hold?

    python benchmarks/issues.py --json benchmarks/results/issues.json [--records DIR]

In embedded worlds the truth is known: whether a label contradicts the gold reward, and how likely a fresh
label of the same annotator contradicts it. Each world is scored by `one-step`, with its own labels. Then
labels are planted in 20 draws, by exchanging chosen and rejected in the records; and in one world a second
time by really turning them round in the data and scoring again, so that the scorers learn from the other
planted labels. A draw sets the threshold with one half of the prompts, and the other half says what the
share of false alarms there really is. Policies are trained on the pairs with each of the actions. DIR holds
the original authors' records of real pairs, a folder a model: nothing is trained there.

Finished worlds are kept in --work, so an interrupted run continues. Eight worlds take some ten minutes on a
core.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy.special import expit, log_expit
from scipy.stats import rankdata

from harness import mean_over_worlds, measure_worlds
from selective_dpo import __version__
from selective_dpo.config import Recipe
from selective_dpo.curriculum.import_ import import_records
from selective_dpo.curriculum.table import curriculum_losses
from selective_dpo.difficulty.scorer import collect_records
from selective_dpo.distributed.progress import quieten_libraries
from selective_dpo.evaluation.results import REFERENCE, SELECTED, from_json
from selective_dpo.identity import pair_id
from selective_dpo.run.keys import Run
from selective_dpo.run.run import open_run, score
from selective_dpo.run.stages import bring_up
from selective_dpo.stats.calibration import probability_wrong
from selective_dpo.stats.spike_in import false_discovery_rate, limit_false_alarms, plant
from selective_dpo.storage.artifacts import content_key, read_json, write_json
from selective_dpo.worlds.recipe import SCORE_TRAINER, world_recipe
from selective_dpo.worlds.world import PairsConfig, World, WorldConfig, build_world

DRAWS = 20
SETTINGS = ((0.05, 0.8), (0.2, 0.5), (0.2, 0.7))
"""Shares of planted labels, and bounds on false alarms. With many wrong labels no small one is reached."""
SCORED = (SETTINGS[0], SETTINGS[2])
"""Those with which labels are really turned round in the data as well."""
SUSPECTED = 0.65
BINS = 10
ARMS: dict[str, dict[str, Any]] = {
    "all pairs": {},
    "suspected flips dropped": {"action": {"suspected_flip": "drop"}},
    "suspected flips flipped": {"action": {"suspected_flip": "flip"}},
    "suspected flips weighted down": {"action": {"suspected_flip": "down-weight"}},
    "suspected flips and too hard dropped": {"action": {"suspected_flip": "drop", "too_hard": "drop"}},
    "suspected flips and too hard flipped": {"action": {"suspected_flip": "flip", "too_hard": "flip"}},
    "those and ties weighted down": {
        "action": {"suspected_flip": "down-weight", "too_hard": "down-weight", "tie": "down-weight"}
    },
}
"""What policies are trained on in shuffled order, beside the easiest half from easy to hard."""
ANNOTATORS = {"noisy": 1.2, "careful": 0.3}
"""Temperatures of the worlds' annotators."""

Floats = NDArray[np.float64]


class Job(NamedTuple):
    """A world."""

    seed: int
    annotator: str
    folder: Path
    scores_planted: bool
    """Whether planted labels are scored as well."""

    @property
    def result(self) -> Path:
        """Where the numbers go."""
        return self.folder / "result.json"


def main() -> None:
    options = _options()
    jobs = [
        Job(seed, name, options.work / f"{name}{seed}", scores_planted=seed == 0 and name == "careful")
        for name in ANNOTATORS
        for seed in range(options.worlds)
    ]
    found = measure_worlds(measure_world, jobs, workers=options.workers)
    summary: dict[str, Any] = {"name": "issues", "version": __version__, "machine": platform.machine()}
    summary |= {"draws": DRAWS, "suspected_flip": SUSPECTED}
    summary["worlds"] = {
        name: summarize([each for each in found if each["annotator"] == name]) for name in ANNOTATORS
    }
    summary["scored"] = next(each["scored"] for each in found if each["scored"])
    if options.records:
        folders = sorted(path for path in options.records.iterdir() if path.is_dir())
        summary["real"] = {folder.name: measure_records(folder) for folder in folders}
    print(json.dumps(summary, indent=1))
    if options.json:
        write_json(options.json, summary)


def measure_world(job: Job) -> None:
    """Build and score the world, and write the numbers; a complete result is kept."""
    key = content_key(seed=job.seed, annotator=job.annotator, scored=job.scores_planted, version=4)
    if job.result.is_file() and read_json(job.result)["key"] == key:
        return
    quieten_libraries()
    torch.set_num_threads(1)
    temperature = ANNOTATORS[job.annotator]
    config = WorldConfig(pairs=PairsConfig(annotator_temperature=temperature))
    world = build_world(job.folder / "world", seed=job.seed, config=config)
    margins = scored_margins(world, job.folder, "own", world.pairs)
    truth = {row["pair_id"]: row for row in pq.read_table(world.truth).to_pylist()}
    ids = sorted(margins)
    p_wrong_P = probability_wrong([margins[name] for name in ids])
    gap_P = np.array([truth[name]["reward_chosen"] - truth[name]["reward_rejected"] for name in ids])
    write_json(
        job.result,
        {
            "key": key,
            "annotator": job.annotator,
            "pairs": len(ids),
            "flipped": float((gap_P < 0).mean()),
            "ties": float((gap_P == 0).mean()),
            "calibration": calibration(p_wrong_P, expit(-gap_P / temperature)),
            "logistic_squared_error": _squared_error_of_logistic(
                np.array([margins[name] for name in ids]), expit(-gap_P / temperature)
            ),
            "found": found_wrong(p_wrong_P, gap_P),
            "win_rates": win_rates(world, job.folder),
            "planted": [draws(p_wrong_P, np.array(ids), *each) for each in SETTINGS],
            "scored": [_scored_draws(job, world, p_wrong_P, ids, *each) for each in SCORED]
            if job.scores_planted
            else [],
        },
    )


def scored_margins(world: World, folder: Path, name: str, pairs: Path) -> dict[str, float]:
    """The margin of each pair under one-step scorers, by id."""
    run = _run(world, folder, name, pairs, {})
    score(run)
    records = collect_records([run.folder.scores(scorer) for scorer in run.scorer_runs])
    return dict(zip(records.pair_id.tolist(), records.margin.tolist(), strict=True))


def _run(world: World, folder: Path, name: str, pairs: Path, controls: dict[str, dict[str, Any]]) -> Run:
    base = world_recipe(world, name=name, output_dir=folder, controls=controls).model_dump(mode="json")
    trainer = {"beta": SCORE_TRAINER["beta"], "bf16": False, "activation_checkpointing": False}
    base["score"] = {"protocol": "one-step", "lora": None, "trainer": trainer}
    base["data"] |= {"train": [{"path": str(pairs)}], "test": []}
    return open_run(Recipe.model_validate(base), fresh=True, say=lambda line: None)


def win_rates(world: World, folder: Path) -> dict[str, float]:
    """Sampled win rate against the starting model of policies trained on each of `ARMS`."""
    names = {f"arm-{number}": name for number, name in enumerate(ARMS)}
    controls = {arm: {"rule": "all", "order": "shuffled", **ARMS[name]} for arm, name in names.items()}
    run = _run(world, folder, "own", world.pairs, controls)
    bring_up(run, "evaluation")
    results = from_json(read_json(run.folder.evaluation / "results.json"))
    names |= {SELECTED: "easiest half, easy to hard", REFERENCE: "starting model"}
    return {names[arm.name]: arm.win_rate.value for arm in results.arms if arm.win_rate is not None}


def calibration(p_P: Floats, fresh_P: Floats) -> dict[str, Any]:
    """By tenths: `p_wrong`, and how likely a fresh label contradicts the pair's."""
    bins = np.array_split(np.argsort(p_P, kind="stable"), BINS)
    return {
        "predicted": [float(p_P[rows].mean()) for rows in bins],
        "fresh": [float(fresh_P[rows].mean()) for rows in bins],
        "squared_error": float(np.mean((p_P - fresh_P) ** 2)),
        "of_a_constant": float(np.var(fresh_P)),
    }


def _squared_error_of_logistic(margin_P: Floats, fresh_P: Floats) -> float:
    """That of sigmoid(-scale x margin), with the scale that fits the labels best."""
    scales = np.geomspace(1e-3, 1e3, 400) / np.sqrt(np.mean(margin_P**2))
    best = max(scales, key=lambda scale: log_expit(scale * margin_P).mean())
    return float(np.mean((expit(-best * margin_P) - fresh_P) ** 2))


def found_wrong(p_P: Floats, gap_P: Floats) -> dict[str, float]:
    """How `p_wrong` finds labels against the gold reward, and planted ones, each against right labels."""
    right_P, wrong_P, flagged_P = gap_P > 0, gap_P < 0, p_P >= SUSPECTED
    return {
        "auroc_real": _auroc(p_P[wrong_P], p_P[right_P]),
        "auroc_planted": _auroc(1.0 - p_P[right_P], p_P[right_P]),
        "suspected": float(flagged_P.mean()),
        "suspected_wrong": float(wrong_P[flagged_P].mean()) if flagged_P.any() else float("nan"),
        "suspected_ties": float((gap_P == 0)[flagged_P].mean()) if flagged_P.any() else float("nan"),
        "expected_wrong": float(p_P[flagged_P].mean()) if flagged_P.any() else float("nan"),
    }


def draws(
    p_P: Floats,
    ids_P: NDArray[np.str_],
    share: float,
    bound: float,
    planted_score: Callable[[int, NDArray[np.bool_]], Floats] | None = None,
) -> dict[str, Any]:
    """Draws of planted labels: AUROC, thresholds, and how often the bound on false alarms is broken.

    `planted_score` gives the scores of a draw; default: those of the exchanged records. With these the share
    of false alarms in the other half is that of all its pairs, each planted with probability `share`; else
    that of the draw, which is of few pairs.
    """
    auroc, rates, reached = [], [], 0
    for seed in range(DRAWS):
        planted_P = plant(ids_P, share, seed)
        score_P = (
            np.where(planted_P, 1.0 - p_P, p_P) if planted_score is None else planted_score(seed, planted_P)
        )
        auroc.append(_auroc(score_P[planted_P], score_P[~planted_P]))
        first_P = np.zeros(len(ids_P), dtype=np.bool_)
        first_P[np.random.default_rng([seed, 1]).permutation(len(ids_P))[: len(ids_P) // 2]] = True
        limit = limit_false_alarms(score_P[first_P], planted_P[first_P], ids_P[first_P], bound)
        if limit is None:
            continue
        reached += 1
        if planted_score is None:
            rates.append(false_discovery_rate(p_P[~first_P], share, limit.threshold))
        elif (flagged_P := ~first_P & (score_P >= limit.threshold)).any():
            rates.append(float((~planted_P[flagged_P]).mean()))
    return {
        "share": share,
        "bound": bound,
        "auroc": mean_over_worlds(auroc),
        "reached": reached,
        "broken": int(sum(rate > bound for rate in rates)),
        "false_discovery_rate": mean_over_worlds(rates) if rates else None,
    }


def _scored_draws(
    job: Job, world: World, p_P: Floats, ids: Sequence[str], share: float, bound: float
) -> dict[str, Any]:
    """Draws with the labels turned round in the data and all pairs scored again, beside exchanged records."""
    rows = [json.loads(line) for line in world.pairs.read_text("utf-8").splitlines()]
    names = {name: place for place, name in enumerate(ids)}
    p_by_draw: list[Floats] = []

    def scores(seed: int, planted_P: NDArray[np.bool_]) -> Floats:
        turned, place_of = [], {}
        for row in rows:
            place = names[pair_id(row["prompt"], row["chosen"], row["rejected"])]
            if planted_P[place]:
                row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            turned.append(json.dumps(row) + "\n")
            place_of[pair_id(row["prompt"], row["chosen"], row["rejected"])] = place
        path = job.folder / f"planted{share}-{seed}.jsonl"
        path.write_text("".join(turned), "utf-8")
        margins = scored_margins(world, job.folder, path.stem, path)
        margin_P = np.empty(len(ids))
        margin_P[[place_of[name] for name in margins]] = list(margins.values())
        p_by_draw.append(probability_wrong(margin_P))
        return p_by_draw[-1]

    scored = draws(p_P, np.array(ids), share, bound, scores)
    exchanged = draws(p_P, np.array(ids), share, bound)
    planted = [plant(ids, share, seed) for seed in range(DRAWS)]
    difference = [
        float(np.abs(p - np.where(where, 1.0 - p_P, p_P)).mean())
        for p, where in zip(p_by_draw, planted, strict=True)
    ]
    return {"scored": scored, "exchanged": exchanged, "mean_difference": mean_over_worlds(difference)}


def measure_records(folder: Path) -> dict[str, Any]:
    """The same for released records of real pairs, whose truth nobody knows."""
    losses_PSE = curriculum_losses(import_records(folder, {"allow_partial": True}).curriculum)
    loss_PR = losses_PSE.losses_PSE.reshape(len(losses_PSE.pair_ids_P), -1)
    margin_P = -np.nanmean(np.log(np.expm1(loss_PR)), axis=1)
    p_P = probability_wrong(margin_P)
    return {
        "pairs": len(p_P),
        "contradicted": float((margin_P < 0).mean()),
        "suspected": float((p_P >= SUSPECTED).mean()),
        "planted": [draws(p_P, losses_PSE.pair_ids_P, *each) for each in SETTINGS],
    }


def summarize(worlds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard errors over worlds; draws of all worlds together."""
    bins = {
        name: np.mean([each["calibration"][name] for each in worlds], axis=0).tolist()
        for name in ("predicted", "fresh")
    }
    return {
        "worlds": len(worlds),
        **{name: mean_over_worlds([each[name] for each in worlds]) for name in ("pairs", "flipped", "ties")},
        "calibration": bins
        | {
            name: mean_over_worlds([each["calibration"][name] for each in worlds])
            for name in ("squared_error", "of_a_constant")
        },
        "logistic_squared_error": mean_over_worlds([each["logistic_squared_error"] for each in worlds]),
        "found": {
            name: mean_over_worlds([each["found"][name] for each in worlds]) for name in worlds[0]["found"]
        },
        "win_rates": {
            name: {
                **mean_over_worlds([each["win_rates"][name] for each in worlds]),
                "minus_all_pairs": mean_over_worlds(
                    [each["win_rates"][name] - each["win_rates"]["all pairs"] for each in worlds]
                ),
            }
            for name in worlds[0]["win_rates"]
        },
        "planted": [
            {
                "share": share,
                "bound": bound,
                "auroc": mean_over_worlds([each["planted"][number]["auroc"]["mean"] for each in worlds]),
                **{
                    name: [each["planted"][number][name] for each in worlds] for name in ("reached", "broken")
                },
            }
            for number, (share, bound) in enumerate(SETTINGS)
        ],
    }


def _auroc(wanted_N: Floats, others_M: Floats) -> float:
    """Mann and Whitney 1947."""
    ranks, count = rankdata(np.concatenate([wanted_N, others_M])), len(wanted_N)
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(others_M)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=4, help="worlds for each annotator")
    parser.add_argument("--workers", type=int, default=1, help="worlds at a time")
    parser.add_argument("--records", type=Path, help="the original authors' records, a folder a model")
    parser.add_argument("--work", type=Path, default=Path("runs/issues"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
