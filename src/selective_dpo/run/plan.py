"""`plan`: what a recipe's run would do and cost. Nothing is trained, nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selective_dpo.config import Recipe
from selective_dpo.config.load import dump_config
from selective_dpo.config.trainer_options import check_recipe_options
from selective_dpo.data.store import PairsSummary
from selective_dpo.errors import ModelError, RunChangedError
from selective_dpo.evaluation.evaluate import check_evaluation
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import Run
from selective_dpo.run.planning.cached import complete_results, has_results
from selective_dpo.run.planning.device import ASSUMED_UTILISATION, Device, this_device
from selective_dpo.run.planning.disk import Disk, disk_need
from selective_dpo.run.planning.forwarding import forwarding_of
from selective_dpo.run.planning.inputs import Inputs, Unknown, is_local, read_inputs
from selective_dpo.run.planning.pricing import Models, PlannedJob, Pricing, models_of
from selective_dpo.run.planning.protocols import PlannedProtocol, planned_protocols
from selective_dpo.run.planning.settings import TrainingSettings, training_settings
from selective_dpo.run.planning.workload import workloads


@dataclass(frozen=True)
class Plan:
    """Everything that `plan` has found out."""

    recipe: Recipe
    folder: Path
    models: Models | None
    scoring: TrainingSettings
    training: TrainingSettings
    pairs: PairsSummary | None
    test: PairsSummary | None
    jobs: tuple[PlannedJob, ...]
    protocols: tuple[PlannedProtocol, ...]
    """What scoring would take and keep with the recipe's protocol and with the others."""
    device: Device
    devices: int
    """How many like this one the times assume."""
    rates: dict[str, float]
    """FLOP/s measured here, by type."""
    disk: Disk | None
    """What will be in the run's folder."""
    seconds: float | None
    """Of all jobs that are not cached and whose time is known."""
    unknown: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "schema_version": 1,
            "config": dump_config(self.recipe),
            "folder": str(self.folder),
            "model": None if self.models is None else self.models.to_json(),
            "scoring": None if self.recipe.curriculum else self.scoring._asdict(),
            "training": self.training._asdict(),
            "pairs": None if self.pairs is None else self.pairs._asdict(),
            "test_pairs": None if self.test is None else self.test._asdict(),
            "jobs": [job.to_json() for job in self.jobs],
            "protocols": [protocol.to_json() for protocol in self.protocols],
            "device": {**self.device._asdict(), "assumed_number": self.devices},
            "measured_flops_per_second": self.rates,
            "assumed_utilisation": ASSUMED_UTILISATION,
            "disk_bytes": None if self.disk is None else self.disk.to_json(),
            "seconds": self.seconds,
            "unknown": list(self.unknown),
            "notes": list(self.notes),
        }


def make_plan(recipe: Recipe) -> Plan:
    """Work out what `run` would do. Reads the model's configuration, tokenizer and data, not its weights.

    What cannot be had here, such as a hub model while offline, is listed in `unknown`.

    Raises:
        SelectiveDPOError: what a run would refuse, as far as that can be known.
    """
    check_recipe_options(recipe)
    check_evaluation(recipe.evaluate, has_test=bool(recipe.data.test))
    run = Run(recipe, RunDirectory.of(recipe), say=lambda line: None)
    unknown: list[str] = []
    models = _models(recipe, unknown)
    cached = _cached(run, unknown)
    is_published = {run.folder.pairs, run.folder.test_pairs} if recipe.data.test else {run.folder.pairs}
    found = read_inputs(run, use_published=is_published <= cached)
    inputs = found if isinstance(found, Inputs) else None
    if isinstance(found, Unknown):
        unknown.append(f"pairs and tokens, so updates, FLOPs and time: {found.reason}")
    device = this_device()
    pricing = Pricing(recipe, models, device)
    forwarding = models.forwarding if models else forwarding_of(recipe, None)
    loads = workloads(run, inputs, cached, forwarding)
    jobs = tuple(pricing.priced(load, run.folder.root) for load in loads)
    unknown += _unknown_jobs(recipe, jobs, inputs)
    return Plan(
        recipe=recipe,
        folder=run.folder.root,
        models=models,
        scoring=pricing.scoring,
        training=pricing.training,
        pairs=inputs.pairs.summary if inputs else None,
        test=inputs.test.summary if inputs and inputs.test else None,
        jobs=jobs,
        protocols=planned_protocols(recipe, inputs.pairs if inputs else None, models, forwarding),
        device=device,
        devices=pricing.devices,
        rates=pricing.rates,
        disk=disk_need(recipe, models),
        seconds=pricing.total_seconds(jobs),
        unknown=tuple(unknown),
        notes=tuple(_notes(run)),
    )


def _models(recipe: Recipe, unknown: list[str]) -> Models | None:
    try:
        return models_of(recipe)
    except ModelError as error:
        if is_local(recipe.model):
            raise
        unknown.append(f"parameters, so FLOPs, memory, disk and time: {error}")
        return None


def _cached(run: Run, unknown: list[str]) -> frozenset[Path]:
    if not has_results(run):
        return frozenset()
    try:
        return complete_results(run)
    except ModelError as error:
        unknown.append(f"which results in {run.folder.root} can be used again: {error}")
        return frozenset()


def _unknown_jobs(recipe: Recipe, jobs: tuple[PlannedJob, ...], inputs: Inputs | None) -> list[str]:
    lines = []
    if inputs is not None:
        unscored = [job.name for job in jobs if job.kind == "policy" and job.pairs is None]
        lines += [f"pairs of {name}: a threshold selects after scoring" for name in unscored]
    if recipe.evaluate.generation.prompts:
        lines.append("time of the answers: sampling waits for memory more than for multiplications")
    if recipe.evaluate.judge == "reward-model":
        lines.append(f"cost of the judge {recipe.evaluate.reward_model}")
    for block in ("train",) if recipe.curriculum else ("score", "train"):
        settings = training_settings(getattr(recipe, block).trainer, recipe.model)
        if settings.unread:
            lines.append(f"{block}: {settings.unread}; counted as not sharded")
    return lines


def _notes(run: Run) -> list[str]:
    try:
        run.folder.require_same_recipe(run.recipe)
    except RunChangedError as error:
        return [f"a run would refuse this: {error}"]
    return []
