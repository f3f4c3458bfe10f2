"""A recipe's `trainer` and `lora` settings are checked against the installed TRL and PEFT."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.state import PartialState
from trl import DPOConfig

from selective_dpo.config.load import make_recipe
from selective_dpo.config.trainer_options import (
    DECIDED,
    DECIDED_IN,
    EVALUATION_KEYS,
    RENAMED,
    Stage,
    check_dpo_options,
    check_lora_options,
    check_recipe_options,
    library_options,
)
from selective_dpo.errors import ConfigError

STAGES: tuple[Stage, ...] = ("score", "train")


def dpo_error(settings: dict[str, Any], stage: Stage = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        check_dpo_options(settings, f"{stage}.trainer", stage)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{stage}.trainer")


def lora_error(settings: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_lora_options(settings, "train.lora")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("train.lora")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learning_rate": 6e-6, "warmup_steps": 0.1, "num_train_epochs": 1, "optim": "paged_adamw_32bit"},
        {"num_train_epochs": 2.0, "warmup_steps": 20},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": False},
        {"loss_type": "ipo"},
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1, 0.2]},  # a whole number is a number
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1},
        {"loss_type": "exo_pair", "label_smoothing": 0.001},
        {"loss_type": ["discopop"], "discopop_tau": 0.05},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        {"report_to": ["tensorboard"], "logging_strategy": "epoch"},
        {"trackio_static_space_id": "org/space"},  # annotated as text, null or false
        {"fp16": True},
        {"bf16": None, "use_cpu": True},
        {"disable_dropout": False},
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        {"lr_scheduler_kwargs": {"num_cycles": 1}},
    ],
)
def test_options_of_trl_pass(stage: Stage, settings: dict[str, Any]) -> None:
    check_dpo_options(settings, f"{stage}.trainer", stage)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"learing_rate": 1e-6},
            ".learing_rate is not an option of TRL's DPOConfig; did you mean 'learning_",
        ),
        ({"zzz": 1}, ".zzz is not an option of TRL's DPOConfig"),
        (
            {"warmup_ratio": 0.1},
            ".warmup_ratio is not an option of TRL's DPOConfig any more: set warmup_steps",
        ),
        (
            {"max_prompt_length": 9},
            ".max_prompt_length is not an option of TRL's DPOConfig any more: set data.",
        ),
        ({"learning_rate": "6e-6"}, '.learning_rate is "6e-6", but must be a number'),
        ({"learning_rate": True}, ".learning_rate is true, but must be a number"),
        ({"weight_decay": None}, ".weight_decay is null, but must be a number"),
        ({"report_to": ["none", 1]}, '.report_to is ["none", 1], but must be text or a list or null'),
        (
            {"liger_kernel_config": {"rope": 1}},
            '.liger_kernel_config is {"rope": 1}, but must be a mapping of keys to true or false or null',
        ),
        ({"run_name": 7}, ".run_name is 7, but must be text or null; put it in quotes"),
        (
            {"per_device_train_batch_size": 2.5},
            ".per_device_train_batch_size is 2.5, but must be a whole num",
        ),
        ({"beta": 0}, ".beta is 0, but must be above 0"),
        ({"bf16": "yes"}, '.bf16 is "yes", but must be true or false or null'),
        (
            {"logging_strategy": False},
            ".logging_strategy is false, but must be one of no, steps, epoch; YAML",
        ),
        ({"loss_type": [1]}, ".loss_type is [1], but must be a list or text"),
        ({"bf16": True, "fp16": True}, ": At most one of fp16 and bf16 can be True, but not both"),
        (
            {"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]},
            ": `loss_weights` must have the same length",
        ),
        (
            {"loss_type": "sigmod"},
            ".loss_type: \"sigmod\" is not a loss of TRL's DPO; did you mean 'sigmoid'?",
        ),
        ({"loss_type": []}, '.loss_type: "" is not a loss of TRL'),
        ({"label_smoothing": 0.1}, ".label_smoothing has no effect on loss_type sigmoid: leave it out"),
        # Stated as what it is anyway, it is still not read.
        ({"label_smoothing": 0.0}, ".label_smoothing has no effect on loss_type sigmoid: leave it out"),
        (
            {"loss_type": ["sigmoid", "ipo"], "label_smoothing": 0.1},
            ".label_smoothing has no effect on loss_type sigmoid + ipo: leave it out",
        ),
        ({"discopop_tau": 0.1}, ".discopop_tau has no effect on loss_type sigmoid: leave it out"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, ".discopop_tau is 0.0, but must be above 0"),
        (
            {"loss_type": "apo_zero", "f_divergence_type": "js_divergence"},
            ".f_divergence_type has no effect on loss_type apo_zero: leave it out",
        ),
        (
            {"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "js_divergence"},
            ".f_divergence_type has no effect on loss_type nca_pair: leave it out",
        ),
        ({"f_divergence_type": "kl"}, ": f_divergence_type 'kl' is none of reverse_kl, forward_kl"),
        (
            {"f_alpha_divergence_coef": 0.5},
            ".f_alpha_divergence_coef has no effect without f_divergence_type: alpha_divergence",
        ),
        ({"loss_type": "exo_pair"}, ": exo_pair needs a label_smoothing above 0 and below 1, such as 0.001"),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            ": robust needs a label_smoothing of at least 0 and below 0.5",
        ),
        ({"warmup_steps": -1}, ": Got warmup_steps = -1"),
        ({"max_steps": 10}, ".max_steps cannot be set: "),
        (
            {"output_dir": "x"},
            ".output_dir cannot be set: the run's folder is output_dir and name at the top",
        ),
        ({"max_length": 9}, ".max_length cannot be set: data.max_length and data.overlong decide"),
        ({"push_to_hub": True}, ".push_to_hub cannot be set: train.hub_id"),
        ({"save_strategy": "epoch"}, ".save_strategy cannot be set: launch.checkpoint_minutes decides"),
        ({"padding_free": True}, ".padding_free cannot be set: TRL ignores it"),
    ],
)
def test_what_trl_does_not_take_or_we_decide_is_refused(settings: dict[str, Any], expected: str) -> None:
    assert dpo_error(settings).startswith(expected)


def test_choices_are_listed_with_the_closest_one() -> None:
    found = dpo_error({"optim": "paged_adamw_32bits"})
    assert found.startswith('.optim is "paged_adamw_32bits", but must be one of ada')
    assert found.endswith("; did you mean 'paged_adamw_32bit'?")


def test_the_stages_differ_in_what_they_decide() -> None:
    check_dpo_options({"seed": 7}, "train.trainer", "train")
    assert dpo_error({"seed": 7}, "score") == ".seed cannot be set: score.seeds decides"
    assert dpo_error({"train_sampling_strategy": "random"}).startswith(
        ".train_sampling_strategy cannot be set: the order is the curriculum's"
    )
    for key in EVALUATION_KEYS:
        assert dpo_error({key: 1}, "score").startswith(f".{key} cannot be set: held-out pairs are scored as")
    check_dpo_options({"num_train_epochs": 0.5}, "score.trainer", "score")
    assert dpo_error({"num_train_epochs": 0.5}).startswith(".num_train_epochs is 0.5, but must be whole")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"loss_type": "aot"},
            ".loss_type: aot gives a pair no loss of its own, which its difficulty is (it ",
        ),
        ({"loss_type": "aot_unpaired"}, ".loss_type: aot_unpaired gives a pair no loss of its own"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
            ".loss_type: sft gives a pair no los",
        ),
        ({"use_weighting": True}, ".use_weighting cannot be set: difficulty is each pair's own loss"),
    ],
)
def test_what_gives_a_pair_no_loss_of_its_own_is_for_training_only(
    settings: dict[str, Any], expected: str
) -> None:
    assert dpo_error(settings, "score").startswith(expected)
    check_dpo_options(settings, "train.trainer", "train")


def test_what_trl_refuses_only_when_it_trains_is_refused_before() -> None:
    assert dpo_error({"loss_type": ["sigmoid", "aot"], "use_weighting": True}) == (
        ".use_weighting has no effect on loss_type aot: leave it out"
    )
    # TRL leaves the likelihood beside a divergence as it is.
    both = {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "js_divergence"}
    check_dpo_options(both, "train.trainer", "train")
    assert dpo_error({**both, "loss_type": "sft"}).startswith(
        ".f_divergence_type has no effect on loss_type s"
    )


def test_evaluation_during_training_needs_a_strategy_and_held_out_pairs() -> None:
    assert dpo_error({"eval_steps": 10}) == ".eval_steps has no effect without train.trainer.eval_strategy"
    raw: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "x"}]}}
    raw["train"] = {"trainer": {"eval_strategy": "steps", "eval_steps": 10, "bf16": False}}
    with pytest.raises(ConfigError, match=r"evaluates on data\.test, which is empty"):
        check_recipe_options(make_recipe(raw))
    raw["data"]["test"] = [{"path": "y"}]
    check_recipe_options(make_recipe(raw))


def test_refused_names_are_real_and_renamed_ones_are_gone() -> None:
    """The tables follow TRL: when it renames an option, this fails and the table is mended."""
    known = set(library_options(DPOConfig))
    # No options of TRL: never were (tokenizer), or dropped (group_by_length, evaluation_strategy).
    gone = {"tokenizer", "group_by_length", "evaluation_strategy"}
    for table in (DECIDED, *DECIDED_IN.values(), EVALUATION_KEYS):
        assert set(table) - gone <= known
    assert not (set(RENAMED) & known)


def test_the_check_sets_up_no_device_and_no_process_group() -> None:
    before = dict(PartialState._shared_state)
    check_dpo_options({"learning_rate": 1e-6, "optim": "adamw_torch"}, "train.trainer", "train")
    assert dict(PartialState._shared_state) == before


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0": 4}, "bias": "lora_only"},
        {"init_lora_weights": "pissa_niter_16"},
        {"loftq_config": {}},  # annotated as another class or a mapping
        {"init_lora_weights": False, "layer_replication": [[0, 1], [1, 2]]},
    ],
)
def test_options_of_peft_pass(settings: dict[str, Any] | None) -> None:
    check_lora_options(settings, "train.lora")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora_r": 16}, ".lora_r is not an option of PEFT's LoraConfig"),
        (
            {"lora_droput": 0.1},
            ".lora_droput is not an option of PEFT's LoraConfig; did you mean 'lora_dropout'?",
        ),
        ({"task_type": "CAUSAL_LM"}, ".task_type cannot be set: it is always CAUSAL_LM"),
        ({"r": 0}, ".r is 0, but must be above 0"),
        ({"r": 1.5}, ".r is 1.5, but must be a whole number"),
        ({"layer_replication": [[0, 1, 2]]}, ".layer_replication is [[0, 1, 2]], but must be a list or null"),
        ({"init_lora_weights": "pissa_niter_x"}, '.init_lora_weights is "pissa_niter_x", but must be true'),
        ({"lora_dropout": 1.0}, ".lora_dropout is 1.0, but must be at least 0 and below 1"),
        ({"bias": "non"}, '.bias is "non", but must be one of none, all, lora_only; did you mean'),
        ({"use_dora": "yes"}, '.use_dora is "yes", but must be true or false'),
        ({"loftq_config": {"a": 1}}, ": `loftq_config` specified but will be ignored"),
        ({"eva_config": {"rho": 2.0}}, '.eva_config is {"rho": 2.0}, but must be null'),
        ({"lora_bias": True, "use_dora": True}, ": The argument lora_bias=True is not supported for DoRA"),
    ],
)
def test_what_peft_does_not_take_or_we_decide_is_refused(settings: dict[str, Any], expected: str) -> None:
    assert lora_error(settings).startswith(expected)


def test_all_four_blocks_of_a_recipe_are_checked() -> None:
    raw: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "x"}]}}
    check_recipe_options(make_recipe(raw))
    for stage in STAGES:
        for block in ("trainer", "lora"):
            with pytest.raises(ConfigError, match=rf"^{stage}\.{block}\.nonsense is not an option"):
                check_recipe_options(make_recipe({**raw, stage: {block: {"nonsense": 1}}}))
