"""Starting a command again as several data-parallel processes, through a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from selective_dpo.errors import Interrupted
from selective_dpo.launch.interruption import REMEDY, passing_on

LONGEST_CHECKPOINT = 3600
"""Seconds that a launcher which is told to end waits for its processes: for an update and a checkpoint."""
_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def under_a_launcher() -> bool:
    """Whether `accelerate launch`, `torchrun` or Slurm's `srun` with them started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def relaunch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `selective-dpo ARGUMENTS` as `processes` processes, wait for them, return the exit code.

    A launcher reports any failure as 1; what went wrong stands in the failing process's own output.

    Raises:
        Interrupted: SIGTERM came; it was passed on, and the processes have stopped.
    """
    command, environment = launch_command(processes)
    launcher = subprocess.Popen([*command, "-m", "selective_dpo", *arguments], env=os.environ | environment)
    with passing_on(lambda: [launcher.pid]) as interrupted:
        code = launcher.wait()
    if code and interrupted():
        raise Interrupted(f"interrupted by SIGTERM: {REMEDY}")
    return code


def launch_command(processes: int) -> tuple[list[str], dict[str, str]]:
    """The launcher, to be followed by `-m MODULE ...`, and the environment variables it needs.

    `accelerate launch --cpu` starts one process, whatever number it is given, so on a CPU it is PyTorch's
    own launcher, with the variable that `accelerate launch --cpu` would set.
    """
    patience = os.environ.get(_PATIENCE, str(LONGEST_CHECKPOINT))
    if torch.cuda.is_available():
        command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        return [sys.executable, "-m", *command], {_PATIENCE: patience}
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), _PATIENCE: patience}
    return [sys.executable, "-m", *command], {"ACCELERATE_USE_CPU": "true", **environment}
