"""One scorer: DPO on one half of the pairs, held-out losses of the other half."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from selective_dpo.config import Recipe, Settings
from selective_dpo.criteria import CRITERIA
from selective_dpo.curriculum.records import (
    LossTable,
    Records,
    concat_records,
    read_loss_table,
    read_records,
    sift,
    write_records,
)
from selective_dpo.data.store import load_tokens
from selective_dpo.difficulty.held_out import HeldOutEvaluations, Measurement
from selective_dpo.difficulty.protocols import ScorerRun, split_pairs
from selective_dpo.distributed.processes import publish_from_main, this_process
from selective_dpo.errors import name_some
from selective_dpo.identity import positions_of
from selective_dpo.logprobs.compute import PairLogps, pair_logps
from selective_dpo.logprobs.nonfinite import read_quarantine, require_few, write_quarantine
from selective_dpo.logprobs.reference import finite_rows, load_reference, with_reference
from selective_dpo.logprobs.rows import part_lengths
from selective_dpo.losses import pair_losses
from selective_dpo.models import load_policy, load_tokenizer
from selective_dpo.storage.artifacts import write_json
from selective_dpo.training.arguments import (
    ORIGINAL_DEFAULTS,
    autocast_dtype,
    dpo_arguments,
    hold_for_training,
    lora_config,
    weights_dtype,
)
from selective_dpo.training.checkpointing import (
    CheckpointPlan,
    ResumableTrainer,
    discard_checkpoints,
    train_resumably,
)
from selective_dpo.training.publish import save_policy, trainer_facts, training_log
from selective_dpo.training.train import TrainingProgress, training_folder
from selective_dpo.training.trainer import PairTrainer

logger = logging.getLogger(__name__)

RECORDS = "records.parquet"

COST = "cost.json"


class ScorerJob(NamedTuple):
    """All that one scorer needs; it can be sent to another process."""

    recipe: Recipe
    run: ScorerRun
    pairs: Path
    """Folder of the prepared pairs."""
    reference: Path
    """Folder of the reference's log-probs."""
    folder: Path
    """Where to publish."""
    key: str
    tracking: Path
    """Where the local files of trackers go."""
    checkpoints: CheckpointPlan


class _Scorer(ResumableTrainer, PairTrainer):
    """The trainer of a scorer."""


def run_scorer(job: ScorerJob) -> None:
    """Train one scorer, measure its held-out half at every evaluation, publish the records.

    A training that was interrupted goes on from its newest checkpoint, with the measurements made so far.

    Raises:
        Interrupted: SIGTERM came during the training.
        ConfigError: too few optimizer steps for the evaluations.
        NotFiniteError: a pair's loss, or an update's gradient, is not finite; the pairs are named.
        RecordsError: the held-out losses of more than 1% of the pairs are not finite; some are named. Fewer
            pairs are set aside (see `logprobs.nonfinite`).
    """
    started = time.monotonic()
    config = job.recipe.score
    tokens = load_tokens(job.pairs)
    reference = load_reference(job.reference)
    split = split_pairs(list(tokens["prompt_id"]), job.run)
    finite = finite_rows(tokens, job.reference)
    train, held_out = (with_reference(tokens, reference, np.intersect1d(rows, finite)) for rows in split)
    with training_folder(config.trainer, job.tracking) as training:
        trainer, evaluations = _make_trainer(job, train, held_out, training)
        earlier = train_resumably(trainer, job.checkpoints, [evaluations])
    settings = {**ORIGINAL_DEFAULTS, **config.trainer}
    measured = to_records(job.run, held_out, reference, evaluations.measurements, settings)
    records, quarantined = sift(measured)
    require_few(
        quarantined,
        len(held_out),
        what="the held-out loss",
        remedy="lower score.trainer.learning_rate, or use bfloat16 or float32 instead of float16",
    )
    with publish_from_main(job.folder, kind="records", key=job.key) as partial:
        write_records(records, partial / RECORDS)
        write_quarantine(partial, quarantined, pairs=len(held_out))
        write_json(partial / "trainer_log.json", training_log(trainer))
        facts = trainer_facts(trainer)
        write_json(
            partial / COST,
            {
                **facts,
                "train_pairs": len(train),
                "held_out_pairs": len(held_out),
                "quarantined_pairs": len(quarantined),
                "evaluations": len(evaluations.measurements),
                "seconds": earlier + time.monotonic() - started,
            },
        )
        if config.keep_scorers:
            save_policy(trainer, partial / "scorer", dtype=job.recipe.model.dtype)
    if this_process().is_main_process:
        discard_checkpoints(job.checkpoints.folder)


def _make_trainer(
    job: ScorerJob, train: Dataset, held_out: Dataset, folder: Path
) -> tuple[PairTrainer, HeldOutEvaluations]:
    config = job.recipe.score
    args = dpo_arguments(
        {"run_name": f"{job.recipe.name}-{job.run.name}", **config.trainer},
        model=job.recipe.model,
        max_length=job.recipe.data.max_length,
        output_dir=folder,
        seed=job.run.seed,
        sequential=False,
    )
    tokenizer = load_tokenizer(job.recipe.model)

    def measure() -> PairLogps:
        # Sharded models only work through their wrapper.
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        return pair_logps(
            trainer.model_wrapped if is_sharded else trainer.model,
            held_out,
            tokens_per_batch=config.tokens_per_batch,
            pad_token_id=tokenizer.pad_token_id,
            autocast_dtype=autocast_dtype(config.trainer, job.recipe.model),
            what=f"{job.run.name} held-out",
            stop=trainer.is_asked_to_stop,
        )

    evaluations = HeldOutEvaluations(config.evaluations, measure)
    held = weights_dtype(job.recipe.model, config.lora, config.trainer)
    trainer = _Scorer(
        hold_for_training(load_policy(job.recipe.model), args, held),
        args=args,
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=lora_config(config.lora, job.recipe.model.revision),
        callbacks=[evaluations, TrainingProgress(job.run.name)],
    )
    return trainer, evaluations


def to_records(
    run: ScorerRun,
    held_out: Dataset,
    reference: PairLogps,
    measurements: list[Measurement],
    settings: Settings,
) -> Records:
    """The records of all `measurements` of the pairs `held_out`, with their margins and losses."""
    pair_ids, prompt_ids = list(held_out["pair_id"]), list(held_out["prompt_id"])
    count, pairs = len(measurements), len(pair_ids)

    def in_order(logps: PairLogps, what: str) -> NDArray[np.float64]:
        at = positions_of(pair_ids, logps.pair_ids, what=what)
        return np.stack([logps.chosen_P[at], logps.rejected_P[at]], axis=1)

    policy_R2 = np.concatenate(
        [in_order(each.logps, f"{run.name} held-out log-probs") for each in measurements]
    )
    reference_R2 = np.tile(in_order(reference, "reference log-probs"), (count, 1))
    _, chosen_P, rejected_P = part_lengths(held_out)
    tokens_R2 = np.tile(np.stack([chosen_P, rejected_P], axis=1), (count, 1))
    losses = pair_losses(policy_R2, reference_R2, tokens_R2, settings)
    return Records(
        pair_id=np.tile(np.asarray(pair_ids, dtype=np.str_), count),
        prompt_id=np.tile(np.asarray(prompt_ids, dtype=np.str_), count),
        seed=np.full(count * pairs, run.seed, dtype=np.int64),
        fold=np.full(count * pairs, run.fold, dtype=np.int64),
        evaluation=np.repeat(np.array([each.evaluation for each in measurements], dtype=np.int64), pairs),
        step=np.repeat(np.array([each.step for each in measurements], dtype=np.int64), pairs),
        policy_chosen_logp=policy_R2[:, 0],
        policy_rejected_logp=policy_R2[:, 1],
        reference_chosen_logp=reference_R2[:, 0],
        reference_rejected_logp=reference_R2[:, 1],
        margin=losses.margin_P,
        loss=losses.loss_P,
    )


def collect_losses(
    folders: Sequence[Path], *, allow_partial: bool = False, criteria: Iterable[str] = ("mean",)
) -> LossTable:
    """The losses that several scorers measured, by pair, seed and evaluation (see `read_loss_table`).

    With them come the margins, and the other record columns that `criteria` read. A pair that any scorer set
    aside is not among them.
    """
    return read_loss_table(
        [folder / RECORDS for folder in folders],
        allow_partial=allow_partial,
        without=read_quarantine(folders),
        columns={"margin"} | {column for name in criteria for column in CRITERIA[name].reads},
    )


def collect_records(folders: Sequence[Path]) -> Records:
    """The records of several scorers with all their columns, sorted by pair, seed and evaluation.

    A pair that any of them set aside has none, and a warning names it.
    """
    records = concat_records([read_records(folder / RECORDS) for folder in folders])
    quarantined = read_quarantine(folders)
    if quarantined:
        logger.warning("%s pair(s) not finite, without records: %s", len(quarantined), name_some(quarantined))
    kept = np.flatnonzero(~np.isin(records.pair_id, list(quarantined)))
    by_key = (records.evaluation[kept], records.seed[kept], records.pair_id[kept])
    order = kept[np.lexsort(by_key)]
    return Records(**{name: column[order] for name, column in vars(records).items()})
