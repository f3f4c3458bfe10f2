"""Starting a command again as several data-parallel processes, through a launcher.

They can do what none of them can do alone: start again. A process that finds that all have to (see
`training.smaller_passes`) makes a file that the command above them has named, and ends with an error.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from selective_dpo.distributed.signals import REMEDY, SUPERVISOR, passing_on, starting_out_of_reach
from selective_dpo.errors import Interrupted, SelectiveDPOError, StartAgainError

LONGEST_CHECKPOINT = 3600
"""Seconds that a launcher which is told to end waits for its processes: for an update and a checkpoint."""

_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"

_MODULE = "selective_dpo"
"""What the processes run."""

_AGAIN = "SELECTIVE_DPO_START_AGAIN"
"""Environment variable: the file that a process makes for all of them to be started again."""

_LAST_WORDS = 30.0
"""Seconds that the others have to end by themselves then."""

_LOOKS = 1.0
"""Seconds between two looks for that file."""


def under_a_launcher() -> bool:
    """Whether `accelerate launch`, `torchrun` or Slurm's `srun` with them started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def one_of_several() -> bool:
    """Whether a launcher started this process as one of several that work together."""
    return under_a_launcher() and os.environ["WORLD_SIZE"] != "1"


def relaunch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `selective-dpo ARGUMENTS` as `processes` processes, wait for them, return the exit code.

    They are started again where one of them asks for it, for a reason that was not given before, and after
    no other failure. A launcher reports any failure as 1; what went wrong stands in the failing process's own
    output.

    Raises:
        Interrupted: SIGTERM came; it was passed on, and the processes have stopped.
        KeyboardInterrupt: Ctrl-C; it was passed on as SIGTERM, likewise.
    """
    command, environment = launch_command(processes)
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again"
        environment = os.environ | environment | {_AGAIN: str(again), SUPERVISOR: str(os.getpid())}
        earlier: set[str] = set()
        while True:
            again.unlink(missing_ok=True)
            code = _launch([*command, "-m", _MODULE, *arguments], environment)
            if not code or not again.exists() or again.read_text("utf-8") in earlier:
                return code
            earlier.add(again.read_text("utf-8"))
            sys.stderr.write(f"selective-dpo: starting the {processes} processes again\n")
            sys.stderr.flush()


def _launch(command: Sequence[str], environment: Mapping[str, str]) -> int:
    launchers: list[subprocess.Popen[bytes]] = []
    try:
        with passing_on(lambda: [each.pid for each in launchers if each.returncode is None]) as interrupted:
            with starting_out_of_reach():
                launchers.append(subprocess.Popen(command, env=environment))
            if interrupted():
                launchers[0].terminate()  # SIGTERM came before there was anybody to pass it on to
            code = launchers[0].wait()
    except KeyboardInterrupt:
        for launcher in launchers:
            launcher.wait()  # its processes make a checkpoint
        raise
    if code and interrupted():
        raise Interrupted(f"interrupted by SIGTERM: {REMEDY}")
    return code


def ask_to_start_again(reason: str) -> bool:
    """Have the command that started this process start it and the others again, when they have ended.

    False: somebody else started them, who would not know.

    Args:
        reason: names what will be different then. The same reason a second time would go on for ever.
    """
    if _AGAIN not in os.environ:
        return False
    with contextlib.suppress(OSError):
        Path(os.environ[_AGAIN]).write_text(reason, "utf-8")
        return True
    return False


@contextlib.contextmanager
def ending_with_the_others() -> Iterator[None]:
    """Inside, this process ends soon after another one asked to start again.

    By an error, since the other one's absence shows in the next exchange with it. Or without: it may wait for
    the other one in an exchange of GPUs, where neither an error nor a signal reaches it, and the launcher
    would leave it there for as long as a checkpoint may take.

    Raises:
        StartAgainError: in place of what the other one's absence led to.
    """
    if _AGAIN not in os.environ:
        yield
        return
    again, done = Path(os.environ[_AGAIN]), threading.Event()

    def watch() -> None:
        while not done.wait(_LOOKS):
            if again.exists() and not done.wait(_LAST_WORDS):
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except SelectiveDPOError:
        raise
    except Exception as error:
        if again.exists():
            raise StartAgainError("ended, as another process asked to start again") from error
        raise
    done.set()  # and not after an error: to end may take another exchange


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
