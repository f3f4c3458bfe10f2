"""Checks of a recipe's pass-through settings against the libraries that they are for: TRL and PEFT.

An option that does not exist, has a value of the wrong type, would have no effect here, or is decided
by this package is refused before anything is loaded. The libraries are asked for their options when a
check runs, so what is allowed is what is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
import warnings
from typing import Any

from selective_dpo.config import Recipe, Settings
from selective_dpo.core.losses import (
    LOSSES,
    NOT_PAIRWISE,
    OPTIONS,
    chance_loss,
    loss_names,
    options_read,
)
from selective_dpo.errors import ConfigError
from selective_dpo.option_rules import (
    DECIDED,
    DECIDED_IN,
    DECIDED_IN_LORA,
    EVALUATION_KEYS,
    NEEDS_MORE,
    POSITIVE,
    RENAMED,
    Stage,
)
from selective_dpo.option_types import fits, one_line, phrase
from selective_dpo.recipe_errors import did_you_mean, show


def check_recipe_options(recipe: Recipe) -> None:
    """Check all four blocks of pass-through settings in `recipe`.

    Raises:
        ConfigError: an option is unknown, of the wrong type, without effect, or decided elsewhere.
    """
    check_dpo_options(recipe.score.trainer, "score.trainer", "score")
    check_lora_options(recipe.score.lora, "score.lora")
    check_dpo_options(recipe.train.trainer, "train.trainer", "train")
    check_lora_options(recipe.train.lora, "train.lora")
    if recipe.train.trainer.get("eval_strategy", "no") != "no" and not recipe.data.test:
        raise ConfigError(
            "train.trainer.eval_strategy evaluates on data.test, which is empty: give data.test"
        )


def check_dpo_options(settings: Settings, where: str, stage: Stage) -> None:
    """Check settings meant for TRL's `DPOConfig`; `where` is their dotted key in messages.

    Raises:
        ConfigError: as `check_recipe_options`.
    """
    decided = {**DECIDED, **DECIDED_IN[stage]}
    _check_names_and_types(settings, where, _dpo_options(), decided, "TRL's DPOConfig")
    _check_loss(settings, where, stage)
    if stage == "train":
        _check_training(settings, where)
    if under_deepspeed():
        return
    _try_dpo_config(settings, where)
    _check_trackers(settings.get("report_to"), where)


def under_deepspeed() -> bool:
    """Whether this process was launched with DeepSpeed: a `DPOConfig` made here would set it up."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes")


def check_lora_options(settings: Settings | None, where: str) -> None:
    """Check settings meant for PEFT's `LoraConfig`; None, full fine-tuning, is fine.

    Raises:
        ConfigError: as `check_recipe_options`.
    """
    if settings is None:
        return
    _check_names_and_types(settings, where, _lora_options(), DECIDED_IN_LORA, "PEFT's LoraConfig")
    if not 0.0 <= settings.get("lora_dropout", 0.0) < 1.0:
        raise ConfigError(
            f"{where}.lora_dropout is {settings['lora_dropout']}, but must be at least 0, below 1"
        )
    from peft import LoraConfig

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            LoraConfig(task_type="CAUSAL_LM", **settings)
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"{where}: {one_line(error)}") from error
    ignored = [one_line(warning.message) for warning in caught if "ignored" in str(warning.message)]
    if ignored:
        raise ConfigError(f"{where}: {ignored[0]}")


def _check_trackers(given: str | list[str] | None, where: str) -> None:
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = integration_utils.get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in [given] if isinstance(given, str) else given or []:
        if name in ("all", "none"):
            continue
        if name not in known:
            raise ConfigError(
                f"{where}.report_to: {show(name)} is not a tracker that transformers knows"
                f"{did_you_mean(name, known)}"
            )
        if name not in ("azure_ml", "flyte") and name not in installed:
            raise ConfigError(
                f"{where}.report_to: {name} is not installed, or switched off by its environment variables; "
                "install it, or take it out of the list"
            )


def _check_names_and_types(
    settings: Settings, where: str, options: dict[str, Any], decided: dict[str, str], library: str
) -> None:
    for key, value in settings.items():
        if key in decided:
            raise ConfigError(f"{where}.{key} cannot be set: {decided[key]}")
        if key not in options:
            remedy = f" any more: {RENAMED[key]}" if key in RENAMED else did_you_mean(key, options)
            raise ConfigError(f"{where}.{key} is not an option of {library}{remedy}")
        if not fits(value, options[key]):
            raise ConfigError(f"{where}.{key} is {show(value)}, but must be {phrase(options[key], value)}")
        if key in POSITIVE and not value > 0:
            raise ConfigError(f"{where}.{key} is {show(value)}, but must be above 0")
        if key == "seed" and not 0 <= value < 2**32:
            raise ConfigError(f"{where}.{key} is {show(value)}, but must be at least 0 and below 2**32")


def _check_loss(settings: Settings, where: str, stage: Stage) -> None:
    """The loss exists, gives each pair a difficulty where it has to, and reads the options given."""
    names = loss_names(settings) or [""]
    for name in names:
        if name not in LOSSES | NOT_PAIRWISE:
            known = [*LOSSES, *NOT_PAIRWISE]
            raise ConfigError(
                f"{where}.loss_type: {show(name)} is not a loss of TRL's DPO{did_you_mean(name, known)} "
                f"(known: {', '.join(known)})"
            )
        if stage == "score" and name in NOT_PAIRWISE:
            raise ConfigError(
                f"{where}.loss_type: {name} gives a pair no loss of its own, which its difficulty is "
                f"({NOT_PAIRWISE[name][0]}); use {', '.join(LOSSES)}, or a weighted sum of them"
            )
    for key in sorted(OPTIONS & settings.keys()):
        without = [name for name in names if key not in options_read(name)]
        # TRL takes these two only where all losses can, but for sft, which it leaves as it is.
        for_all = key in ("f_divergence_type", "use_weighting") and set(without) - {"sft"}
        if for_all or len(without) == len(names):
            raise ConfigError(f"{where}.{key} has no effect on loss_type {' + '.join(without)}: leave it out")
    kind = settings.get("f_divergence_type")
    if "f_alpha_divergence_coef" in settings and kind != "alpha_divergence":
        raise ConfigError(
            f"{where}.f_alpha_divergence_coef has no effect without f_divergence_type: alpha_divergence"
        )
    for name in LOSSES.keys() & set(names):
        try:  # its value for one pair; no option's range depends on beta
            chance_loss({**settings, "beta": 1.0, "loss_type": name, "loss_weights": None})
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error


def _check_training(settings: Settings, where: str) -> None:
    if settings.get("eval_strategy", "no") == "no":
        idle = [key for key in EVALUATION_KEYS if key in settings and key != "eval_strategy"]
        if idle:
            raise ConfigError(f"{where}.{idle[0]} has no effect without {where}.eval_strategy")
    epochs = settings.get("num_train_epochs", 1)
    if epochs != int(epochs):
        raise ConfigError(
            f"{where}.num_train_epochs is {epochs}, but must be whole: part of an epoch leaves pairs out"
        )


@functools.cache
def _dpo_options() -> dict[str, Any]:
    from trl import DPOConfig

    # TRL turns a single loss name into a list of one.
    return {**_options(DPOConfig), "loss_type": list[str] | str}


@functools.cache
def _lora_options() -> dict[str, Any]:
    from peft import LoraConfig

    return _options(LoraConfig)


def _options(config: Any) -> dict[str, Any]:
    kinds = typing.get_type_hints(config)
    return {field.name: kinds[field.name] for field in dataclasses.fields(config) if field.init}


def _try_dpo_config(settings: Settings, where: str) -> None:
    """Let TRL and transformers judge how the options go together, without touching any device."""
    from trl import DPOConfig

    tried = {key: value for key, value in settings.items() if key not in NEEDS_MORE}
    # Reading `device` would set up the process group for good, on the CPU.
    import torch

    without_device = type("_TriedConfig", (DPOConfig,), {"device": property(lambda _: torch.device("cpu"))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            without_device(output_dir="unused", use_cpu=True, **tried)
        except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
            raise ConfigError(f"{where}: {one_line(error)}") from error
