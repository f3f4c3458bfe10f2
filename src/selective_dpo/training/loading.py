"""Reading a checkpoint: what none of this training's would hold is one typed error, on all processes.

Digests find damage. Somebody who replaces a file can rewrite the manifest, too, and then a checkpoint holds
anything: weights of another model, a pickle that `weights_only` refuses, JSON of another kind. None of it
runs. Here it is kept from ending in whatever transformers happens to stumble over, or from being taken for
less than it should be: transformers only notes that weights are missing, and goes on with those of the start.

Only the reading is guarded. What is raised after it is the training's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from selective_dpo.artifacts import read_json
from selective_dpo.engine.memory import is_out_of_memory
from selective_dpo.errors import CheckpointError, DiskError, SelectiveDPOError, disk_fault, name_some
from selective_dpo.training.checkpoints import TRAINER, is_number, unsound

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each weight, in its shape."""


class CheckedLoading(Trainer):
    """transformers' own reading of a checkpoint, guarded. To be named before a trainer class of TRL."""

    checkpoint: Path | None = None
    """The folder that is gone on from; None: guarded by nobody."""

    def _load_from_checkpoint(self, *args: Any, **others: Any) -> None:
        with reading(self.checkpoint):
            super()._load_from_checkpoint(*args, **others)

    def _init_training_state(self, *args: Any, **others: Any) -> Any:
        with reading(self.checkpoint):
            return super()._init_training_state(*args, **others)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = self.checkpoint
        has_states = checkpoint is not None and (Path(checkpoint) / OPTIMIZER_NAME).is_file()
        if folder is None or not has_states or _is_sharded(self):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with reading(folder), _whole_schedule(self.lr_scheduler), _whole_states(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(self.checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(self.checkpoint):
            super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def reading(checkpoint: Path | None) -> Iterator[None]:
    """Inside, files of `checkpoint` are read; all processes enter together. None: without any guard.

    Raises:
        CheckpointError: on all processes, where a file of any of them is not what it should be.
    """
    if checkpoint is None:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    # The others would wait for ever for a process that ends here.
    reasons = [reason for reason in gather_object([_reason(own)]) if reason]
    if own is not None and _says_enough(own):
        raise own
    if reasons:
        raise unsound(checkpoint, reasons[0]) from own


def require_sound(checkpoint: Path, progress: Mapping[str, Any], trainer: Any) -> None:
    """Check what can be checked of a checkpoint without reading its tensors; for one process.

    Raises:
        CheckpointError: files are missing, or not of this training.
        DiskError: the system refuses to read them.
    """
    try:
        folder = checkpoint / TRAINER / f"checkpoint-{progress['step']}"
        _require_state(folder / TRAINER_STATE_NAME, progress)
        if not _is_sharded(trainer):
            _require_weights(folder, trainer.model)
            if progress["step"] < progress["steps"]:
                _require_files(folder, progress["layout"]["processes"])
    except Exception as error:
        if fault := disk_fault(error):
            raise DiskError(fault) from error
        raise unsound(checkpoint, _reason(error)) from error


def _says_enough(error: Exception) -> bool:
    """Whether it is for the user as it is, or nothing of the checkpoint's."""
    return isinstance(error, CheckpointError) or is_out_of_memory(error) or bool(disk_fault(error))


def _reason(error: Exception | None) -> str:
    if error is None:
        return ""
    # PyTorch goes on to explain how to read a pickle after all.
    sentence = " ".join(str(error).split()).split(". ")[0][:200]
    is_told = isinstance(error, _UnfitError | SelectiveDPOError)
    return sentence if is_told else f"{type(error).__name__}: {sentence}".rstrip(": ")


class _UnfitError(Exception):
    """Something is there, and readable, and not what this training writes."""


def _is_sharded(trainer: Any) -> bool:
    # DeepSpeed and FSDP have files of their own.
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


# --- trainer_state.json -----------------------------------------------------------------------------------


def _require_state(path: Path, progress: Mapping[str, Any]) -> None:
    found, usual = read_json(path), vars(TrainerState())
    wrong = [name for name in found.keys() | usual.keys() if not _is_alike(found, usual, name)]
    steps = (("global_step", "step"), ("max_steps", "steps"))
    wrong += [name for name, own in steps if found.get(name) != progress[own]]
    if wrong:
        raise _UnfitError(f"{path.name}: {name_some(sorted(set(wrong)))}")


def _is_alike(found: Mapping[str, Any], usual: Mapping[str, Any], name: str) -> bool:
    if name not in found or name not in usual:
        return False
    value, example = found[name], usual[name]
    if name == "log_history":
        return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    if example is None or value is None:
        return True
    return _are_of_one_kind(value, example)


def _are_of_one_kind(value: object, example: object) -> bool:
    return (is_number(value) and is_number(example)) or type(value) is type(example)


# --- weights ----------------------------------------------------------------------------------------------


def _require_weights(folder: Path, model: Any) -> None:
    """The names and shapes of the weights that training writes, against those of the model."""
    if (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        from peft import get_peft_model_state_dict

        files = [ADAPTER_SAFE_WEIGHTS_NAME]
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        files = (
            sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [SAFE_WEIGHTS_NAME]
        )
        wanted = model.state_dict()
    found: dict[str, list[int]] = {}
    for name in files:
        with safe_open(folder / Path(name).name, framework="pt") as file:
            found |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    written = {weight.data_ptr() for name, weight in wanted.items() if name in found}
    wrong = [
        f"{name} {found.get(name, 'missing')}"
        for name, weight in wanted.items()
        # Of weights that are tied to each other, one is written.
        if found.get(name, None if weight.data_ptr() in written else "missing")
        not in (None, list(weight.shape))
    ]
    if wrong:
        raise _UnfitError(f"weights that do not fit the model: {name_some(dict.fromkeys(wrong), limit=2)}")


# --- optimizer, schedule, random states -------------------------------------------------------------------


def _require_files(folder: Path, processes: int) -> None:
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME, *states) if not (folder / name).is_file()]
    if missing:
        raise _UnfitError(f"without {name_some(missing)}")


@contextlib.contextmanager
def _whole_schedule(scheduler: Any) -> Iterator[None]:
    """Inside, the state of `scheduler` is read: on leaving, each part of it must have been there."""
    if not isinstance(scheduler, LambdaLR):
        yield
        return
    before = {name: value for name, value in scheduler.state_dict().items() if name in vars(scheduler)}
    before.pop("lr_lambdas", None)
    vars(scheduler).update(dict.fromkeys(before, _Unread))
    yield
    wrong = [name for name, value in before.items() if type(vars(scheduler)[name]) is not type(value)]
    if wrong:
        raise _UnfitError(f"{SCHEDULER_NAME}: {name_some(wrong)}")


class _Unread:
    """Stands for what a file has not brought."""


@contextlib.contextmanager
def _whole_states(optimizer: Any) -> Iterator[None]:
    """Inside, the states of `optimizer` are read: on leaving, they must fit its weights and settings."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps it
    before = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    yield
    wrong = [
        name
        for group, after in zip(before, optimizer.param_groups, strict=True)
        for name, value in group.items()
        if name not in after or not _are_of_one_kind(after[name], value)
    ]
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        wrong += [] if optimizer.state else ["no moments"]
        wrong += [
            f"{name} of a weight of shape {list(weight.shape)}"
            for weight, state in optimizer.state.items()
            for name in _MOMENTS
            if getattr(state.get(name), "shape", None) != weight.shape
        ]
        wrong += ["step" for state in optimizer.state.values() if "step" not in state]
    if wrong:
        raise _UnfitError(f"{OPTIMIZER_NAME}: {name_some(dict.fromkeys(wrong), limit=2)}")
