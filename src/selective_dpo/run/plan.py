"""`plan`: what a recipe's run would do and cost. Nothing is trained, nothing is written.

The pairs are prepared as a run does it, in a temporary folder. All else is counted (see `costs`). A time is
given only where the model itself can be timed here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from selective_dpo.config import PROTOCOLS, Recipe
from selective_dpo.config.load import dump_config
from selective_dpo.config.trainer_options import check_recipe_options
from selective_dpo.curriculum.build import rule_of
from selective_dpo.curriculum.import_ import outside_curriculum
from selective_dpo.curriculum.select import select
from selective_dpo.curriculum.table import TABLE, Curriculum
from selective_dpo.data.store import PairsSummary, load_summary, load_tokens
from selective_dpo.difficulty.protocols import split_pairs
from selective_dpo.errors import DataError, ModelError, RunChangedError
from selective_dpo.evaluation.benchmarks import question_file, read_questions
from selective_dpo.evaluation.evaluate import check_evaluation
from selective_dpo.identity import positions_of
from selective_dpo.logprobs.rows import PartLengths, part_lengths
from selective_dpo.report.tables import label_for, text_table
from selective_dpo.run import costs
from selective_dpo.run.costs import (
    UNKNOWN,
    Device,
    Disk,
    JobKind,
    Memory,
    Models,
    RowCounter,
    job_flops,
    readable,
    readable_bytes,
    readable_time,
)
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import MIN_SEEDS, Run, check_run, input_digests, require_same_inputs, trainings
from selective_dpo.run.stages import prepare, scorer_steps
from selective_dpo.storage.artifacts import MANIFEST
from selective_dpo.training.arguments import TrainingSettings, optimizer_steps, training_settings

Found = TypeVar("Found")


@dataclass(frozen=True)
class Job:
    """One job with its costs. What is not known is None."""

    name: str
    """Where its result goes in the run's folder."""
    kind: JobKind
    cached: bool
    """Its result is there already; the run looks at its key, too."""
    memory_bytes: Memory
    tokens: float | None
    """Computed by the model, padding included; training and forward passes."""
    flops: float | None
    seconds: float | None
    pairs: int | None = None
    """Pairs trained on, or whose log-probs are computed; prompts that are answered."""
    held_out: int | None = None
    """Pairs measured at every evaluation."""
    updates: int | None = None
    evaluated_after: tuple[int, ...] | None = None
    """Optimizer steps after which the held-out pairs are measured."""


@dataclass(frozen=True)
class Plan:
    """What a run would do and cost. What is not known is None, and named in `unknown`."""

    recipe: Recipe
    folder: Path
    model: Models | None
    scoring: TrainingSettings | None
    """None where the difficulty is imported."""
    training: TrainingSettings
    pairs: PairsSummary | None
    test_pairs: PairsSummary | None
    jobs: tuple[Job, ...]
    protocols: tuple[PlannedProtocol, ...]
    """What scoring takes and keeps with the recipe's protocol and with the others."""
    device: Device
    measured_flops_per_second: dict[str, float]
    """Of the model's forward pass on this device, by the type that it computes in."""
    disk_bytes: Disk | None
    seconds: float | None
    """Wall time of all jobs that are not cached, sampling of answers left out."""
    unknown: tuple[str, ...]
    refused: str
    """Why a run would refuse to go on in this folder; nothing of what is there is counted then."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        given: dict[str, Any] = _json({name: value for name, value in vars(self).items() if name != "recipe"})
        return {"schema_version": 3, "config": dump_config(self.recipe), **given}


def make_plan(recipe: Recipe) -> Plan:
    """Work out what `run` would do.

    What cannot be had here, such as a hub model while offline, is listed in `unknown`.

    Raises:
        SelectiveDPOError: what a run would refuse, as far as that can be known.
    """
    check_recipe_options(recipe)
    check_evaluation(recipe.evaluate, has_test=bool(recipe.data.test))
    run = Run(recipe, RunDirectory.of(recipe), say=lambda line: None)
    unknown: list[str] = []

    def known(make: Callable[[], Found], what: str, *needed: str) -> Found | None:
        """What `make` gives. What is here and does not work is an error; what is not may be elsewhere."""
        try:
            return make()
        except (ModelError, DataError) as error:
            if all(Path(path).expanduser().exists() for path in needed):
                raise
            unknown.append(f"{what}: {error}")
            return None

    model = (recipe.model.path, recipe.model.tokenizer or recipe.model.path)
    data = [source.path for source in (*recipe.data.train, *recipe.data.test)]
    data += [recipe.curriculum] if recipe.curriculum else []
    data += [select.source for select in recipe.evaluate.controls.values() if select.source]
    device = costs.this_device()
    models = known(lambda: costs.models_of(recipe), "model, pairs, jobs and disk", *model)
    inputs = models and known(lambda: _read_inputs(run, device), "pairs and jobs", *model, *data)
    rates: dict[str, float] = {}
    jobs: tuple[Job, ...] = ()
    if models and inputs:
        if costs.fits(recipe.model, models.sizes, device):
            rates = _measured_rates(recipe, models, device, inputs.pairs.lengths)
        jobs = tuple(_Planner(run, inputs, models, device, rates).jobs())
        unknown += _not_counted(recipe, jobs, is_timed=bool(rates))
    scoring, training = _settings(recipe)
    return Plan(
        recipe=recipe,
        folder=run.folder.root,
        model=models,
        scoring=None if recipe.curriculum else scoring,
        training=training,
        pairs=inputs and inputs.pairs.summary,
        test_pairs=inputs.test.summary if inputs and inputs.test else None,
        jobs=jobs,
        protocols=tuple(planned_protocols(recipe, models, inputs and inputs.passes)),
        device=device,
        measured_flops_per_second=rates,
        disk_bytes=costs.disk_need(recipe, models),
        seconds=_total_seconds(jobs, recipe, device) if jobs else None,
        unknown=tuple(unknown),
        refused=inputs.refused if inputs else "",
    )


def _json(value: Any) -> Any:
    """Records as mappings, with their total where they have one."""
    if is_dataclass(value):
        value = vars(value)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        total = {"total": value.total} if hasattr(value, "total") else {}
        value = {**value._asdict(), **total}
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _settings(recipe: Recipe) -> list[TrainingSettings]:
    """Of the scorers and of the policies."""
    return [
        training_settings(block.trainer, recipe.model, recipe.launch.processes)
        for block in (recipe.score, recipe.train)
    ]


def _measured_rates(recipe: Recipe, models: Models, device: Device, lengths: PartLengths) -> dict[str, float]:
    """FLOP/s of forward passes over rows of the median length, by type."""
    longest = max(1, int(np.median(lengths.padded_P)))
    return {
        name: costs.measured_rate(recipe.model, models.sizes, device, longest=longest, compute_dtype=name)
        for name in sorted({settings.compute_dtype for settings in _settings(recipe)})
    }


def _total_seconds(jobs: Sequence[Job], recipe: Recipe, device: Device) -> float | None:
    """Wall time of what is to do; scorers, and policies, run `launch.workers` at a time on as many GPUs.

    With several processes each, it is scorers only.
    """
    alone = ("reference",) if recipe.launch.processes == 1 else ("reference", "policy")
    total = 0.0
    for kinds in (("scorer",), ("policy",), ("reference", "held-out")):
        wanted = [job.seconds for job in jobs if job.kind in kinds and not job.cached]
        known = [seconds for seconds in wanted if seconds is not None]
        if len(known) < len(wanted):
            return None
        workers = recipe.launch.workers if device.kind == "cuda" and kinds[0] not in alone else 1
        total += sum(known) / max(1, min(workers, len(known)))
    return total


def _not_counted(recipe: Recipe, jobs: Sequence[Job], *, is_timed: bool) -> Iterator[str]:
    for job in jobs:
        if job.kind == "policy" and job.pairs is None:
            yield f"pairs of {job.name}: a threshold selects after scoring"
    if not is_timed:
        yield "time: only a model in a local folder that fits into memory is measured"
    if recipe.train.trainer.get("eval_strategy", "no") != "no":
        yield "train: the evaluations of eval_strategy, which are not counted"
    if recipe.evaluate.generation.prompts:
        yield "time of the answers: sampling waits for memory more than for multiplications"
    for name, benchmark in recipe.evaluate.benchmarks.items():
        questions = len(read_questions(name, question_file(name, benchmark.source)))
        policies = 1 + len(recipe.evaluate.controls) + len(recipe.evaluate.training_seeds)
        yield f"answers of {policies + 1} policies to {questions:,} questions of {name}"
    if options := recipe.evaluate.language_judge:
        generation = recipe.evaluate.generation
        policies = 1 + len(recipe.evaluate.controls) + len(recipe.evaluate.training_seeds)
        # Both orders of each sample against each of the starting model's samples.
        questions = 2 * generation.prompts * generation.samples**2 * (policies + 1)
        tokens = questions * (recipe.data.max_prompt_length + 2 * generation.max_new_tokens + 100)
        price = f", at most {tokens * options.price / 1e6:,.2f}" if options.price else ""
        yield f"cost of the judge {options.model}: up to {questions:,} questions{price}"
    if recipe.evaluate.judge == "reward-model":
        yield f"cost of the judge {recipe.evaluate.reward_model}"


# ----------------------------------------------------------------------------------------------------
# What the run would work on.


class KeptPairs(NamedTuple):
    """The prepared pairs of one folder; columns of equal length P."""

    summary: PairsSummary
    pair_ids: list[str]
    prompt_ids: list[str]
    lengths: PartLengths

    def lengths_of(self, pair_ids: Iterable[str]) -> PartLengths:
        """Those of some pairs, in their order."""
        at = positions_of(list(pair_ids), self.pair_ids, what="plan")
        return PartLengths(*(part_P[at] for part_P in self.lengths))


class ScoringPasses(NamedTuple):
    """Tokens of one pass over all pairs; protocols and scorers are multiples of these."""

    forward: float
    epoch: float
    """Of both scorers of a seed: each pair is in one of their halves. One random order is drawn."""


class Inputs(NamedTuple):
    """What a run would work on."""

    pairs: KeptPairs
    test: KeptPairs | None
    orders: dict[str, list[str]]
    """The pairs that each policy is trained on, in order, where that is known."""
    counter: RowCounter
    passes: ScoringPasses
    refused: str
    """Why a run would refuse to go on from what is in its folder; else ""."""


def _read_inputs(run: Run, device: Device) -> Inputs:
    """Prepared pairs: the published ones where a run would take them, else made in a temporary folder.

    Raises:
        ModelError, DataError, TemplateError, ConfigError: as for a run.
    """
    folder, recipe, refused = run.folder, run.recipe, ""
    try:
        folder.require_same_recipe(recipe)
        if folder.is_claimed:
            require_same_inputs(run, input_digests(run))
    except RunChangedError as error:
        refused = str(error)
    wanted = [folder.pairs, folder.test_pairs] if recipe.data.test else [folder.pairs]
    with tempfile.TemporaryDirectory() as scratch:
        if refused or not all((at / MANIFEST).is_file() for at in wanted):
            folder = RunDirectory(Path(scratch) / "run")
            prepare(Run(recipe, folder, say=lambda line: None))
        pairs = _kept_pairs(folder.pairs)
        test = _kept_pairs(folder.test_pairs) if recipe.data.test else None
    orders: dict[str, list[str]] = {}
    for name, training in trainings(run).items():
        if (training.curriculum / TABLE).is_file() and not refused:
            orders[name] = Curriculum.load(training.curriculum).order
        elif (outside := run.outside_of(training.select)) is not None:
            ids, prompt_ids = (pa.chunked_array([names]) for names in (pairs.pair_ids, pairs.prompt_ids))
            chosen = training.select.model_copy(update={"source": ""})
            orders[name] = outside_curriculum(outside, ids, prompt_ids, chosen).order
    counter = RowCounter(recipe, device.kind)
    return Inputs(pairs, test, orders, counter, scoring_passes(recipe, pairs.lengths, counter), refused)


def _kept_pairs(folder: Path) -> KeptPairs:
    tokens = load_tokens(folder)
    pair_ids, prompt_ids = (list(tokens[name]) for name in ("pair_id", "prompt_id"))
    return KeptPairs(load_summary(folder), pair_ids, prompt_ids, part_lengths(tokens))


def scoring_passes(recipe: Recipe, lengths: PartLengths, counter: RowCounter) -> ScoringPasses:
    """The passes of `recipe.score` over pairs of these lengths."""
    return ScoringPasses(
        counter.forward(lengths, recipe.score.tokens_per_batch),
        counter.training(_shuffled(lengths), _settings(recipe)[0]),
    )


def _shuffled(lengths: PartLengths) -> PartLengths:
    order_P = np.random.default_rng(0).permutation(len(lengths.prompt_P))
    return PartLengths(*(part_P[order_P] for part_P in lengths))


# ----------------------------------------------------------------------------------------------------
# The jobs.


@dataclass(frozen=True)
class _Planner:
    """Makes the jobs of a run."""

    run: Run
    inputs: Inputs
    models: Models
    device: Device
    rates: Mapping[str, float]

    def jobs(self) -> Iterator[Job]:
        """Every job, in the order they are done.

        Raises:
            ConfigError: too few updates for the evaluations, or a selection that fits no pair.
            DataError: too few prompts to halve.
        """
        recipe, folder, (pairs, test, orders, *_) = self.run.recipe, self.run.folder, self.inputs
        referenced = pairs.lengths
        if recipe.curriculum:  # only the pairs that are trained on have a reference
            referenced = pairs.lengths_of({name for order in orders.values() for name in order})
        if recipe.score.protocol == "one-step" and not recipe.curriculum:
            # The first split's gradients, and the reference from the same forward passes.
            epoch = self.inputs.passes.epoch
            count = len(pairs.pair_ids)
            yield self._job(
                "scorer", folder.reference, trained=epoch, forwarded=0, lengths=referenced, pairs=count
            )
        else:
            yield self._forward("reference", folder.reference, referenced)
        if test:
            yield self._forward("reference", folder.test_reference, test.lengths)
        yield from self._scorers()
        yield from self._check()
        yield from self._policies()
        policies = len(trainings(self.run)) + 1  # the starting model is evaluated too
        if test:
            yield self._forward("held-out", folder.evaluation, test.lengths, times=policies)
        generation = recipe.evaluate.generation
        if generation.prompts:  # every answer at its longest, after the longest prompt
            longest = recipe.data.max_prompt_length + generation.max_new_tokens
            tokens = generation.prompts * generation.samples * policies * longest
            yield self._job("answers", folder.evaluation, forwarded=tokens, pairs=generation.prompts)

    def _forward(self, kind: JobKind, folder: Path, lengths: PartLengths, times: int = 1) -> Job:
        block = self.run.recipe.evaluate if kind == "held-out" else self.run.recipe.score
        tokens = times * self.inputs.counter.forward(lengths, block.tokens_per_batch)
        return self._job(kind, folder, forwarded=tokens, lengths=lengths, pairs=len(lengths.prompt_P))

    def _scorers(self) -> Iterator[Job]:
        recipe, pairs, passes = self.run.recipe, self.inputs.pairs, self.inputs.passes
        epochs, all_pairs = _settings(recipe)[0].epochs, len(pairs.pair_ids)
        for scorer in self.run.scorer_runs:
            trained, held_out = map(len, split_pairs(pairs.prompt_ids, scorer))
            if recipe.score.protocol == "one-step":
                yield self._job(
                    "scorer",
                    self.run.folder.scores(scorer),
                    trained=0
                    if scorer.seed == recipe.score.seeds[0]
                    else passes.epoch * held_out / all_pairs,
                    forwarded=passes.forward * held_out / all_pairs,
                    lengths=pairs.lengths,
                    pairs=trained,
                    held_out=held_out,
                )
                continue
            steps = scorer_steps(recipe, scorer, trained, recipe.launch.processes)
            yield self._job(
                "scorer",
                self.run.folder.scores(scorer),
                trained=passes.epoch * epochs * trained / all_pairs,
                forwarded=passes.forward * recipe.score.evaluations * held_out / all_pairs,
                lengths=pairs.lengths,
                pairs=trained,
                held_out=held_out,
                updates=steps.updates,
                evaluated_after=steps.evaluated_after,
            )

    def _check(self) -> Iterator[Job]:
        """The pair of scorers of `score.check`, and the reference of their pairs."""
        recipe, passes, all_pairs = self.run.recipe, self.inputs.passes, len(self.inputs.pairs.pair_ids)
        if not recipe.score.check or recipe.curriculum:
            return
        settings = _settings(recipe)[0]
        share = min(1.0, recipe.score.check / all_pairs)
        half = round(share * all_pairs / 2)
        checked = check_run(self.run)
        for scorer in checked.scorer_runs:
            yield self._job(
                "scorer",
                checked.folder.scores(scorer),
                trained=passes.epoch * settings.epochs * share / 2,
                # Half of the reference, and the scorer's evaluations of its half.
                forwarded=passes.forward * (1 + checked.recipe.score.evaluations) * share / 2,
                lengths=self.inputs.pairs.lengths,
                pairs=half,
                held_out=half,
                updates=optimizer_steps(half, settings, recipe.launch.processes),
            )

    def _policies(self) -> Iterator[Job]:
        pairs, settings = self.inputs.pairs, _settings(self.run.recipe)[1]
        all_pairs = len(pairs.pair_ids)

        @cache
        def epoch_of_all() -> int:
            return self.inputs.counter.training(_shuffled(pairs.lengths), settings)

        for name, training in trainings(self.run).items():
            epoch: float
            if (order := self.inputs.orders.get(name)) is not None:
                count, epoch = len(order), self.inputs.counter.training(pairs.lengths_of(order), settings)
            elif training.select.rule == "below":  # a threshold needs the scores
                yield self._job("policy", training.policy)
                continue
            else:  # as many pairs of an average length
                ranks_P = np.arange(all_pairs)
                selection = select(ranks_P.astype(float), ranks_P.astype(np.str_), rule_of(training.select))
                count = int(selection.selected_P.sum())
                epoch = epoch_of_all() * count / all_pairs
            yield self._job(
                "policy",
                training.policy,
                trained=epoch * settings.epochs,
                forwarded=0,
                lengths=pairs.lengths,
                pairs=count,
                updates=optimizer_steps(count, settings, self.run.recipe.launch.processes),
            )

    def _job(
        self,
        kind: JobKind,
        folder: Path,
        *,
        trained: float = 0,
        forwarded: float | None = None,
        lengths: PartLengths | None = None,
        **counts: Any,
    ) -> Job:
        recipe, models = self.run.recipe, self.models
        name = folder.relative_to(self.run.folder.root).as_posix()
        flops = seconds = None
        if forwarded is not None:
            flops = job_flops(recipe, models, kind, trained, forwarded)
            # Sampling waits for memory, not for multiplications: its FLOPs say little about its time.
            if self.rates and kind != "answers":
                block = costs.block_of(recipe, kind)
                dtype = training_settings(block.trainer, recipe.model, recipe.launch.processes).compute_dtype
                # Processes on one CPU share its cores, so more of them are not faster.
                processes = recipe.launch.processes if self.device.kind == "cuda" else 1
                seconds = flops / (self.rates[dtype] * processes)
        return Job(
            name=f"{name}: {kind}" if kind in ("held-out", "answers") else name,
            kind=kind,
            cached=not self.inputs.refused and (folder / MANIFEST).is_file(),
            tokens=None if forwarded is None else trained + forwarded,
            flops=flops,
            memory_bytes=costs.job_memory(recipe, models, kind, lengths),
            seconds=seconds,
            **counts,
        )


# ----------------------------------------------------------------------------------------------------
# The protocols side by side.


class Passes(NamedTuple):
    """How often scoring takes all pairs through the model."""

    forward: float
    """Without a gradient: once for the reference, and for the held-out evaluations."""
    training: float
    """Forward and backward."""


def _of_trained_scorers(seeds: int, evaluations: int, epochs: float) -> Passes:
    return Passes(1 + seeds * evaluations, seeds * epochs)


def _of_one_step(splits: int, evaluations: int, epochs: float) -> Passes:
    # The gradient pass of the first split is the reference, too. It is counted as if all pairs were in it.
    return Passes(splits, splits)


PASSES: dict[str, Callable[[int, int, float], Passes]] = {
    **dict.fromkeys(PROTOCOLS, _of_trained_scorers),
    "one-step": _of_one_step,
}
"""The passes of each protocol, from its seeds, its evaluations and the epochs of a scorer's training."""

MIN_UPDATES = 10
"""Of a scorer; with fewer, `plan` warns."""

MEASURED_ON = "dpo-mix-7k with Qwen2.5 of 1.5B, 7B and 14B"

MEASURED = {
    (1, 2): {"spearman": (0.9969, 0.9981), "overlap": (0.977, 0.988)},
    (2, 2): {"spearman": (0.9984, 0.9993), "overlap": (0.987, 0.993)},
}
"""Agreement with `paper`, by seeds and evaluations of each scorer: rank correlation of the difficulties (the
mean over all records), and the share of the easiest half that is also in that of `paper`.

The least and the largest of nine values: three models, and whichever one (or two) of the three seeds. Source:
the original authors' records, of which seeds and evaluations were left out; docs/protocols.md says how, and
tests/unit/test_plan_protocols.py computes them from the records.
"""


@dataclass(frozen=True)
class PlannedProtocol:
    """What scoring all pairs takes with one protocol, as if nothing were there yet, and what it keeps."""

    protocol: str
    part: str
    """Of `certified`, which may stop early: "at least" or "at most"; else ""."""
    own: bool
    """The recipe asks for it."""
    seeds: tuple[int, ...]
    evaluations: int
    forward_passes: float
    """Of each pair through the model: the reference's, the training's, those of every held-out evaluation."""
    backward_passes: float
    nt: float
    """Arithmetic over (parameters x tokens of all pairs); see docs/protocols.md."""
    dpo_epochs: float
    """The same over that of one DPO epoch on all pairs, with `train`'s settings and its reference."""
    tokens: float | None
    flops: float | None
    expected_agreement: dict[str, tuple[float, float]] | None
    """With `paper`; None where nothing was measured."""


def planned_protocols(
    recipe: Recipe, models: Models | None, work: ScoringPasses | None
) -> Iterator[PlannedProtocol]:
    """The published protocols, and the recipe's own in its place among them; none where the difficulty is
    imported. `certified` stands there twice: with the fewest seeds and with all."""
    if recipe.curriculum:
        return
    score, train = _settings(recipe)
    measured = MEASURED if recipe.select.aggregate == "mean" else {}
    backward_nt = _backward_nt(score, is_full=recipe.score.lora is None)
    epoch_nt = 4 + _backward_nt(train, is_full=recipe.train.lora is None)
    for name, part, seeds, evaluations in _compared(recipe):
        passes = PASSES[name](len(seeds), evaluations, score.epochs)
        forward = passes.forward + passes.training
        nt = 2 * forward + backward_nt * passes.training
        tokens = flops = None
        if work is not None and models is not None:
            trained, evaluated = work.epoch * passes.training, work.forward * (passes.forward - 1)
            tokens = work.forward + trained + evaluated
            flops = job_flops(recipe, models, "reference", 0, work.forward)
            flops += job_flops(recipe, models, "scorer", trained, evaluated)
        yield PlannedProtocol(
            protocol=name,
            part=part,
            own=name == recipe.score.protocol,
            seeds=seeds,
            evaluations=evaluations,
            forward_passes=forward,
            backward_passes=passes.training,
            nt=nt,
            dpo_epochs=nt / epoch_nt,
            tokens=tokens,
            flops=flops,
            expected_agreement=measured.get((len(seeds), evaluations)),
        )


def _compared(recipe: Recipe) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Protocol, part, seeds, evaluations."""
    for name, published in PROTOCOLS.items():
        own = name == recipe.score.protocol
        seeds, evaluations = (recipe.score.seeds, recipe.score.evaluations) if own else published
        if name == "certified":
            yield name, "at least", seeds[:MIN_SEEDS], evaluations
            yield name, "at most", seeds, evaluations
        elif own or name != "custom":
            yield name, "", seeds, evaluations


def _backward_nt(settings: TrainingSettings, *, is_full: bool) -> int:
    """Of one backward pass; frozen weights need no gradient of their own (see `costs`)."""
    return (4 if is_full else 2) + (2 if settings.recomputes else 0)


# ----------------------------------------------------------------------------------------------------
# The plan as text.


def plan_text(plan: Plan) -> str:
    """All of a plan."""
    pairs = {"pairs": plan.pairs, **({"held-out pairs": plan.test_pairs} if plan.recipe.data.test else {})}
    parts = [
        f"plan of {plan.recipe.name}, in {plan.folder}: nothing is trained or written",
        "\n".join(f"{name:<11}{text}" for name, text in _settings_rows(plan)),
        *(f"{name}: {summary.describe() if summary else UNKNOWN}" for name, summary in pairs.items()),
        _jobs_text(plan),
        protocols_text(plan),
        "\n".join(_end_lines(plan)),
    ]
    return "\n\n".join(part for part in parts if part)


def _settings_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, models, score = plan.recipe, plan.model, plan.recipe.score
    size = f"{readable(models.sizes.parameters)} parameters" if models else "size unknown"
    yield "model", f"{recipe.model.path}: {size}, {recipe.model.dtype}, {recipe.model.attention} attention"
    if plan.scoring is None:
        yield "difficulty", f"imported from {recipe.curriculum}: nothing is scored"
    else:
        seeds = f"{len(score.seeds)} seed(s)"
        if score.protocol == "certified":
            seeds = f"2 to {len(score.seeds)} seeds (the first 2 are planned below)"
        if score.protocol == "one-step":
            yield "scoring", f"one-step: {score.splits} split(s) into folds, one step for each of them"
            yield "steps", _step_text(plan, plan.scoring, models and models.scorer_adapter)
        else:
            yield "scoring", f"{score.protocol}: {seeds} x 2 folds x {score.evaluations} evaluations"
            yield "scorers", _training_text(plan, plan.scoring, score.lora, models and models.scorer_adapter)
    yield "selection", label_for(recipe.select)
    yield "training", _training_text(plan, plan.training, recipe.train.lora, models and models.policy_adapter)


def _step_text(plan: Plan, settings: TrainingSettings, adapter: int | None) -> str:
    lora = plan.recipe.score.lora
    what = "all weights" if lora is None else f"LoRA, {readable(adapter)} parameters" if adapter else "LoRA"
    return f"{what}; beta {settings.beta:g}, no learning rate, computed in {settings.compute_dtype}"


def _training_text(plan: Plan, settings: TrainingSettings, lora: object, adapter: int | None) -> str:
    what = "all weights"
    if lora is not None:
        what = f"LoRA, {readable(adapter)} parameters" if adapter else "LoRA"
    processes = plan.recipe.launch.processes
    batch = settings.pairs_per_batch * settings.accumulation * processes
    return (
        f"{what}; beta {settings.beta:g}, learning rate {settings.learning_rate:g}, "
        f"{settings.pairs_per_batch} x {settings.accumulation} x {processes} = {batch:,} pairs an update, "
        f"{settings.epochs:g} epoch(s), {settings.optimizer}, computed in {settings.compute_dtype}"
    )


def _jobs_text(plan: Plan) -> str:
    if not plan.jobs:
        return f"jobs: {UNKNOWN}"
    header = ["job", "pairs", "held out", "updates", "evaluated after"]
    header += ["tokens", "FLOPs", "memory", "time", ""]
    rows = [
        [
            job.name,
            *("" if count is None else f"{count:,}" for count in (job.pairs, job.held_out, job.updates)),
            " ".join(map(str, job.evaluated_after or ())),
            readable(job.tokens),
            readable(job.flops),
            readable_bytes(job.memory_bytes.total),
            readable_time(job.seconds),
            "cached" if job.cached else "",
        ]
        for job in plan.jobs
    ]
    rates = plan.measured_flops_per_second.items()
    speed = ", ".join(f"{readable(rate, 'FLOP/s')} in {name}" for name, rate in rates)
    device = f"{plan.device.name}, {readable_bytes(plan.device.memory)}"
    legend = f"""
tokens: what the model computes, padding included; in a random order where that of the training is not known
FLOPs: 2 per parameter and token, attention left out; training 3 times that, with LoRA about 2 times, and
  recomputed activations
memory: an estimate, on each process, for weights, gradients, optimizer states and activations
time: FLOPs over the speed of the model's forward pass, {speed or "not"} measured here, on {device}"""
    return text_table(header, rows) + legend


def protocols_text(plan: Plan) -> str:
    """The table of protocols, and below it what its columns mean; "" where there are none."""
    if not plan.protocols:
        return ""
    header = ["scoring by", "seeds x evaluations", "forward", "backward", "arithmetic", "DPO epochs"]
    header += ["tokens", "FLOPs", "Spearman", "overlap"]
    rows = []
    for each in plan.protocols:
        agreement = [UNKNOWN, UNKNOWN] if each.protocol != "paper" else ["itself", "itself"]
        if each.expected_agreement and each.protocol != "paper":
            ranges = each.expected_agreement.values()
            agreement = [f"{least:.4g} .. {largest:.4g}" for least, largest in ranges]
        rows.append(
            [
                ", ".join(filter(None, (each.protocol, each.part))) + (" (this recipe)" if each.own else ""),
                f"{len(each.seeds)} x {each.evaluations}",
                f"{each.forward_passes:.4g} P",
                f"{each.backward_passes:.4g} P",
                f"{each.nt:.4g} NT",
                f"{each.dpo_epochs:.3g}",
                readable(each.tokens),
                readable(each.flops),
                *agreement,
            ]
        )
    pairs = f" = {plan.pairs.kept:,}" if plan.pairs else ""
    legend = f"""
forward, backward: passes of all P{pairs} pairs through the model, each with both completions
arithmetic: N parameters, T tokens in all pairs, recomputed activations included
DPO epochs: the arithmetic over that of one DPO epoch on all pairs, with the settings of `train`
tokens, FLOPs: of all the scoring, cached or not, counted as for the jobs
Spearman, overlap: agreement with `paper`, least .. largest as measured on {MEASURED_ON};
  overlap of the easiest half, docs/protocols.md has others. Noisier scorers keep less. ?: not measured"""
    return text_table(header, rows) + legend


def _few_updates(plan: Plan) -> Iterator[str]:
    """A warning of scorers that will hardly move: their difficulty would be noise."""
    updates = [job.updates for job in plan.jobs if job.kind == "scorer" and job.updates]
    if updates and min(updates) < MIN_UPDATES:
        yield (
            f"warning: a scorer makes {min(updates)} updates, fewer than {MIN_UPDATES}: it will hardly move, "
            "and difficulty will be mostly noise; use score.protocol one-step, or smaller batches, more "
            "epochs, more pairs"
        )


def _end_lines(plan: Plan) -> Iterator[str]:
    if plan.jobs:
        todo = sum(not job.cached for job in plan.jobs)
        time = UNKNOWN if plan.seconds is None else f"about {readable_time(plan.seconds)}"
        without = ", answers not counted" if plan.recipe.evaluate.generation.prompts else ""
        yield f"to do: {todo} of {len(plan.jobs)} jobs; time: {time}{without}"
    disk = UNKNOWN
    if plan.disk_bytes is not None:
        disk = f"{readable_bytes(plan.disk_bytes.results)} for trained weights"
        if plan.disk_bytes.checkpoints:
            disk += f", and up to {readable_bytes(plan.disk_bytes.checkpoints)} for checkpoints meanwhile"
    yield f"disk: {disk}"
    yield from _few_updates(plan)
    if plan.refused:
        yield f"a run would refuse this: {plan.refused}"
    yield from (f"unknown: {line}" for line in plan.unknown)
