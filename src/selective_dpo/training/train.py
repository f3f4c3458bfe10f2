"""The recipe's training stage: DPO from the starting policy along a curriculum."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback
from typing_extensions import override

from selective_dpo.config import TRAINING_SEED, Recipe, Settings
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.store import load_tokens
from selective_dpo.distributed.processes import publish_from_main, this_process
from selective_dpo.distributed.progress import Progress
from selective_dpo.errors import IdentityError, name_some
from selective_dpo.identity import positions_of
from selective_dpo.logprobs.reference import finite_rows, load_reference, with_reference
from selective_dpo.models import load_policy, load_tokenizer
from selective_dpo.storage.artifacts import write_atomic, write_json
from selective_dpo.training.arguments import dpo_arguments, hold_for_training, lora_config, weights_dtype
from selective_dpo.training.card import model_card
from selective_dpo.training.checkpointing import (
    CheckpointPlan,
    ResumableTrainer,
    discard_checkpoints,
    train_resumably,
)
from selective_dpo.training.publish import save_policy, trainer_facts, training_log
from selective_dpo.training.selective_trainer import SelectiveDPOTrainer


class TrainingJob(NamedTuple):
    """All that one training needs; it can be sent to another process."""

    recipe: Recipe
    name: str
    """"selected", or the control's name."""
    label: str
    """The selection in words."""
    pairs: Path
    reference: Path
    test_pairs: Path | None
    """Prepared held-out pairs, where the recipe has any."""
    test_reference: Path | None
    curriculum: Path
    folder: Path
    """Where to publish the policy."""
    key: str
    tracking: Path | None = None
    """Where the local files of trackers go; None: they are deleted."""
    checkpoints: CheckpointPlan | None = None
    """None: a killed training begins anew."""
    seed: int | None = None
    """In place of the recipe's own."""


class _PolicyTrainer(ResumableTrainer, SelectiveDPOTrainer):
    """The trainer of a policy."""


def train_policy(job: TrainingJob) -> None:
    """Train on the curriculum's pairs in its order; publish weights, card, log and the order consumed.

    A training that was interrupted goes on from its newest checkpoint.

    Raises:
        Interrupted: SIGTERM came during the training.
        ConfigError: the training diverged.
        IdentityError: the curriculum was made from other pairs, or the order consumed is not the
            curriculum's, once an epoch. Nothing is published on either error.
    """
    started = time.monotonic()
    curriculum = Curriculum.load(job.curriculum)
    with training_folder(job.recipe.train.trainer, job.tracking) as folder:
        trainer = _make_trainer(job, curriculum, folder)
        earlier = train_resumably(trainer, job.checkpoints)
    order = trainer.consumed_order
    if not order.matches or order.epochs != trainer.args.num_train_epochs:
        raise IdentityError(
            f"{job.name}: the pairs consumed are not the curriculum's order: {order.consumed:,} rows with "
            f"digest {order.consumed_digest[:12]} instead of {trainer.args.num_train_epochs:g} times "
            f"{order.pairs:,} with {order.expected_digest[:12]}"
        )
    with publish_from_main(job.folder, kind="policy", key=job.key) as partial:
        save_policy(trainer, partial, dtype=job.recipe.model.dtype)
        if this_process().is_main_process:
            write_json(partial / "order.json", order.to_json())
            write_json(partial / "trainer_log.json", training_log(trainer))
            card = model_card(job.recipe, label=job.label, facts=curriculum.facts, order=order, key=job.key)
            write_atomic(partial / "README.md", card)
            seconds = earlier + time.monotonic() - started
            write_json(partial / "cost.json", {**trainer_facts(trainer), "seconds": seconds})
    if job.checkpoints is not None and this_process().is_main_process:
        discard_checkpoints(job.checkpoints.folder)


def _make_trainer(job: TrainingJob, curriculum: Curriculum, folder: Path) -> Any:
    recipe = job.recipe
    tokens = load_tokens(job.pairs)
    _require_same_pairs(curriculum, list(tokens["pair_id"]))
    at = positions_of(curriculum.order, list(tokens["pair_id"]), what="prepared pairs")
    rows = with_reference(tokens, load_reference(job.reference), at)
    seed = {} if job.seed is None else {"seed": job.seed}
    args = dpo_arguments(
        {"run_name": f"{recipe.name}-{job.name}", **recipe.train.trainer, **seed},
        model=recipe.model,
        max_length=recipe.data.max_length,
        output_dir=folder,
        seed=TRAINING_SEED,
        sequential=True,
    )
    held = weights_dtype(recipe.model, recipe.train.lora, recipe.train.trainer)
    return _PolicyTrainer(
        hold_for_training(load_policy(recipe.model), args, held),
        args=args,
        train_dataset=rows,
        eval_dataset=_held_out(job) if args.eval_strategy != "no" else None,
        processing_class=load_tokenizer(recipe.model),
        peft_config=lora_config(recipe.train.lora, recipe.model.revision),
        curriculum=curriculum,
        callbacks=[TrainingProgress(job.name)],
    )


def _require_same_pairs(curriculum: Curriculum, ids: list[str]) -> None:
    """The trainer leaves out rows that a curriculum does not know. Here it must know all of them."""
    listed, measured = (set(each.table["pair_id"].to_pylist()) for each in (curriculum, curriculum.measured))
    unknown, gone = sorted(set(ids) - listed), sorted(measured - set(ids))
    if unknown or gone:
        raise IdentityError(
            f"the curriculum was made from other pairs: it lacks {len(unknown):,} of {len(ids):,} prepared "
            f"pairs ({name_some(unknown) or 'none'}), and {len(gone):,} of its {len(measured):,} are not "
            f"among them ({name_some(gone) or 'none'}); build it again with `selective-dpo curriculum`"
        )


def _held_out(job: TrainingJob) -> Any:
    if job.test_pairs is None or job.test_reference is None:
        return None
    tokens = load_tokens(job.test_pairs)
    rows = finite_rows(tokens, job.test_reference)
    return with_reference(tokens, load_reference(job.test_reference), rows)


# --- experiment trackers ------------------------------------------------------------------------------------


def tracker_names(settings: Settings) -> tuple[str, ...]:
    """The trackers that the trainer settings ask for; "all" is every one that is installed."""
    given = settings.get("report_to") or "none"
    names = (given,) if isinstance(given, str) else tuple(given)
    if "all" in names:
        from transformers.integrations import integration_utils

        return tuple(integration_utils.get_available_reporting_integrations())  # type: ignore[no-untyped-call]
    return tuple(name for name in names if name != "none")


@contextlib.contextmanager
def training_folder(settings: Settings, tracking: Path | None) -> Iterator[Path]:
    """The trainer's own folder: `tracking` where a tracker may write to it, else one that is deleted.

    Afterwards a W&B run is closed: its next training in this process is another run.
    """
    names = tracker_names(settings)
    if names and tracking is not None:
        yield tracking
        with contextlib.suppress(OSError):  # only if it is there and empty: most trackers write elsewhere
            tracking.rmdir()
            tracking.parent.rmdir()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    # The only one of the usual trackers that transformers leaves open.
    if "wandb" in names and "wandb" in sys.modules:
        sys.modules["wandb"].finish()


# --- progress -----------------------------------------------------------------------------------------------


class TrainingProgress(TrainerCallback):
    """Shows optimizer steps, rate and time left."""

    def __init__(self, what: str) -> None:
        self._what = what

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress = Progress(state.max_steps, self._what, unit="updates", done=state.global_step)

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.advance(1)

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.close()
