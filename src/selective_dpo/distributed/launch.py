"""Starting a command again as several data-parallel processes, through a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from selective_dpo.distributed.signals import SUPERVISOR, interrupted_error, passing_on, starting_out_of_reach

MAX_CHECKPOINT_SECONDS = 3600
"""What a launcher that is told to end allows its processes: an update and a checkpoint. Set
`TORCH_ELASTIC_SHUTDOWN_TIMEOUT` to allow another time."""

_SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def under_a_launcher() -> bool:
    """Whether `accelerate launch`, `torchrun` or Slurm's `srun` with them started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def one_of_several() -> bool:
    """Whether a launcher started this process as one of several that work together."""
    return under_a_launcher() and os.environ["WORLD_SIZE"] != "1"


def relaunch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `selective-dpo ARGUMENTS` as `processes` processes, wait for them, return the exit code.

    A launcher reports any failure as 1; what went wrong stands in the failing process's own output.

    Raises:
        Interrupted: SIGTERM came; it was passed on, and the processes have stopped.
        KeyboardInterrupt: Ctrl-C; it was passed on as SIGTERM, likewise.
    """
    command, environment = launch_command(processes)
    environment = os.environ | environment | {SUPERVISOR: str(os.getpid())}
    launchers: list[subprocess.Popen[bytes]] = []
    try:
        with passing_on(lambda: [each.pid for each in launchers if each.returncode is None]) as interrupted:
            with starting_out_of_reach():
                launchers.append(
                    subprocess.Popen([*command, "-m", "selective_dpo", *arguments], env=environment)
                )
            if interrupted():
                launchers[0].terminate()  # SIGTERM came before there was anybody to pass it on to
            code = launchers[0].wait()
    except KeyboardInterrupt:
        for launcher in launchers:
            launcher.wait()  # its processes make a checkpoint
        raise
    if code and interrupted():
        raise interrupted_error()
    return code


def launch_command(processes: int) -> tuple[list[str], dict[str, str]]:
    """The launcher, to be followed by `-m MODULE ...`, and the environment variables it needs.

    `accelerate launch --cpu` starts one process, whatever number it is given, so on a CPU it is PyTorch's
    own launcher, with the variable that `accelerate launch --cpu` would set.
    """
    timeout = os.environ.get(_SHUTDOWN_TIMEOUT, str(MAX_CHECKPOINT_SECONDS))
    if torch.cuda.is_available():
        command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        return [sys.executable, "-m", *command], {_SHUTDOWN_TIMEOUT: timeout}
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads, _SHUTDOWN_TIMEOUT: timeout}
    return [sys.executable, "-m", *command], environment
