"""The cheaper rows of tokens against padded ones: seconds of scoring and of a training step, by shape.

    python benchmarks/rows.py --json benchmarks/results/rows.json

`path="auto"` takes a row for each pair, its prompt once, or a row for each completion, whichever it expects
to cost less; `path="padded"` takes a row for each completion, in training as TRL makes it. The model, pairs
and thread are the same; A B A B, after both gave the same log-probs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig

from harness import add_options, interleave, show, summary
from selective_dpo.distributed.progress import quieten_libraries
from selective_dpo.logprobs.compute import PairLogps, pair_logps
from selective_dpo.logprobs.packing_support import RowCollator, plan_rows
from selective_dpo.logprobs.rows import forward_logps, log_probs_only
from selective_dpo.storage.artifacts import write_json
from selective_dpo.training.batching import PAIRS, PairBatch
from selective_dpo.training.trainer import PairTrainer
from workload import byte_tokenizer

SHAPES = ((16, 500, 500), (64, 900, 900), (500, 100, 100), (150, 300, 300))
"""Tokens of prompt, chosen and rejected."""
TOLERANCE = 1e-4
"""Nats a token that the two sides' log-probs may differ by, in float32."""
VOCABULARY = 1_024


class Sides(NamedTuple):
    """The two things that are timed."""

    ours: Callable[[], Any]
    padded: Callable[[], Any]


def main() -> None:
    options = _options()
    quieten_libraries()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=options.hidden,
            intermediate_size=4 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2_048,
        )
    ).to(options.device)
    results = []
    # A process's own time does not depend on who else uses the machine.
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for shape in SHAPES:
        pairs = pairs_of(shape, options.pairs)
        with tempfile.TemporaryDirectory() as scratch:
            for kind, sides, gap in (
                ("score", *scoring(model, pairs)),
                ("train", *training(model, pairs, Path(scratch), options)),
            ):
                rounds = interleave(*sides, rounds=options.rounds, device=options.device, clock=clock)
                details = {"shape": shape, "pairs": options.pairs, "hidden": options.hidden}
                name = f"{kind} {'/'.join(map(str, shape))}"
                results.append(summary(name, rounds, max_abs_diff=gap, details=details))
                show(results[-1:], None)
                if options.json is not None:  # as far as it has come: on a busy machine this takes long
                    write_json(options.json, {"results": results})


def pairs_of(shape: tuple[int, int, int], count: int) -> Dataset:
    """Tokenized pairs of one shape, with made-up reference log-probs."""
    draw = np.random.default_rng(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list(
        [
            {
                "pair_id": str(number),
                "ref_chosen_logps": -7.0 * shape[1],
                "ref_rejected_logps": -7.0 * shape[2],
                **{
                    name: draw.integers(1, 250, size=size).tolist()
                    for name, size in zip(names, shape, strict=True)
                },
            }
            for number in range(count)
        ]
    )


def scoring(model: Any, pairs: Dataset) -> tuple[Sides, float]:
    """Log-probs without gradients, and by how many nats the two sides differ."""

    def measure(path: Any) -> PairLogps:
        return pair_logps(
            model, pairs, tokens_per_batch=4_096, pad_token_id=0, autocast_dtype=None, what="rows", path=path
        )

    found = [np.stack(measure(path)[1:]) for path in ("auto", "shared", "padded")]
    gap = max(float(np.abs(each - found[-1]).max()) for each in found)
    require_equal(gap / min(map(len, (pairs[0]["chosen_ids"], pairs[0]["rejected_ids"]))))

    def forward(path: Any) -> Callable[[], Any]:
        # The choice is made once for a data set, so it is no part of a batch's time.
        with log_probs_only(model):
            plan = plan_rows(model.eval(), pairs, 0, path)
        collate, rows = RowCollator(model, pad_token_id=0, kind=plan.kind), pairs[:]
        device = next(model.parameters()).device

        def run() -> Any:
            with torch.no_grad(), log_probs_only(model):
                return forward_logps(model, collate(rows).to(device))

        return run

    return Sides(forward("auto"), forward("padded")), gap


def training(model: Any, pairs: Dataset, folder: Path, options: Any) -> tuple[Sides, float]:
    """A forward and a backward pass of one batch, and by how much the logged log-probs differ."""

    def side(path: Any) -> tuple[PairTrainer, PairBatch]:
        args = DPOConfig(
            str(folder),
            per_device_train_batch_size=options.pairs,
            max_length=None,
            bf16=False,
            use_cpu=options.device == "cpu",
            activation_checkpointing=False,
            report_to="none",
            precompute_ref_log_probs=True,
            dataloader_pin_memory=False,
        )
        trainer = PairTrainer(
            model, args=args, train_dataset=pairs, processing_class=byte_tokenizer(), path=path
        )
        trainer.model.train()
        return trainer, next(iter(trainer.get_train_dataloader()))[PAIRS]

    def step(trainer: PairTrainer, batch: PairBatch) -> float:
        loss = trainer.compute_loss(trainer.model, {PAIRS: batch})
        loss.backward()
        trainer.model.zero_grad()
        return float(loss.detach())

    (ours, batch), (padded, same) = side("auto"), side("padded")
    step(ours, batch), step(padded, same)
    logged = [trainer._metrics["train"]["logps/chosen"][-1] for trainer in (ours, padded)]
    gap = abs(logged[0] - logged[1])
    require_equal(gap / len(pairs[0]["chosen_ids"]))
    return Sides(lambda: step(ours, batch), lambda: step(padded, same)), gap


def require_equal(gap_a_token: float) -> None:
    """Nothing is timed that does not compute the same."""
    if not gap_a_token < TOLERANCE:
        raise SystemExit(f"the two sides differ by {gap_a_token:.2g} nats a token, not {TOLERANCE:g}")


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.set_defaults(rounds=9)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
