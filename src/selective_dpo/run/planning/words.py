"""A plan as text for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from selective_dpo.config import Recipe, ScoreConfig
from selective_dpo.config.load import dump_config, make_recipe
from selective_dpo.data.store import PairsSummary
from selective_dpo.evaluation.evaluate import policy_names
from selective_dpo.report.tables import label_for, text_table
from selective_dpo.run.planning.device import ASSUMED_UTILISATION
from selective_dpo.run.planning.pricing import PlannedJob
from selective_dpo.run.planning.protocol_words import protocols_text
from selective_dpo.run.planning.quantities import (
    UNKNOWN,
    readable,
    readable_bytes,
    readable_count,
    readable_time,
)
from selective_dpo.run.planning.settings import TrainingSettings
from selective_dpo.training.arguments import ORIGINAL_DEFAULTS

if TYPE_CHECKING:
    from selective_dpo.run.plan import Plan
    from selective_dpo.run.planning.disk import Disk

__all__ = ["plan_text", "readable", "readable_bytes", "readable_count", "readable_time"]


def plan_text(plan: Plan) -> str:
    """All of a plan."""
    parts = [
        f"plan of {plan.recipe.name}, in {plan.folder}: nothing is trained or written",
        "\n".join([*_decisive_lines(plan), *_changed_lines(plan.recipe)]),
        *_pairs_parts(plan),
        _jobs_table(plan.jobs),
        "\n".join(_assumption_lines(plan)),
        *_protocol_parts(plan),
        "\n".join(_end_lines(plan)),
    ]
    return "\n\n".join(part for part in parts if part)


def _protocol_parts(plan: Plan) -> list[str]:
    pairs = plan.pairs.kept if plan.pairs else None
    return [protocols_text(plan.protocols, plan.recipe.select, pairs)] if plan.protocols else []


def _scoring_rows(plan: Plan, adapter: int | None) -> list[tuple[str, str]]:
    recipe = plan.recipe
    if recipe.curriculum:
        return [("difficulty", f"imported from {recipe.curriculum}: nothing is scored")]
    return [
        ("scoring", _protocol_words(recipe.score)),
        ("scorers", _training_words(recipe.score.lora, adapter, plan.scoring, recipe)),
    ]


def _decisive_lines(plan: Plan) -> list[str]:
    recipe = plan.recipe
    model, generation = recipe.model, recipe.evaluate.generation
    size = f"{readable_count(plan.models.sizes.parameters)} parameters" if plan.models else "size unknown"
    adapters = (plan.models.scorer_adapter, plan.models.policy_adapter) if plan.models else (None, None)
    answers = f"{generation.prompts:,} prompts x {generation.samples} answers" if generation.prompts else ""
    launch = recipe.launch
    spread = [f"{launch.processes} processes" if launch.processes > 1 else f"{launch.workers} at a time"]
    rows = [
        ("model", f"{model.path}: {size}, {model.dtype}, {model.attention} attention"),
        ("template", model.chat_template or "the tokenizer's own"),
        *_scoring_rows(plan, adapters[0]),
        ("selection", label_for(recipe.select)),
        ("training", _training_words(recipe.train.lora, adapters[1], plan.training, recipe)),
        ("controls", ", ".join(policy_names(recipe.evaluate)[1:]) or "none"),
        ("judge", ", ".join(part for part in (recipe.evaluate.judge, answers) if part)),
        ("launch", *spread),
    ]
    return [f"{name:<11}{text}" for name, text in rows]


def _protocol_words(score: ScoreConfig) -> str:
    many = len(score.seeds)
    counts = f"{many} seed{'s' if many > 1 else ''}"
    scorers = f"{2 * many} scorers"
    if score.protocol == "certified":
        counts, scorers = f"2 to {many} seeds", f"4 to {2 * many} scorers (the first 4 are planned below)"
    return f"{score.protocol}: {counts} x 2 folds x {score.evaluations} evaluations, {scorers}"


def _training_words(lora: object, adapter: int | None, settings: TrainingSettings, recipe: Recipe) -> str:
    if lora is None:
        what = "all weights"
    else:
        what = f"LoRA, {readable_count(adapter)} parameters" if adapter else "LoRA"
    processes = recipe.launch.processes
    batch = settings.pairs_per_batch * settings.accumulation * processes
    return (
        f"{what}; beta {settings.beta:g}, learning rate {settings.learning_rate:g}, "
        f"{settings.pairs_per_batch} x {settings.accumulation} x {processes} = {batch:,} pairs an update, "
        f"{settings.epochs:g} epoch{'s' if settings.epochs != 1 else ''}, {settings.optimizer}, computed in "
        f"{settings.compute_dtype}"
    )


def _changed_lines(recipe: Recipe) -> list[str]:
    """What the recipe sets that is not the default anyway, a line a block."""
    least = {"name": recipe.name, "model": {"path": recipe.model.path}, "data": {"train": [{"path": "-"}]}}
    default, given = dump_config(make_recipe(least)), dump_config(recipe)
    for trainer in (default["score"]["trainer"], default["train"]["trainer"]):
        trainer.update(ORIGINAL_DEFAULTS)
    default["evaluate"]["controls"] = dict.fromkeys(recipe.evaluate.controls, default["select"])
    lines = [f"  {key}: {', '.join(changes)}" for key, changes in _changes(default, given, "") if changes]
    return ["", "unlike the defaults", *lines] if lines else []


def _changes(
    default: Mapping[str, Any], given: Mapping[str, Any], key: str
) -> Iterator[tuple[str, list[str]]]:
    """For each block its dotted key, and its own values that differ."""
    yield (
        key or "recipe",
        [
            f"{name} {json.dumps(_without_defaults(value))}"
            for name, value in given.items()
            if value != default.get(name) and not isinstance(value, dict)
        ],
    )
    for name, value in given.items():
        if isinstance(value, dict):
            below = default.get(name)
            path = f"{key}.{name}" if key else name
            yield from _changes(below if isinstance(below, dict) else {}, value, path)


def _without_defaults(value: Any) -> Any:
    """Lists of blocks, the sources of data, without what each leaves open."""
    if not isinstance(value, list):
        return value
    return [
        {key: given for key, given in item.items() if given not in ("", 1.0)}
        if isinstance(item, dict)
        else item
        for item in value
    ]


def _pairs_parts(plan: Plan) -> list[str]:
    def part(name: str, summary: PairsSummary | None) -> str:
        return f"{name}: {summary.describe() if summary else UNKNOWN}"

    parts = [part("pairs", plan.pairs)]
    return [*parts, part("held-out pairs", plan.test)] if plan.recipe.data.test else parts


def _jobs_table(jobs: Sequence[PlannedJob]) -> str:
    header = [
        "job",
        "pairs",
        "held out",
        "updates",
        "evaluated after",
        "tokens",
        "FLOPs",
        "memory",
        "time",
        "",
    ]
    rows = [
        [
            job.name,
            _count(job.pairs),
            _count(job.held_out) if job.kind == "scorer" else "",
            _count(job.updates) if job.kind in ("scorer", "policy") else "",
            _steps(job.evaluated_after) if job.kind == "scorer" else "",
            UNKNOWN if job.tokens is None else readable_count(job.tokens),
            UNKNOWN if job.flops is None else readable_count(job.flops),
            readable_bytes(None if job.memory is None else job.memory.total),
            readable_time(job.seconds),
            "cached" if job.cached else "",
        ]
        for job in jobs
    ]
    # In the table a sign is enough: the lines below it say what is unknown, and why.
    return text_table(header, [["?" if cell == UNKNOWN else cell for cell in row] for row in rows])


def _assumption_lines(plan: Plan) -> list[str]:
    device = plan.device
    number = f"{plan.devices} of " if plan.devices > 1 else ""
    rates = ", ".join(f"{readable(rate, 'FLOP/s')} in {dtype}" for dtype, rate in plan.rates.items())
    measured = f"; matrix multiplication measured here: {rates}" if rates else ""
    return [
        "tokens: what the model computes, padding included; exact where the order is known, else expected; "
        f"{_rows_words(plan)}",
        "FLOPs: 2 per parameter and token, plus attention; training 3 times that, with LoRA about 2 times; "
        "recomputed activations are counted",
        "memory: an estimate, on each process, for weights, gradients, optimizer states and activations",
        f"time: an estimate, on {number}{device.name}, {readable_bytes(device.memory)}{measured}; assumed to "
        f"be used to {ASSUMED_UTILISATION:.0%}; small models use less and take longer",
    ]


def _rows_words(plan: Plan) -> str:
    kinds = {job.kind: job.rows_per_pair for job in plan.jobs}
    rows = {1: "one row a pair", 2: "two rows a pair"}
    forward, trained = rows[kinds["reference"]], rows[kinds["policy"]]
    return f"forward passes take {forward}, the training {trained}"


def _end_lines(plan: Plan) -> list[str]:
    todo = sum(not job.cached for job in plan.jobs)
    return [
        f"to do: {todo} of {len(plan.jobs)} jobs; time: {_about(readable_time(plan.seconds))}"
        + (", answers not counted" if plan.recipe.evaluate.generation.prompts else ""),
        f"disk: {_disk_words(plan.disk)}",
        *(f"note: {line}" for line in plan.notes),
        *(f"unknown: {line}" for line in plan.unknown),
    ]


def _disk_words(disk: Disk | None) -> str:
    if disk is None:
        return UNKNOWN
    passing = f", and up to {readable_bytes(disk.checkpoints)} for checkpoints meanwhile"
    return f"{readable_bytes(disk.results)} for trained weights" + (passing if disk.checkpoints else "")


def _about(text: str) -> str:
    return text if text == UNKNOWN else f"about {text}"


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _steps(steps: tuple[int, ...] | None) -> str:
    return UNKNOWN if steps is None else " ".join(map(str, steps))
