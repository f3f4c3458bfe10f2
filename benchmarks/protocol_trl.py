"""The original's scoring, and one epoch of DPO, on TRL as it is.

Everything is TRL's own: its data loading, its training, its evaluation in the midst of training, the
reference computed live in every step and every evaluation. `HeldOutTrainer` adds what the method needs and
TRL does not give, the loss of each held-out pair: it keeps the log-probs that TRL computes anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import LoraConfig
from torch import Tensor
from transformers import AutoTokenizer, PrinterCallback
from trl import DPOConfig

from protocol_pairs import Start
from selective_dpo.difficulty.folds import FOLDS
from selective_dpo.difficulty.protocols import ScorerRun, split_pairs
from workload import MAX_LENGTH, TokenizedDPOTrainer

EVALUATION_BATCH = 8
"""TRL's default, and the original's on UltraFeedback."""
TRAINING_SEED = 42


class HeldOut(NamedTuple):
    """One evaluation: the losses of a fold under a scorer as it was after `step` updates."""

    seed: int
    step: int
    pair_ids: list[str]
    loss_P: NDArray[np.float64]
    mean_loss: float
    """What TRL reports of the same evaluation."""


class HeldOutTrainer(TokenizedDPOTrainer):
    """It also keeps the loss of each pair whenever TRL evaluates."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.evaluations: list[HeldOut] = []
        self._logps: list[Tensor] = []
        self.model.register_forward_hook(self._keep_logps)

    def _keep_logps(self, model: Any, arguments: Any, output: Any) -> None:
        # Of each batch first the policy's, then the reference's: the same model without its adapter.
        if not model.training:
            self._logps.append(output.log_probs.sum(dim=1))

    def evaluate(self, *args: Any, **others: Any) -> Any:
        self._logps.clear()
        metrics = super().evaluate(*args, **others)
        policy, reference = (torch.cat([_margins(batch) for batch in self._logps[at::2]]) for at in (0, 1))
        losses = -torch.nn.functional.logsigmoid(self.beta * (policy - reference))
        # TRL evaluates in the order of the rows. Were it otherwise, the comparison with our records by
        # pair_id would fail.
        self.evaluations.append(
            HeldOut(
                self.args.seed,
                self.state.global_step,
                list(self.eval_dataset["pair_id"]),
                losses.double().cpu().numpy(),
                metrics["eval_loss"],
            )
        )
        return metrics


def score_as_the_original(
    start: Start, pairs: Dataset, settings: dict[str, Any], lora: dict[str, Any], *, seeds: Sequence[int]
) -> list[HeldOut]:
    """Step 1: two scorers for each seed, each measuring its held-out fold five times on the way.

    The folds are those of this package, which never split a prompt; the original halves rows.
    """
    measured = []
    for seed in seeds:
        for fold in FOLDS:
            split = split_pairs(pairs["prompt_id"], ScorerRun(seed, fold))
            train, held_out = (pairs.select(rows) for rows in split)
            trainer = HeldOutTrainer(
                start.load(),
                args=_arguments(
                    settings,
                    seed,
                    start,
                    eval_strategy="steps",
                    eval_steps=updates(len(train), settings) // 5,
                    per_device_eval_batch_size=EVALUATION_BATCH,
                ),
                train_dataset=train,
                eval_dataset=held_out,
                processing_class=AutoTokenizer.from_pretrained(start.model),
                peft_config=LoraConfig(**lora, task_type="CAUSAL_LM"),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            measured += trainer.evaluations
    return measured


def train_on_all(start: Start, pairs: Dataset, settings: dict[str, Any], lora: dict[str, Any] | None) -> None:
    """One epoch of DPO on all pairs. Without `lora` TRL loads a second model as the reference."""
    trainer = TokenizedDPOTrainer(
        start.load(),
        args=_arguments(settings, TRAINING_SEED, start),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(start.model),
        peft_config=None if lora is None else LoraConfig(**lora, task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def updates(pairs: int, settings: dict[str, Any]) -> int:
    """Optimizer steps of an epoch."""
    per_update = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    return int(-(-pairs // per_update))


def _arguments(settings: dict[str, Any], seed: int, start: Start, **others: Any) -> DPOConfig:
    on_gpu = start.in_memory
    return DPOConfig(
        # Nothing is written there.
        output_dir=str(Path(start.model).parent / "trl"),
        seed=seed,
        data_seed=seed,
        max_length=MAX_LENGTH,
        use_cpu=not on_gpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        **settings,
        **others,
    )


def _margins(logps_2B: Tensor) -> Tensor:
    chosen_B, rejected_B = logps_2B.chunk(2)
    return chosen_B - rejected_B
