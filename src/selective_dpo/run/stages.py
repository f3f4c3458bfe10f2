"""The stages of a run. Each one makes its result unless a complete one with the same key is there."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import peft
import pyarrow.parquet as pq
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.config import DEFAULT_TARGET, DataConfig, Recipe, SelectConfig, SourceConfig
from selective_dpo.curriculum.build import build_curriculum, rule_of
from selective_dpo.curriculum.import_ import (
    Outside,
    imported_from,
    imported_in_words,
    outside_curriculum,
    read_outside,
)
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.stability import Prediction, is_stable, predict_overlap, seeds_needed
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.prepare import pairs_key, prepare_pairs
from selective_dpo.data.sources import read_prompts
from selective_dpo.data.store import TOKENS, load_ids, load_pairs, load_tokens, prompt_keys, require_known
from selective_dpo.difficulty.held_out import evaluation_steps
from selective_dpo.difficulty.protocols import ScorerRun, planned_runs, require_fold_sizes, split_pairs
from selective_dpo.difficulty.scorer import COST, ScorerJob, collect_losses, run_scorers
from selective_dpo.distributed.processes import (
    making,
    publish_from_main,
    this_process,
    wait_for_everyone,
    whole_on_each_process,
)
from selective_dpo.distributed.progress import Progress
from selective_dpo.distributed.workers import run_in_workers
from selective_dpo.errors import ArtifactError, ConfigError, RecordsError, name_some
from selective_dpo.evaluation.evaluate import Arm, evaluate_arms, held_out_metrics
from selective_dpo.evaluation.generate import Prompt, encode_prompt
from selective_dpo.evaluation.judges import judge_for
from selective_dpo.evaluation.results import REFERENCE, SELECTED, PreferenceMetrics, repeat_name
from selective_dpo.identity import positions_of, prompt_id
from selective_dpo.logprobs.compute import pair_logps
from selective_dpo.logprobs.nonfinite import read_quarantine
from selective_dpo.logprobs.padded import part_lengths
from selective_dpo.logprobs.reference import (
    load_reference,
    publish_reference,
    require_finite_reference,
    without_quarantined,
)
from selective_dpo.losses import chance_loss
from selective_dpo.models import load_policy, load_tokenizer, loading, model_digest
from selective_dpo.report.tables import label_for, seeds_note
from selective_dpo.run import stages as told
from selective_dpo.run.costs import optimizer_steps, training_settings
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import (
    curriculum_key,
    has_curriculum,
    imported_inputs,
    input_digests,
    provenance,
    record_digests,
    reference_block,
    reference_key,
    remember_inputs,
    require_same_inputs,
    require_same_processes,
    scorer_job,
    trained_ids,
    training_job,
    trainings,
)
from selective_dpo.storage.artifacts import (
    MANIFEST,
    content_key,
    is_complete,
    read_json,
    read_manifest,
    write_json,
)
from selective_dpo.training.arguments import ORIGINAL_DEFAULTS, autocast_dtype, weights_dtype
from selective_dpo.training.checkpointing import discard_checkpoints
from selective_dpo.training.train import TrainingJob, train_policy

Job = TypeVar("Job", ScorerJob, TrainingJob)


@dataclass(frozen=True)
class Run:
    """A recipe in its folder. All processes of a distributed run build the same one."""

    recipe: Recipe
    folder: RunDirectory
    say: Callable[[str], object] = print
    """Told one line per stage."""
    fresh: bool = False
    """Whether changed inputs are accepted."""
    check: Callable[[Run], object] = lambda run: None
    """Called before the first result is made; it raises what has to be mended first."""

    @cached_property
    def model_digest(self) -> str:
        """What identifies the starting policy's weights."""
        return model_digest(self.recipe.model)

    @cached_property
    def judge_digest(self) -> str:
        """What identifies the judge's content; empty where there is none."""
        judge = judge_for(self.recipe.evaluate)
        return judge.fingerprint() if judge else ""

    @cached_property
    def tokenizer(self) -> Any:
        """The starting policy's tokenizer."""
        return load_tokenizer(self.recipe.model)

    @cached_property
    def outside(self) -> Outside | None:
        """The difficulties that replace scoring; None: they are measured."""
        return read_outside(self.recipe.curriculum) if self.recipe.curriculum else None

    @property
    def scorer_runs(self) -> tuple[ScorerRun, ...]:
        """The protocol's scorers; of `certified`, those that are known to be needed."""
        if self.recipe.curriculum:
            return ()
        if self.recipe.score.protocol == "certified":
            return certified_runs(self)
        return planned_runs(self.recipe.score)

    @property
    def arms(self) -> dict[str, tuple[SelectConfig, Path]]:
        """Selection and folder of the run's own arm and of each control."""
        own = self.recipe.select
        # Controls come from the same records: incomplete ones are accepted for all arms or for none.
        controls = {
            name: select.model_copy(update={"allow_partial": own.allow_partial})
            for name, select in self.recipe.evaluate.controls.items()
        }
        return {SELECTED: (own, self.folder.root)} | {
            name: (select, self.folder.control(name)) for name, select in controls.items()
        }

    def claim(self) -> None:
        """Write down once whose folder this is (see `RunDirectory.claim`)."""
        if this_process().is_main_process:
            self.folder.claim(self.recipe)

    def tell(self, line: str) -> None:
        """Say something once, whatever the number of processes."""
        if this_process().is_main_process:
            self.say(line)


def ensure_pairs(run: Run) -> None:
    """Prepare the training pairs, and the held-out ones where the recipe has any.

    Raises:
        ConfigError: too few pairs for the scorers' evaluations, or a pair to exclude is not in the data.
        RunChangedError: model, tokenizer, template or data are not those that the run began with.
    """
    inputs = input_digests(run)
    require_same_inputs(run, inputs)
    prepare(run)
    run.claim()
    remember_inputs(run, inputs)


def prepare(run: Run) -> None:
    """The same for a folder that does not become a run: that of a plan, or of `doctor`.

    Raises:
        ConfigError: too few pairs for the scorers' evaluations, or a pair to exclude is not in the data.
    """
    ensure_prepared(run, run.recipe.data.train, run.folder.pairs, exclude=None)
    if run.recipe.data.test:
        ensure_prepared(run, run.recipe.data.test, run.folder.test_pairs, exclude=run.folder.pairs)
    prepared = [run.folder.pairs, *([run.folder.test_pairs] if run.recipe.data.test else [])]
    require_known(run.recipe.data.exclude, prepared)
    require_room_for_evaluations(run)


def ensure_reference(run: Run) -> None:
    """The starting policy's log-probs of all prepared pairs, once for everything that follows."""
    ensure_pairs(run)
    _ensure_references(run)


def _ensure_references(run: Run) -> None:
    _ensure_reference_of(run, run.folder.pairs, run.folder.reference)
    if run.recipe.data.test:
        _ensure_reference_of(run, run.folder.test_pairs, run.folder.test_reference)


def ensure_scores(run: Run, *, only: tuple[str, ...] = ()) -> None:
    """Run the protocol's scorers that are missing; `only` names some of them.

    Raises:
        ConfigError: `only` names a scorer that the protocol does not have, or there are none.
    """
    if run.recipe.curriculum:
        raise ConfigError(
            f"nothing to score: the difficulty comes from {run.recipe.curriculum}; use `run`, or leave the "
            "recipe's curriculum out"
        )
    planned = planned_runs(run.recipe.score)
    unknown = sorted(set(only) - {scorer.name for scorer in planned})
    if unknown:
        known = ", ".join(scorer.name for scorer in planned)
        raise ConfigError(f"no scorer named {name_some(unknown)}; this recipe has {known}")
    ensure_reference(run)
    if only:
        _score(run, [scorer for scorer in planned if scorer.name in only])
    elif run.recipe.score.protocol == "certified":
        ensure_certified(run, lambda scorers: _score(run, scorers))
    else:
        _score(run, planned)


def _score(run: Run, scorers: Sequence[ScorerRun]) -> None:
    jobs = [scorer_job(run, scorer) for scorer in scorers]
    complete, missing = _by_completeness(jobs)
    if not missing:
        return
    require_same_processes(complete)
    run.tell(f"scores: {len(missing)} of {len(jobs)} scorers to train")
    wait_for_everyone()
    workers = run.recipe.launch.workers
    run_scorers(missing, workers=workers, done=lambda job: run.tell(f"  {told.measured(job)}"))
    _tell_tracking(run)


def ensure_curriculum(run: Run) -> Curriculum:
    """Records -> difficulty, agreement, selection and order, for the run's arm and its controls.

    Raises:
        RecordsError: scorers are missing and the recipe does not allow a partial set.
        IdentityError: no pair has a difficulty in the recipe's `curriculum`.
    """
    if run.outside is not None:
        ensure_pairs(run)
        return import_curricula(run, run.outside)
    ensure_scores(run)
    return build_curricula(run)


def ensure_policy(run: Run) -> None:
    """Train the run's policy, its controls' and those of other seeds, where they are missing."""
    ensure_curriculum(run)
    if run.recipe.curriculum:
        _ensure_references(run)
        require_finite_reference(run.folder.reference)
    jobs = [training_job(run, name) for name in trainings(run)]
    complete, missing = _by_completeness(jobs)
    if not missing:
        return
    require_same_processes(complete)
    run.tell(f"training: {'; '.join(job.label for job in missing)}")
    wait_for_everyone()
    run_in_workers(
        _train_alone,
        missing,
        workers=run.recipe.launch.workers,
        name=lambda job: job.name,
        done=lambda job: run.tell(f"  {told.trained(job)}"),
    )
    _tell_tracking(run)


def _by_completeness(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """The jobs that are done, and those to do. Checkpoints that a killed process left of a done one go."""
    complete = [job for job in jobs if is_complete(job.folder, key=job.key)]
    if this_process().is_main_process:
        for job in complete:
            if job.checkpoints is not None:
                discard_checkpoints(job.checkpoints.folder)
    return complete, [job for job in jobs if job not in complete]


def _train_alone(job: TrainingJob) -> None:
    # By the process that does the work: a worker may outlive the command that started it.
    with making(job.folder):
        if not is_complete(job.folder, key=job.key):
            train_policy(job)


def _ensure_reference_of(run: Run, pairs: Path, folder: Path) -> None:
    recipe = run.recipe
    key = reference_key(run, pairs)
    if is_complete(folder, key=key):
        return
    with making(folder):
        if is_complete(folder, key=key):
            return
        wait_for_everyone()
        tokens = load_tokens(pairs)
        trained = trained_ids(run) if pairs == run.folder.pairs else None
        if trained is not None:
            tokens = tokens.select(positions_of(trained, list(tokens["pair_id"]), what="reference"))
        block = reference_block(run)
        with whole_on_each_process():
            model = load_policy(recipe.model)
        if weights_dtype(recipe.model, block.lora, block.trainer) == "float32":
            model.float()  # as the policies that it is compared with
        publish_reference(
            folder,
            key=key,
            model=model,
            tokens=tokens,
            tokens_per_batch=recipe.score.tokens_per_batch,
            pad_token_id=run.tokenizer.pad_token_id,
            autocast_dtype=autocast_dtype(block.trainer, recipe.model),
        )
        run.tell(told.referenced(folder, len(tokens)))


def _tell_tracking(run: Run) -> None:
    if run.folder.tracking.is_dir():
        run.tell(f"  trackers' files: {run.folder.tracking}")


# ----------------------------------------------------------------------------------------------------
# The stage between scores and policy: each arm's curriculum, from records or from outside difficulties.


def build_curricula(run: Run) -> Curriculum:
    """Build each arm's curriculum from the records that are there, without running a scorer."""
    if not (run.folder.reference / MANIFEST).is_file():
        raise RecordsError(f"nothing was scored yet in {run.folder.root}: run `selective-dpo score` first")
    complete: list[ScorerJob] = []
    missing: list[ScorerJob] = []
    for scorer in run.scorer_runs:
        job = scorer_job(run, scorer)
        (complete if is_complete(job.folder, key=job.key) else missing).append(job)
    if missing and not (run.recipe.select.allow_partial and complete):
        names = name_some(job.run.name for job in missing)
        raise RecordsError(f"records are missing of {names}: score them, or pass --select.allow_partial true")
    run.claim()
    folders = [job.folder for job in complete]

    @cache
    def losses() -> LossTable:
        # All arms accept partial records, or none does.
        return collect_losses(folders, allow_partial=run.recipe.select.allow_partial)

    def build(select: SelectConfig, origin: dict[str, Any], key: str) -> Curriculum:
        made = build_curriculum(
            losses(),
            select,
            provenance=origin,
            cost={"scorers": {job.run.name: read_json(job.folder / COST) for job in complete}},
            key=key,
            quarantined=read_quarantine([run.folder.reference, *folders]),
            chance_loss=chance_loss({**ORIGINAL_DEFAULTS, **run.recipe.score.trainer}),
        )
        absent = [job.run.name for job in missing]
        more = {"certificate": certificate(run), "missing_scorers": absent}
        return replace(made, facts={**made.facts, **more})

    return _make_curricula(run, record_digests(complete), build)


def import_curricula(run: Run, outside: Outside) -> Curriculum:
    """Build each arm's curriculum from difficulties that come from outside."""
    ids = load_ids(run.folder.pairs)

    def build(select: SelectConfig, origin: dict[str, Any], key: str) -> Curriculum:
        return outside_curriculum(
            outside, ids["pair_id"], ids["prompt_id"], select, provenance=origin, key=key
        )

    return _make_curricula(run, imported_inputs(run, outside.digest), build)


def _make_curricula(
    run: Run, inputs: dict[str, str], build: Callable[[SelectConfig, dict[str, Any], str], Curriculum]
) -> Curriculum:
    """`build` makes an arm's curriculum from its selection, provenance and key, where it is not there."""
    for name, (select, folder) in run.arms.items():
        key = curriculum_key(inputs, select)
        if has_curriculum(folder, key):
            continue
        if this_process().is_main_process:
            origin = provenance(run.recipe, inputs={"model": run.model_digest, **inputs})
            made = build(select, origin, key)
            made.save(folder)
            if name == SELECTED:
                run.tell(f"curriculum: {told.selected(made, label_for(select))}")
    wait_for_everyone()
    return Curriculum.load(run.folder.curriculum)


# ----------------------------------------------------------------------------------------------------
# Protocol `certified`: seeds are added until the selected set is known to be stable, and how well.
#
# It stops where the lower end of the predicted overlap with a fresh repetition reaches the target. That end
# assumes what `ASSUMES` says, which is told wherever the certificate is.
#
# `scores/certificate.json` says how many seeds that took and what was predicted from them. It is made from
# the records, so where it is missing or belongs to other records it is simply made again.


FEWEST_SEEDS = 2
"""Below this there is nothing to compare."""

ASSUMES = "if all pairs of a seed share nothing, such as its scorers' taste for length"
"""What the interval rests on (see `core.stability.predict_overlap`)."""


def certified_runs(run: Run) -> tuple[ScorerRun, ...]:
    """The scorers that `run` needs as far as is known: those of its certificate, else of two seeds."""
    planned = planned_runs(run.recipe.score)
    try:
        found = read_json(run.folder.certificate)
        scorers = planned[: 2 * int(found["seeds"])]
        is_valid = found["key"] == _key(run, scorers)
    except ArtifactError:
        is_valid = False
    return scorers if is_valid else planned[: 2 * FEWEST_SEEDS]


def ensure_certified(run: Run, score: Callable[[Sequence[ScorerRun]], None]) -> None:
    """Score seed after seed until the lower end reaches the target, or the recipe has no further seed.

    `score` makes the records of the scorers it is given, where they are missing.
    """
    planned = planned_runs(run.recipe.score)
    for scorers in range(len(certified_runs(run)), len(planned) + 1, 2):
        score(planned[:scorers])
        if _certificate(run, planned[:scorers])["reached"]:
            return
    run.tell(
        f"  NOT certified: the recipe's {len(run.recipe.score.seeds)} seeds are used up below the target; "
        "the curriculum says what was predicted"
    )


def certificate(run: Run) -> dict[str, Any] | None:
    """What the curriculum says of its stability; None for other protocols."""
    return read_json(run.folder.certificate) if run.recipe.score.protocol == "certified" else None


def _certificate(run: Run, scorers: Sequence[ScorerRun]) -> dict[str, Any]:
    """The certificate of these scorers' records, made where it is not there."""
    key = _key(run, scorers)
    found = read_json(run.folder.certificate) if run.folder.certificate.is_file() else {}
    if found.get("key") == key:
        return found
    wait_for_everyone()
    if this_process().is_main_process:
        table = collect_losses([run.folder.scores(scorer) for scorer in scorers])
        prediction = predict_overlap(table, run.recipe.select.aggregate, rule_of(run.recipe.select))
        write_json(run.folder.certificate, _as_json(prediction, key, _target(run)))
    wait_for_everyone()
    found = read_json(run.folder.certificate)
    run.tell(f"  {_words(found)}")
    return found


def _key(run: Run, scorers: Sequence[ScorerRun]) -> str:
    select = run.recipe.select
    return content_key(
        records=record_digests([scorer_job(run, scorer) for scorer in scorers]),
        aggregate=select.aggregate,
        rule=asdict(rule_of(select)),
        target=_target(run),
        decides="lower end",
    )


def _target(run: Run) -> float:
    return run.recipe.score.target_overlap or DEFAULT_TARGET


def _as_json(prediction: Prediction, key: str, target: float) -> dict[str, Any]:
    return {
        "key": key,
        "seeds": prediction.seeds,
        "target": target,
        "reached": is_stable(prediction, target),
        "assumes": ASSUMES,
        "seeds_needed": seeds_needed(prediction, target),
        "prediction": prediction.as_json(),
    }


def _words(found: dict[str, Any]) -> str:
    repetition = found["prediction"]["repetition"]
    low, high = (_percent(repetition[end]) for end in ("low", "high"))
    return (
        f"{found['seeds']} seeds: a fresh repetition is predicted to select {repetition['value']:.1%} of the "
        f"same pairs, 95% interval {low} to {high} {ASSUMES}; "
        f"the lower end decides, target {found['target']:.0%}"
    )


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


# ----------------------------------------------------------------------------------------------------
# The first stage: sources become prepared pairs, once.


def ensure_prepared(run: Run, sources: Sequence[SourceConfig], folder: Path, *, exclude: Path | None) -> None:
    """Read, check and tokenize `sources` into `folder`, unless that was done with the same inputs.

    `exclude` is the folder of the training pairs when held-out ones are prepared: a prompt in both
    would not be held out. The main process works, the others wait.
    """
    key = prepared_key(run, sources, exclude=exclude)
    if is_complete(folder, key=key):
        return
    if exclude is None:  # the training pairs are a run's first result
        run.check(run)
    with making(folder):
        if not is_complete(folder, key=key):
            wait_for_everyone()
            _prepare(run, sources, folder, key=key, exclude=exclude)
            wait_for_everyone()


def _prepare(
    run: Run, sources: Sequence[SourceConfig], folder: Path, *, key: str, exclude: Path | None
) -> None:
    if not this_process().is_main_process:
        return
    with Progress(0, folder.name, unit="rows") as progress:
        summary = prepare_pairs(
            sources,
            _limits(run, exclude),
            run.tokenizer,
            folder,
            key=key,
            exclude_prompts=_excluded(exclude),
            progress=progress.advance,
        )
    run.tell(f"{folder.name}: {summary.describe()}")


def prepared_key(run: Run, sources: Sequence[SourceConfig], *, exclude: Path | None) -> str:
    """The key that `ensure_prepared` publishes under. It reads the sources' bytes and writes nothing."""
    return pairs_key(sources, _limits(run, exclude), run.tokenizer, exclude_prompts=_excluded(exclude))


def _limits(run: Run, exclude: Path | None) -> DataConfig:
    # A limit on the number of training rows is not one on the held-out ones.
    data = run.recipe.data
    return data if exclude is None else data.model_copy(update={"max_pairs": 0})


def _excluded(exclude: Path | None) -> frozenset[str]:
    return frozenset() if exclude is None else prompt_keys(exclude)


# ----------------------------------------------------------------------------------------------------
# The evaluation stage: every arm on held-out pairs, and its answers against the starting model's.


_NAMED_BY_CONTENT: Any = {
    "controls": True,
    "training_seeds": True,
    "reward_model": True,
    "generation": {"source"},
}
"""Keys of `evaluate` for which something else stands in the evaluation's key: policies, judge, prompts."""


def ensure_evaluation(run: Run) -> None:
    """Measure every arm, unless the same policies were measured in the same way already.

    In a distributed run all processes share the held-out pairs' forward passes; answers are generated
    by each, and the main process's are kept.
    """
    ensure_policy(run)
    _require_spread(run)
    key = evaluation_key(run)
    if is_complete(run.folder.evaluation, key=key):
        return
    wait_for_everyone()
    arms = [_arm(run, name) for name in trainings(run)]
    several = len(run.arms)
    reference = Arm(REFERENCE, "starting model", 0, 0, lambda: load_arm(run, None), _held_out_measure(run))
    with whole_on_each_process():
        evaluation = evaluate_arms(
            arms[:several],
            reference,
            tokenizer=run.tokenizer,
            prompts=prompts_to_answer(run),
            config=run.recipe.evaluate,
            repeats=arms[several:],
            encode=lambda text: encode_prompt(
                run.tokenizer, text, empty_system_message=run.recipe.data.empty_system_message
            ),
        )
    with publish_from_main(run.folder.evaluation, kind="evaluation", key=key) as partial:
        evaluation.write(partial)
    run.tell(f"evaluation: {len(arms)} arm(s), {evaluation.results.prompts:,} prompts answered")
    if evaluation.results.repeats:
        run.tell(f"  {seeds_note(evaluation.results)}")


def evaluation_key(run: Run) -> str:
    """Key of the evaluation of the arms that are trained. `ArtifactError` while one is not."""
    policies = {name: read_manifest(training.policy).files for name, training in trainings(run).items()}
    has_test = bool(run.recipe.data.test)
    return content_key(
        stage="evaluation",
        weights=run.model_digest,
        policies={name: _weights(files) for name, files in policies.items()},
        judge=run.judge_digest,
        evaluate=run.recipe.evaluate.model_dump(mode="json", exclude=_NAMED_BY_CONTENT),
        held_out=read_manifest(run.folder.test_pairs).files[TOKENS] if has_test else "",
        prompts=[prompt.prompt_id for prompt in prompts_to_answer(run)],
    )


def _weights(files: dict[str, str]) -> dict[str, str]:
    return {name: found for name, found in files.items() if name.endswith(".safetensors")}


def _arm(run: Run, name: str) -> Arm:
    training = trainings(run)[name]
    updates = int(read_json(training.policy / "cost.json")["optimizer_steps"])
    pairs = len(Curriculum.load(training.curriculum).order)
    measure = _held_out_measure(run)
    return Arm(name, training.label, pairs, updates, lambda: load_arm(run, training.policy), measure)


def _require_spread(run: Run) -> None:
    """Refuse to show how far trainings lie apart that no seed could change."""
    names = [SELECTED, *map(repeat_name, run.recipe.evaluate.training_seeds)]
    weights = [_weights(read_manifest(trainings(run)[name].policy).files) for name in names]
    if any(one == other for one, other in itertools.combinations(weights, 2)):
        raise ConfigError(
            "trainings with different seeds gave equal weights, so nothing in them is random: leave "
            "evaluate.training_seeds out"
        )


def load_arm(run: Run, policy: Path | None) -> Any:
    """The starting model, or a trained policy: its own weights, or the starting model with its adapter."""
    config = run.recipe.model
    if policy is None or (policy / "adapter_config.json").is_file():
        model = load_policy(config)
        add_fused_lm_head(model)
        if policy is not None:
            with loading("adapter", str(policy)):
                model = peft.PeftModel.from_pretrained(model, policy)
    else:
        model = load_policy(config.model_copy(update={"path": str(policy), "revision": "main"}))
        add_fused_lm_head(model)
    return model.to(this_process().device)


def _held_out_measure(run: Run) -> Any:
    if not run.recipe.data.test:
        return None
    tokens = without_quarantined(load_tokens(run.folder.test_pairs), run.folder.test_reference)
    reference = load_reference(run.folder.test_reference)
    prompt_ids = dict(zip(tokens["pair_id"], tokens["prompt_id"], strict=True))
    tokens_P2 = np.stack(part_lengths(tokens)[1:], axis=1)
    settings = {**ORIGINAL_DEFAULTS, **run.recipe.train.trainer}

    def measure(model: Any) -> PreferenceMetrics:
        logps = pair_logps(
            model,
            tokens,
            tokens_per_batch=run.recipe.evaluate.tokens_per_batch,
            pad_token_id=run.tokenizer.pad_token_id,
            autocast_dtype=autocast_dtype(settings, run.recipe.model),
            what="held-out pairs",
        )
        return held_out_metrics(logps, reference, tokens_P2, prompt_ids, settings)

    return measure


def prompts_to_answer(run: Run) -> list[Prompt]:
    """The prompts that answers are drawn for: a file's, or the held-out pairs'.

    Raises:
        DataError: the file cannot be read, or a row of it has no prompt.
    """
    generation = run.recipe.evaluate.generation
    if generation.prompts == 0:
        return []
    if generation.source:
        return [Prompt(prompt_id(text), text) for text in read_prompts(Path(generation.source))]
    if not run.recipe.data.test:
        return []
    table = load_pairs(run.folder.test_pairs)
    rows = zip(*(table[name].to_pylist() for name in ("status", "prompt_id", "prompt")), strict=True)
    return [Prompt(identity, json.loads(text)) for status, identity, text in rows if status == "kept"]


# ----------------------------------------------------------------------------------------------------
# Whether the scorers have enough to train on and to measure, as often as wanted, before any does.


class ScorerSteps(NamedTuple):
    """When a scorer does what."""

    updates: int
    evaluated_after: tuple[int, ...]


def scorer_steps(recipe: Recipe, scorer: ScorerRun, pairs: int, processes: int) -> ScorerSteps:
    """The optimizer steps of a scorer that trains on `pairs` pairs, and those after which it is measured.

    Raises:
        ConfigError: it makes fewer steps than it is to be measured.
    """
    config = recipe.score
    settings = training_settings(config.trainer, recipe.model)
    updates = optimizer_steps(pairs, settings, processes)
    try:
        return ScorerSteps(updates, evaluation_steps(updates, config.evaluations))
    except ValueError as error:
        raise ConfigError(
            f"{scorer.name}: {error}: lower score.evaluations or the batch size "
            f"({settings.pairs_per_batch} x {settings.accumulation} x {processes} process(es))"
        ) from error


def require_room_for_evaluations(run: Run) -> None:
    """Check each scorer's fold, and its number of optimizer steps against `score.evaluations`; the pairs are
    prepared.

    Raises:
        DataError: a fold has fewer prompts than `score.min_fold_prompts`.
        ConfigError: a scorer makes fewer steps than it is to be measured.
    """
    # Before `accelerate launch` this process is alone, under it the recipe may not say how many there are.
    processes = max(run.recipe.launch.processes, this_process().num_processes)
    prompt_ids = pq.read_table(run.folder.pairs / TOKENS, columns=["prompt_id"])["prompt_id"].to_pylist()
    for scorer in run.scorer_runs:
        require_fold_sizes(prompt_ids, scorer, run.recipe.score.min_fold_prompts)
        scorer_steps(run.recipe, scorer, len(split_pairs(prompt_ids, scorer).train), processes)


# ----------------------------------------------------------------------------------------------------
# What the user is told of a finished stage, a line each.


def referenced(folder: Path, pairs: int) -> str:
    """Of the reference's log-probs in `folder`."""
    return f"{folder.name}: {pairs:,} pairs{_set_aside(folder)}"


def measured(job: ScorerJob) -> str:
    """Of a scorer."""
    cost = read_json(job.folder / COST)
    return (
        f"{job.run.name}: {cost['train_pairs']:,} pairs trained, {cost['held_out_pairs']:,} measured "
        f"{cost['evaluations']} times, {cost['seconds']:.0f} s{_set_aside(job.folder)}"
    )


def selected(curriculum: Curriculum, label: str) -> str:
    """Of a curriculum; `label` is its selection in words."""
    facts = curriculum.facts
    parts = [f"{facts['selected']:,} of {facts['pairs']:,} pairs, {label}"]
    if imported := imported_from(facts):
        parts.append(imported_in_words(imported))
    if facts["quarantined"]:
        parts.append(f"{facts['quarantined']:,} more not finite, not selected")
    if facts.get("missing_scorers"):
        parts.append(f"WITHOUT the records of {name_some(facts['missing_scorers'], limit=12)}")
    return "; ".join(parts)


def trained(job: TrainingJob) -> str:
    """Of a policy."""
    cost = read_json(job.folder / "cost.json")
    return f"{job.label}: {cost['optimizer_steps']:,} updates, {cost['seconds']:.0f} s"


def _set_aside(folder: Path) -> str:
    aside = read_quarantine([folder])
    return f"; {len(aside):,} of them not finite, set aside: {name_some(aside)}" if aside else ""
