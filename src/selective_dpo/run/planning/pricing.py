"""Workloads priced for a model and a device: FLOPs, memory and time of every job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selective_dpo.config import Recipe
from selective_dpo.run.planning.architecture import (
    Architecture,
    adapter_parameters,
    architecture_of,
    build_on_meta,
)
from selective_dpo.run.planning.costs import (
    Memory,
    forward_flops,
    generation_memory,
    inference_memory,
    training_flops,
    training_memory,
)
from selective_dpo.run.planning.device import ASSUMED_UTILISATION, Device, measured_rate
from selective_dpo.run.planning.forwarding import Forwarding, forwarding_of
from selective_dpo.run.planning.settings import TrainingSettings, training_settings
from selective_dpo.run.planning.workload import Kind, Workload
from selective_dpo.training.arguments import weights_dtype


@dataclass(frozen=True)
class PlannedJob:
    """One job with its costs. What is not known is None."""

    name: str
    """Where its result goes in the run's folder."""
    kind: Kind
    cached: bool
    pairs: int | None
    held_out: int | None
    updates: int | None
    evaluated_after: tuple[int, ...] | None
    rows_per_pair: int
    """1 where prompt, chosen and rejected share a row; of a scorer, in its training."""
    tokens: float | None
    """Computed by the model, padding included; training and forward passes."""
    flops: float | None
    memory: Memory | None
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """The job as JSON values."""
        memory = None if self.memory is None else {**self.memory._asdict(), "total": self.memory.total}
        return {
            "name": self.name,
            "kind": self.kind,
            "cached": self.cached,
            "pairs": self.pairs,
            "held_out": self.held_out,
            "updates": self.updates,
            "evaluated_after": None if self.evaluated_after is None else list(self.evaluated_after),
            "rows_per_pair": self.rows_per_pair,
            "tokens": self.tokens,
            "flops": self.flops,
            "memory_bytes": memory,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Models:
    """Sizes of the starting policy and of what is trained of it."""

    sizes: Architecture
    scorer_adapter: int
    """Parameters of a scorer's adapter; 0: full fine-tuning."""
    policy_adapter: int
    forwarding: Forwarding

    def to_json(self) -> dict[str, Any]:
        """The sizes as JSON values."""
        own = {
            "scorer_adapter": self.scorer_adapter,
            "policy_adapter": self.policy_adapter,
            "rows": self.forwarding.path.name,
        }
        return {**self.sizes._asdict(), **own}


def models_of(recipe: Recipe) -> Models:
    """Sizes of the recipe's model and adapters.

    Raises:
        ModelError: the model's configuration cannot be had.
        ConfigError: an adapter does not fit the model.
    """
    model = build_on_meta(recipe.model)
    sizes = architecture_of(model)
    adapters = {
        "score.lora": None if recipe.curriculum else recipe.score.lora,
        "train.lora": recipe.train.lora,
    }
    score, train = (
        adapter_parameters(build_on_meta(recipe.model), lora, where) if lora is not None else 0
        for where, lora in adapters.items()
    )
    return Models(sizes, score, train, forwarding_of(recipe, model))


class Pricing:
    """Turns workloads into costs on one device."""

    def __init__(self, recipe: Recipe, models: Models | None, device: Device) -> None:
        self._recipe, self._models, self._device = recipe, models, device
        self.training = training_settings(recipe.train.trainer, recipe.model)
        # Where difficulty is imported the reference, the only job of the two left, runs as the training does.
        self.scoring = self.training
        if not recipe.curriculum:
            self.scoring = training_settings(recipe.score.trainer, recipe.model)
        launch = recipe.launch
        # Processes on one CPU share its cores, so more of them are not faster.
        self.devices = max(launch.processes, launch.workers) if device.kind == "cuda" else 1
        self.rates: dict[str, float] = {}

    def priced(self, load: Workload, root: Path) -> PlannedJob:
        """The job that `load` is."""
        flops = self._flops(load)
        works = [work.tokens for work in (load.trained, load.forwarded) if work is not None]
        name = load.folder.relative_to(root).as_posix()
        return PlannedJob(
            name=name if load.kind not in ("held-out", "answers") else f"{name}: {load.kind}",
            kind=load.kind,
            cached=load.cached,
            pairs=load.pairs,
            held_out=load.held_out,
            updates=load.updates,
            evaluated_after=load.evaluated_after,
            rows_per_pair=load.rows_per_pair,
            tokens=sum(works) if works else None,
            flops=flops,
            memory=self._memory(load),
            # Sampling waits for memory, not for multiplications: its FLOPs say little about its time.
            seconds=self._seconds(flops, load.kind) if load.kind != "answers" else None,
        )

    def total_seconds(self, jobs: Sequence[PlannedJob]) -> float | None:
        """Wall time of the jobs that are not cached, answers left out; None if one is not known.

        Scorers, and policies, run `launch.workers` at a time.
        """
        wanted = [job for job in jobs if not job.cached and job.kind != "answers"]
        if any(job.seconds is None for job in wanted):
            return None
        total = 0.0
        for side_by_side in (("scorer",), ("policy",), ("reference", "held-out")):
            seconds = [job.seconds or 0.0 for job in wanted if job.kind in side_by_side]
            shared = side_by_side != ("reference", "held-out") and self.devices > 1
            workers = min(self._recipe.launch.workers, len(seconds)) if shared and seconds else 1
            total += sum(seconds) / workers
        return total

    def _stage(self, kind: Kind) -> tuple[TrainingSettings, int]:
        """The settings and the number of adapter parameters that a kind of job runs with."""
        models = self._models
        if kind in ("reference", "scorer"):
            return self.scoring, models.scorer_adapter if models and kind == "scorer" else 0
        return self.training, models.policy_adapter if models else 0

    def _held_in(self, kind: Kind) -> str:
        """The type that a job holds its weights in; the reference is held as the scorers are."""
        if kind in ("held-out", "answers"):
            return self._recipe.model.dtype
        block = self._recipe.train if kind == "policy" else self._recipe.score
        return weights_dtype(self._recipe.model, block.lora, block.trainer)

    def _flops(self, load: Workload) -> float | None:
        if self._models is None or load.forwarded is None:
            return None
        settings, adapter = self._stage(load.kind)
        sizes = self._models.sizes
        flops = forward_flops(sizes, load.forwarded, adapter)
        if load.trained is not None:
            flops += training_flops(sizes, load.trained, adapter=adapter, recomputes=settings.recomputes)
        return flops

    def _seconds(self, flops: float | None, kind: Kind) -> float | None:
        if flops is None:
            return None
        dtype = self._stage(kind)[0].compute_dtype
        if dtype not in self.rates:
            self.rates[dtype] = measured_rate(self._device, dtype)
        processes = self._recipe.launch.processes if self._device.kind == "cuda" else 1
        return flops / (self.rates[dtype] * ASSUMED_UTILISATION * processes)

    def _memory(self, load: Workload) -> Memory | None:
        if self._models is None:
            return None
        recipe, generation = self._recipe, self._recipe.evaluate.generation
        if load.kind == "answers":
            adapter = self._models.policy_adapter
            return generation_memory(
                self._models.sizes,
                adapter=adapter,
                dtype=recipe.model.dtype,
                rows=generation.batch_size,
                longest=load.longest or recipe.data.max_prompt_length + generation.max_new_tokens,
            )
        # A shared row holds one prompt and two completions: at most twice the longest sequence.
        longest = load.longest or recipe.data.max_length * (2 if load.rows_per_pair == 1 else 1)
        block = recipe.evaluate if load.kind == "held-out" else recipe.score
        budget = self._models.forwarding.tokens_of(block.tokens_per_batch)
        if load.kind in ("reference", "held-out"):
            return self._forward_memory(load, self._models, longest, budget)
        training = self._training_memory(load, self._models, longest)
        if load.kind == "policy":
            return training
        measuring = self._forward_memory(load, self._models, longest, budget)
        return training._replace(activations=max(training.activations, measuring.activations))

    def _training_memory(self, load: Workload, models: Models, longest: int) -> Memory:
        settings, adapter = self._stage(load.kind)
        return training_memory(
            models.sizes,
            settings,
            adapter=adapter,
            dtype=self._held_in(load.kind),
            eager=self._recipe.model.attention == "eager",
            rows_per_pair=load.rows_per_pair,
            longest=longest,
            processes=self._recipe.launch.processes,
        )

    def _forward_memory(self, load: Workload, models: Models, longest: int, budget: int) -> Memory:
        settings, adapter = self._stage(load.kind)
        return inference_memory(
            models.sizes,
            adapter=adapter,
            dtype=self._held_in(load.kind),
            compute_dtype=settings.compute_dtype,
            eager=self._recipe.model.attention == "eager",
            rows=max(load.rows_per_pair, budget // longest),
            longest=longest,
        )
