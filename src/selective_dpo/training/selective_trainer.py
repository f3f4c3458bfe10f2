"""`SelectiveDPOTrainer`: TRL's DPO trainer that follows a curriculum."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl import DPOConfig

from selective_dpo.curriculum.table import DIFFICULTY, PAIR_ID, WEIGHT, Curriculum, with_weights
from selective_dpo.errors import ArtifactError, ConfigError, IdentityError, ModelError, name_some
from selective_dpo.identity import ids_digest
from selective_dpo.logprobs.rows import part_lengths
from selective_dpo.losses import LOSSES, loss_names
from selective_dpo.models import require_full_model
from selective_dpo.storage.artifacts import read_json, write_atomic
from selective_dpo.training.batching import PairBatch, is_tokenized
from selective_dpo.training.trainer import PairTrainer, has_reference

logger = logging.getLogger(__name__)


class SelectiveDPOTrainer(PairTrainer):
    """`trl.DPOTrainer` plus `curriculum`: it trains on the selected pairs, in the curriculum's order.

    Rows are matched by `pair_id` (a column, or computed from prompt, chosen and rejected). Everything
    else, any `loss_type` included, is TRL's, but for what `PairTrainer` says. The mean difficulty of the
    pairs since the last log entry is logged as `difficulty`, and `consumed_order` says which order was
    really trained on. Where the curriculum has weights (`select.action`), each pair's gradient is multiplied
    by its own; the loss that is logged is the one without weights.

    Args:
        curriculum: Selected pairs and their order; by name only.
        args: As for `DPOTrainer`, with `train_sampling_strategy="sequential"`. By default TRL's, in the
            folder `selective-dpo`; without an accelerator on the CPU, in float32.
        train_dataset: Preference pairs in any form that `score_difficulty` takes, with every selected pair
            among them; or tokenized rows (`prompt_ids`, `chosen_ids`, `rejected_ids`). Rows that the
            curriculum did not select, or does not know, are left out. Columns `ref_chosen_logps` and
            `ref_rejected_logps`, where present, are the reference; no reference model is loaded.
        Others: as for `DPOTrainer`, in its order, and `path` as for `PairTrainer`.

    Raises:
        ConfigError: the curriculum or the data set is of the wrong type; the configuration would shuffle,
            drop or cut rows, or contradicts cached reference log-probs.
        DataError: the prompt of a selected pair fills `max_length`, so that TRL would drop it.
        IdentityError: selected pairs are missing from `train_dataset`.
        ModelError: `model` is a PEFT adapter that transformers would load, or has loaded, with its base.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        *rest: Any,
        curriculum: Curriculum,
        **others: Any,
    ) -> None:
        if not isinstance(curriculum, Curriculum):
            raise ConfigError(
                f"curriculum is a {type(curriculum).__name__}: pass a Curriculum, as build_curriculum(...) "
                "returns or Curriculum.load(FOLDER) reads it"
            )
        if isinstance(model, str):
            require_full_model(model)
        elif getattr(model, "_hf_peft_config_loaded", False):
            raise ModelError(
                "model holds a PEFT adapter that transformers has loaded, whose place a new one would take: "
                "load it with peft.AutoPeftModelForCausalLM.from_pretrained and pass its merge_and_unload()"
            )
        if args is None:
            args = DPOConfig(
                "selective-dpo",
                train_sampling_strategy="sequential",
                use_cpu=not torch.accelerator.is_available(),
                bf16=is_torch_bf16_gpu_available(),
            )
        _require_order_kept(args)
        # Scoring leaves out unusable pairs (too long, identical ...), which raw data still holds.
        ordered = curriculum.apply(train_dataset, allow_unscored=True)
        if ref_model is not None and has_reference(ordered):
            raise ConfigError(
                "ref_model would have no effect: the rows carry its log-probs; give the one or the other"
            )
        ids: list[str] = ordered[PAIR_ID][:]
        self._has_weights = WEIGHT in curriculum.table.column_names
        if self._has_weights:
            _require_weights_kept(args)
        self._order_log = OrderLog(ids, ordered[WEIGHT][:] if self._has_weights else None)
        self._position = {name: position for position, name in enumerate(ids)}
        self._difficulty_P = np.asarray(ordered[DIFFICULTY][:], dtype=np.float64)
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            ordered,
            eval_dataset,
            processing_class,
            compute_metrics,
            *rest,
            **others,
        )
        _check_lengths(self.train_dataset, args.max_length)

    @property
    def consumed_order(self) -> ConsumedOrder:
        """What the last call of `train` has trained on so far, against the curriculum."""
        return self._order_log.result()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **others: Any) -> Any:
        """As `DPOTrainer.train`. From a checkpoint, what was consumed before it counts, too.

        Raises:
            IdentityError: the checkpoint is of a training on another curriculum.
            ArtifactError: it does not say what was consumed, as one of another trainer.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        self._order_log.start_training()
        if checkpoint:
            self._order_log.read_state(Path(checkpoint))  # what is refused is refused before it is loaded
        return super().train(resume_from_checkpoint, *args, **others)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._order_log.write_state(folder)

    def _note_update(self, batches: list[PairBatch]) -> None:
        # Before the update's pairs are grouped by length: their order within it is the curriculum's.
        for batch in batches:
            positions = torch.tensor([self._position[name] for name in batch.ids])
            own = self._order_log.add(self._of_all(positions), self._weights_of(batch))
            # TRL logs the mean of this list, so one entry a pair gives the mean over pairs, whatever the
            # sizes of the batches.
            self._metrics["train"][DIFFICULTY].extend(self._difficulty_P[own].tolist())

    def _weights_of(self, batch: PairBatch) -> list[float] | None:
        if not self._has_weights:
            return None
        return self._of_all(torch.tensor(batch.pair_weights, dtype=torch.float64))

    def _of_all(self, values: Tensor) -> list[Any]:
        """The values of all processes, rank by rank."""
        if self.accelerator.num_processes > 1:
            values = self.accelerator.gather(values.to(self.accelerator.device))
        everyones: list[Any] = values.tolist()
        return everyones


_KEEPS_ORDER: dict[str, tuple[Any, str]] = {
    "train_sampling_strategy": (
        "sequential",
        'shuffle the curriculum (for a shuffled order, build it with order="shuffled")',
    ),
    "dataloader_drop_last": (False, "drop the curriculum's last pairs"),
    "dataloader_in_order": (True, "train on whichever batch is ready first"),
    "ignore_data_skip": (False, "begin the curriculum again after a checkpoint"),
    "accelerator_config.even_batches": (True, "leave some processes without a last batch to share"),
    "accelerator_config.dispatch_batches": (False, "join batches of different lengths"),
}
"""Arguments: what each one must be, and what it would do else."""


def _require_order_kept(args: DPOConfig) -> None:
    for name, (needed, effect) in _KEEPS_ORDER.items():
        value = attrgetter(name)(args)
        if (value or False) != needed:
            raise ConfigError(f"{name}={value!r} would {effect}: set it to {needed!r}")


def _require_weights_kept(args: DPOConfig) -> None:
    """Refuse losses in which a pair has no share of its own, and batches that are no pairs."""
    names = loss_names(vars(args))
    if not LOSSES.keys() >= set(names):
        raise ConfigError(
            f"the curriculum has weights, and loss_type {', '.join(names)} is not a mean over pairs: use "
            "another loss, or a curriculum without down-weight"
        )
    if args.accelerator_config.split_batches:
        raise ConfigError(
            "accelerator_config.split_batches=True would lose the curriculum's weights: leave it out"
        )


def _check_lengths(rows: Any, max_length: int | None) -> None:
    """Refuse pairs above `max_length` whose reference is that of the whole pair; else say they are cut."""
    if max_length is None or not is_tokenized(rows):
        return
    lengths_P = part_lengths(rows).padded_P
    long = np.flatnonzero(lengths_P > max_length)
    if not len(long):
        return
    what = f"{len(long):,} selected pairs are longer than max_length {max_length} (up to {lengths_P.max():,})"
    if has_reference(rows):
        raise ConfigError(
            f"{what}, and their reference log-probs are those of the whole pairs: raise max_length "
            f"({name_some(rows.select(long)[PAIR_ID])})"
        )
    logger.warning("%s: TRL cuts their completions", what)


# --- which pairs a training consumed, in which order --------------------------------------------------------


STATE = "curriculum_order.json"
"""In a checkpoint: what was consumed before it."""


class ConsumedOrder(NamedTuple):
    """The verdict on one training's data order."""

    pairs: int
    """Pairs of the curriculum."""
    consumed: int
    """Rows that went through the model, all epochs, padding rows not counted."""
    repeated_to_fill: int
    """Rows that the data loader repeated so that the last batch of an epoch is full on every process."""
    expected_digest: str
    """SHA-256 of the curriculum's order, run through as often as was consumed. Of a curriculum with weights
    it is that of ids with their weights (`Curriculum.certified_order`)."""
    consumed_digest: str
    """SHA-256 of the order consumed."""

    @property
    def matches(self) -> bool:
        """Whether the curriculum's order was consumed, from its beginning; part of an epoch will do."""
        return self.consumed > 0 and self.expected_digest == self.consumed_digest

    @property
    def epochs(self) -> float:
        """How often the curriculum was run through."""
        return self.consumed / self.pairs

    def to_json(self) -> dict[str, Any]:
        """For `order.json`."""
        return {**self._asdict(), "epochs": self.epochs, "matches": self.matches}


class OrderLog:
    """Collects the rows of each batch, in the order that optimizer steps see them.

    A data loader that divides batches among several processes completes the last round of an epoch with
    rows from the epoch's beginning. They are recognised, since an epoch has exactly P rows, and
    counted apart.
    """

    def __init__(self, order: Sequence[str], weights: Sequence[float] | None = None) -> None:
        self._order = list(order)
        self._weights = None if weights is None else list(weights)
        self.start_training()

    def start_training(self) -> None:
        """Forget an earlier training."""
        self._repeated = 0
        self._consumed: list[int] = []
        self._consumed_weights: list[float] = []

    def add(self, positions: Sequence[int], weights: Sequence[float] | None = None) -> list[int]:
        """One global batch: positions in the curriculum's order, over all processes, rank by rank.

        With them the weights that the pairs have in training, where the curriculum has any. Returns those
        positions that do not merely fill the batch.
        """
        own = list(positions[: len(self._order) - len(self._consumed) % len(self._order)])
        self._repeated += len(positions) - len(own)
        self._consumed += own
        self._consumed_weights += (weights or [])[: len(own)]
        return own

    def write_state(self, folder: Path) -> None:
        """Write what was consumed so far into a checkpoint: positions in the curriculum's order."""
        state = {
            "curriculum": ids_digest(self._order),
            "repeated_to_fill": self._repeated,
            "positions": self._consumed,
            **({} if self._weights is None else {"weights": self._consumed_weights}),
        }
        write_atomic(folder / STATE, json.dumps(state) + "\n")

    def read_state(self, folder: Path) -> None:
        """Go on from what was written into a checkpoint.

        Raises:
            ArtifactError: it is not there, or something else.
            IdentityError: it is of another curriculum.
        """
        path = folder / STATE
        state = read_json(path) if path.is_file() else {}
        positions, repeated = state.get("positions"), state.get("repeated_to_fill")
        if positions is None or repeated is None or state.get("unrecorded"):
            raise ArtifactError(
                f"{folder} does not say in {STATE} which pairs were consumed before it: go on from a "
                "checkpoint of SelectiveDPOTrainer, or begin anew"
            )
        weights = state.get("weights", [])
        if len(weights) != (0 if self._weights is None else len(positions)):
            raise IdentityError(
                f"{path} is of a training with{'' if weights else 'out'} weights, and this curriculum has "
                f"{'none' if weights else 'some'}: go on with the one it is of, or begin anew"
            )
        own, other = ids_digest(self._order), state.get("curriculum")
        if other != own or max(positions, default=0) >= len(self._order):
            raise IdentityError(
                f"{path} is of a training on another curriculum (the digest of its order is "
                f"{str(other)[:12]}, here {own[:12]}): go on with that one, or begin anew"
            )
        self._consumed, self._repeated, self._consumed_weights = positions, repeated, weights

    def result(self) -> ConsumedOrder:
        """Compare what was consumed with the curriculum's order, repeated per epoch."""
        consumed, pairs = len(self._consumed), len(self._order)
        expected, found = self._order, [self._order[position] for position in self._consumed]
        if self._weights is not None:
            expected, found = (
                with_weights(expected, self._weights),
                with_weights(found, self._consumed_weights),
            )
        expected = (expected * -(-consumed // max(1, pairs)))[:consumed]
        return ConsumedOrder(pairs, consumed, self._repeated, ids_digest(expected), ids_digest(found))
