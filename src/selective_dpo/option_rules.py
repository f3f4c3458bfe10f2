"""Which TRL and PEFT options a recipe cannot set, and why: tables for `pass_through`."""

from __future__ import annotations

from typing import Literal

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
