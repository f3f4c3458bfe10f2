"""Starting a command again as several data-parallel processes, through `accelerate launch`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch


def under_a_launcher() -> bool:
    """Whether `accelerate launch`, `torchrun` or Slurm's `srun` with them started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def relaunch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `selective-dpo ARGUMENTS` as `processes` processes, wait for them, return the exit code.

    A launcher reports any failure as 1; what went wrong stands in the failing process's own output.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu"] if torch.cuda.is_available() else ["--cpu"]
    return subprocess.run([*command, "-m", "selective_dpo", *arguments], check=False).returncode
