"""One world of `one_step.py`: its pairs scored by every protocol, policies trained and judged, as numbers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from selective_dpo.config import Recipe
from selective_dpo.curriculum.records import LossTable
from selective_dpo.difficulty.scorer import collect_losses, collect_records
from selective_dpo.distributed.progress import quieten_libraries
from selective_dpo.evaluation.results import from_json
from selective_dpo.identity import positions_of
from selective_dpo.run.keys import Run
from selective_dpo.run.run import open_run, score
from selective_dpo.run.stages import bring_up
from selective_dpo.storage.artifacts import content_key, read_json, write_json
from selective_dpo.worlds.recipe import SCORE_TRAINER, world_recipe
from selective_dpo.worlds.world import PairsConfig, World, build_world

SEEDS, FRESH = (41, 42, 43), (44, 45)
"""Of the protocol `paper`, and of the scorers that no protocol has seen."""
ONE_STEP: dict[str, Any] = {
    "protocol": "one-step",
    "lora": None,
    "trainer": {"beta": SCORE_TRAINER["beta"], "bf16": False, "activation_checkpointing": False},
}
AWAY: dict[str, dict[str, Any]] = {
    "3 x learning rate": {"learning_rate": 3 * SCORE_TRAINER["learning_rate"]},
    "10 x learning rate": {"learning_rate": 10 * SCORE_TRAINER["learning_rate"]},
    "4 epochs": {"num_train_epochs": 4},
    "beta 0.5": {"beta": 0.5},
}
"""Scorers that are trained away from the linear regime, or nearer to it."""
SIZES = (50, 200, 1000)
BINS = 10
SHARED = ("pairs", "test-pairs", "reference", "test-reference")


class WorldJob(NamedTuple):
    """What to measure."""

    seed: int
    folder: Path
    orders: int
    """Training orders of each arm."""

    @property
    def result(self) -> Path:
        """Where the numbers go."""
        return self.folder / "result.json"


def measure_world(job: WorldJob) -> None:
    """Build the world, score it in every way, train and judge the arms; a complete result is kept."""
    key = content_key(seed=job.seed, orders=job.orders, version=2)
    if job.result.is_file() and read_json(job.result)["key"] == key:
        return
    quieten_libraries()
    torch.set_num_threads(1)  # One world a core.
    world = build_world(job.folder / "world", seed=job.seed)
    measured = _Measured(job, world)
    write_json(
        job.result,
        {
            "key": key,
            "seed": job.seed,
            "pairs": len(measured.pair_ids),
            "flipped": float(measured.flipped_P.mean()),
            "ties": float(measured.tie_P.mean()),
            "agreement": measured.agreement(),
            "labels": measured.labels(),
            "calibration": measured.calibration(),
            "away": measured.away(),
            "sizes": measured.sizes(),
            "win_rates": measured.win_rates(),
        },
    )


class _Measured:
    """The pairs of a world, in the order of their ids, and their difficulty by each protocol."""

    def __init__(self, job: WorldJob, world: World) -> None:
        self._job, self._world = job, world
        trained = {"protocol": "custom", "seeds": [*SEEDS, *FRESH], "evaluations": 5}
        table = _losses(self._scored("trained", _trained(**trained)))
        self.pair_ids = table.pair_ids_P.tolist()
        self._by_seed = dict(zip(table.seeds_S, table.losses_PSE.mean(axis=2).T, strict=True))
        self._one_step = self._scored("one-step", ONE_STEP)
        self.difficulty = {
            "one trained seed": self._by_seed[SEEDS[0]],
            "two trained seeds": np.mean([self._by_seed[seed] for seed in SEEDS[:2]], axis=0),
            "paper": np.mean([self._by_seed[seed] for seed in SEEDS], axis=0),
            "fast": self._difficulty(self._scored("fast", _trained(protocol="fast"))),
            "one-step": self._difficulty(self._one_step),
        }
        truth = pq.read_table(world.truth)
        at = positions_of(self.pair_ids, truth["pair_id"].to_pylist(), what="truth")
        self.flipped_P, self.tie_P, chosen_P, rejected_P = (
            truth[name].to_numpy(zero_copy_only=False)[at]
            for name in ("flipped", "tie", "reward_chosen", "reward_rejected")
        )
        self._reward_gap_P = chosen_P - rejected_P

    def _run(self, name: str, block: Mapping[str, Any], controls: dict[str, Any], **data: Any) -> Run:
        base = world_recipe(self._world, name=name, output_dir=self._job.folder, controls=controls)
        raw = base.model_dump(mode="json")
        raw["score"] = dict(block)
        raw["data"] |= data
        return open_run(Recipe.model_validate(raw), fresh=True, say=lambda line: None)

    def _scored(self, name: str, block: Mapping[str, Any], **data: Any) -> Run:
        run = self._run(name, block, {}, **data)
        score(run)
        return run

    def _difficulty(self, run: Run) -> NDArray[np.float64]:
        table = _losses(run)
        if table.pair_ids_P.tolist() != self.pair_ids:
            raise SystemExit("two protocols measured different pairs")
        return np.asarray(table.losses_PSE.mean(axis=(1, 2)))

    def agreement(self) -> dict[str, dict[str, float]]:
        """Of each protocol's difficulty with that of trained seeds it has not seen: means over those."""
        fresh = [self._by_seed[seed] for seed in FRESH]
        found = {name: _agreement(values, fresh) for name, values in self.difficulty.items()}
        found["two fresh seeds"] = _agreement(fresh[0], fresh[1:])
        return found

    def labels(self) -> dict[str, dict[str, float]]:
        """How well a difficulty finds flipped labels and ties among the pairs, and what it keeps."""
        right_P = ~(self.flipped_P | self.tie_P)
        found = {}
        for name, values_P in self.difficulty.items():
            easy_P = _easiest_half(values_P)
            found[name] = {
                "auc_flipped": _auc(values_P, self.flipped_P, right_P),
                "auc_ties": _auc(values_P, self.tie_P, right_P),
                "flipped_in_easiest_half": float(self.flipped_P[easy_P].mean()),
                "ties_in_easiest_half": float(self.tie_P[easy_P].mean()),
            }
        return found

    def calibration(self) -> dict[str, Any]:
        """sigmoid(-margin) of one-step as a probability, pairs by tenths of it.

        `fresh`: how likely a fresh label of the annotator contradicts the pair's. `flipped`: how often
        the label contradicts the truth, ties left out.
        """
        run = self._one_step
        records = collect_records([run.folder.scores(scorer) for scorer in run.scorer_runs])
        at = positions_of(self.pair_ids, records.pair_id.tolist(), what="records")
        p_P = 1 / (1 + np.exp(records.margin[at]))
        fresh_P = 1 / (1 + np.exp(self._reward_gap_P / PairsConfig().annotator_temperature))
        kept_P = ~self.tie_P
        return {
            "fresh": _reliability(p_P, fresh_P),
            "flipped": _reliability(p_P[kept_P], self.flipped_P[kept_P].astype(float)),
        }

    def away(self) -> dict[str, dict[str, float]]:
        """Scorers trained otherwise: how two seeds agree with each other, and one-step with each."""
        found = {}
        for name, changes in AWAY.items():
            block = _trained(protocol="custom", seeds=[41, 42], evaluations=2)
            block["trainer"] |= changes
            table = _losses(self._scored(f"away-{name.replace(' ', '-')}", block))
            seeds = table.losses_PSE.mean(axis=2).T
            own = [_spearman(self.difficulty["one-step"], each) for each in seeds]
            right_P = ~(self.flipped_P | self.tie_P)
            found[name] = {
                "two_seeds": _spearman(*seeds),
                "one_step": float(np.mean(own)),
                "auc_flipped": _auc(np.mean(seeds, axis=0), self.flipped_P, right_P),
                "held_out_loss": float(table.losses_PSE[:, :, -1].mean()),
            }
        return found

    def sizes(self) -> dict[str, dict[str, float]]:
        """How two splits of one-step agree, and two trained seeds, on few pairs."""
        found = {}
        for count in SIZES:
            splits = _losses(self._scored(f"splits-{count}", {**ONE_STEP, "splits": 2}, max_pairs=count))
            # Of 50 pairs a scorer makes one update.
            block = _trained(protocol="custom", seeds=[41, 42], evaluations=1)
            seeds = _losses(self._scored(f"seeds-{count}", block, max_pairs=count))
            found[str(count)] = {
                name: _spearman(*table.losses_PSE.mean(axis=2).T)
                for name, table in (("one-step", splits), ("trained", seeds))
            }
        return found

    def win_rates(self) -> dict[str, list[float]]:
        """Sampled win rate of policies trained on each easiest half, and on others, order by order."""
        orders = range(self._job.orders)
        shuffled = {f"order-{seed}": {"order": "shuffled", "seed": seed} for seed in orders}
        easiest = {name: {"fraction": 0.5, **given} for name, given in shuffled.items()}
        others = {f"all-{name}": {"rule": "all", **given} for name, given in shuffled.items()}
        others |= {
            f"random-{name}": {"rule": "random", "fraction": 0.5, **given} for name, given in shuffled.items()
        }
        found: dict[str, list[float]] = {}
        for name, block in {
            "paper": _trained(protocol="paper"),
            "fast": _trained(protocol="fast"),
            "one-step": ONE_STEP,
        }.items():
            run = self._run(f"policies-{name}", block, easiest | (others if name == "paper" else {}))
            # Their keys do not depend on the arms, so the copies count as complete.
            source = self._job.folder / ("trained" if name == "paper" else name)
            for part in (*SHARED, "scores"):
                if not (run.folder.root / part).exists():
                    shutil.copytree(source / part, run.folder.root / part)
            bring_up(run, "evaluation")
            for arm in from_json(read_json(run.folder.evaluation / "results.json")).arms:
                if arm.win_rate is not None and arm.name != "reference":
                    kind = "easiest, sorted" if arm.name == "selected" else arm.name.split("-")[0]
                    label = f"{name} {kind}" if kind in ("order", "easiest, sorted") else kind
                    found.setdefault(label.replace(" order", ""), []).append(arm.win_rate.value)
        return found


def _reliability(p_N: NDArray[np.float64], truth_N: NDArray[np.float64]) -> dict[str, Any]:
    """Predicted and true probabilities by tenths, and the mean squared error (Brier score, for outcomes)."""
    bins = np.array_split(np.argsort(p_N, kind="stable"), BINS)
    return {
        "predicted": [float(p_N[rows].mean()) for rows in bins],
        "observed": [float(truth_N[rows].mean()) for rows in bins],
        "brier": float(np.mean((p_N - truth_N) ** 2)),
        "brier_of_constant": float(np.var(truth_N)),
    }


def _trained(**block: Any) -> dict[str, Any]:
    return {"lora": None, "trainer": dict(SCORE_TRAINER), **block}


def _losses(run: Run) -> LossTable:
    return collect_losses([run.folder.scores(scorer) for scorer in run.scorer_runs])


def _agreement(values_P: NDArray[np.float64], fresh: list[NDArray[np.float64]]) -> dict[str, float]:
    overlaps = [float(np.mean(_easiest_half(each)[_easiest_half(values_P)])) for each in fresh]
    return {
        "spearman": float(np.mean([_spearman(values_P, each) for each in fresh])),
        "overlap": float(np.mean(overlaps)),
    }


def _spearman(one_P: NDArray[np.float64], other_P: NDArray[np.float64]) -> float:
    if one_P.std() == 0 or other_P.std() == 0:
        return 0.0  # scorers that made one update, at a learning rate of 0, order nothing
    return float(spearmanr(one_P, other_P).statistic)


def _easiest_half(values_P: NDArray[np.float64]) -> NDArray[np.bool_]:
    easy_P = np.zeros(len(values_P), dtype=np.bool_)
    easy_P[np.argsort(values_P, kind="stable")[: len(values_P) // 2]] = True
    return easy_P


def _auc(values_P: NDArray[np.float64], wanted_P: NDArray[np.bool_], against_P: NDArray[np.bool_]) -> float:
    """Probability that a wanted pair is harder than one of the others (Mann and Whitney 1947)."""
    kept_P = wanted_P | against_P
    ranks, wanted = rankdata(values_P[kept_P]), wanted_P[kept_P]
    count = int(wanted.sum())
    return float((ranks[wanted].sum() - count * (count + 1) / 2) / (count * (len(ranks) - count)))
