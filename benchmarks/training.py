"""DPO training of the same pairs per update: this package's trainer against `trl.DPOTrainer.train`.

    python benchmarks/training.py --json benchmarks/results/training.json

Same pairs in the same updates, same starting weights, same LoRA adapter (r 16, all linear layers), the
original's 4 pairs a batch and 8 batches an update, activation checkpointing on both sides. `training` has
each side get its reference as it does: TRL live in every step, ours once beforehand, counted.
`training+cached` gives both the same reference log-probs for nothing. Before any timing both train from
the same weights, and what they have learned is compared.

`--device cuda` trains a 7B-shaped model in bfloat16 and adds tokens/s, FLOPs utilisation and memory.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from harness import add_options, interleave, show, summary
from on_gpu import Work, measure_on_gpu
from selective_dpo.distributed.progress import quieten_libraries
from selective_dpo.logprobs.compute import pair_logps
from selective_dpo.logprobs.reference import CHOSEN_COLUMN, REJECTED_COLUMN
from selective_dpo.training.trainer import PairTrainer
from workload import TokenizedDPOTrainer, byte_tokenizer, seven_billion, small_model, tokenized_pairs

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}
LAYERS = 2
"""Of the CPU's model: a round of all four trainings then takes a minute or two."""
TOLERANCE = 0.01
"""Largest relative difference in what the two sides learn, in float32. Adam divides a gradient by its own
size, so rounding in gradients near zero counts in full; gradients themselves agree to 1e-4
(tests/equality/test_shared_training.py)."""


class Learned(NamedTuple):
    """How far two trainings' weights are apart."""

    max_abs_diff: float
    relative: float


def main() -> None:
    options = _options()
    quieten_libraries()
    torch.set_num_threads(options.threads)
    model = seven_billion() if options.device == "cuda" else small_model(num_hidden_layers=LAYERS)
    pairs = tokenized_pairs(options.pairs, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        sides = Sides(model, pairs, options, Path(scratch))
        learned = sides.compare()
        if options.device == "cpu" and not learned.relative < TOLERANCE:
            raise SystemExit(f"the two trainings learn different weights: {learned}")
        results = []
        for name, ours, theirs in (
            ("training", sides.train_ours_with_reference, sides.live.train),
            ("training+cached", sides.ours.train, sides.cached.train),
        ):
            rounds = interleave(ours, theirs, rounds=options.rounds, device=options.device)
            details = {
                "pairs": options.pairs,
                "epochs": options.epochs,
                "pairs_per_batch": options.batch,
                "batches_per_update": options.accumulation,
                "lora": LORA,
                "relative_difference": learned.relative,
                "pair_tokens": sides.pair_tokens,
            }
            if options.device == "cuda":
                live = name == "training"
                for side, train in (("ours", ours), ("theirs", theirs)):
                    work = sides.work(shares=side == "ours", reference=live)
                    details[side] = measure_on_gpu(train, work)._asdict()
            results.append(summary(name, rounds, max_abs_diff=learned.max_abs_diff, details=details))
    show(results, options.json)


class Sides:
    """Both trainers, on the same pairs; they share the frozen weights, and each has its own adapter."""

    def __init__(self, model: Any, pairs: Dataset, options: argparse.Namespace, scratch: Path) -> None:
        self._options = options
        self._pairs = pairs.remove_columns(["prompt_id"])
        self._scratch = scratch
        # As the pipeline has it: before any trainer adapts it.
        self._base = model
        self.live = self._trainer(TokenizedDPOTrainer, self._pairs)
        self._start = self._adapter(self.live)
        referenced = self._with_reference()
        self.cached = self._trainer(TokenizedDPOTrainer, referenced)
        self.cached.precompute_ref_logps = True
        self.ours = self._trainer(PairTrainer, referenced)

    @property
    def pair_tokens(self) -> int:
        """Tokens of all pairs, prompts counted twice: the work that plain rows without padding are."""
        return sum(2 * len(row["prompt_ids"]) + self._completions(row) for row in self._pairs)

    def compare(self) -> Learned:
        """Train each side once from the same adapter; what TRL's and ours have learned."""
        learned = []
        for trainer in (self.live, self.cached, self.ours):
            self._set_adapter(trainer, self._start)
            trainer.train()
            learned.append(torch.cat([part.flatten().float() for part in self._adapter(trainer).values()]))
        start = torch.cat([part.flatten().float() for part in self._start.values()])
        theirs, _, ours = (weights - start for weights in learned)
        return Learned(float((ours - theirs).abs().max()), float((ours - theirs).norm() / theirs.norm()))

    def train_ours_with_reference(self) -> None:
        """What a user of this package pays: the reference of all pairs, once, and the training."""
        self._with_reference()
        self.ours.train()

    def work(self, *, shares: bool, reference: bool) -> Work:
        """One training on all pairs. `shares`: a pair's prompt is computed once; `reference`: so is that."""
        prompts = sum(len(row["prompt_ids"]) for row in self._pairs)
        computed = self.pair_tokens - (prompts if shares else 0)
        weights = sum(weight.numel() for weight in self._base.parameters())
        # Frozen weights: a multiplication and an addition forwards, as many back to the inputs, and one more
        # forward pass where there is a reference to compute: ours once, TRL's in every epoch.
        epochs = self._options.epochs
        passes = 2 * epochs + ((1 if shares else epochs) if reference else 0)
        return Work(epochs * self.pair_tokens, 2.0 * passes * weights * computed)

    def _with_reference(self) -> Dataset:
        logps = pair_logps(
            self._base,
            self._pairs,
            tokens_per_batch="auto",
            pad_token_id=0,
            autocast_dtype=None,
            what="reference",
        )
        columns = {CHOSEN_COLUMN: logps.chosen_P, REJECTED_COLUMN: logps.rejected_P}
        rows = self._pairs
        for name, values in columns.items():
            rows = rows.add_column(name, values.tolist())
        return rows

    def _trainer(self, kind: type[DPOTrainer], rows: Dataset) -> Any:
        on_gpu = self._options.device == "cuda"
        args = DPOConfig(
            str(self._scratch),
            per_device_train_batch_size=self._options.batch,
            gradient_accumulation_steps=self._options.accumulation,
            num_train_epochs=self._options.epochs,
            learning_rate=1e-4,
            max_length=1024,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            activation_checkpointing=True,
            train_sampling_strategy="sequential",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
        )
        torch.manual_seed(0)  # of the adapter
        # Layers of its own around the same frozen weights.
        shared = {id(weight): weight for weight in self._base.parameters()}
        trainer = kind(
            copy.deepcopy(self._base, shared),
            args=args,
            train_dataset=rows,
            processing_class=byte_tokenizer(),
            peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    @staticmethod
    def _completions(row: Any) -> int:
        return len(row["chosen_ids"]) + len(row["rejected_ids"])

    @staticmethod
    def _adapter(trainer: Any) -> dict[str, torch.Tensor]:
        weights = trainer.model.named_parameters()
        return {name: weight.detach().clone() for name, weight in weights if weight.requires_grad}

    @staticmethod
    def _set_adapter(trainer: Any, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if name in values:
                    weight.copy_(values[name])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument(
        "--epochs", type=int, default=1, help="TRL computes the reference in each of them, ours once for all"
    )
    parser.add_argument("--batch", type=int, default=4, help="pairs a batch")
    parser.add_argument("--accumulation", type=int, default=8, help="batches an update")
    parser.add_argument("--threads", type=int, default=1)
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
