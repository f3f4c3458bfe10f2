"""Checks of the machine: Python and packages, device, disk, settings of the hub's client."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from selective_dpo.config import Recipe
from selective_dpo.pipeline.checks.check import Check, fail, ok, warn
from selective_dpo.pipeline.planning.device import Device
from selective_dpo.pipeline.planning.disk import Disk
from selective_dpo.pipeline.planning.words import readable_bytes
from selective_dpo.training.arguments import PURE
from selective_dpo.training.trackers import tracker_names

_DISTRIBUTION = "selective-dpo"
_BASE_NEED = 100 * (1 << 20)
"""Bytes for tables, logs and the report, beside trained weights."""
# What transformers calls them -> the package to install.
_TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}


def check_python() -> Check:
    """The interpreter against what the installed package asks for."""
    found, wanted = platform.python_version(), metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return ok("python", found)
    return fail("python", found, f"use a version {wanted}")


def check_packages() -> Iterator[Check]:
    """Each package that is always needed, against the bounds that this one declares."""
    good = []
    for text in metadata.requires(_DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield fail(requirement.name, "not installed", remedy)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            good.append(f"{requirement.name} {found}")
        else:
            yield fail(requirement.name, f"{found}, needed is {requirement.specifier}", remedy)
    yield ok("packages", ", ".join(good))


def check_device(device: Device) -> Check:
    """What a run would compute on."""
    if device.kind == "cuda":
        return ok("device", f"{device.number} x {device.name}, {readable_bytes(device.memory)} each")
    found = f"no GPU; {device.name}, {readable_bytes(device.memory)}"
    return warn("device", found, "fine for models of a few million parameters; larger ones need a GPU")


def check_hub() -> Check:
    """Whether the hub may be asked, and that nothing is reported to it."""
    import huggingface_hub.constants as hub

    telemetry = "off" if os.environ.get("HF_HUB_DISABLE_TELEMETRY") == "1" else "on"
    if hub.HF_HUB_OFFLINE:
        found = f"offline (HF_HUB_OFFLINE), telemetry {telemetry}: models and data of the hub must be cached"
        return ok("hub", found)
    return ok("hub", f"online, telemetry {telemetry}")


def check_disk(recipe: Recipe, need: Disk | None) -> Check:
    """Free space where the run folder goes; `need` is None if it is not known."""
    folder = Path(recipe.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return fail("disk", f"cannot write below {existing}", "choose another output_dir")
    free = shutil.disk_usage(existing).free
    found = f"{readable_bytes(free)} free at {existing}"
    if need is None:
        return warn("disk", f"{found}, the model's size is not known", "check that its weights fit")
    wanted = need.total + _BASE_NEED
    found += f", the run needs about {readable_bytes(wanted)}"
    if need.checkpoints:
        found += f" ({readable_bytes(need.checkpoints)} of it for checkpoints, while it trains)"
    if free < wanted:
        return fail("disk", found, "free some, or choose another output_dir")
    # Weights are written beside the old ones before these are removed.
    twice = free > wanted + need.results
    return (
        ok("disk", found) if twice else warn("disk", found, "a repeated run needs room for its weights twice")
    )


def check_launch(recipe: Recipe, device: Device) -> Check:
    """Processes and workers against the devices."""
    processes, workers = recipe.launch.processes, recipe.launch.workers
    found = f"{processes} processes" if processes > 1 else f"{workers} scorer(s) at a time"
    if device.kind != "cuda":
        return ok("launch", found)
    found += f" on {device.number} GPU(s)"
    if processes > device.number:
        return fail("launch", found, f"lower launch.processes to {device.number}")
    if processes == 1 and workers == 1 and device.number > 1:
        return warn(
            "launch",
            found,
            "transformers would split batches over all GPUs: set launch.processes or launch.workers to "
            f"{device.number}, or CUDA_VISIBLE_DEVICES to one",
        )
    if workers > device.number:
        return warn("launch", found, "several would share a GPU's memory")
    return ok("launch", found)


def check_precision(recipe: Recipe, device: Device) -> Check:
    """Whether the device computes in the weights' type, and small updates are kept."""
    if not recipe.model.master_weights:
        return warn("precision", PURE.format(dtype=recipe.model.dtype), "leave model.master_weights out")
    if recipe.model.dtype != "bfloat16":
        return ok("precision", recipe.model.dtype)
    if device.kind == "cpu":
        return warn("precision", "bfloat16, which is slow on most CPUs", "set model.dtype: float32")
    if not torch.cuda.is_bf16_supported():
        return fail(
            "precision", "this GPU has no bfloat16", "set model.dtype to float32, and fp16 in trainer"
        )
    return ok("precision", "bfloat16, which the device supports")


def check_optional_packages(recipe: Recipe) -> Iterator[Check]:
    """Packages that only some recipes need: optimizers, DeepSpeed, trackers, attention kernels."""
    for block in ("score", "train"):
        settings = getattr(recipe, block).trainer
        optimizer = str(settings.get("optim", ""))
        if any(word in optimizer for word in ("bnb", "8bit", "paged", "ademamix")):
            yield _needs("bitsandbytes", f"{block}.trainer.optim {optimizer}", "the gpu extra")
        if settings.get("deepspeed"):
            yield _needs("deepspeed", f"{block}.trainer.deepspeed", "the gpu extra")
        if settings.get("use_liger_kernel"):
            yield _needs("liger_kernel", f"{block}.trainer.use_liger_kernel", "liger-kernel")
        for name in tracker_names(settings):
            yield _needs(
                _TRACKERS.get(name, name), f"{block}.trainer.report_to {name}", "the tracker's package"
            )
    yield check_attention(recipe.model.attention)


def check_attention(name: str) -> Check:
    """Whether the attention implementation is there. What the model can take shows when it is loaded."""
    from transformers.utils import import_utils

    available = {
        "flash_attention_2": import_utils.is_flash_attn_2_available,
        "flash_attention_3": import_utils.is_flash_attn_3_available,
        "flex_attention": import_utils.is_torch_flex_attn_available,
    }.get(name, lambda: True)
    if available():
        return ok("attention", name)
    return fail(
        "attention", f"{name} is not available here", "install its package, or set model.attention: sdpa"
    )


def _needs(module: str, key: str, source: str) -> Check:
    if importlib.util.find_spec(module) is not None:
        return ok(key, f"{module} is installed")
    return fail(key, f"{module} is not installed", f"install {source}, or change the option")
