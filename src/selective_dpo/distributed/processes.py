"""One process among several: who writes, who waits, and how results come together."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, reduce
from numpy.typing import NDArray
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from selective_dpo.errors import BusyError, IdentityError, name_some
from selective_dpo.storage.artifacts import publish_folder
from selective_dpo.storage.locks import holding

_USE_CPU = "ACCELERATE_USE_CPU"

_FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"

_MAX_WAIT = timedelta(days=1)
"""For the other processes, while the main one prepares a large data set."""


def this_process() -> PartialState:
    """The process group that `accelerate launch` or `torchrun` made, or this process alone."""
    if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
        # Unless told of the CPU, accelerate (and transformers, which reads the same variable) takes each of
        # several CPU processes for the only one: all would train alone and publish over each other.
        os.environ.setdefault(_USE_CPU, "true")
    return PartialState(cpu=parse_flag_from_env(_USE_CPU), timeout=_MAX_WAIT)


def wait_for_everyone() -> None:
    """Block until every process has come here."""
    this_process().wait_for_everyone()


def on_any_process(flag: bool) -> bool:
    """Whether `flag` is true on at least one process; all processes must ask together."""
    process = this_process()
    if process.num_processes == 1:
        return flag
    return bool(reduce(torch.tensor([int(flag)], device=process.device), "sum").item())


def leave_group() -> None:
    """Take this process out of its group, when all is done; every process must come here.

    Left to the interpreter's end, threads of a group now and then abort a process that has succeeded.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def whole_on_each_process() -> Iterator[None]:
    """Inside, models are loaded whole, on each process: for forward passes that no trainer's wrapper runs.

    A training's arguments, and `accelerate launch`, tell transformers that models are to be spread over the
    processes (ZeRO-3), or loaded by the first one only (FSDP). That lasts longer than the training, and is
    for its own model only.
    """
    # The next training's arguments set their own.
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    before = os.environ.pop(_FSDP_LOADING, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_FSDP_LOADING] = before


@contextlib.contextmanager
def publish_from_main(folder: Path, *, kind: str, key: str) -> Iterator[Path]:
    """`publish_folder` by the main process; the others get a folder that is thrown away.

    All processes must enter and leave; they leave together, when the folder is complete.
    """
    if this_process().is_main_process:
        with publish_folder(folder, kind=kind, key=key) as partial:
            yield partial
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    wait_for_everyone()


@contextlib.contextmanager
def held_by_main(lock: Path, *, what: str, shared: bool = False) -> Iterator[None]:
    """`locks.holding` by the main process; the others wait for its verdict. All processes must enter.

    Raises:
        BusyError: somebody else holds it; on all processes.
    """
    process = this_process()
    refused: Exception | None = None
    with contextlib.ExitStack() as stack:
        if process.is_main_process:
            try:
                stack.enter_context(holding(lock, what=what, shared=shared))
            except (BusyError, OSError) as error:
                refused = error
        if process.num_processes > 1:
            # Its own error on the main process; the others need only know that there is no going on.
            verdict = [str(refused) if refused else None]
            broadcast_object_list(verdict)
            if verdict[0] is not None and refused is None:
                refused = BusyError(verdict[0])
        if refused is not None:
            raise refused
        yield


def combine_by_position(
    values_PC: NDArray[np.float64], done_P: NDArray[np.bool_], ids_P: list[str], *, what: str
) -> NDArray[np.float64]:
    """Put together the rows that each process filled, each row exactly once.

    Shapes: values_PC [P, C] with zeros in rows this process did not fill, done_P [P] true where it
    did, ids_P [P] the rows' names. Rows are added over processes, so no row order is exchanged.

    Raises:
        IdentityError: a row was filled by no process or by several; some are named.
    """
    counts_P = done_P.astype(np.int64)
    process = this_process()
    if process.num_processes > 1:
        device = process.device
        counts_P = reduce(torch.from_numpy(counts_P).to(device), "sum").cpu().numpy()
        values_PC = reduce(torch.from_numpy(values_PC).to(device), "sum").cpu().numpy()
    if (counts_P != 1).any():
        wrong = [ids_P[row] for row in np.flatnonzero(counts_P != 1)]
        raise IdentityError(f"{what}: {len(wrong):,} pairs not computed exactly once: {name_some(wrong)}")
    return values_PC
