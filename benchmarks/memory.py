"""Peak memory of one-step's gradient pass beside that of DPO training with the same adapter.

    python benchmarks/memory.py --json benchmarks/results/memory.json

Three programs, each a process of its own: `gradients`, the pass that measures the reference and sums the
gradients of eight folds; `training`, DPO on the easy half here; `trl`, `DPOTrainer` on all pairs. Same pairs,
model shape (SmolLM2-135M's, random weights), LoRA adapters, batch of 4 pairs, activation checkpointing. On a
CPU the figure is the highest resident memory of the process above what it held before it loaded the model
(Linux only); with `--device cuda` the most that PyTorch allocated, and the model is 7B-shaped.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from harness import add_options
from protocol import LORA
from protocol_ours import Ours, training_name
from protocol_pairs import Start, make_start
from protocol_trl import train_on_all
from selective_dpo.distributed.progress import quieten_libraries
from selective_dpo.run.stages import bring_up
from selective_dpo.storage.artifacts import write_json
from workload import small_model

SIDES = ("gradients", "training", "trl")
SHAPE: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
SETTINGS: dict[str, Any] = {
    "beta": 0.1,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "activation_checkpointing": True,
}


def main() -> None:
    options = _options()
    if options.side:
        print(json.dumps(_measure(options)))
        return
    found = {side: [_in_a_process(options, side) for _ in range(options.rounds)] for side in SIDES}
    gigabytes = {side: sorted(values)[len(values) // 2] for side, values in found.items()}
    for side, median in gigabytes.items():
        print(f"{side:<10} {median:.2f} GB  ({min(found[side]):.2f} to {max(found[side]):.2f})")
    if options.json:
        about = {
            "name": "memory",
            "device": options.device,
            "pairs": options.pairs,
            "longest": options.longest,
        }
        write_json(options.json, {**about, "settings": SETTINGS, "gigabytes": found})


def _in_a_process(options: argparse.Namespace, side: str) -> float:
    """Gigabytes of one side: what was there before its model is not its own."""
    command = [sys.executable, __file__, "--side", side, "--device", options.device]
    command += ["--pairs", str(options.pairs), "--longest", str(options.longest)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _measure(options: argparse.Namespace) -> float:
    quieten_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        start = _start(Path(scratch), options)
        settings = {**SETTINGS, "bf16": options.device == "cuda"}
        ours = Ours(start, Path(scratch), settings, LORA)
        run = ours.run(training_name("one-step", "lora"))
        if options.side == "training":
            # In a process of its own: memory that is given back stays resident, and would hide a peak.
            scoring = multiprocessing.get_context("fork").Process(target=bring_up, args=(run, "curriculum"))
            scoring.start()
            scoring.join()
        before = _held(options.device)
        if options.side == "gradients":
            bring_up(run, "reference")
        elif options.side == "training":
            bring_up(run, "policy")
        else:
            train_on_all(start, ours.pairs, settings, LORA)
        return (_peak(options.device) - before) / 1e9


def _start(folder: Path, options: argparse.Namespace) -> Start:
    start = make_start(folder, pairs=options.pairs, longest=options.longest, width=64, device=options.device)
    if options.device == "cpu":
        small_model(**SHAPE, bos_token_id=None, eos_token_id=1).save_pretrained(start.model)
    return start


def _held(device: str) -> float:
    """Bytes held now; the peak is counted from here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # 5: the highest resident memory becomes the present one (proc_pid_clear_refs of Linux).
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=SIDES, help="measure one side, in this process")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt or an answer")
    add_options(parser)
    parser.set_defaults(rounds=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
