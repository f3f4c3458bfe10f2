"""`plan`: what a recipe's run would do and cost. Nothing is trained, nothing is written.

The pairs are prepared as a run does it, in a temporary folder. All else is counted: how often a pair goes
through the model, with how many tokens, and what a model of this size costs for them (see `costs`). A time
is given only where the model itself can be timed here.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selective_dpo.config import PROTOCOLS, ModelConfig, Recipe, SelectConfig
from selective_dpo.config.load import dump_config
from selective_dpo.config.trainer_options import check_recipe_options
from selective_dpo.curriculum.build import rule_of
from selective_dpo.curriculum.import_ import outside_curriculum
from selective_dpo.curriculum.select import rank_window, size_of
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.store import PairsSummary, load_summary, load_tokens
from selective_dpo.difficulty.protocols import ScorerRun, split_pairs
from selective_dpo.errors import DataError, ModelError, RunChangedError
from selective_dpo.evaluation.evaluate import check_evaluation, policy_names
from selective_dpo.evaluation.results import SELECTED
from selective_dpo.identity import positions_of
from selective_dpo.logprobs.rows import PartLengths, part_lengths
from selective_dpo.report.tables import DEFAULT_FRACTION, label_for, text_table
from selective_dpo.run import costs
from selective_dpo.run.costs import (
    UNKNOWN,
    Device,
    Disk,
    JobKind,
    Memory,
    Models,
    TrainingSettings,
    Work,
    readable,
    readable_bytes,
    readable_time,
)
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import (
    MIN_SEEDS,
    Run,
    curriculum_key,
    evaluation_key,
    has_curriculum,
    imported_inputs,
    prepared_key,
    record_digests,
    reference_key,
    scorer_job,
    training_job,
    trainings,
)
from selective_dpo.run.stages import prepare, scorer_steps
from selective_dpo.storage.artifacts import MANIFEST, is_complete

Found = TypeVar("Found")


@dataclass(frozen=True)
class Job:
    """One job with its costs. What is not known is None."""

    name: str
    """Where its result goes in the run's folder."""
    kind: JobKind
    cached: bool
    """Its result is there already, made from the same inputs."""
    pairs: int | None = None
    """Pairs trained on, or whose log-probs are computed; prompts that are answered."""
    held_out: int | None = None
    """Pairs measured at every evaluation."""
    updates: int | None = None
    evaluated_after: tuple[int, ...] | None = None
    """Optimizer steps after which the held-out pairs are measured."""
    tokens: float | None = None
    """Computed by the model, padding included; training and forward passes."""
    flops: float | None = None
    memory_bytes: Memory | None = None
    seconds: float | None = None


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
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        given: dict[str, Any] = _json({name: value for name, value in vars(self).items() if name != "recipe"})
        return {"schema_version": 2, "config": dump_config(self.recipe), **given}


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
    has_model, has_data = _has_model(recipe.model), _has_data(recipe)
    what = "parameters, so FLOPs, memory, disk and time"
    models = _known(lambda: costs.models_of(recipe), what, unknown, is_here=has_model)
    what = f"which results in {run.folder.root} can be used again"
    cached = frozenset[Path]()
    if (run.folder.pairs / MANIFEST).is_file():
        found = _known(lambda: complete_results(run), what, unknown, is_here=has_model and has_data)
        cached = found or cached
    what = "pairs and tokens, so updates, FLOPs and time"
    inputs = _known(lambda: _read_inputs(run, cached), what, unknown, is_here=has_model and has_data)
    device = costs.this_device()
    rates = _measured_rates(recipe, models, device, inputs)
    jobs = tuple(_Jobs(run, inputs, models, cached, device, rates).all())
    score, train = _settings(recipe)
    return Plan(
        recipe=recipe,
        folder=run.folder.root,
        model=models,
        scoring=None if recipe.curriculum else score,
        training=train,
        pairs=inputs.pairs.summary if inputs else None,
        test_pairs=inputs.test.summary if inputs and inputs.test else None,
        jobs=jobs,
        protocols=tuple(planned_protocols(recipe, inputs.pairs if inputs else None, models)),
        device=device,
        measured_flops_per_second=rates,
        disk_bytes=costs.disk_need(recipe, models),
        seconds=_total_seconds(jobs, recipe, device),
        unknown=(*unknown, *_unknown_parts(recipe, jobs, inputs, is_timed=bool(rates) or models is None)),
        notes=tuple(_notes(run)),
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


# ----------------------------------------------------------------------------------------------------
# What the run would work on, as far as it can be had here.


class KeptPairs(NamedTuple):
    """The prepared pairs of one folder; columns of equal length P."""

    summary: PairsSummary
    pair_ids: list[str]
    prompt_ids: list[str]
    parts: PartLengths
    """Tokens of prompt, chosen and rejected."""

    def lengths(self, rows_per_pair: int) -> NDArray[np.int64]:
        """Tokens of each pair's row, or of the longer of its two: [P]."""
        return self.parts.packed_P if rows_per_pair == 1 else self.parts.padded_P


class Inputs(NamedTuple):
    """What a run would work on."""

    pairs: KeptPairs
    test: KeptPairs | None
    orders: dict[str, list[str]]
    """The pairs that each policy is trained on, in order, where that is known."""


def _known(make: Callable[[], Found], what: str, unknown: list[str], *, is_here: bool) -> Found | None:
    """What `make` gives. What is here and does not work is an error; what is not may be somewhere else."""
    try:
        return make()
    except (ModelError, DataError) as error:
        if is_here:
            raise
        unknown.append(f"{what}: {error}")
        return None


def _has_model(config: ModelConfig) -> bool:
    return all(Path(path).is_dir() for path in (config.path, config.tokenizer or config.path))


def _has_data(recipe: Recipe) -> bool:
    paths = [source.path for source in (*recipe.data.train, *recipe.data.test)]
    paths += [recipe.curriculum] if recipe.curriculum else []
    return all(Path(path).expanduser().exists() for path in paths)


def _read_inputs(run: Run, cached: frozenset[Path]) -> Inputs:
    """Prepared pairs: the published ones, else made in a temporary folder.

    Raises:
        ModelError, DataError, TemplateError, ConfigError: as for a run.
    """
    published = {run.folder.pairs, run.folder.test_pairs} if run.recipe.data.test else {run.folder.pairs}
    with tempfile.TemporaryDirectory() as scratch:
        prepared = run
        if not published <= cached:
            prepared = Run(run.recipe, RunDirectory(Path(scratch) / "run"), say=lambda line: None)
            prepare(prepared)
        pairs = _kept_pairs(prepared.folder.pairs)
        test = _kept_pairs(prepared.folder.test_pairs) if run.recipe.data.test else None
    return Inputs(pairs, test, dict(_known_orders(run, pairs, cached)))


def _kept_pairs(folder: Path) -> KeptPairs:
    tokens = load_tokens(folder)
    ids = tokens.select_columns(["pair_id", "prompt_id"]).with_format("arrow")[:]
    pair_ids, prompt_ids = (ids[name].to_pylist() for name in ("pair_id", "prompt_id"))
    return KeptPairs(load_summary(folder), pair_ids, prompt_ids, part_lengths(tokens))


def _known_orders(run: Run, pairs: KeptPairs, cached: frozenset[Path]) -> Iterator[tuple[str, list[str]]]:
    """Of complete curricula, and of those to be made from an imported difficulty."""
    for name, training in trainings(run).items():
        if training.curriculum in cached:
            yield name, Curriculum.load(training.curriculum).order
        elif run.outside is not None:
            select, _ = run.arms[name if training.seed is None else SELECTED]
            ids, prompt_ids = (pa.chunked_array([names]) for names in (pairs.pair_ids, pairs.prompt_ids))
            yield name, outside_curriculum(run.outside, ids, prompt_ids, select).order


# ----------------------------------------------------------------------------------------------------
# Which results are there already.


class _Result(NamedTuple):
    """A stage's result."""

    folder: Path
    inputs: frozenset[Path]
    """The results that it is made from."""
    is_complete: Callable[[], bool]


def complete_results(run: Run) -> frozenset[Path]:
    """The folders (for a curriculum, the one that holds it) that the run would use as they are.

    A result whose inputs would be made again is not among them, even if it came out the same. Asking changes
    nothing.

    Raises:
        ModelError, DataError: tokenizer or data cannot be had, so their digests are not known.
    """
    found: set[Path] = set()
    for result in _results(run):
        if result.inputs <= found and result.is_complete():
            found.add(result.folder)
    return frozenset(found)


def _results(run: Run) -> Iterator[_Result]:
    """All results of a run, each after what it is made from."""
    data, folder = run.recipe.data, run.folder

    def result(at: Path, inputs: Iterable[Path], key: Callable[[], str]) -> _Result:
        # A key is worked out only where there is a manifest.
        return _Result(
            at, frozenset(inputs), lambda: (at / MANIFEST).is_file() and is_complete(at, key=key())
        )

    def scorer_key(scorer: ScorerRun) -> str:
        return scorer_job(run, scorer).key

    def policy_key(name: str) -> str:
        return training_job(run, name).key

    def is_built(select: SelectConfig, at: Path) -> bool:
        digests = record_digests([scorer_job(run, scorer) for scorer in run.scorer_runs])
        inputs = imported_inputs(run, run.outside.digest) if run.outside else digests
        return has_curriculum(at, curriculum_key(inputs, select))

    pairs = {folder.pairs: folder.reference}
    yield result(folder.pairs, (), lambda: prepared_key(run, data.train, exclude=None))
    if data.test:
        pairs[folder.test_pairs] = folder.test_reference
        yield result(
            folder.test_pairs, [folder.pairs], lambda: prepared_key(run, data.test, exclude=folder.pairs)
        )
    scores = [run.folder.scores(scorer) for scorer in run.scorer_runs]
    curricula = [
        _Result(at, frozenset([*pairs, *scores]), partial(is_built, select, at))
        for select, at in run.arms.values()
    ]
    # With an imported difficulty the reference is that of the selected pairs.
    selected = [each.folder for each in curricula] if run.outside is not None else []
    references = [
        result(reference, [*pairs, *selected], partial(reference_key, run, at))
        for at, reference in pairs.items()
    ]
    yield from [*curricula, *references] if run.outside is not None else references
    for scorer in run.scorer_runs:
        yield result(run.folder.scores(scorer), pairs.values(), partial(scorer_key, scorer))
    if run.outside is None:
        yield from curricula
    policies = trainings(run)
    for name, training in policies.items():
        yield result(training.policy, [training.curriculum, *pairs.values()], partial(policy_key, name))
    trained = [training.policy for training in policies.values()]
    yield result(folder.evaluation, trained, lambda: evaluation_key(run))


# ----------------------------------------------------------------------------------------------------
# The jobs.


class _Jobs:
    """The jobs of a run, and what each one has to compute."""

    def __init__(
        self,
        run: Run,
        inputs: Inputs | None,
        models: Models | None,
        cached: frozenset[Path],
        device: Device,
        rates: Mapping[str, float],
    ) -> None:
        self._run, self._recipe, self._inputs, self._models = run, run.recipe, inputs, models
        self._cached, self._device, self._rates = cached, device, rates
        self._rows = models.rows_per_pair if models else 2
        self._lengths_P = None if inputs is None else inputs.pairs.lengths(self._rows)

    def all(self) -> Iterator[Job]:
        """Every job, in the order they are done.

        Raises:
            ConfigError: too few updates for the evaluations, or a selection that fits no pair.
            DataError: too few prompts to halve.
        """
        recipe, folder, kinds = self._recipe, self._run.folder, costs.job_kinds(self._recipe)
        test = self._inputs.test.lengths(self._rows) if self._inputs and self._inputs.test else None
        yield self._forward("reference", folder.reference, self._referenced())
        if "held-out" in kinds:
            yield self._forward("reference", folder.test_reference, test)
        yield from self._scorers()
        yield from self._policies()
        policies = len(trainings(self._run)) + 1  # the starting model is evaluated too
        if "held-out" in kinds:
            yield self._forward("held-out", folder.evaluation, test, times=policies)
        if "answers" in kinds:
            # Every answer at its longest, after the longest prompt.
            generation = recipe.evaluate.generation
            longest = recipe.data.max_prompt_length + generation.max_new_tokens
            answers = generation.prompts * generation.samples * policies
            work = Work(float(longest), float(longest**2)).times(answers)
            yield self._job("answers", folder.evaluation, forwarded=work, pairs=generation.prompts)

    def _referenced(self) -> NDArray[np.int64] | None:
        """Lengths of the pairs whose reference is computed: all, or with an imported difficulty those
        trained on."""
        if self._inputs is None or self._lengths_P is None or not self._recipe.curriculum:
            return self._lengths_P
        trained = sorted({pair_id for order in self._inputs.orders.values() for pair_id in order})
        return self._lengths_P[positions_of(trained, self._inputs.pairs.pair_ids, what="plan")]

    def _forward(
        self, kind: JobKind, folder: Path, lengths_P: NDArray[np.int64] | None, times: int = 1
    ) -> Job:
        if lengths_P is None:
            return self._job(kind, folder)
        block = self._recipe.evaluate if kind == "held-out" else self._recipe.score
        work = costs.forward_work(lengths_P, self._rows, block.tokens_per_batch).times(times)
        return self._job(kind, folder, forwarded=work, longest=lengths_P.max(), pairs=len(lengths_P))

    def _scorers(self) -> Iterator[Job]:
        recipe, inputs, lengths_P = self._recipe, self._inputs, self._lengths_P
        passes = None if lengths_P is None else scoring_passes(recipe, lengths_P, self._rows)
        for scorer in self._run.scorer_runs:
            folder = self._run.folder.scores(scorer)
            if inputs is None or lengths_P is None or passes is None:
                yield self._job("scorer", folder)
                continue
            halves = split_pairs(inputs.pairs.prompt_ids, scorer)
            trained, held_out = len(halves.train), len(halves.held_out)
            steps = scorer_steps(recipe, scorer, trained, recipe.launch.processes)
            yield self._job(
                "scorer",
                folder,
                trained=passes.training.times(trained / len(lengths_P)),
                forwarded=passes.forward.times(recipe.score.evaluations * held_out / len(lengths_P)),
                longest=lengths_P.max(),
                pairs=trained,
                held_out=held_out,
                updates=steps.updates,
                evaluated_after=steps.evaluated_after,
            )

    def _policies(self) -> Iterator[Job]:
        settings, lengths_P = _settings(self._recipe)[1], self._lengths_P
        for name, training in trainings(self._run).items():
            order = self._inputs.orders.get(name) if self._inputs else None
            count = None if lengths_P is None else selected_count(training.select, len(lengths_P))
            if self._inputs is None or lengths_P is None or (order is None and count is None):
                yield self._job("policy", training.policy)
                continue
            if order is None:  # as many pairs of an average length
                work = costs.training_work(_shuffled(lengths_P), self._rows, settings)
                work = work.times((count or 0) / len(lengths_P))
            else:
                at = positions_of(order, self._inputs.pairs.pair_ids, what="curriculum")
                count, work = len(order), costs.training_work(lengths_P[at], self._rows, settings)
            yield self._job(
                "policy",
                training.policy,
                trained=work.times(settings.epochs),
                forwarded=costs.NO_WORK,
                longest=lengths_P.max(),
                pairs=count,
                updates=costs.optimizer_steps(count or 0, settings, self._recipe.launch.processes),
            )

    def _job(
        self,
        kind: JobKind,
        folder: Path,
        *,
        trained: Work = costs.NO_WORK,
        forwarded: Work | None = None,
        longest: int | None = None,
        **counts: Any,
    ) -> Job:
        name = folder.relative_to(self._run.folder.root).as_posix()
        flops = seconds = None
        if self._models is not None and forwarded is not None:
            flops = job_flops(self._recipe, self._models, kind, trained, forwarded)
            # Sampling waits for memory, not for multiplications: its FLOPs say little about its time.
            if self._rates and kind != "answers":
                seconds = flops / self._rate(kind)
        return Job(
            name=f"{name}: {kind}" if kind in ("held-out", "answers") else name,
            kind=kind,
            cached=folder in self._cached,
            tokens=None if forwarded is None else trained.tokens + forwarded.tokens,
            flops=flops,
            memory_bytes=self._models and costs.job_memory(self._recipe, self._models, kind, longest),
            seconds=seconds,
            **counts,
        )

    def _rate(self, kind: JobKind) -> float:
        """FLOP/s of all processes. Those on one CPU share its cores, so more of them are not faster."""
        score, train = _settings(self._recipe)
        is_scoring = kind in ("reference", "scorer") and not self._recipe.curriculum
        processes = self._recipe.launch.processes if self._device.kind == "cuda" else 1
        return self._rates[(score if is_scoring else train).compute_dtype] * processes


def job_flops(recipe: Recipe, models: Models, kind: JobKind, trained: Work, forwarded: Work) -> float:
    """FLOPs of a job that trains on `trained` and computes `forwarded` without gradients."""
    score, train = _settings(recipe)
    adapter = {"reference": 0, "scorer": models.scorer_adapter}.get(kind, models.policy_adapter)
    recomputes = (score if kind == "scorer" else train).recomputes
    training = costs.training_flops(models.sizes, trained, adapter=adapter, recomputes=recomputes)
    return training + costs.forward_flops(models.sizes, forwarded, adapter)


def selected_count(select: SelectConfig, pairs: int) -> int | None:
    """How many of `pairs` scored pairs a selection keeps; None for a threshold, which needs the scores."""
    rule = rule_of(select)
    if select.rule == "below":
        return None
    if select.rule == "random":
        return size_of(pairs, rule)
    low, high = rank_window(pairs, rule)
    return high - low


def _settings(recipe: Recipe) -> tuple[TrainingSettings, TrainingSettings]:
    """Of the scorers and of the policies."""
    score, train = (
        costs.training_settings(block.trainer, recipe.model) for block in (recipe.score, recipe.train)
    )
    return score, train


def _shuffled(lengths_P: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.random.default_rng(0).permutation(lengths_P)


def _measured_rates(
    recipe: Recipe, models: Models | None, device: Device, inputs: Inputs | None
) -> dict[str, float]:
    """FLOP/s of forward passes by type; empty where the model cannot be timed here."""
    if models is None or inputs is None or not costs.fits(recipe.model, models.sizes, device):
        return {}
    longest = max(1, int(np.median(inputs.pairs.lengths(models.rows_per_pair))))
    return {
        name: costs.measured_rate(recipe.model, models.sizes, device, longest=longest, compute_dtype=name)
        for name in sorted({settings.compute_dtype for settings in _settings(recipe)})
    }


def _total_seconds(jobs: Sequence[Job], recipe: Recipe, device: Device) -> float | None:
    """Wall time of what is to do; scorers, and policies, run `launch.workers` at a time on as many GPUs."""
    total = 0.0
    for kinds in (("scorer",), ("policy",), ("reference", "held-out")):
        wanted = [job.seconds for job in jobs if job.kind in kinds and not job.cached]
        known = [seconds for seconds in wanted if seconds is not None]
        if len(known) < len(wanted):
            return None
        workers = recipe.launch.workers if device.kind == "cuda" and "reference" not in kinds else 1
        total += sum(known) / max(1, min(workers, len(known)))
    return total


def _unknown_parts(
    recipe: Recipe, jobs: Sequence[Job], inputs: Inputs | None, *, is_timed: bool
) -> Iterator[str]:
    if inputs is not None:
        for job in jobs:
            if job.kind == "policy" and job.pairs is None:
                yield f"pairs of {job.name}: a threshold selects after scoring"
        if not is_timed:
            yield "time: only a model in a local folder that fits into memory is measured"
    if recipe.train.trainer.get("eval_strategy", "no") != "no":
        yield "train: the evaluations of eval_strategy, which are not counted"
    if recipe.evaluate.generation.prompts:
        yield "time of the answers: sampling waits for memory more than for multiplications"
    if recipe.evaluate.judge == "reward-model":
        yield f"cost of the judge {recipe.evaluate.reward_model}"
    for block, settings in zip(("score", "train"), _settings(recipe), strict=True):
        if settings.unread and not (block == "score" and recipe.curriculum):
            yield f"{block}: {settings.unread}; counted as not sharded"


def _notes(run: Run) -> Iterator[str]:
    try:
        run.folder.require_same_recipe(run.recipe)
    except RunChangedError as error:
        yield f"a run would refuse this: {error}"


# ----------------------------------------------------------------------------------------------------
# The protocols side by side.
#
# The agreement figures are the least and the largest of nine values: three models, and whichever one (or
# two) of the three seeds. Source: the original authors' records, of which seeds and evaluations were left
# out; docs/protocols.md says how, and tests/unit/test_plan_protocols.py computes them from the records.

MEASURED_ON = "dpo-mix-7k with Qwen2.5 of 1.5B, 7B and 14B"

Range = tuple[float, float]
"""The least and the largest value measured."""

MEASURED_SPEARMAN: dict[tuple[int, int], Range] = {(1, 2): (0.9969, 0.9981), (2, 2): (0.9984, 0.9993)}
"""Rank correlation of the difficulties with those of `paper`, by seeds and evaluations of each scorer; the
evaluations are the third and the last of five."""

MEASURED_OVERLAP: dict[tuple[int, int], dict[float, Range]] = {
    (1, 2): {
        0.1: (0.927, 0.948),
        0.2: (0.951, 0.969),
        0.3: (0.967, 0.975),
        0.4: (0.976, 0.983),
        0.5: (0.977, 0.988),
        0.6: (0.985, 0.991),
        0.7: (0.989, 0.993),
        0.8: (0.993, 0.996),
        0.9: (0.995, 0.998),
    },
    (2, 2): {
        0.1: (0.951, 0.975),
        0.2: (0.968, 0.980),
        0.3: (0.979, 0.988),
        0.4: (0.984, 0.991),
        0.5: (0.987, 0.993),
        0.6: (0.990, 0.995),
        0.7: (0.993, 0.996),
        0.8: (0.995, 0.998),
        0.9: (0.997, 0.999),
    },
}
"""Share of the easiest pairs that are also among the easiest of `paper`, by the fraction selected."""


class Agreement(NamedTuple):
    """The agreement with `paper` to expect, as far as it was measured."""

    spearman: Range
    overlap: Range | None
    """None: not measured for this selection."""
    fraction: float | None
    """The measured fraction nearest to the one in use."""
    measured_on: str = MEASURED_ON


@dataclass(frozen=True)
class PlannedProtocol:
    """What scoring all pairs takes with one protocol, as if nothing were there yet, and what it keeps."""

    protocol: str
    part: str
    """Of `certified`, which may stop early: "least" or "most"; else ""."""
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
    expected_agreement: Agreement | None
    """With `paper`; None where nothing was measured."""


class ScoringPasses(NamedTuple):
    """What one pass over all pairs takes; protocols and scorers are multiples of these."""

    forward: Work
    training: Work
    """All epochs of both scorers of a seed: each pair is in one of their halves."""


def scoring_passes(recipe: Recipe, lengths_P: NDArray[np.int64], rows_per_pair: int) -> ScoringPasses:
    """The passes of `recipe.score`; pairs are trained in random order, of which one is drawn."""
    settings = _settings(recipe)[0]
    training = costs.training_work(_shuffled(lengths_P), rows_per_pair, settings)
    return ScoringPasses(
        costs.forward_work(lengths_P, rows_per_pair, recipe.score.tokens_per_batch),
        training.times(settings.epochs),
    )


def planned_protocols(
    recipe: Recipe, pairs: KeptPairs | None, models: Models | None
) -> Iterator[PlannedProtocol]:
    """The published protocols, and the recipe's own in its place among them; none where the difficulty is
    imported. `certified` stands there twice: with the fewest seeds and with all."""
    if recipe.curriculum:
        return
    # What was measured is the mean over all records.
    is_measured = recipe.select.aggregate == "mean"
    score, train = _settings(recipe)
    rows_per_pair = models.rows_per_pair if models else 2
    passes = None if pairs is None else scoring_passes(recipe, pairs.lengths(rows_per_pair), rows_per_pair)
    fraction = easiest_fraction(recipe.select, None if pairs is None else len(pairs.pair_ids))
    epoch_nt = 4 + _backward_nt(train, is_full=recipe.train.lora is None)
    for name, part, seeds, evaluations in _compared(recipe):
        trained, measured = len(seeds) * score.epochs, len(seeds) * evaluations
        forward = 1 + trained + measured
        nt = 2 * forward + trained * _backward_nt(score, is_full=recipe.score.lora is None)
        tokens = flops = None
        if passes is not None:
            training, evaluated = passes.training.times(len(seeds)), passes.forward.times(measured)
            tokens = passes.forward.tokens + training.tokens + evaluated.tokens
            if models is not None:
                flops = job_flops(recipe, models, "reference", costs.NO_WORK, passes.forward)
                flops += job_flops(recipe, models, "scorer", training, evaluated)
        yield PlannedProtocol(
            protocol=name,
            part=part,
            own=name == recipe.score.protocol,
            seeds=seeds,
            evaluations=evaluations,
            forward_passes=forward,
            backward_passes=trained,
            nt=nt,
            dpo_epochs=nt / epoch_nt,
            tokens=tokens,
            flops=flops,
            expected_agreement=expected_agreement(len(seeds), evaluations, fraction) if is_measured else None,
        )


def _compared(recipe: Recipe) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Protocol, part, seeds, evaluations."""
    for name, published in PROTOCOLS.items():
        own = name == recipe.score.protocol
        seeds, evaluations = (recipe.score.seeds, recipe.score.evaluations) if own else published
        if name == "certified":
            yield name, "least", seeds[:MIN_SEEDS], evaluations
            yield name, "most", seeds, evaluations
        elif own or name != "custom":
            yield name, "", seeds, evaluations


def _backward_nt(settings: TrainingSettings, *, is_full: bool) -> int:
    """Of one backward pass; frozen weights need no gradient of their own (see `costs`)."""
    return (4 if is_full else 2) + (2 if settings.recomputes else 0)


def expected_agreement(seeds: int, evaluations: int, fraction: float | None) -> Agreement | None:
    """What was measured for this many seeds and evaluations, the easiest `fraction` being selected.

    None where nothing was. `fraction` None: the selection is not one of the easiest share, so nothing is
    known of its overlap.
    """
    spearman = MEASURED_SPEARMAN.get((seeds, evaluations))
    if spearman is None or fraction is None:
        return None if spearman is None else Agreement(spearman, None, None)
    nearest = nearest_fraction(fraction)
    return Agreement(spearman, MEASURED_OVERLAP[seeds, evaluations][nearest], nearest)


def easiest_fraction(select: SelectConfig, pairs: int | None) -> float | None:
    """The share of easiest pairs that a selection keeps; None for other rules, or where it is not known."""
    if select.rule != "easiest":
        return None
    if select.count is not None:
        return min(1.0, select.count / pairs) if pairs else None
    return DEFAULT_FRACTION if select.fraction is None else select.fraction


def nearest_fraction(fraction: float) -> float:
    """The measured fraction that is nearest."""
    return min(max(round(10 * fraction), 1), 9) / 10


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
    recipe, models = plan.recipe, plan.model
    model, score, generation, launch = recipe.model, recipe.score, recipe.evaluate.generation, recipe.launch
    size = f"{readable(models.sizes.parameters)} parameters" if models else "size unknown"
    yield "model", f"{model.path}: {size}, {model.dtype}, {model.attention} attention"
    yield "template", model.chat_template or "the tokenizer's own"
    if plan.scoring is None:
        yield "difficulty", f"imported from {recipe.curriculum}: nothing is scored"
    else:
        seeds, scorers = f"{len(score.seeds)} seed(s)", f"{2 * len(score.seeds)} scorers"
        if score.protocol == "certified":
            seeds = f"2 to {len(score.seeds)} seeds"
            scorers = f"4 to {2 * len(score.seeds)} scorers (the first 4 are planned below)"
        yield "scoring", f"{score.protocol}: {seeds} x 2 folds x {score.evaluations} evaluations, {scorers}"
        adapter = models.scorer_adapter if models else None
        yield "scorers", _training_text(score.lora, adapter, plan.scoring, launch.processes)
    yield "selection", label_for(recipe.select)
    adapter = models.policy_adapter if models else None
    yield "training", _training_text(recipe.train.lora, adapter, plan.training, launch.processes)
    yield "controls", ", ".join(policy_names(recipe.evaluate)[1:]) or "none"
    answers = f", {generation.prompts:,} prompts x {generation.samples} answers" if generation.prompts else ""
    yield "judge", f"{recipe.evaluate.judge}{answers}"
    yield (
        "launch",
        f"{launch.processes} processes" if launch.processes > 1 else f"{launch.workers} at a time",
    )


def _training_text(lora: object, adapter: int | None, settings: TrainingSettings, processes: int) -> str:
    what = "all weights"
    if lora is not None:
        what = f"LoRA, {readable(adapter)} parameters" if adapter else "LoRA"
    batch = settings.pairs_per_batch * settings.accumulation * processes
    return (
        f"{what}; beta {settings.beta:g}, learning rate {settings.learning_rate:g}, "
        f"{settings.pairs_per_batch} x {settings.accumulation} x {processes} = {batch:,} pairs an update, "
        f"{settings.epochs:g} epoch(s), {settings.optimizer}, computed in {settings.compute_dtype}"
    )


def _jobs_text(plan: Plan) -> str:
    header = ["job", "pairs", "held out", "updates", "evaluated after"]
    header += ["tokens", "FLOPs", "memory", "time", ""]
    rows = [
        [
            job.name,
            _count(job.pairs),
            _count(job.held_out) if job.kind == "scorer" else "",
            _count(job.updates) if job.kind in ("scorer", "policy") else "",
            " ".join(map(str, job.evaluated_after or "?")) if job.kind == "scorer" else "",
            readable(job.tokens),
            readable(job.flops),
            readable_bytes(job.memory_bytes and job.memory_bytes.total),
            readable_time(job.seconds),
            "cached" if job.cached else "",
        ]
        for job in plan.jobs
    ]
    # In the table a sign is enough: the last lines say what is unknown, and why.
    table = text_table(header, [["?" if cell == UNKNOWN else cell for cell in row] for row in rows])
    per_pair = "" if plan.model is None else f", {plan.model.rows_per_pair} row(s) a pair"
    rates = plan.measured_flops_per_second.items()
    speed = ", ".join(f"{readable(rate, 'FLOP/s')} in {name}" for name, rate in rates)
    device = f"{plan.device.name}, {readable_bytes(plan.device.memory)}"
    legend = f"""
tokens: what the model computes, padding in batches included{per_pair}; of a random order where that of the
  training is not known yet
FLOPs: 2 per parameter and token, plus attention; training 3 times that, with LoRA about 2 times; recomputed
  activations are counted
memory: an estimate, on each process, for weights, gradients, optimizer states and activations
time: FLOPs over the speed of the model's forward pass, {speed or "not"} measured here, on {device}"""
    return table + legend


def protocols_text(plan: Plan) -> str:
    """The table of protocols, and below it what its columns mean; "" where there are none."""
    if not plan.protocols:
        return ""
    header = ["scoring by", "seeds x evaluations", "forward", "backward", "arithmetic", "DPO epochs"]
    header += ["tokens", "FLOPs", "Spearman", "overlap"]
    pairs = f" = {plan.pairs.kept:,}" if plan.pairs else ""
    legend = f"""
forward, backward: passes of all P{pairs} pairs through the model, each with both completions: the reference
  once, the scorers' training, each held-out evaluation
arithmetic: N parameters, T tokens in all pairs, recomputed activations included
DPO epochs: the arithmetic over that of one DPO epoch on all pairs, with the settings of `train`
tokens, FLOPs: of all the scoring, cached or not, counted as for the jobs
Spearman, overlap: agreement with `paper`, least .. largest as measured on {MEASURED_ON};
  {_overlap_text(plan)}; noisier scorers keep less (docs/protocols.md). ?: not measured"""
    return text_table(header, [_protocol_row(each) for each in plan.protocols]) + legend


def _protocol_row(planned: PlannedProtocol) -> list[str]:
    def agreement(measured: Range | None, digits: int) -> str:
        if planned.protocol == "paper":
            return "itself"
        return "?" if measured is None else " .. ".join(f"{end:.{digits}f}" for end in measured)

    part = {"least": ", at least", "most": ", at most"}.get(planned.part, "")
    expected = planned.expected_agreement
    return [
        f"{planned.protocol}{part}{' (this recipe)' if planned.own else ''}",
        f"{len(planned.seeds)} x {planned.evaluations}",
        f"{planned.forward_passes:.4g} P",
        f"{planned.backward_passes:.4g} P",
        f"{planned.nt:.4g} NT",
        f"{planned.dpo_epochs:.3g}",
        "?" if planned.tokens is None else readable(planned.tokens),
        "?" if planned.flops is None else readable(planned.flops),
        agreement(expected and expected.spearman, 4),
        agreement(expected and expected.overlap, 3),
    ]


def _overlap_text(plan: Plan) -> str:
    select = plan.recipe.select
    if select.aggregate != "mean":
        return "not with the aggregate of this recipe"
    fraction = easiest_fraction(select, plan.pairs.kept if plan.pairs else None)
    if fraction is None:
        return "the overlap not with the selection of this recipe"
    nearest = nearest_fraction(fraction)
    which = f", the nearest that was measured to this recipe's {fraction:.3g}"
    return f"overlap of the easiest {nearest:.0%}{'' if math.isclose(nearest, fraction) else which}"


def _end_lines(plan: Plan) -> Iterator[str]:
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
    yield from (f"note: {line}" for line in plan.notes)
    yield from (f"unknown: {line}" for line in plan.unknown)


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
