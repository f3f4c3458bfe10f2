"""What selecting within strata of length, or by difficulty with length taken out, does to the answers.

    python benchmarks/balance.py --json benchmarks/results/balance.json

Several embedded worlds, each with pairs of its own, scored by `one-step`; `--real` adds
SmolLM2-135M-Instruct on its own answers, as part "checked" of `real_model.py`. Half of the pairs is
selected by the plain rule, balanced by fifths of the length difference, by difficulty less its monotone
dependence on length, and at random; each is trained on in several shuffled orders. Win rate, win rate at
equal length, and answer tokens; means and standard errors over worlds of the means over orders, differences
from the plain rule paired by world. Also how many of the kept pairs are labelled wrong, and how much longer
their chosen answers are. Work is kept in --work.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from harness import mean_over_worlds, measure_worlds
from one_step_world import ONE_STEP
from selective_dpo import __version__
from selective_dpo.config import Recipe
from selective_dpo.curriculum.balance import read_attributes
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.distributed.progress import quieten_libraries
from selective_dpo.evaluation.results import from_json
from selective_dpo.identity import positions_of
from selective_dpo.run.demo import sample_texts
from selective_dpo.run.run import open_run
from selective_dpo.run.stages import bring_up
from selective_dpo.stats.rank_correlation import clustered_spearman
from selective_dpo.storage.artifacts import content_key, read_json, write_json
from selective_dpo.worlds.real import build_real_world, make_model, real_recipe
from selective_dpo.worlds.recipe import world_recipe
from selective_dpo.worlds.world import World, build_world

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "balanced": {"balance": ["length"]},
    "residual": {"residual": "length"},
    "random": {"rule": "random"},
}
FIGURES = ("win_rate", "length_controlled", "answer_tokens")


class Job(NamedTuple):
    """One world to measure."""

    seed: int
    folder: Path
    orders: int
    is_real: bool

    @property
    def result(self) -> Path:
        return self.folder / "result.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=4)
    parser.add_argument("--orders", type=int, default=3, help="training orders of each arm")
    parser.add_argument("--real", type=int, default=0, metavar="N", help="worlds of the real model")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/balance"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kinds = {"worlds": (options.worlds, False), "real": (options.real, True)}
    found: dict[str, Any] = {"name": "balance", "version": __version__, "machine": platform.machine()}
    for kind, (count, is_real) in kinds.items():
        jobs = [Job(seed, options.work / f"{kind}{seed}", options.orders, is_real) for seed in range(count)]
        if jobs:
            found[kind] = summarize(measure_worlds(measure, jobs, workers=options.workers))
            print(as_text(kind, found[kind]))
    if options.json:
        write_json(options.json, found)


def measure(job: Job) -> None:
    """Build, score, train and judge one world; a complete result is kept."""
    key = content_key(seed=job.seed, orders=job.orders, is_real=job.is_real, rules=RULES, version=1)
    if job.result.is_file() and read_json(job.result)["key"] == key:
        return
    quieten_libraries()
    if not job.is_real:
        torch.set_num_threads(1)  # one world a core
    controls = {
        f"{name}-{seed}": {"fraction": 0.5, "order": "shuffled", "seed": seed, **rule}
        for name, rule in RULES.items()
        for seed in range(job.orders)
    }
    world, recipe = (_real if job.is_real else _embedded)(job, controls)
    run = open_run(recipe, fresh=True, say=partial(print, flush=True) if job.is_real else lambda line: None)
    bring_up(run, "evaluation")
    rows: dict[str, dict[str, list[float]]] = {}
    for arm in from_json(read_json(run.folder.evaluation / "results.json")).arms:
        name = arm.name.split("-")[0]
        for figure in FIGURES:
            value = getattr(arm, figure)
            if value is not None and name in RULES:
                rows.setdefault(name, {}).setdefault(figure, []).append(value.value)
    truth = pq.read_table(world.truth)
    plain = Curriculum.load(run.folder.control("plain-0"))
    known = read_attributes(run.folder.pairs / "pairs.parquet", plain.pair_ids)
    flipped_P = truth["flipped"].to_numpy(zero_copy_only=False)[
        positions_of(plain.pair_ids, truth["pair_id"].to_pylist(), what="truth")
    ]
    kept = {}
    for name in RULES:
        curriculum = Curriculum.load(run.folder.control(f"{name}-0"))
        is_kept_P = np.isin(plain.pair_ids, curriculum.order)
        kept[name] = {
            "wrong labels": float(flipped_P[is_kept_P].mean()),
            "chosen minus rejected tokens": float(known.length_P[is_kept_P].mean()),
        }
    prompts_P = np.unique(plain.table["prompt_id"].to_pylist(), return_inverse=True)[1]
    follows = clustered_spearman(known.length_P.astype(float), plain.difficulty_P, prompts_P)
    content = {
        "pairs": len(plain.pair_ids),
        "length correlation": follows.as_json(),
        "arms": rows,
        "kept": kept,
    }
    write_json(job.result, {"key": key, "seed": job.seed, **content})


def _embedded(job: Job, controls: dict[str, Any]) -> tuple[World, Recipe]:
    world = build_world(job.folder / "world", seed=job.seed)
    raw = world_recipe(world, name="run", output_dir=job.folder, controls=controls).model_dump(mode="json")
    raw["score"] = dict(ONE_STEP)
    return world, Recipe.model_validate(raw)


def _real(job: Job, controls: dict[str, Any]) -> tuple[World, Recipe]:
    model = make_model(job.folder.parent / "model")
    world = build_real_world(job.folder / "world", model=model, seed=job.seed, sample=sample_texts)
    return world, real_recipe(world, name="run", output_dir=job.folder, controls=controls)


def summarize(worlds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over worlds of the means over orders, and the spread between orders of one world."""
    arms: dict[str, Any] = {}
    for name in RULES:
        arms[name] = {}
        for figure in FIGURES:
            values = [world["arms"][name].get(figure) for world in worlds]
            if not all(values):
                continue
            plain = [np.mean(world["arms"]["plain"][figure]) for world in worlds]
            means = [float(np.mean(each)) for each in values]
            spread = [float(np.std(each, ddof=1)) for each in values if len(each) > 1]
            arms[name][figure] = {
                **mean_over_worlds(means),
                "minus_plain": mean_over_worlds(float(a - b) for a, b in zip(means, plain, strict=True)),
                "between_orders": float(np.mean(spread)) if spread else None,
            }
        arms[name]["kept"] = {
            what: mean_over_worlds(world["kept"][name][what] for world in worlds)
            for what in worlds[0]["kept"][name]
        }
    correlation = mean_over_worlds(world["length correlation"]["value"] for world in worlds)
    return {"worlds": len(worlds), "length_correlation": correlation, "arms": arms, "per_world": list(worlds)}


def as_text(kind: str, found: dict[str, Any]) -> str:
    """A Markdown table."""
    lines = [
        f"{kind}: {found['worlds']}; difficulty with chosen minus rejected tokens: "
        f"{_shown(found['length_correlation'], 2)} (Spearman)",
        "",
        "| half selected | win rate | minus plain | at equal length | tokens | wrong labels | longer by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in found["arms"].items():
        cells = [
            _shown(arm.get("win_rate")),
            _shown(arm.get("win_rate", {}).get("minus_plain")) if name != "plain" else "",
            _shown(arm.get("length_controlled")),
            _shown(arm.get("answer_tokens"), 2),
            _shown(arm["kept"]["wrong labels"]),
            _shown(arm["kept"]["chosen minus rejected tokens"], 2),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: dict[str, Any] | None, decimals: int = 3) -> str:
    if not value:
        return ""
    error = value.get("standard_error")
    return f"{value['mean']:.{decimals}f}" + (f" ± {error:.{decimals}f}" if error is not None else "")


if __name__ == "__main__":
    main()
