"""`SelectiveDPOTrainer`: TRL's DPO trainer that follows a curriculum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig

from selective_dpo.errors import ConfigError, IdentityError
from selective_dpo.training.order import ConsumedOrder, OrderLog
from selective_dpo.training.pair_trainer import PairTrainer, with_cached_reference

if TYPE_CHECKING:
    from selective_dpo.curriculum.table import Curriculum

POSITION = "curriculum_position"
DIFFICULTY = "difficulty"


class SelectiveDPOTrainer(PairTrainer):
    """`trl.DPOTrainer` plus `curriculum`: it trains on the selected pairs, in the curriculum's order.

    Rows are matched by `pair_id` (a column, or computed from prompt, chosen and rejected). Everything
    else, any `loss_type` included, is TRL's. The mean difficulty of each step's pairs is logged as
    `difficulty`, and `consumed_order` says which order was really trained on.

    Args:
        curriculum: Selected pairs and their order.
        args: As for `DPOTrainer`, with `train_sampling_strategy="sequential"`.
        train_dataset: Preference pairs in any form TRL takes, with every selected pair among them;
            or tokenized rows (`prompt_ids`, `chosen_ids`, `rejected_ids`). Columns `ref_chosen_logps`
            and `ref_rejected_logps`, where present, are the reference; no reference model is loaded.
        Others: as for `DPOTrainer`.

    Raises:
        ConfigError: the configuration would shuffle or drop rows.
        IdentityError: selected pairs are missing from `train_dataset`, or TRL's preparation lost some.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        *,
        curriculum: Curriculum,
        callbacks: list[TrainerCallback] | None = None,
        **others: Any,
    ) -> None:
        if args is None:
            args = DPOConfig("selective-dpo", train_sampling_strategy="sequential")
        _refuse_shuffling(args)
        if not isinstance(train_dataset, Dataset):
            raise ConfigError("a curriculum needs a datasets.Dataset, not a stream: rows are looked up by id")
        ordered = curriculum.apply(train_dataset)
        ordered = ordered.add_column(POSITION, list(range(len(ordered))))
        self._order_log = OrderLog(list(ordered["pair_id"]))
        args = with_cached_reference(args, ordered, *_datasets_in(eval_dataset))
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            ordered,
            eval_dataset,
            callbacks=[*(callbacks or []), _EpochStarts(self._order_log)],
            **others,
        )
        if len(self.train_dataset) != len(ordered):
            raise IdentityError(
                f"{len(ordered) - len(self.train_dataset):,} selected pairs do not fit into max_length "
                f"{args.max_length}: raise it, or score and select with the same limit"
            )
        inner: Any = self.data_collator
        self.data_collator: Any = _PositionCollator(inner)

    @property
    def consumed_order(self) -> ConsumedOrder:
        """What was trained on so far, against the curriculum."""
        return self._order_log.result()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns
        self._signature_columns: Any = [*columns, POSITION, DIFFICULTY]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Not the model's inputs: TRL would pass them on to its forward.
        positions = inputs.pop(POSITION, None)
        difficulty = inputs.pop(DIFFICULTY, None)
        if positions is not None and self.model.training:
            positions, difficulty = self.accelerator.gather((positions, difficulty))
            self._order_log.add(positions.tolist())
            self._metrics["train"][DIFFICULTY].append(difficulty.mean().item())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class _PositionCollator:
    """A collator's batch plus where its rows stand in the curriculum, and their difficulty."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._inner(examples)
        if POSITION in examples[0]:
            batch[POSITION] = torch.tensor([example[POSITION] for example in examples])
            batch[DIFFICULTY] = torch.tensor([example[DIFFICULTY] for example in examples])
        return batch


class _EpochStarts(TrainerCallback):
    """Tells the order log when the data loader begins again."""

    def __init__(self, log: OrderLog) -> None:
        self._log = log

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log.start_epoch()


def _refuse_shuffling(args: DPOConfig) -> None:
    if args.train_sampling_strategy != "sequential":
        raise ConfigError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} would shuffle the curriculum: set it "
            'to "sequential" in DPOConfig (for a shuffled order, build the curriculum with order="shuffled")'
        )
    if args.dataloader_drop_last:
        raise ConfigError("dataloader_drop_last=True would drop the curriculum's last pairs: set it to False")


def _datasets_in(eval_dataset: Any) -> list[Any]:
    if eval_dataset is None:
        return []
    return list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
