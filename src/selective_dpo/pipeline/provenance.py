"""Where a result came from: enough to make it again."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from selective_dpo.config import Recipe
from selective_dpo.digests import digest
from selective_dpo.engine.models import remote_code
from selective_dpo.recipe_io import dump_config

_PACKAGES = ("selective-dpo", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


def provenance(recipe: Recipe, *, inputs: dict[str, str]) -> dict[str, Any]:
    """Versions, hardware, git state, the recipe's digest and those of its inputs.

    It is published, on a model card too: no environment variables, no user names, no paths of this machine,
    so not the command either. What that said stands in the run's `config.json`.
    """
    return {
        "recipe_sha256": digest(dump_config(recipe)),
        "inputs": inputs,
        "trust_remote_code": recipe.model.trust_remote_code,
        "remote_code": remote_code(recipe.model),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": hardware(),
        "git": git_state(),
    }


def hardware() -> dict[str, Any]:
    """The machine in a few words."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}


def git_state() -> str | None:
    """Commit of the checkout this was started in, with "+changes" if it was not clean; None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
