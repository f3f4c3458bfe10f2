"""Checks of a recipe's `trainer` and `lora` blocks against the libraries that they are for: TRL and PEFT.

An option that does not exist, has a value of the wrong type, would have no effect here, or is decided by this
package is refused before anything is loaded. pydantic checks each value against the annotation that the
installed library gives the option; then the library's own configuration is made once, on trial.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import typing
import warnings
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from selective_dpo.config.messages import did_you_mean, inlined, misfit, one_line, show
from selective_dpo.config.schema import ONE_STEP_OPTIONS, Recipe, Settings
from selective_dpo.errors import ConfigError
from selective_dpo.losses import LOSSES, NOT_PAIRWISE, OPTIONS, chance_loss, loss_names, options_read

Stage = Literal["score", "train"]

_ORDER = "the order is the curriculum's; select.order and select.seed decide"
_HELD_OUT = "held-out pairs are scored as score.evaluations and score.tokens_per_batch say"
_LOADING = "the model block decides how the model is loaded"

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
"""Options of transformers' evaluation loop, which a training runs on `data.test` where it is asked to."""

_REASONS = {
    "the run's folder is output_dir and name at the top of the recipe": "output_dir",
    "data.max_length and data.overlong decide": "max_length truncation_mode",
    "the reference's log-probs are computed once, before any training, and stay what they are": (
        "precompute_ref_log_probs precompute_ref_batch_size sync_ref_model ref_model_mixup_alpha "
        "ref_model_sync_steps"
    ),
    "the reference's log-probs are computed once, as sums over tokens, which it would weigh": "ld_alpha",
    _LOADING: "model_init_kwargs trust_remote_code",
    "model.tokenizer decides": "pad_token tokenizer",
    "this package prepares the pairs": "remove_unused_columns dataset_num_proc",
    "train.hub_id and train.hub_private decide; log in with `hf auth login`": (
        "push_to_hub hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
    ),
    "a recipe is no place for secrets; set the environment variable HF_TOKEN, or use `hf auth login`": (
        "hub_token"
    ),
    "launch.checkpoint_minutes decides; a training goes on from its newest whole checkpoint by itself, and "
    "score.keep_scorers keeps scorers": (
        "save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint "
        "restore_callback_states_from_checkpoint resume_from_checkpoint ignore_data_skip"
    ),
    "the policy is what the curriculum ends with": (
        "load_best_model_at_end metric_for_best_model greater_is_better"
    ),
    "the stage decides": "do_train do_eval do_predict",
    "launch.processes decides": "local_rank parallelism_config",
    "it has no effect on DPO here": "label_names length_column_name",
    "it has no effect on DPO here; DPO's own is label_smoothing": "label_smoothing_factor",
    "TRL ignores it in DPO for now": "padding_free",
    "progress is shown by this package": "disable_tqdm",
    "it follows from the device": "dataloader_pin_memory",
    "every pair must be trained on": "dataloader_drop_last",
    "it would change the number of pairs in an update on the way": "auto_find_batch_size",
}

DECIDED = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}
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

_POSITIVE, _COUNT = Annotated[float, Field(gt=0)], Annotated[int, Field(gt=0)]

_NARROWER: Settings = {
    "beta": _POSITIVE,
    "discopop_tau": _POSITIVE,
    "learning_rate": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "r": _COUNT,
    "lora_alpha": _COUNT,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
    "lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    # TRL makes a list of a single name.
    "loss_type": list[str] | str,
}
"""Types that replace the libraries' own, which find out late that such a number is wrong."""

_ALSO: Settings = {
    "init_lora_weights": Annotated[str, Field(pattern="^pissa_niter_[0-9]+$")],
    "fsdp": bool,
}
"""Types beside the libraries' own: PEFT's annotation has a placeholder for this number, and transformers' is
that of an older form of `fsdp`."""

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
"""Options that are not tried: they need hardware, files or another package, or they change the process."""


def check_recipe_options(recipe: Recipe) -> None:
    """Check all four blocks of pass-through settings in `recipe`.

    Raises:
        ConfigError: an option is unknown, of the wrong type, without effect, or decided elsewhere.
    """
    if not recipe.study.is_empty:
        raise ConfigError(
            "study: its arms are not spelled out; make the recipe with make_recipe or load_recipe"
        )
    check_dpo_options(recipe.score.trainer, "score.trainer", "score")
    # Its passes divide the frozen weights under an adapter, if not quantized.
    spreads = recipe.score.lora is not None and not recipe.model.quantization
    unread = sorted(set(recipe.score.trainer) - ONE_STEP_OPTIONS - ({"fsdp"} if spreads else set()))
    if recipe.score.protocol == "one-step" and unread and not recipe.score.check:
        raise ConfigError(
            f"score.trainer.{unread[0]} has no effect with protocol 'one-step', the default, which trains no "
            "scorer: leave it out, or name the protocol whose scorers it trains, such as 'paper', or set "
            "score.check"
        )
    check_lora_options(recipe.score.lora, "score.lora")
    check_dpo_options(recipe.train.trainer, "train.trainer", "train")
    check_lora_options(recipe.train.lora, "train.lora")
    for block in (recipe.score, recipe.train):
        accumulation(block.trainer, recipe.launch.processes)
    if recipe.train.trainer.get("eval_strategy", "no") != "no" and not recipe.data.test:
        raise ConfigError(
            "train.trainer.eval_strategy evaluates on data.test, which is empty: give data.test"
        )


def check_dpo_options(settings: Settings, where: str, stage: Stage) -> None:
    """Check settings meant for TRL's `DPOConfig`; `where` is their dotted key in messages.

    Raises:
        ConfigError: as `check_recipe_options`.
    """
    from trl import DPOConfig

    settings = _without_own(settings, where)
    _check_options(settings, where, DPOConfig, {**DECIDED, **DECIDED_IN[stage]})
    _check_loss(settings, where, stage)
    if stage == "train":
        _check_training(settings, where)
    if not under_deepspeed():
        _try_dpo_config(settings, where)
        _check_trackers(settings.get("report_to"), where)


PAIRS_PER_UPDATE = "pairs_per_update"
"""Of `trainer`, this package's own: gradient accumulation follows from it and the processes there are."""


def accumulation(settings: Settings, processes: int) -> int | None:
    """Batches that each of `processes` processes adds up to an update; None: TRL's own option says it.

    Raises:
        ConfigError: they cannot make so many pairs, with the batch sizes that can.
    """
    pairs = settings.get(PAIRS_PER_UPDATE)
    if pairs is None:
        return None
    batch = settings.get("per_device_train_batch_size", 8)  # transformers' default
    if pairs % (batch * processes):
        fits = [str(size) for size in range(1, pairs // processes + 1) if pairs % (size * processes) == 0]
        remedy = (
            f"set per_device_train_batch_size to one of {', '.join(fits[-6:])}"
            if fits
            else "start as many processes as divide it"
        )
        raise ConfigError(
            f"pairs_per_update {pairs:,} is no multiple of {batch} pairs on each of {processes} process(es): "
            f"{remedy}"
        )
    return int(pairs // (batch * processes))


def _without_own(settings: Settings, where: str) -> Settings:
    """What is TRL's of a block's `trainer`; this package's own key is checked."""
    if PAIRS_PER_UPDATE not in settings:
        return settings
    pairs = settings[PAIRS_PER_UPDATE]
    if not isinstance(pairs, int) or isinstance(pairs, bool) or pairs < 1:
        raise ConfigError(f"{where}.{PAIRS_PER_UPDATE} is {pairs!r}, but must be a whole number above 0")
    if "gradient_accumulation_steps" in settings:
        raise ConfigError(
            f"{where}: gradient_accumulation_steps follows from {PAIRS_PER_UPDATE} and the processes; give "
            "one of both"
        )
    return {key: value for key, value in settings.items() if key != PAIRS_PER_UPDATE}


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
    from peft import LoraConfig

    _check_options(settings, where, LoraConfig, DECIDED_IN_LORA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            LoraConfig(task_type="CAUSAL_LM", **settings)
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"{where}: {one_line(error)}") from error
    ignored = [one_line(warning.message) for warning in caught if "ignored" in str(warning.message)]
    if ignored:
        raise ConfigError(f"{where}: {ignored[0]}")


def _check_options(settings: Settings, where: str, library: type, decided: dict[str, str]) -> None:
    """Each option exists in the configuration class of the library, is the user's, and has the right type."""
    options = library_options(library)
    for key, value in settings.items():
        if key in decided:
            raise ConfigError(f"{where}.{key} cannot be set: {decided[key]}")
        if key not in options:
            remedy = f" any more: {RENAMED[key]}" if key in RENAMED else did_you_mean(key, options)
            name = "PEFT's" if library.__name__ == "LoraConfig" else "TRL's"
            raise ConfigError(f"{where}.{key} is not an option of {name} {library.__name__}{remedy}")
        expected = TypeAdapter(options[key], config=ConfigDict(strict=True))
        try:
            # As JSON: there a list is a tuple and text an enumeration's value, and `true` is no number.
            expected.validate_json(json.dumps(value))
        except ValidationError as error:
            raise ConfigError(misfit(f"{where}.{key}", value, inlined(expected.json_schema()))) from error


@functools.cache
def library_options(library: Any) -> dict[str, Any]:
    """The options of a configuration class (a dataclass), and the types of their values in a recipe."""
    kinds = typing.get_type_hints(library)
    options: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(library) if field.init):
        kind = _NARROWER.get(name, _json_kind(kinds[name]))
        options[name] = kind | _ALSO[name] if name in _ALSO else kind
    return options


def _json_kind(kind: Any) -> Any:
    """An annotation without what no recipe can hold, such as another dataclass.

    Beside an enumeration or literal texts, plain text goes too: `SchedulerType | str` takes a scheduler.
    """
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kept = [one for one in members if one is Any or get_origin(one) is Literal or _is_json(one)]
    if any(_lists_texts(one) for one in kept):
        kept = [one for one in kept if one is not str]
    return functools.reduce(operator.or_, kept or [type(None)])


def _is_json(kind: Any) -> bool:
    kind = get_origin(kind) or kind
    json_types = (int, float, str, list, tuple, dict, Enum, type(None))
    return isinstance(kind, type) and issubclass(kind, json_types)


def _lists_texts(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(isinstance(value, str) for value in get_args(kind))
    return isinstance(kind, type) and issubclass(kind, Enum)


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
        try:  # the loss of one pair; no option's range depends on beta
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


def _try_dpo_config(settings: Settings, where: str) -> None:
    """Let TRL and transformers judge how the options go together, without touching any device."""
    import torch
    from trl import DPOConfig

    tried = {key: value for key, value in settings.items() if key not in NEEDS_MORE}
    # Reading `device` would set up the process group for good, on the CPU.
    without_device = type("_TriedConfig", (DPOConfig,), {"device": property(lambda _: torch.device("cpu"))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            without_device(output_dir="unused", use_cpu=True, **tried)
        except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
            raise ConfigError(f"{where}: {one_line(error)}") from error


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
