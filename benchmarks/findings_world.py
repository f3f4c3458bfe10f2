"""One world of `findings.py`: its arms trained and judged, as numbers in a file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from selective_dpo.config import GenerationConfig, Recipe
from selective_dpo.curriculum.table import TABLE, Curriculum
from selective_dpo.distributed.progress import quieten_libraries
from selective_dpo.evaluation.evaluate import Arm, evaluate_arms
from selective_dpo.evaluation.results import REFERENCE, SELECTED, from_json
from selective_dpo.identity import positions_of
from selective_dpo.run.keys import Run, prompts_to_answer, training_job
from selective_dpo.run.run import open_run
from selective_dpo.run.stages import bring_up, load_arm
from selective_dpo.storage.artifacts import content_key, read_json, write_json
from selective_dpo.training.train import train_policy
from selective_dpo.worlds.recipe import world_recipe
from selective_dpo.worlds.world import PairsConfig, World, WorldConfig, build_world

BETA = 2.0
FRACTIONS = (0.3, 0.4, 0.6, 0.7, 0.85)
"""Of the sweep; 0.5 is the arm `selected` and 1.0 the arm `all sorted`."""
SHARED_STAGES = ("pairs", "test-pairs", "reference", "test-reference", "scores")
ORACLE = "oracle"


class WorldJob(NamedTuple):
    """What to measure."""

    seed: int
    folder: Path
    betas: tuple[float, ...]
    """Other values of beta that all pairs and the easiest half are trained with."""
    sweep: bool
    """Whether to train the other fractions, too."""
    annotator_temperature: float

    @property
    def result(self) -> Path:
        """Where the numbers go."""
        return self.folder / "result.json"


def measure_world(job: WorldJob) -> None:
    """Build the world, score it once, train and judge every arm; a complete result is kept."""
    key = content_key(job=[job.seed, list(job.betas), job.sweep, job.annotator_temperature], version=1)
    if job.result.is_file() and read_json(job.result)["key"] == key:
        return
    quieten_libraries()
    torch.set_num_threads(1)  # One world a core: see launch.workers.
    config = WorldConfig(pairs=PairsConfig(annotator_temperature=job.annotator_temperature))
    world = build_world(job.folder / "world", seed=job.seed, config=config)
    run = _run(job, world, "main", BETA, _controls(job.sweep))
    bring_up(run, "evaluation")
    arms = _arms(run)
    arms[ORACLE] = _oracle(run, world)
    greedy = _greedy(run)
    betas = {str(BETA): {name: arms[name] for name in (SELECTED, "all")}}
    for beta in job.betas:
        other = _run(job, world, f"beta-{beta:g}", beta, {"all": _controls(False)["all"]}, share=run)
        bring_up(other, "evaluation")
        betas[str(beta)] = _arms(other)
    agreement = Curriculum.load(run.folder.curriculum).facts["agreement"]
    write_json(
        job.result,
        {
            "key": key,
            "seed": job.seed,
            "world": {name: world.facts[name] for name in ("pairs", "sft")},
            "arms": arms,
            "greedy": greedy,
            "betas": betas,
            "between_seeds": {
                name: float(np.mean([each[name]["value"] for each in agreement["seeds"]]))
                for name in ("spearman", "overlap", "jaccard")
            },
            "flips_by_fifth": _by_fifth(run, world, "flipped"),
            "ties_by_fifth": _by_fifth(run, world, "tie"),
        },
    )


def _controls(sweep: bool) -> dict[str, dict[str, Any]]:
    controls: dict[str, dict[str, Any]] = {
        "all": {"rule": "all", "order": "shuffled"},
        "random": {"rule": "random", "fraction": 0.5, "order": "shuffled"},
        "hardest": {"rule": "hardest", "fraction": 0.5, "order": "shuffled"},
        "all-sorted": {"rule": "all"},
        "easiest-shuffled": {"fraction": 0.5, "order": "shuffled"},
    }
    if sweep:
        controls |= {f"easiest-{fraction:g}": {"fraction": fraction} for fraction in FRACTIONS}
    return controls


def _run(
    job: WorldJob,
    world: World,
    name: str,
    beta: float,
    controls: Mapping[str, dict[str, Any]],
    *,
    share: Run | None = None,
) -> Run:
    recipe = world_recipe(world, name=name, output_dir=job.folder, controls=dict(controls))
    trainer = {**recipe.train.trainer, "beta": beta}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"trainer": trainer})})
    run = open_run(Recipe.model_validate(recipe.model_dump()), fresh=True, say=lambda line: None)
    if share is not None:
        # Their keys do not depend on how the policy is trained, so the copies count as complete.
        for stage in SHARED_STAGES:
            shutil.copytree(share.folder.root / stage, run.folder.root / stage, dirs_exist_ok=True)
    return run


def _arms(run: Run) -> dict[str, dict[str, float]]:
    results = from_json(read_json(run.folder.evaluation / "results.json"))
    return {
        arm.name: {"win_rate": arm.win_rate.value, "pairs": arm.pairs, "updates": arm.updates}
        for arm in results.arms
        if arm.win_rate is not None
    }


def _oracle(run: Run, world: World) -> dict[str, float]:
    """All pairs whose label the gold reward confirms, shuffled: what clean labels would give."""
    curriculum = Curriculum.load(run.folder.curriculum)
    truth = pq.read_table(world.truth)
    at = positions_of(curriculum.pair_ids, truth["pair_id"].to_pylist(), what="truth")
    clean_P = ~(
        truth["flipped"].to_numpy(zero_copy_only=False) | truth["tie"].to_numpy(zero_copy_only=False)
    )[at]
    positions_P = np.full(len(clean_P), -1, dtype=np.int64)
    positions_P[np.random.default_rng(0).permutation(np.flatnonzero(clean_P))] = np.arange(clean_P.sum())
    table = curriculum.table
    for name, column in (("selected", pa.array(clean_P)), ("position", pa.array(positions_P))):
        table = table.set_column(table.column_names.index(name), name, column)
    folder = run.folder.control(ORACLE)
    facts = {**curriculum.facts, "key": ORACLE, "selected": int(clean_P.sum())}
    Curriculum(table, facts).save(folder)
    job = training_job(run, SELECTED)
    train_policy(
        job._replace(
            name=ORACLE, label="clean labels", curriculum=folder / TABLE, folder=folder / "policy", key=ORACLE
        )
    )
    updates = int(read_json(folder / "policy" / "cost.json")["optimizer_steps"])
    arm = Arm(ORACLE, "clean labels", int(clean_P.sum()), updates, lambda: load_arm(run, folder / "policy"))
    return _judge(run, [arm], run.recipe.evaluate.generation)[ORACLE]


def _greedy(run: Run) -> dict[str, dict[str, float]]:
    """The main arms again, each model giving its most likely answer."""
    arms = [
        Arm(name, name, 0, 0, lambda folder=folder: load_arm(run, folder / "policy"))
        for name, (_, folder) in run.arms.items()
        if name in (SELECTED, "all", "random", "hardest")
    ]
    greedy = {"temperature": 0.0, "samples": 1}
    return _judge(run, arms, run.recipe.evaluate.generation.model_copy(update=greedy))


def _judge(run: Run, arms: list[Arm], generation: GenerationConfig) -> dict[str, dict[str, float]]:
    evaluation = evaluate_arms(
        arms,
        Arm(REFERENCE, "starting model", 0, 0, lambda: load_arm(run, None)),
        tokenizer=run.tokenizer,
        prompts=prompts_to_answer(run),
        config=run.recipe.evaluate.model_copy(update={"generation": generation}),
    )
    return {
        arm.name: {"win_rate": arm.win_rate.value, "pairs": arm.pairs, "updates": arm.updates}
        for arm in evaluation.results.arms
        if arm.win_rate is not None
    }


def _by_fifth(run: Run, world: World, column: str) -> list[float]:
    """Share of pairs that have a property, by fifth of the difficulty, easiest first."""
    curriculum = Curriculum.load(run.folder.curriculum)
    truth = pq.read_table(world.truth)
    at = positions_of(curriculum.pair_ids, truth["pair_id"].to_pylist(), what="truth")
    has_P = truth[column].to_numpy(zero_copy_only=False)[at]
    by_rank = has_P[np.argsort(curriculum.table["rank"].to_numpy())]
    return [float(fifth.mean()) for fifth in np.array_split(by_rank, 5)]
