"""Starting a command again as several data-parallel processes, through a launcher."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from selective_dpo.distributed.signals import SUPERVISOR, interrupted_error, passing_on, starting_out_of_reach
from selective_dpo.errors import ConfigError

MAX_CHECKPOINT_SECONDS = 3600
"""What a launcher that is told to end allows its processes: an update and a checkpoint. Set
`TORCH_ELASTIC_SHUTDOWN_TIMEOUT` to allow another time."""

_SECONDS_BETWEEN_LOOKS = 0.5
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
    return relaunch_each([arguments], processes=processes, groups=1)


def relaunch_each(commands: Sequence[Sequence[str]], *, processes: int, groups: int) -> int:
    """The same for several commands, `groups` of them at a time, each with devices of its own.

    A command that fails does not stop the others. Returns the first exit code that is not 0.

    Raises:
        ConfigError: there are GPUs, and too few of them.
        Interrupted, KeyboardInterrupt: as `relaunch`; no further command is begun.
    """
    environments = [_environment(group, processes, groups) for group in range(groups)]
    waiting = list(commands)
    codes: list[int] = []
    running: dict[int, subprocess.Popen[bytes]] = {}
    try:
        with passing_on(
            lambda: [each.pid for each in running.values() if each.returncode is None]
        ) as stopped:
            while running or (waiting and not stopped()):
                for group in range(groups):
                    if group in running or not waiting or stopped():
                        continue
                    command = [*launch_command(processes), "-m", "selective_dpo", *waiting.pop(0)]
                    with starting_out_of_reach():
                        running[group] = subprocess.Popen(command, env=environments[group])
                    if stopped():
                        running[group].terminate()  # SIGTERM came before there was anybody to pass it on to
                with contextlib.suppress(subprocess.TimeoutExpired):
                    next(iter(running.values())).wait(_SECONDS_BETWEEN_LOOKS if groups > 1 else None)
                ended = [group for group, each in running.items() if each.poll() is not None]
                codes += [running.pop(group).returncode for group in ended]
    except KeyboardInterrupt:
        for launcher in running.values():
            launcher.wait()  # its processes make a checkpoint
        raise
    failed = [code for code in codes if code]
    if stopped() and (failed or groups > 1):
        raise interrupted_error()
    return failed[0] if failed else 0


def _environment(group: int, processes: int, groups: int) -> dict[str, str]:
    """Of one of several groups of processes: its share of the GPUs, or else of the CPU's cores."""
    timeout = os.environ.get(_SHUTDOWN_TIMEOUT, str(MAX_CHECKPOINT_SECONDS))
    environment = os.environ | {_SHUTDOWN_TIMEOUT: timeout, SUPERVISOR: str(os.getpid())}
    if not torch.cuda.is_available():
        threads = max(1, (os.cpu_count() or 1) // (processes * groups))
        threads_text = os.environ.get("OMP_NUM_THREADS", str(threads))
        return environment | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads_text}
    if groups == 1:
        return environment
    devices = visible_gpus()
    if len(devices) < groups * processes:
        raise ConfigError(
            f"launch.workers {groups} x launch.processes {processes} need {groups * processes} GPUs, and "
            f"there are {len(devices)}: lower one of them"
        )
    own = devices[group * processes : (group + 1) * processes]
    return environment | {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def processes_of_passes(workers: int, processes: int) -> int:
    """Processes of a pass that no scorer trains: one for each GPU that the workers have."""
    if not torch.cuda.is_available():
        return processes
    return max(processes, min(workers * processes, len(visible_gpus())))


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(device) for device in range(torch.cuda.device_count())]


def launch_command(processes: int) -> list[str]:
    """The launcher, to be followed by `-m MODULE ...`.

    `accelerate launch --cpu` starts one process, whatever number it is given, so on a CPU it is PyTorch's
    own launcher, with the variable that `accelerate launch --cpu` would set (see `_environment`).
    """
    if torch.cuda.is_available():
        command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        return [sys.executable, "-m", *command, "--main_process_port", "0"]  # 0: any that is free
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
