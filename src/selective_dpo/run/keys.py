"""A run, and the key of each of its results: a digest of everything that decides it. Asking changes nothing.

A key holds contents, never paths: weights, tokenizer, chat template, data, judge, settings. So a result is
used again where its inputs are the same, wherever they lie, and made again where one of them differs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from selective_dpo.config import (
    DEFAULT_TARGET,
    DataConfig,
    EvaluateConfig,
    GuardConfig,
    Recipe,
    ScoreConfig,
    SelectConfig,
    SourceConfig,
    TrainConfig,
)
from selective_dpo.config.load import dump_config
from selective_dpo.config.schema import PROTOCOLS, BenchmarkName
from selective_dpo.criteria import criterion_source
from selective_dpo.curriculum.balance import needs_attributes
from selective_dpo.curriculum.build import rule_of
from selective_dpo.curriculum.import_ import Outside, read_outside
from selective_dpo.curriculum.table import TABLE, Curriculum
from selective_dpo.data.prepare import pairs_key
from selective_dpo.data.sources import read_prompts, source_digest, source_label
from selective_dpo.data.store import PAIRS, TOKENS, load_pairs, prompt_keys
from selective_dpo.data.templates import template_digest
from selective_dpo.data.tokenize import tokenizer_digest
from selective_dpo.difficulty.protocols import ScorerRun, planned_runs
from selective_dpo.difficulty.scorer import RECORDS, ScorerJob
from selective_dpo.difficulty.step_scorers import GradientJob, OneStepJob, target_delta
from selective_dpo.distributed.processes import this_process
from selective_dpo.errors import ArtifactError, RunChangedError, name_some
from selective_dpo.evaluation.benchmarks import model_name, question_file
from selective_dpo.evaluation.generate import Prompt
from selective_dpo.evaluation.judges import judge_for
from selective_dpo.evaluation.results import SELECTED, repeat_name
from selective_dpo.identity import ids_digest, prompt_id
from selective_dpo.models import load_tokenizer, model_digest, remote_code
from selective_dpo.report.tables import label_for
from selective_dpo.run.folder import RunDirectory
from selective_dpo.storage.artifacts import (
    content_key,
    file_digest,
    folder_digests,
    read_json,
    read_manifest,
    write_json,
)
from selective_dpo.storage.digests import digest
from selective_dpo.training.arguments import autocast_dtype, weights_dtype
from selective_dpo.training.checkpointing import CheckpointPlan
from selective_dpo.training.train import TrainingJob

MIN_SEEDS = 2
"""Protocol `certified`: below this there is nothing to compare."""


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
        return self._read(self.recipe.curriculum) if self.recipe.curriculum else None

    def outside_of(self, select: SelectConfig) -> Outside | None:
        """The difficulties of an arm that replace those measured here; None: there are none."""
        return self._read(select.source) if select.source else self.outside

    def _read(self, path: str) -> Outside:
        if path not in self._files:
            self._files[path] = read_outside(path)
        return self._files[path]

    @cached_property
    def _files(self) -> dict[str, Outside]:
        return {}

    @property
    def scorer_runs(self) -> tuple[ScorerRun, ...]:
        """The protocol's scorers; of `certified`, those that are known to be needed."""
        if self.recipe.curriculum:
            return ()
        planned = planned_runs(self.recipe.score)
        return planned if self.recipe.score.protocol != "certified" else _certified_runs(self, planned)

    @property
    def arms(self) -> dict[str, tuple[SelectConfig, Path]]:
        """Selection and folder of the run's own arm and of each control."""
        own = self.recipe.select
        # Controls come from the same records: incomplete ones are accepted for all arms or for none.
        controls = {
            name: select if select.source else select.model_copy(update={"allow_partial": own.allow_partial})
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


# ----------------------------------------------------------------------------------------------------
# Pairs and reference.


def prepared_key(run: Run, sources: Sequence[SourceConfig], *, exclude: Path | None) -> str:
    """Key of the pairs prepared from `sources`. It reads the sources' bytes.

    `exclude` is the folder of the training pairs where `sources` are the held-out ones.
    """
    limits, prompts = limits_of(run, exclude)
    return pairs_key(sources, limits, run.tokenizer, exclude_prompts=prompts)


def limits_of(run: Run, exclude: Path | None) -> tuple[DataConfig, frozenset[str]]:
    """The recipe's limits on the pairs, and the prompts that may not be among them.

    Of held-out pairs these are the prompts of the training pairs in the folder `exclude`. `data.max_pairs`
    limits training pairs only.
    """
    data = run.recipe.data
    if exclude is None:
        return data, frozenset()
    return data.model_copy(update={"max_pairs": 0}), prompt_keys(exclude)


def reference_key(run: Run, pairs: Path) -> str:
    """Key of the reference's log-probs of the prepared pairs in the folder `pairs`."""
    trained = trained_ids(run) if pairs == run.folder.pairs else None
    return content_key(
        stage="reference",
        tokens=read_manifest(pairs).files[TOKENS],
        **_model_key(run, reference_block(run)),
        autocast=str(autocast_dtype(reference_block(run).trainer, run.recipe.model)),
        tokens_per_batch=run.recipe.score.tokens_per_batch,
        **({} if trained is None else {"pairs": ids_digest(trained)}),
    )


def trained_ids(run: Run) -> list[str] | None:
    """The training pairs whose reference is needed: with an imported curriculum those that some arm trains
    on, sorted; None: all, since all are scored.

    Raises:
        ArtifactError: an arm's curriculum is not there yet.
    """
    if not run.recipe.curriculum:
        return None
    return sorted({name for _, folder in run.arms.values() for name in Curriculum.load(folder).order})


def reference_block(run: Run) -> ScoreConfig | TrainConfig:
    """The block in whose precision the reference runs: the scorers', who use it first, or the training's
    where there are none."""
    return run.recipe.train if run.recipe.curriculum else run.recipe.score


# ----------------------------------------------------------------------------------------------------
# Scorers, and the certificate of their stability.


def scorer_job(run: Run, scorer: ScorerRun) -> ScorerJob | OneStepJob:
    """One scorer's work and key. `ArtifactError` while pairs or reference are not complete."""
    recipe = run.recipe
    if recipe.score.protocol == "one-step":
        return one_step_job(run, scorer)
    # Not which scorers there are: adding one must not throw away the others' records.
    which = {"protocol", "seeds", "splits", "gradient_pairs", "target_overlap", "min_fold_prompts"}
    settings = recipe.score.model_dump(mode="json", exclude=which)
    key = content_key(
        stage="records",
        scorer=scorer.name,
        score=settings,
        max_length=recipe.data.max_length,
        **_model_key(run, recipe.score),
        tokens=read_manifest(run.folder.pairs).files[TOKENS],
        reference=read_manifest(run.folder.reference).files,
    )
    folder = run.folder.scores(scorer)
    tracking = run.folder.tracking / scorer.name
    checkpoints = _checkpoints(run, scorer.name, key)
    return ScorerJob(
        recipe, scorer, run.folder.pairs, run.folder.reference, folder, key, tracking, checkpoints
    )


def gradient_job(run: Run, seed: int) -> GradientJob:
    """The gradient pass of one split. `ArtifactError` while the pairs are not complete."""
    recipe = run.recipe
    key = content_key(
        stage="gradients",
        seed=seed,
        target_delta=target_delta(recipe),
        score=recipe.score.model_dump(
            mode="json", include={"lora", "trainer", "gradient_pairs", "tokens_per_batch", "keep_scorers"}
        ),
        max_length=recipe.data.max_length,
        **_model_key(run, recipe.score),
        tokens=read_manifest(run.folder.pairs).files[TOKENS],
    )
    return GradientJob(recipe, seed, run.folder.pairs, run.folder.checkpoints(f"one-step-{seed}"), key)


def one_step_job(run: Run, scorer: ScorerRun) -> OneStepJob:
    """One fold's work and key. `ArtifactError` while pairs or reference are not complete."""
    gradients = gradient_job(run, scorer.seed)
    reference = read_manifest(run.folder.reference).files
    key = content_key(
        stage="one-step records", gradients=gradients.key, fold=scorer.fold, reference=reference
    )
    return OneStepJob(gradients, scorer, run.folder.reference, run.folder.scores(scorer), key)


def record_digests(jobs: Sequence[ScorerJob | OneStepJob]) -> dict[str, str]:
    """SHA-256 of the records of each finished scorer, by its name."""
    return {job.run.name: read_manifest(job.folder).files[RECORDS] for job in jobs}


def check_run(run: Run) -> Run:
    """The run of `score.check`: a pair of scorers, as `fast` trains them, on some of the pairs."""
    recipe, means = run.recipe, PROTOCOLS["fast"]
    score = recipe.score.model_copy(
        update={
            **means._asdict(),
            "protocol": "fast",
            "splits": 1,
            "gradient_pairs": 0,
            "check": 0,
            "keep_scorers": False,
        }
    )
    most = recipe.data.max_pairs or recipe.score.check
    data = recipe.data.model_copy(update={"test": (), "max_pairs": min(most, recipe.score.check)})
    blocks = {"select": SelectConfig(), "train": TrainConfig(), "evaluate": EvaluateConfig()}
    place = {"output_dir": str(run.folder.root), "name": run.folder.check.name}
    checked = recipe.model_copy(update={**place, **blocks, "data": data, "score": score})
    return Run(checked, RunDirectory.of(checked), run.say, run.fresh)


def check_inputs(run: Run) -> dict[str, str]:
    """SHA-256 of the records of `score.check`, by scorer; none where there is no check."""
    if not run.recipe.score.check:
        return {}
    checked = check_run(run)
    found = record_digests([scorer_job(checked, scorer) for scorer in checked.scorer_runs])
    return {f"{run.folder.check.name}/{name}": digest for name, digest in found.items()}


def certificate_key(run: Run, scorers: Sequence[ScorerRun]) -> str:
    """Key of what the records of these scorers predict of the selected set's stability."""
    select = run.recipe.select
    return content_key(
        records=record_digests([scorer_job(run, scorer) for scorer in scorers]),
        aggregate=select.aggregate,
        **criterion_source(select.aggregate),
        rule=asdict(rule_of(select)),
        target=target_overlap(run),
        decides="lower end",
    )


def target_overlap(run: Run) -> float:
    """The overlap with a fresh repetition that protocol `certified` asks for."""
    return run.recipe.score.target_overlap or DEFAULT_TARGET


def _certified_runs(run: Run, planned: tuple[ScorerRun, ...]) -> tuple[ScorerRun, ...]:
    """The scorers that are needed as far as is known: those of the certificate, else of `MIN_SEEDS` seeds."""
    try:
        found = read_json(run.folder.certificate)
        scorers = planned[: 2 * int(found["seeds"])]
        if found["key"] == certificate_key(run, scorers):
            return scorers
    except ArtifactError:
        pass
    return planned[: 2 * MIN_SEEDS]


# ----------------------------------------------------------------------------------------------------
# Curricula and policies.


def imported_inputs(run: Run, digest: str) -> dict[str, str]:
    """What a curriculum is made from, where its difficulty is imported with this digest of its content."""
    return {"curriculum": digest, "pairs": read_manifest(run.folder.pairs).files[TOKENS]}


def action_inputs(run: Run, select: SelectConfig) -> dict[str, str]:
    """What a curriculum with an `action` is made from besides records: texts, and where pairs are flagged."""
    if not select.action:
        return {}
    thresholds = digest(run.recipe.issues.model_dump(mode="json"))
    return {"texts": read_manifest(run.folder.pairs).files[PAIRS], "issues": thresholds}


def attribute_inputs(run: Run, select: SelectConfig) -> dict[str, str]:
    """SHA-256 of the pairs' table, for a selection that goes by lengths, sources or scores; else nothing."""
    return {"attributes": read_manifest(run.folder.pairs).files[PAIRS]} if needs_attributes(select) else {}


def curriculum_key(records: Mapping[str, str], select: SelectConfig) -> str:
    """Key of the curriculum made from these records (see `record_digests` and `imported_inputs`)."""
    chosen = select.identity()
    source = criterion_source(select.aggregate)
    return content_key(stage="curriculum", records=dict(records), select=chosen, **source)


def has_curriculum(folder: Path, key: str) -> bool:
    """Whether `folder` holds the curriculum that was made under `key`."""
    try:
        return bool(Curriculum.load(folder).facts["key"] == key)
    except ArtifactError:
        return False


class Training(NamedTuple):
    """What one policy is trained on, and where it goes."""

    select: SelectConfig
    curriculum: Path
    """The folder that holds it."""
    policy: Path
    seed: int | None = None
    """In place of the recipe's own."""

    @property
    def label(self) -> str:
        """In words."""
        return label_for(self.select) + ("" if self.seed is None else f", seed {self.seed}")


def trainings(run: Run) -> dict[str, Training]:
    """Every policy that is trained: of each arm, and of the run's own with each of the other seeds."""
    own = run.recipe.select
    arms = {name: Training(select, at, at / "policy") for name, (select, at) in run.arms.items()}
    return arms | {
        repeat_name(seed): Training(own, run.folder.root, run.folder.repeat(seed) / "policy", seed)
        for seed in run.recipe.evaluate.training_seeds
    }


def training_job(run: Run, name: str) -> TrainingJob:
    """What trains the policy `name` of `trainings`, from its curriculum as it is on disk."""
    recipe = run.recipe
    training = trainings(run)[name]
    curriculum = Curriculum.load(training.curriculum)
    has_test = bool(recipe.data.test)
    key = content_key(
        stage="policy",
        order=curriculum.order_digest,
        curriculum=curriculum.facts["key"],
        train=recipe.train.model_dump(mode="json", include={"lora", "trainer"}),
        max_length=recipe.data.max_length,
        **_model_key(run, recipe.train),
        tokens=read_manifest(run.folder.pairs).files[TOKENS],
        reference=read_manifest(run.folder.reference).files,
        held_out=read_manifest(run.folder.test_reference).files if has_test else {},
        **({} if training.seed is None else {"seed": training.seed}),
    )
    return TrainingJob(
        recipe,
        name,
        training.label,
        run.folder.pairs,
        run.folder.reference,
        run.folder.test_pairs if has_test else None,
        run.folder.test_reference if has_test else None,
        training.curriculum / TABLE,
        training.policy,
        key,
        run.folder.tracking / name,
        _checkpoints(run, name, key),
        training.seed,
    )


def _checkpoints(run: Run, name: str, key: str) -> CheckpointPlan:
    launch = run.recipe.launch
    return CheckpointPlan(
        run.folder.checkpoints(name), key, minutes=launch.checkpoint_minutes, steps=launch.checkpoint_steps
    )


def _model_key(run: Run, block: ScoreConfig | TrainConfig) -> dict[str, object]:
    # Content, not paths: a model moved elsewhere is the same. Tokenizer and template decide the tokens,
    # which have a digest of their own.
    numerics = run.recipe.model.model_dump(mode="json", include={"dtype", "attention"})
    held = weights_dtype(run.recipe.model, block.lora, block.trainer)
    if held != run.recipe.model.dtype:
        numerics["held_in"] = held
    return {"weights": run.model_digest, "numerics": numerics}


# ----------------------------------------------------------------------------------------------------
# Evaluation.


_NAMED_BY_CONTENT: Any = {
    "controls": True,
    "training_seeds": True,
    "reward_model": True,
    "language_judge": True,
    "benchmarks": True,
    "guard": True,
    "text": True,
    "generation": {"source"},
}
"""Keys of `evaluate` for which something else stands in the evaluation's key: policies, judge, prompts. The
answers to benchmarks have keys of their own."""


def evaluation_key(run: Run) -> str:
    """Key of the evaluation of the arms that are trained. `ArtifactError` while one is not."""
    policies = {name: read_manifest(training.policy).files for name, training in trainings(run).items()}
    has_test = bool(run.recipe.data.test)
    return content_key(
        stage="evaluation",
        weights=run.model_digest,
        policies={name: weight_digests(files) for name, files in policies.items()},
        judge=run.judge_digest,
        evaluate=run.recipe.evaluate.model_dump(mode="json", exclude=_NAMED_BY_CONTENT),
        held_out=read_manifest(run.folder.test_pairs).files[TOKENS] if has_test else "",
        prompts=[prompt.prompt_id for prompt in prompts_to_answer(run)],
        # Left out where there is none: results of versions that had no other text stay.
        **({"text": file_digest(Path(run.recipe.evaluate.text))} if run.recipe.evaluate.text else {}),
    )


def guard_key(run: Run, config: GuardConfig, arm: str) -> str:
    """Key of the scores of one arm, or of the starting model, in the tasks of `evaluate.guard`."""
    policy, selected = trainings(run).get(arm), trainings(run)[SELECTED]
    return content_key(
        stage="guard",
        settings=config.model_dump(mode="json", exclude={"include_path", "allow_code", "batch_size"}),
        files=folder_digests(Path(config.include_path)) if config.include_path else {},
        harness=importlib.metadata.version("lm_eval"),
        weights=run.model_digest,
        policy=weight_digests(read_manifest(policy.policy).files) if policy else {},
        tokenizer={
            name: digest for name, digest in read_manifest(selected.policy).files.items() if "token" in name
        },
        dtype=run.recipe.model.dtype,
    )


def benchmark_key(run: Run, name: BenchmarkName, arm: str) -> str:
    """Key of the answers of one arm, or of the starting model, to a benchmark's questions."""
    recipe, policy = run.recipe, trainings(run).get(arm)
    benchmark = recipe.evaluate.benchmarks[name]
    return content_key(
        stage="benchmark",
        benchmark=name,
        questions=file_digest(question_file(name, benchmark.source)),
        settings=benchmark.model_dump(mode="json", exclude={"source"}),
        generation=recipe.evaluate.generation.model_dump(mode="json", include={"batch_size", "seed"}),
        called=model_name(recipe.name, arm),
        weights=run.model_digest,
        policy=weight_digests(read_manifest(policy.policy).files) if policy else {},
        tokens=read_manifest(run.folder.pairs).files[TOKENS],  # they tell of tokenizer and template
        empty_system_message=recipe.data.empty_system_message,
    )


def weight_digests(files: Mapping[str, str]) -> dict[str, str]:
    """Of the files of a policy and their digests, those of its weights."""
    return {name: found for name, found in files.items() if name.endswith(".safetensors")}


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
# The content of what the recipe names, which must not change while a run goes on. The recipe itself is
# compared field by field (`RunDirectory.require_same_recipe`).


INPUTS = "inputs.json"

JUDGE = "judge"
"""What the judge is called there, before its name."""


def input_digests(run: Run) -> dict[str, str]:
    """SHA-256 of the content that the recipe names, by the key that names it."""
    recipe = run.recipe
    how = recipe.select.aggregate
    evaluate, prompts = recipe.evaluate, recipe.evaluate.generation.source
    has_judge = evaluate.judge != "none"
    sources = {"data.train": recipe.data.train, "data.test": recipe.data.test}
    return {
        f"model {recipe.model.path}": run.model_digest,
        f"tokenizer {recipe.model.tokenizer or recipe.model.path}": tokenizer_digest(run.tokenizer),
        f"chat template {recipe.model.chat_template or 'of the tokenizer'}": template_digest(run.tokenizer),
        **{
            f"{key}.{number} {source_label(source)}": source_digest(source)
            for key, listed in sources.items()
            for number, source in enumerate(listed)
        },
        **({f"curriculum {recipe.curriculum}": run.outside.digest} if run.outside else {}),
        **{
            f"evaluate.controls.{name}.from {select.source}": outside.digest
            for name, select in evaluate.controls.items()
            if select.source and (outside := run.outside_of(select))
        },
        **{f"{kind} {how}": source for kind, source in criterion_source(how).items()},
        **({f"{JUDGE} {evaluate.reward_model or evaluate.judge}": run.judge_digest} if has_judge else {}),
        **({f"evaluate.generation.source {prompts}": file_digest(Path(prompts))} if prompts else {}),
        **{
            f"evaluate.benchmarks.{name}.source {each.source}": file_digest(question_file(name, each.source))
            for name, each in evaluate.benchmarks.items()
        },
    }


def require_same_inputs(run: Run, inputs: Mapping[str, str]) -> None:
    """Refuse to go on with inputs of another content than the run began with; a moved file is the same.

    Raises:
        RunChangedError: each changed input is named, with its digest before and now.
    """
    path = run.folder.root / INPUTS
    if run.fresh or not path.is_file():
        return
    # By what they are for; where they lie may differ.
    before = {name.split()[0]: digest for name, digest in read_json(path).items()}
    changes = [
        f"{name}: SHA-256 {before[kind][:12]} -> {digest[:12]}"
        for name, digest in inputs.items()
        if (kind := name.split()[0]) in before and before[kind] != digest
    ]
    if changes:
        raise RunChangedError(
            f"{run.folder.root} was made from other inputs ({name_some(changes, limit=8)}): put them back, "
            "give this run another name, or pass --fresh to redo the stages that the change touches"
        )


def remember_inputs(run: Run, inputs: Mapping[str, str]) -> None:
    """Write down what the run is made from; the main process does."""
    path = run.folder.root / INPUTS
    if this_process().is_main_process and (not path.is_file() or read_json(path) != inputs):
        write_json(path, inputs)


# ----------------------------------------------------------------------------------------------------
# Where a result came from: enough to make it again.


_PACKAGES = ("selective-dpo", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


def provenance(recipe: Recipe, *, inputs: dict[str, str]) -> dict[str, Any]:
    """Versions, hardware, git state, the recipe's digest and those of its inputs.

    It is published, on a model card too: no environment variables, no user names, no paths of this machine,
    so not the command either. What that said stands in the run's `config.json`.
    """
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "recipe_sha256": digest(dump_config(recipe)),
        "inputs": inputs,
        "trust_remote_code": recipe.model.trust_remote_code,
        "remote_code": remote_code(recipe.model),
        "versions": versions(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus},
        "git": git_state(),
    }


def git_state() -> str | None:
    """Commit of the checkout this was started in, with "+changes" if it was not clean; None outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide results."""
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}
