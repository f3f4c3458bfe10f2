"""Checks of a recipe's pass-through settings against the libraries that they are for: TRL and PEFT.

An option that does not exist, has a value of the wrong type, would have no effect here, or is decided
by this package is refused before anything is loaded. The libraries are asked for their options when a
check runs, so what is allowed is what is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
import warnings
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from selective_dpo.config import Recipe, Settings
from selective_dpo.config.messages import did_you_mean, show
from selective_dpo.errors import ConfigError
from selective_dpo.losses import LOSSES, NOT_PAIRWISE, OPTIONS, chance_loss, loss_names, options_read


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


# ----------------------------------------------------------------------------------------------------
# Which TRL and PEFT options a recipe cannot set, and why: tables for `pass_through`.


Stage = Literal["score", "train"]

_LENGTHS = "data.max_length and data.overlong decide"

_REFERENCE = "the reference's log-probs are computed once, before any training, and stay what they are"

_HUB = "train.hub_id and train.hub_private decide; log in with `hf auth login`"

_TOKEN = "a recipe is no place for secrets; set the environment variable HF_TOKEN, or use `hf auth login`"

_LOADING = "the model block decides how the model is loaded"

_PREPARED = "this package prepares the pairs"

_PROCESSES = "launch.processes decides"

_CHECKPOINTS = (
    "launch.checkpoint_minutes decides; a training goes on from its newest whole checkpoint by itself, and "
    "score.keep_scorers keeps scorers"
)

_LAST = "the policy is what the curriculum ends with"

_NO_EFFECT = "it has no effect on DPO here"

_ORDER = "the order is the curriculum's; select.order and select.seed decide"

_HELD_OUT = "held-out pairs are scored as score.evaluations and score.tokens_per_batch say"

EVALUATION_KEYS = (
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "include_for_metrics",
    "batch_eval_metrics",
    "bf16_full_eval",
    "fp16_full_eval",
)
"""Options of transformers' evaluation loop, which the training stage runs on `data.test` where asked to."""

DECIDED: dict[str, str] = {
    "output_dir": "the run's folder is output_dir and name at the top of the recipe",
    "max_length": _LENGTHS,
    "truncation_mode": _LENGTHS,
    "precompute_ref_log_probs": _REFERENCE,
    "precompute_ref_batch_size": _REFERENCE,
    "sync_ref_model": _REFERENCE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "ld_alpha": "the reference's log-probs are computed once, as sums over tokens, which it would weigh",
    "model_init_kwargs": _LOADING,
    "trust_remote_code": _LOADING,
    "pad_token": "model.tokenizer decides",
    "tokenizer": "model.tokenizer decides",
    "remove_unused_columns": _PREPARED,
    "dataset_num_proc": _PREPARED,
    "push_to_hub": _HUB,
    "hub_token": _TOKEN,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "save_strategy": _CHECKPOINTS,
    "save_steps": _CHECKPOINTS,
    "save_total_limit": _CHECKPOINTS,
    "save_only_model": _CHECKPOINTS,
    "save_on_each_node": _CHECKPOINTS,
    "enable_jit_checkpoint": _CHECKPOINTS,
    "restore_callback_states_from_checkpoint": _CHECKPOINTS,
    "resume_from_checkpoint": _CHECKPOINTS,
    "ignore_data_skip": _CHECKPOINTS,
    "load_best_model_at_end": _LAST,
    "metric_for_best_model": _LAST,
    "greater_is_better": _LAST,
    "do_train": "the stage decides",
    "do_eval": "the stage decides",
    "do_predict": "the stage decides",
    "local_rank": _PROCESSES,
    "parallelism_config": _PROCESSES,
    "label_names": _NO_EFFECT,
    "length_column_name": _NO_EFFECT,
    "label_smoothing_factor": _NO_EFFECT + "; DPO's own is label_smoothing",
    "padding_free": "TRL ignores it in DPO for now",
    "disable_tqdm": "progress is shown by this package",
    "dataloader_pin_memory": "it follows from the device",
    "dataloader_drop_last": "every pair must be trained on",
    "auto_find_batch_size": "it would change the number of pairs in an update on the way",
}
"""DPOConfig key -> why neither stage takes it."""

DECIDED_IN: dict[Stage, dict[str, str]] = {
    "score": {
        "seed": "score.seeds decides",
        "data_seed": "score.seeds decides",
        "train_sampling_strategy": "scorers see their half in random order",
        "group_by_length": "scorers see their half in random order",
        "max_steps": "the evaluations are spaced over whole epochs; set num_train_epochs",
        "evaluation_strategy": _HELD_OUT,
        "use_weighting": "difficulty is each pair's own loss, and it weighs pairs by the policy's tokens",
        **dict.fromkeys(EVALUATION_KEYS, _HELD_OUT),
    },
    "train": {
        "data_seed": _ORDER,
        "train_sampling_strategy": _ORDER,
        "group_by_length": _ORDER,
        "dataloader_in_order": _ORDER,
        "max_steps": "every selected pair is trained on; set select.count or num_train_epochs",
    },
}
"""The same for one stage."""

RENAMED = {
    "evaluation_strategy": "set eval_strategy",
    "max_prompt_length": "set data.max_prompt_length",
    "max_completion_length": "set data.max_length and data.max_prompt_length",
    "max_target_length": "set data.max_length and data.max_prompt_length",
    "truncation_side": "set data.overlong",
    "warmup_ratio": "set warmup_steps; below 1 it is a share of all steps",
    "generate_during_eval": "set evaluate.generation",
    "reference_free": "leave it out",
    "rpo_alpha": "set loss_type: [sigmoid, sft] and loss_weights",
    "torch_dtype": "set model.dtype",
    "attn_implementation": "set model.attention",
    "use_peft": "set lora beside trainer",
    "no_cuda": "set use_cpu",
}
"""Names that TRL or transformers dropped, or that belong elsewhere -> what to write instead."""

DECIDED_IN_LORA = {
    "task_type": "it is always CAUSAL_LM",
    "inference_mode": "adapters are trained",
    "base_model_name_or_path": _LOADING,
    "revision": _LOADING,
    "peft_type": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "auto_mapping": "PEFT fills it in",
    "runtime_config": "PEFT fills it in",
}
"""LoraConfig key -> why it cannot be set."""

POSITIVE = (
    "beta",
    "discopop_tau",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "r",
    "lora_alpha",
)
"""Numbers that mean nothing at zero or below, which the libraries find out late."""

NEEDS_MORE = (
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "tf32",
    "accelerator_config",
    "use_cpu",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "report_to",
)
"""Options that need hardware, files or another package to be judged, or that change the process."""


# ----------------------------------------------------------------------------------------------------
# Whether a recipe's value has the type that a library's option is annotated with.


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping of keys to values",
    type(None): "null",
}


def fits(value: object, kind: Any) -> bool:
    """Whether `value`, of JSON types, can stand where `kind` is annotated.

    Stricter than Python: `true` is no number. Wider in two ways: a whole number is a number, and a list
    is a tuple. Where an enumeration is one of several types, text must be one of its values.
    """
    options = _options_of(kind)
    choices = _choices(options)
    if isinstance(value, str) and choices:
        return value in choices or any(value.startswith(prefix) for prefix in _open_choices(choices))
    return any(_fits_one(value, option) for option in options)


def phrase(kind: Any, value: object) -> str:
    """What `kind` allows, in words, with a hint at what was meant by `value`."""
    options = _options_of(kind)
    choices = _choices(options)
    words = [_WORDS.get(get_origin(option) or option, "") for option in options]
    if choices:
        words = ["one of " + ", ".join(sorted(choices)), *(word for word in words if word != "text")]
    listed = " or ".join(dict.fromkeys(word for word in words if word)) or "what only Python code can give"
    if isinstance(value, str):
        return listed + did_you_mean(value, choices)
    if isinstance(value, bool) and (choices or str in options):
        return f"{listed}; YAML reads a bare yes, no, on or off as true or false, so put it in quotes"
    return listed


def one_line(error: object) -> str:
    """The message of an error or warning on one line."""
    return " ".join(str(error).split())


def _options_of(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _choices(options: tuple[Any, ...]) -> list[str]:
    """The texts that are allowed, where only certain ones are."""
    choices: list[str] = []
    for option in options:
        if isinstance(option, type) and issubclass(option, Enum):
            choices += [str(member.value) for member in option]
        elif get_origin(option) is Literal:
            choices += [value for value in get_args(option) if isinstance(value, str)]
    return choices


def _open_choices(choices: list[str]) -> list[str]:
    # PEFT writes "pissa_niter_[number of iters]" for any text that starts so.
    return [choice[: choice.index("[")] for choice in choices if "[" in choice]


def _fits_one(value: object, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    container, inner = get_origin(kind) or kind, get_args(kind)
    if container is Literal:
        return value in inner
    if container is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if container is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if container in (list, tuple):
        return isinstance(value, list | tuple) and all(
            not inner or fits(item, inner[min(index, len(inner) - 1)]) for index, item in enumerate(value)
        )
    return isinstance(container, type) and isinstance(value, container)
