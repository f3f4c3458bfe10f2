"""Checks of what a recipe names: model, tokenizer, adapters, judge, trainer settings."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from selective_dpo.config import Recipe
from selective_dpo.data.pairs import Pair
from selective_dpo.data.tokenize import PairTokens, fit_length, tokenize_pairs
from selective_dpo.engine.models import damaged_weights, load_policy
from selective_dpo.engine.processes import this_process
from selective_dpo.engine.reference import TRIED, require_finite_start
from selective_dpo.evaluation.judges import judge_for
from selective_dpo.pass_through import under_deepspeed
from selective_dpo.pipeline.checks.check import Check, fail, ok, warn
from selective_dpo.pipeline.checks.environment import check_attention
from selective_dpo.pipeline.planning.architecture import (
    Architecture,
    adapter_parameters,
    build_on_meta,
)
from selective_dpo.pipeline.planning.costs import BYTES
from selective_dpo.pipeline.planning.device import Device
from selective_dpo.pipeline.planning.pricing import Models, Pricing
from selective_dpo.pipeline.planning.words import readable_bytes, readable_count
from selective_dpo.pipeline.planning.workload import workloads
from selective_dpo.pipeline.run_directory import RunDirectory
from selective_dpo.pipeline.stages import Run
from selective_dpo.training.arguments import dpo_arguments

_NEARLY_FULL = 0.9


def check_weights(recipe: Recipe, model: Any) -> Check:
    """The architecture, and for a local folder that it holds all its weights, in the one format that is read.

    Raises:
        ModelError: weights are missing, of other shapes than the configuration says, or not to be loaded.
    """
    size = readable_count(sum(parameter.numel() for parameter in model.parameters()))
    found = f"{type(model).__name__}, {size} parameters"
    folder = Path(recipe.model.path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        return fail("model", f"{found}, but no .safetensors in {folder}", "save its weights as safetensors")
    if problem := damaged_weights(folder):
        return fail("model", f"{found}, but {problem}", "copy or download it again")
    if folder.is_dir():
        # An attention that is not installed has been named already.
        is_there = check_attention(recipe.model.attention).status == "ok"
        attention = {} if is_there else {"attention": "eager"}
        load_policy(recipe.model.model_copy(update=attention), device_map="meta")
    return ok("model", found)


def check_tokenizer(tokenizer: Any, model: Any) -> Check:
    """Special tokens, and that the model has a row for each of them."""
    special = {name: getattr(tokenizer, f"{name}_token") for name in ("pad", "bos", "eos")}
    rows, tokens = embedded_tokens(model), len(tokenizer)
    named = ", ".join(f"{name} {token!r}" for name, token in special.items())
    found = f"{tokens:,} tokens, {named}; the model embeds {rows:,}"
    outside = [
        token for token in special.values() if token and tokenizer.convert_tokens_to_ids(token) >= rows
    ]
    if outside:
        remedy = "use the tokenizer the model was trained with (model.tokenizer), or resize its embedding"
        return fail("tokenizer", f"{found}, none for {', '.join(outside)}", remedy)
    if tokens > rows:
        return warn("tokenizer", found, "texts with the tokens beyond that would stop the run")
    if tokenizer.eos_token is None:
        return warn("tokenizer", found, "without an end-of-sequence token, answers have no end")
    return ok("tokenizer", found)


def embedded_tokens(model: Any) -> int:
    """How many tokens the model has a row for."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_positions(recipe: Recipe, model: Any) -> Check:
    """Whether the longest sequence fits into the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = recipe.data.max_length
    generation = recipe.evaluate.generation
    if generation.prompts:
        longest = max(longest, recipe.data.max_prompt_length + generation.max_new_tokens)
    found = f"sequences of up to {longest:,} tokens, the model has {positions or 'no limit of'} positions"
    if positions is not None and longest > positions:
        return fail("length", found, "lower data.max_length or evaluate.generation.max_new_tokens")
    return ok("length", found)


def check_adapter(recipe: Recipe, block: str) -> Check:
    """Whether the LoRA settings of `block` ("score" or "train") find their modules in the model."""
    lora = getattr(recipe, block).lora
    if lora is None:
        return ok(f"{block}.lora", "none: all weights are trained")
    trained = adapter_parameters(build_on_meta(recipe.model), lora, f"{block}.lora")
    return ok(f"{block}.lora", f"{readable_count(trained)} parameters in the adapter")


def check_forward(
    recipe: Recipe, tokenizer: Any, pairs: Sequence[Pair], sizes: Architecture, device: Device
) -> Check:
    """A forward pass of the first pairs, where the weights are a local folder's and fit into memory.

    Raises:
        ModelError: no pair has finite log-probabilities.
    """
    name, size = "forward pass", sizes.parameters * BYTES[recipe.model.dtype]
    if not Path(recipe.model.path).is_dir():
        return ok(name, "not tried with a model of the hub; a run tries it before its reference")
    if device.memory and size > device.memory / 2:
        return ok(name, f"not tried with {readable_bytes(size)} of weights; a run tries it first")
    data, rows = recipe.data, []
    tokens = tokenize_pairs(pairs, tokenizer, empty_system_message=data.empty_system_message)
    for pair, item in zip(pairs, tokens, strict=True):
        if isinstance(item, PairTokens) and (fitted := fit_length(item, data)).drop is None:
            ids = {
                name: getattr(fitted.tokens, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
            }
            rows.append({"pair_id": pair.pair_id, "prompt_id": pair.prompt_id, **ids})
    if not rows:
        return ok(name, "not tried: none of the first rows is short enough")
    model = load_policy(recipe.model).to(this_process().device)
    require_finite_start(model, Dataset.from_list(rows), pad_token_id=tokenizer.pad_token_id)
    return ok(name, f"log-probabilities of {min(TRIED, len(rows))} pairs are finite")


def check_memory(recipe: Recipe, models: Models, device: Device) -> Check:
    """The plan's largest estimate, at the longest sequences that the recipe allows, against the device."""
    pricing = Pricing(recipe, models, device)
    run = Run(recipe, RunDirectory.of(recipe), say=lambda line: None)
    jobs = [pricing.priced(load, run.folder.root) for load in workloads(run, None, (), models.forwarding)]
    need, name = max((job.memory.total, job.name) for job in jobs if job.memory is not None)
    found = f"{name} needs about {readable_bytes(need)} of {readable_bytes(device.memory)}"
    if device.memory and need > _NEARLY_FULL * device.memory:
        remedy = "lower per_device_train_batch_size or tokens_per_batch, use LoRA, or shard over processes"
        return warn("memory", found, remedy)
    return ok("memory", found)


def check_trainer(recipe: Recipe, block: str) -> Check:
    """Whether TRL accepts the trainer settings on this machine (mixed precision, for one)."""
    settings = getattr(recipe, block).trainer
    name = f"{block}.trainer"
    if settings.get("deepspeed") or settings.get("fsdp") or under_deepspeed():
        return ok(name, "options are known; sharding is set up by the launched processes")
    with tempfile.TemporaryDirectory() as scratch:
        dpo_arguments(
            settings,
            model=recipe.model,
            max_length=recipe.data.max_length,
            output_dir=Path(scratch),
            seed=0,
            sequential=block == "train",
        )
    return ok(name, "accepted on this machine")


def check_judge(recipe: Recipe) -> Check:
    """Whether the judge can be made; its weights are not loaded."""
    judge, reward_model = judge_for(recipe.evaluate), recipe.evaluate.reward_model
    if reward_model and (problem := damaged_weights(Path(reward_model))):
        return fail("judge", f"reward model {reward_model}: {problem}", "copy or download it again")
    return ok("judge", "none: no answers are compared" if judge is None else judge.name)
