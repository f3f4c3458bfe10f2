"""`DifficultyCallback`: the loss each pair has when a plain `DPOTrainer` first reads it, at no extra pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer

from selective_dpo.curriculum.table import row_pair_ids
from selective_dpo.errors import ConfigError
from selective_dpo.storage.artifacts import replacing
from selective_dpo.storage.digests import digest

_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")


class DifficultyCallback(TrainerCallback):
    """Records each pair's DPO loss before the first update that it takes part in, by `pair_id`.

    `trainer.add_callback(DifficultyCallback(trainer))` before `trainer.train()`, and afterwards `table()` or
    `save(PATH)`. It reads the log-probs that the training computes anyhow. No model has learned from the pair
    by then, so the loss is a held-out one, but not of one model: pairs that come early have losses near ln 2,
    whatever they are. Compare pairs with others of about the same `seen`, or use `score_difficulty`.

    Raises:
        ConfigError: the data loader works in processes of its own, or the loss is not a reverse-KL DPO's.
    """

    def __init__(self, trainer: DPOTrainer) -> None:
        if trainer.args.dataloader_num_workers:
            raise ConfigError(
                "DifficultyCallback reads batches as they are made in this process: set "
                "dataloader_num_workers=0"
            )
        if trainer.f_divergence_type != "reverse_kl" or trainer.ld_alpha is not None:
            raise ConfigError(
                "DifficultyCallback computes DPO's own loss from sums of log-probs: leave f_divergence_type "
                "and ld_alpha at their defaults"
            )
        self._trainer = trainer
        self._id_of = _ids_by_tokens(trainer.train_dataset)
        self._collate = trainer.data_collator
        trainer.data_collator = self._collated
        self._batches: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
        self._policy: tuple[str, Tensor] | None = None
        self._found: dict[str, tuple[float, float, int]] = {}
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start to listen to the model, and to the reference where it is another one."""
        models = [self._trainer.accelerator.unwrap_model(self._trainer.model)]
        if self._trainer.ref_model is not None:
            models.append(self._trainer.accelerator.unwrap_model(self._trainer.ref_model))
        self._hooks = [model.register_forward_hook(self._heard, with_kwargs=True) for model in models]

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    def table(self) -> pa.Table:
        """`pair_id`, `difficulty` (the loss, in nats), `margin` (nats, before beta) and `seen`, by id.

        `seen` is how many pairs this process had read before. In a training by several processes each has the
        table of its own pairs.
        """
        rows = sorted((name, *numbers) for name, numbers in self._found.items())
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        kinds = {
            "pair_id": pa.string(),
            "difficulty": pa.float64(),
            "margin": pa.float64(),
            "seen": pa.int64(),
        }
        return pa.table([list(column) for column in columns], schema=pa.schema(kinds))

    def save(self, path: str | Path) -> Path:
        """Write `table()` as Parquet, which `import_curriculum` reads."""
        path = Path(path)
        with replacing(path) as partial:
            pq.write_table(self.table(), partial)
        return path

    def _collated(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._collate(examples)
        ids = [self._id_of.get(_tokens_digest(row), "") for row in examples]
        self._batches[_batch_digest(batch["input_ids"])] = (ids, batch)
        return batch

    def _heard(self, model: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if "input_ids" not in kwargs or getattr(output, "log_probs", None) is None:
            return
        key = _batch_digest(kwargs["input_ids"])
        if key not in self._batches:
            return  # of an evaluation
        logps_R = output.log_probs.detach().float().sum(dim=1)
        ids, batch = self._batches[key]
        if torch.is_grad_enabled():
            self._policy = key, logps_R
            if "ref_chosen_logps" not in batch:
                return  # the reference comes next
            reference_R = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).to(logps_R)
        elif self._policy and self._policy[0] == key:
            logps_R, reference_R = self._policy[1], logps_R
        else:
            return
        del self._batches[key]
        chosen_P, rejected_P = (logps_R - reference_R).double().chunk(2)
        margin_P = (chosen_P - rejected_P).cpu().numpy()
        loss_P = np.logaddexp(0.0, -self._trainer.beta * margin_P)  # -log sigmoid(beta margin), Rafailov 2023
        seen = len(self._found)
        for name, loss, margin in zip(ids, loss_P.tolist(), margin_P.tolist(), strict=True):
            if name:
                self._found.setdefault(name, (loss, margin, seen))


def _ids_by_tokens(dataset: Any) -> dict[str, str]:
    ids = row_pair_ids(dataset).to_pylist()
    rows = dataset.select_columns(list(_TOKENS))
    return {_tokens_digest(row): name for row, name in zip(rows, ids, strict=True) if name is not None}


def _tokens_digest(row: Mapping[str, Any]) -> str:
    return digest([list(row[name]) for name in _TOKENS])


def _batch_digest(input_ids: Tensor) -> str:
    return digest(input_ids.tolist())
