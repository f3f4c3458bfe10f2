"""The starting policy and its tokenizer: loading them, and naming their exact content."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from selective_dpo.artifacts import file_digest
from selective_dpo.config import ModelConfig
from selective_dpo.data.templates import apply_template
from selective_dpo.digests import digest
from selective_dpo.errors import ModelError

_LOCAL_PATH = re.compile(r"[/~.\\]|[^/]*/[^/]*/")
"""What no hub name looks like: a leading slash, tilde or dot, or two slashes."""
logger = logging.getLogger(__name__)

_LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, SafetensorError)


def load_policy(config: ModelConfig) -> Any:
    """The starting policy, in training precision, on the CPU or wherever a trainer will move it.

    Raises:
        ModelError: it cannot be loaded; only safetensors weights are read.
    """
    _announce_remote_code(config)
    try:
        return AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    except _LOADING_ERRORS as error:
        raise ModelError(_explain("model", config.path, error)) from error


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer with the recipe's chat template and a padding token (its end-of-sequence token where
    it has none of its own).

    Raises:
        ModelError: it cannot be loaded, or has neither a padding nor an end-of-sequence token.
        ConfigError, TemplateError: there is no such chat template, or it is not valid.
    """
    path = config.tokenizer or config.path
    _announce_remote_code(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=config.revision if path == config.path else "main",
            trust_remote_code=config.trust_remote_code,
        )
    except _LOADING_ERRORS as error:
        raise ModelError(_explain("tokenizer", path, error)) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"tokenizer {path} has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    apply_template(tokenizer, config.chat_template)
    return tokenizer


def load_model_config(config: ModelConfig) -> Any:
    """The architecture's configuration, without weights. `ModelError` if it cannot be had."""
    _announce_remote_code(config)
    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except _LOADING_ERRORS as error:
        raise ModelError(_explain("model", config.path, error)) from error


def model_digest(config: ModelConfig) -> str:
    """What identifies the weights: digests of a local folder's files, or a hub model's commit.

    Code that is run with the model (`trust_remote_code`) is part of it.
    """
    folder = Path(config.path)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
        digests = {path.name: file_digest(path) for path in files}
        return digest({**digests, **(remote_code(config) or {})})
    commit = getattr(load_model_config(config), "_commit_hash", None)
    return digest({"hub": config.path, "commit": commit or config.revision})


def remote_code(config: ModelConfig) -> dict[str, str] | None:
    """The code that `trust_remote_code` lets a model bring along; None where it is off.

    SHA-256 of each Python file of a local folder, by name; of a hub model its name and revision.
    """
    if not config.trust_remote_code:
        return None
    found: dict[str, str] = {}
    for path in dict.fromkeys((config.path, config.tokenizer or config.path)):
        folder = Path(path)
        if folder.is_dir():
            files = sorted(folder.rglob("*.py"))
            found |= {file.relative_to(folder).as_posix(): file_digest(file) for file in files}
        else:
            found[path] = f"revision {config.revision if path == config.path else 'main'}"
    return found


def _announce_remote_code(config: ModelConfig) -> None:
    if config.trust_remote_code:
        tokenizer = f" and {config.tokenizer}" if config.tokenizer else ""
        _say_once(f"{config.path} ({config.revision}){tokenizer}")


@functools.cache
def _say_once(where: str) -> None:
    # Without any logging set up, Python writes warnings to stderr, and so does the command line.
    logger.warning(
        "WARNING: model.trust_remote_code is on: Python code that comes with %s runs with all your rights; "
        "leave it off unless you have read that code",
        where,
    )


def _explain(what: str, path: str, error: BaseException) -> str:
    folder = Path(path).expanduser()
    if not folder.is_dir() and _LOCAL_PATH.match(path):
        return f"cannot load {what} {path!r}: there is no such folder; check the path"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = (lines[0] if lines else type(error).__name__)[:300].rstrip(" .:")
    if folder.is_dir():
        remedy = "the folder needs config.json, the tokenizer's files and *.safetensors weights"
    else:
        remedy = "check the name, your access and the network, or name a local folder"
    return f"cannot load {what} {path!r}: {reason}; {remedy}"
