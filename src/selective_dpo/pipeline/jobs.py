"""What each stage's work is and which key its result gets. Asking changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from selective_dpo.artifacts import content_key, read_manifest
from selective_dpo.config import ScoreConfig, SelectConfig, TrainConfig
from selective_dpo.core.identity import ids_digest
from selective_dpo.core.results import repeat_name
from selective_dpo.curriculum.table import TABLE, Curriculum
from selective_dpo.data.store import TOKENS
from selective_dpo.errors import ArtifactError
from selective_dpo.reporting.tables import label_for
from selective_dpo.scoring.plan import ScorerRun
from selective_dpo.scoring.scorer import RECORDS, ScorerJob
from selective_dpo.training.arguments import autocast_dtype, weights_dtype
from selective_dpo.training.checkpoints import CheckpointPlan
from selective_dpo.training.train import TrainingJob

if TYPE_CHECKING:
    from selective_dpo.pipeline.stages import Run


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


def scorer_job(run: Run, scorer: ScorerRun) -> ScorerJob:
    """One scorer's work and key. `ArtifactError` while pairs or reference are not complete."""
    recipe = run.recipe
    # Not which scorers there are: adding one must not throw away the others' records.
    which = {"protocol", "seeds", "target_overlap", "min_fold_prompts"}
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


def record_digests(jobs: Sequence[ScorerJob]) -> dict[str, str]:
    """SHA-256 of the records of each finished scorer, by its name."""
    return {job.run.name: read_manifest(job.folder).files[RECORDS] for job in jobs}


def imported_inputs(run: Run, digest: str) -> dict[str, str]:
    """What a curriculum is made from, where its difficulty is imported with this digest of its content."""
    return {"curriculum": digest, "pairs": read_manifest(run.folder.pairs).files[TOKENS]}


def curriculum_key(records: Mapping[str, str], select: SelectConfig) -> str:
    """Key of the curriculum made from these records (see `record_digests` and `imported_inputs`)."""
    return content_key(stage="curriculum", records=dict(records), select=select.model_dump(mode="json"))


def has_curriculum(folder: Path, key: str) -> bool:
    """Whether `folder` holds the curriculum that was made under `key`."""
    try:
        return bool(Curriculum.load(folder).facts["key"] == key)
    except ArtifactError:
        return False


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
