"""Held-out evaluation of pairs: this package's engine against `trl.DPOTrainer.evaluate`.

    python benchmarks/scoring.py --json benchmarks/results/scoring.json

Same pairs, same model, same LoRA adapter. TRL evaluates as it does unless told otherwise: 8 pairs a batch, in
the given order, chosen and rejected in rows of their own, the reference computed live. Ours reads the
reference from a table; `scoring` leaves the making of that table out, `scoring+reference` counts it once.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl import DPOConfig

from harness import add_options, interleave, show, summary
from on_gpu import Work, measure_on_gpu
from selective_dpo.distributed.progress import quieten_libraries
from selective_dpo.logprobs.compute import PairLogps, pair_logps
from selective_dpo.logprobs.memory import TokenBudget
from selective_dpo.losses import pair_losses
from workload import TokenizedDPOTrainer, byte_tokenizer, seven_billion, small_model, tokenized_pairs

BETA = 0.1
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}


def main() -> None:
    options = _options()
    quieten_libraries()
    torch.set_num_threads(options.threads)
    model = seven_billion() if options.device == "cuda" else small_model()
    pairs = tokenized_pairs(options.pairs, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(model, pairs, Path(scratch), options.device)
        budget = options.tokens_per_batch
        reference = reference_logps(trainer, pairs, budget)
        difference = compare(trainer, pairs, reference, budget)
        results = []
        for name, ours in (
            ("scoring", lambda: evaluate(trainer, pairs, reference, budget)),
            (
                "scoring+reference",
                lambda: evaluate(trainer, pairs, reference_logps(trainer, pairs, budget), budget),
            ),
        ):
            rounds = interleave(ours, trainer.evaluate, rounds=options.rounds, device=options.device)
            details = {"pairs": options.pairs, "tokens_per_batch": budget, "trl_batch": 8, "lora": LORA}
            if options.device == "cuda":
                for side, run in (("ours", ours), ("theirs", trainer.evaluate)):
                    twice = side == "theirs" or name == "scoring+reference"
                    work = forward_work(model, pairs, shares=side == "ours", reference=twice)
                    details[side] = measure_on_gpu(run, work)._asdict()
            results.append(summary(name, rounds, max_abs_diff=difference, details=details))
    show(results, options.json)


def make_trainer(model: Any, pairs: Dataset, scratch: Path, device: str) -> Any:
    """TRL's trainer around `model`, its adapter moved off zero so that policy and reference differ."""
    on_gpu = device == "cuda"
    trainer = TokenizedDPOTrainer(
        model,
        args=DPOConfig(
            str(scratch),
            beta=BETA,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            activation_checkpointing=False,
            per_device_eval_batch_size=8,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )
    trainer.remove_callback(PrinterCallback)
    generator = torch.Generator().manual_seed(0)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    return trainer


def forward_work(model: Any, pairs: Dataset, *, shares: bool, reference: bool) -> Work:
    """One evaluation of all pairs. `shares`: a pair's prompt is computed once; `reference`: so is that."""
    prompts, chosen, rejected = (
        sum(len(ids) for ids in pairs[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    computed = prompts * (1 if shares else 2) + chosen + rejected
    weights = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" not in name)
    passes = 2 if reference else 1
    # A multiplication and an addition for each weight and token.
    return Work(2 * prompts + chosen + rejected, 2.0 * passes * weights * computed)


def reference_logps(trainer: Any, pairs: Dataset, tokens_per_batch: TokenBudget) -> PairLogps:
    """The starting model's log-probs: those of the same model without its adapter."""
    with trainer.model.disable_adapter():
        return _logps(trainer, pairs, tokens_per_batch)


def evaluate(trainer: Any, pairs: Dataset, reference: PairLogps, tokens_per_batch: TokenBudget) -> np.ndarray:
    """Held-out loss of each pair: [P]."""
    policy = _logps(trainer, pairs, tokens_per_batch)
    policy_P2, reference_P2 = (np.stack(logps[1:], axis=1) for logps in (policy, reference))
    # DPO's own loss does not look at lengths.
    return pair_losses(policy_P2, reference_P2, np.ones_like(policy_P2), {"beta": BETA}).loss_P


def compare(trainer: Any, pairs: Dataset, reference: PairLogps, tokens_per_batch: TokenBudget) -> float:
    """Largest difference in the loss between ours and TRL's, batch of 8 by batch, in nats.

    TRL reduces a batch to its mean, so means over the same 8 pairs are compared.
    """
    ours_P = evaluate(trainer, pairs, reference, tokens_per_batch)
    trainer.model.eval()
    differences = []
    loader = trainer.get_eval_dataloader()
    for number, batch in enumerate(loader):
        with torch.no_grad(), trainer.compute_loss_context_manager():
            theirs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        differences.append(abs(float(theirs) - float(ours_P[8 * number : 8 * number + 8].mean())))
    limit = 1e-4 if trainer.args.device.type == "cpu" else 5e-2
    if max(differences) > limit:
        raise SystemExit(f"the two sides disagree by {max(differences):.2e} nats: nothing is timed")
    return max(differences)


def _logps(trainer: Any, pairs: Dataset, tokens_per_batch: TokenBudget) -> PairLogps:
    return pair_logps(
        trainer.model,
        pairs,
        tokens_per_batch=tokens_per_batch,
        pad_token_id=0,
        autocast_dtype=torch.bfloat16 if trainer.args.bf16 else None,
        what="benchmark",
    )


def _budget(text: str) -> TokenBudget:
    return "auto" if text == "auto" else int(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens-per-batch", type=_budget, default="auto")
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
