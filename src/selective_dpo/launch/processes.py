"""Starting a command again as several data-parallel processes, through a launcher."""

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
    command, environment = launch_command(processes)
    return subprocess.run(
        [*command, "-m", "selective_dpo", *arguments], check=False, env={**os.environ, **environment}
    ).returncode


def launch_command(processes: int) -> tuple[list[str], dict[str, str]]:
    """The launcher, to be followed by `-m MODULE ...`, and the environment variables it needs.

    `accelerate launch --cpu` starts one process, whatever number it is given, so on a CPU it is PyTorch's
    own launcher, with the variable that `accelerate launch --cpu` would set.
    """
    if torch.cuda.is_available():
        command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        return [sys.executable, "-m", *command], {}
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    return [sys.executable, "-m", *command], {"ACCELERATE_USE_CPU": "true", **environment}
