"""What a run costs: FLOPs, memory and disk from sizes and counts, and the speed of this machine.

All are estimates; each docstring says what its numbers leave out.

FLOPs. A forward pass costs 2 N per token for multiplications with N parameters (Kaplan et al. 2020,
"Scaling Laws for Neural Language Models", section 2.1) plus 4 L D T per token for attention of T keys in L
layers of width D, scores and weighted values (Chowdhery et al. 2022, "PaLM", appendix B). As there, nothing
is subtracted for the causal mask. N leaves out an embedding that is only looked up, and counts the output
head at every position. A backward pass costs twice the forward one: gradients of the inputs and of the
weights. With an adapter the base weights get no gradient, so only the adapter's parameters and attention
cost three times. Activation checkpointing adds one forward pass.

Dimension suffixes: P pairs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import platform
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from selective_dpo.config import ModelConfig, Recipe, Settings
from selective_dpo.difficulty.protocols import planned_runs
from selective_dpo.errors import ConfigError
from selective_dpo.logprobs.memory import Budget, TokenBudget, bounded_batches, most_tokens
from selective_dpo.logprobs.packing_support import packing_obstacle
from selective_dpo.models import load_model_config, load_policy, loading
from selective_dpo.training.arguments import ORIGINAL_DEFAULTS, mixed_precision, weights_dtype
from selective_dpo.training.checkpointing import KEPT

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

JobKind = Literal["reference", "scorer", "policy", "held-out", "answers"]

_ADAPTER_BYTES = 4
"""PEFT keeps adapters in float32."""

_VALUES_PER_LAYER = 17
"""Activations that one layer keeps for its backward pass, in units of tokens x hidden size: 34 bytes at two
each (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", eq. 1)."""

_EAGER_ATTENTION_BYTES = 5
"""Bytes per head and pair of positions that eager attention keeps (the same equation)."""

# ----------------------------------------------------------------------------------------------------
# The model and its adapters, from the configuration alone: no weights are loaded.

# They decide with which numbers an adapter starts, not how large it is, and may need the real weights.
_STARTING_VALUES = ("init_lora_weights", "loftq_config", "eva_config", "corda_config")


class Architecture(NamedTuple):
    """Sizes that decide what a model costs."""

    parameters: int
    lookup_parameters: int
    """Those of the input embedding where it is looked up only; 0 where it is the output head as well."""
    layers: int
    hidden: int
    attention_width: int
    """Heads times head size: the width of queries."""
    key_value_width: int
    """The same of keys, and of values."""
    heads: int
    vocabulary: int
    """Rows of the embedding."""

    @property
    def matrix_parameters(self) -> int:
        """Parameters that every token is multiplied with."""
        return self.parameters - self.lookup_parameters


class Models(NamedTuple):
    """Sizes of the starting policy and of its adapters."""

    sizes: Architecture
    scorer_adapter: int
    """Parameters of a scorer's adapter; 0: full fine-tuning."""
    policy_adapter: int
    rows_per_pair: int
    """1 where prompt, chosen and rejected share a row; else 2."""


def models_of(recipe: Recipe) -> Models:
    """Sizes of the recipe's model and adapters.

    Raises:
        ModelError: the model's configuration cannot be had.
        ConfigError: an adapter does not fit the model.
    """
    model = build_on_meta(recipe.model)
    sizes = architecture_of(model)
    model.config._attn_implementation = recipe.model.attention
    rows_per_pair = 2 if packing_obstacle(model, recipe.data.max_length) else 1
    score_lora = None if recipe.curriculum else recipe.score.lora
    return Models(
        sizes,
        adapter_parameters(build_on_meta(recipe.model), score_lora, "score.lora") if score_lora else 0,
        adapter_parameters(model, recipe.train.lora, "train.lora"),
        rows_per_pair,
    )


def build_on_meta(config: ModelConfig) -> Any:
    """The recipe's model with shapes and no numbers: it takes no memory and cannot compute.

    Raises:
        ModelError: the configuration cannot be had, or is not that of a causal language model.
    """
    architecture = load_model_config(config)
    from_config: Any = AutoModelForCausalLM.from_config
    with loading("model", config.path), torch.device("meta"):
        # Shapes do not depend on the attention implementation, and this one needs no other package.
        return from_config(
            architecture, attn_implementation="eager", trust_remote_code=config.trust_remote_code
        )


def architecture_of(model: Any) -> Architecture:
    """The sizes of a model of transformers. Experts of a mixture are counted as if all were used."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    is_shared = head is not None and head.weight is embedding
    return Architecture(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        lookup_parameters=0 if is_shared else embedding.numel(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention_width=heads * head_size,
        key_value_width=key_value_heads * head_size,
        heads=heads,
        vocabulary=embedding.shape[0],
    )


def adapter_parameters(model: Any, lora: Settings | None, where: str) -> int:
    """How many parameters the adapter `lora` (keys of PEFT's `LoraConfig`) trains; 0 for None.

    `model` must be on the meta device; it is changed and of no further use. `where` is the settings' key.

    Raises:
        ConfigError: the adapter does not fit the model, such as target modules that it does not have.
    """
    if lora is None:
        return 0
    sized = {key: value for key, value in lora.items() if key not in _STARTING_VALUES}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between PEFT and transformers
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **sized))
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{where} does not fit the model: {str(error).strip().splitlines()[0]}") from error
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


# ----------------------------------------------------------------------------------------------------
# The settings of a training that decide its cost, with the libraries' defaults filled in. They are read from
# the recipe: to make a `DPOConfig` would set up devices, and needs DeepSpeed where the recipe asks for it.


class TrainingSettings(NamedTuple):
    """One stage's training."""

    pairs_per_batch: int
    """On each process."""
    accumulation: int
    epochs: float
    learning_rate: float
    beta: float
    optimizer: str
    recomputes: bool
    """Activation checkpointing: activations are computed again in the backward pass."""
    compute_dtype: str
    """The type of matrix multiplications: the mixed precision, else the weights' type."""
    shards: str
    """What processes divide among them: "", "optimizer" (ZeRO-1), "gradients" (and optimizer; ZeRO-2), or
    "weights" (and all; ZeRO-3, FSDP)."""
    keeps_master_weights: bool
    """DeepSpeed trains a float32 copy of 16-bit weights."""
    unread: str
    """A setting that could not be read; it is counted as if it were not there."""


def training_settings(settings: Settings, model: ModelConfig) -> TrainingSettings:
    """What `score.trainer` or `train.trainer` decide for a model loaded as `model` says."""
    value = {**_library_defaults(), **ORIGINAL_DEFAULTS, **settings}
    checkpointing = value["activation_checkpointing"]
    if checkpointing is None:  # the older name counts only where the newer one is not given
        checkpointing = value["gradient_checkpointing"]
    deepspeed, shards, unread = settings.get("deepspeed"), "", ""
    if settings.get("fsdp"):
        shards = "weights"
    elif isinstance(deepspeed, dict):
        stage = (deepspeed.get("zero_optimization") or {}).get("stage", 0)
        shards = {1: "optimizer", 2: "gradients", 3: "weights"}.get(stage, "")
    elif deepspeed:
        unread = f"the sharding in {deepspeed}"
    return TrainingSettings(
        pairs_per_batch=value["per_device_train_batch_size"],
        accumulation=value["gradient_accumulation_steps"],
        epochs=float(value["num_train_epochs"]),
        learning_rate=float(value["learning_rate"]),
        beta=float(value["beta"]),
        optimizer=str(value["optim"]),
        recomputes=bool(checkpointing),
        compute_dtype=mixed_precision(settings, model) or model.dtype,
        shards=shards,
        keeps_master_weights=bool(deepspeed) and model.dtype != "float32",
        unread=unread,
    )


@functools.cache
def _library_defaults() -> dict[str, Any]:
    from trl import DPOConfig

    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(DPOConfig)
    }


def optimizer_steps(pairs: int, settings: TrainingSettings, processes: int) -> int:
    """Updates of a training: `accumulation` batches of every process make one, the last may have fewer.

    Every process gets as many batches (accelerate's `even_batches`).
    """
    batches_per_process = math.ceil(math.ceil(pairs / settings.pairs_per_batch) / processes)
    return math.ceil(settings.epochs * max(1, math.ceil(batches_per_process / settings.accumulation)))


# ----------------------------------------------------------------------------------------------------
# Tokens, and the FLOPs of passes over them.


class Work(NamedTuple):
    """What a model computes on, the padding in batches included."""

    tokens: float
    squares: float
    """Each row's padded length squared, summed over rows: attention costs by it."""

    def times(self, factor: float) -> Work:
        """The same work, `factor` times."""
        return Work(self.tokens * factor, self.squares * factor)


NO_WORK = Work(0.0, 0.0)


def forward_work(lengths_P: NDArray[np.int64], rows_per_pair: int, budget: TokenBudget) -> Work:
    """One forward pass over the pairs, in batches of at most `budget` tokens, sorted by length.

    Shapes: lengths_P [P], tokens of the row that a pair takes, or of the longer of its two. Batches that
    memory makes smaller hold less padding.
    """
    tokens = tokens_per_batch(budget)
    unbounded = Budget(tokens, tokens * int(lengths_P.max(initial=1)))
    return _padded(
        lengths_P, bounded_batches(lengths_P, unbounded, rows_per_pair=rows_per_pair), rows_per_pair
    )


def training_work(lengths_P: NDArray[np.int64], rows_per_pair: int, settings: TrainingSettings) -> Work:
    """One epoch of training in this order, on one process.

    An update's pairs are sorted by length and then cut into its batches. Shapes: as for `forward_work`.
    """
    size, per_update = settings.pairs_per_batch, settings.pairs_per_batch * settings.accumulation
    batches = []
    for start in range(0, len(lengths_P), per_update):
        update = np.arange(start, min(start + per_update, len(lengths_P)))
        update = update[np.argsort(-lengths_P[update], kind="stable")]
        batches += [update[at : at + size] for at in range(0, len(update), size)]
    return _padded(lengths_P, batches, rows_per_pair)


def tokens_per_batch(budget: TokenBudget) -> int:
    """Tokens of a full batch; for an automatic budget those that it has where memory is plenty."""
    return most_tokens("cuda" if torch.cuda.is_available() else "cpu") if budget == "auto" else budget


def _padded(lengths_P: NDArray[np.int64], batches: Iterable[NDArray[np.int64]], rows_per_pair: int) -> Work:
    shapes = [(len(batch) * rows_per_pair, int(lengths_P[batch].max())) for batch in batches]
    return Work(float(sum(rows * width for rows, width in shapes)), float(sum(r * w * w for r, w in shapes)))


def forward_flops(sizes: Architecture, work: Work, adapter: int = 0) -> float:
    """FLOPs of a forward pass with `adapter` additional parameters; see the module's text."""
    return 2.0 * (sizes.matrix_parameters + adapter) * work.tokens + _attention_flops(sizes, work)


def training_flops(sizes: Architecture, work: Work, *, adapter: int, recomputes: bool) -> float:
    """FLOPs of forward and backward passes; `adapter` 0 is full fine-tuning. See the module's text."""
    base = 2.0 * sizes.matrix_parameters * work.tokens
    own = 2.0 * adapter * work.tokens
    flops = (2 if adapter else 3) * base + 3 * own + 3 * _attention_flops(sizes, work)
    return flops + (forward_flops(sizes, work, adapter) if recomputes else 0.0)


def _attention_flops(sizes: Architecture, work: Work) -> float:
    return 4.0 * sizes.layers * sizes.attention_width * work.squares


# ----------------------------------------------------------------------------------------------------
# Memory.


class Memory(NamedTuple):
    """Bytes on each process at the worst moment."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it. Fragmentation, buffers of the device and other programs come on top."""
        return sum(self)


def job_kinds(recipe: Recipe) -> tuple[JobKind, ...]:
    """The kinds of jobs that a run of this recipe has."""
    wanted: dict[JobKind, bool] = {
        "reference": True,
        "scorer": not recipe.curriculum,
        "policy": True,
        "held-out": bool(recipe.data.test),
        "answers": bool(recipe.evaluate.generation.prompts),
    }
    return tuple(kind for kind, is_wanted in wanted.items() if is_wanted)


def job_memory(recipe: Recipe, models: Models, kind: JobKind, longest: int | None = None) -> Memory:
    """Memory of a job of this kind whose longest row has `longest` tokens; None: the longest allowed row.

    Forward passes keep one layer's activations; answers keep keys and values of all tokens, and logits.
    """
    sizes, rows_per_pair, generation = models.sizes, models.rows_per_pair, recipe.evaluate.generation
    is_scoring = kind == "scorer" or (kind == "reference" and not recipe.curriculum)
    block = recipe.score if is_scoring else recipe.train
    settings = training_settings(block.trainer, recipe.model)
    adapter = {"reference": 0, "scorer": models.scorer_adapter}.get(kind, models.policy_adapter)
    dtype: str = recipe.model.dtype
    if kind in ("reference", "scorer", "policy"):
        dtype = weights_dtype(recipe.model, block.lora, block.trainer)
    weights = float(sizes.parameters * BYTES[dtype] + adapter * _ADAPTER_BYTES)
    if kind == "answers":
        tokens = generation.batch_size * (
            longest or recipe.data.max_prompt_length + generation.max_new_tokens
        )
        cache = 2 * sizes.layers * tokens * sizes.key_value_width * BYTES[dtype]
        return Memory(weights, 0.0, 0.0, cache + 4.0 * generation.batch_size * sizes.vocabulary)
    # A shared row holds one prompt and two completions: at most twice the longest sequence.
    longest = longest or recipe.data.max_length * (2 if rows_per_pair == 1 else 1)
    eager = recipe.model.attention == "eager"
    budget = (recipe.evaluate if kind == "held-out" else recipe.score).tokens_per_batch
    rows = max(rows_per_pair, tokens_per_batch(budget) // longest)
    forward = layer_bytes(sizes, rows, longest, settings.compute_dtype, eager=eager)
    if kind in ("reference", "held-out"):
        return Memory(weights, 0.0, 0.0, forward)
    training = training_memory(
        sizes,
        settings,
        adapter=adapter,
        dtype=dtype,
        eager=eager,
        rows_per_pair=rows_per_pair,
        longest=longest,
        processes=recipe.launch.processes,
    )
    if kind == "policy":
        return training
    return training._replace(activations=max(training.activations, forward))


def training_memory(
    sizes: Architecture,
    settings: TrainingSettings,
    *,
    adapter: int,
    dtype: str,
    eager: bool,
    rows_per_pair: int,
    longest: int,
    processes: int,
) -> Memory:
    """Memory of a training with `rows_per_pair` rows for a pair, the longest of `longest` tokens.

    `dtype` is the weights' type, `eager` whether attention is computed without a fused kernel. Gradients
    are kept in the trained parameters' type. What is sharded is divided among `processes`.
    """
    trained = adapter or sizes.parameters
    trained_bytes = _ADAPTER_BYTES if adapter else BYTES[dtype]
    weights = float(sizes.parameters * BYTES[dtype] + adapter * _ADAPTER_BYTES)
    if not adapter and settings.compute_dtype != dtype and settings.shards != "weights":
        # Autocast keeps its copy until a forward pass ends.
        weights += sizes.parameters * BYTES[settings.compute_dtype]
    gradients = trained * trained_bytes
    optimizer = _states_bytes(settings, trained, trained_bytes)
    sharded = ("optimizer", "gradients", "weights")
    shares = [processes if settings.shards in sharded[place:] else 1 for place in range(3)]
    rows = rows_per_pair * settings.pairs_per_batch
    layer = layer_bytes(sizes, rows, longest, settings.compute_dtype, eager=eager)
    if settings.recomputes:
        # Each layer keeps its input; one layer at a time has all of its activations.
        kept = sizes.layers * rows * longest * sizes.hidden * BYTES[settings.compute_dtype] + layer
    else:
        kept = sizes.layers * layer
    return Memory(weights / shares[2], gradients / shares[1], optimizer / shares[0], kept)


def layer_bytes(sizes: Architecture, rows: int, longest: int, dtype: str, *, eager: bool) -> float:
    """Activations of one layer for a batch of `rows` rows of `longest` tokens."""
    values = _VALUES_PER_LAYER * BYTES[dtype] * rows * longest * sizes.hidden
    scores = _EAGER_ATTENTION_BYTES * rows * longest**2 * sizes.heads if eager else 0
    return float(values + scores)


def _states_bytes(settings: TrainingSettings, trained: int, trained_bytes: int) -> float:
    """Of an optimizer over `trained` parameters; all processes together."""
    if not settings.keeps_master_weights:
        return trained * _optimizer_bytes(settings.optimizer, trained_bytes)
    return trained * (4 + _optimizer_bytes(settings.optimizer, 4))


def _optimizer_bytes(name: str, state_bytes: int) -> float:
    """Bytes of optimizer state per trained parameter, by transformers' name of the optimizer."""
    if "8bit" in name:
        return 1 if "lion" in name or "rmsprop" in name else 2
    if "32bit" in name:
        state_bytes = 4
    if name == "sgd" or "adafactor" in name:
        return 0  # Adafactor's states are of the size of rows and columns, not of their product.
    return state_bytes * (1 if any(one in name for one in ("lion", "rmsprop", "adagrad")) else 2)


# ----------------------------------------------------------------------------------------------------
# Disk.


class Disk(NamedTuple):
    """Bytes in a run's folder."""

    results: float
    """Trained weights: policies, and scorers where they are kept."""
    checkpoints: float
    """The most that there are at a time. They are deleted at the end of their training."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.results + self.checkpoints


def disk_need(recipe: Recipe, models: Models | None) -> Disk | None:
    """The disk that a run with these models takes; None if they are not known.

    Not counted: tables, logs and tokenizers; what DeepSpeed and FSDP write besides weights and states;
    checkpoints that failed trainings have left.
    """
    if models is None:
        return None
    launch = recipe.launch
    scorers = 0 if recipe.curriculum else len(planned_runs(recipe.score))
    policies = 1 + len(recipe.evaluate.controls) + len(recipe.evaluate.training_seeds)
    stages = (
        (recipe.score, models.scorer_adapter, scorers, recipe.score.keep_scorers),
        (recipe.train, models.policy_adapter, policies, True),
    )
    results = checkpoints = 0.0
    for block, adapter, jobs, are_kept in stages:
        trained = adapter or models.sizes.parameters
        saved = trained * (_ADAPTER_BYTES if adapter else BYTES[recipe.model.dtype])
        results += jobs * saved if are_kept else 0
        if launch.checkpoint_minutes or launch.checkpoint_steps:
            held = (
                _ADAPTER_BYTES if adapter else BYTES[weights_dtype(recipe.model, block.lora, block.trainer)]
            )
            settings = training_settings(block.trainer, recipe.model)
            one = trained * held + _states_bytes(settings, trained, held)
            # Of each training under way: those that are kept, and the next one while it is written.
            checkpoints = max(checkpoints, min(launch.workers, jobs) * (KEPT + 1) * one)
    return Disk(results, checkpoints)


# ----------------------------------------------------------------------------------------------------
# This machine, and how fast it runs the model.

_MEASURED_SECONDS, _MEASURED_PASSES = 1.0, 50

_MEASURED_TOKENS = 4096
"""Tokens of a measured batch on a GPU. On a CPU it is one row, since batches gain nothing there."""


class Device(NamedTuple):
    """The accelerators of this machine, or its CPU."""

    kind: str
    """"cuda" or "cpu"."""
    name: str
    number: int
    memory: int
    """Bytes of one of them; of the machine, for the CPU."""


def this_device() -> Device:
    """The device that a run on this machine would use."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device("cuda", properties.name, torch.cuda.device_count(), properties.total_memory)
    name = f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}"
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not every system knows
        memory = 0
    return Device("cpu", name, 1, memory)


def fits(config: ModelConfig, sizes: Architecture, device: Device) -> bool:
    """Whether the model's weights are a folder of this machine and take at most half of its memory."""
    size = sizes.parameters * BYTES[config.dtype]
    return Path(config.path).is_dir() and not (device.memory and size > device.memory / 2)


def measured_rate(
    config: ModelConfig, sizes: Architecture, device: Device, *, longest: int, compute_dtype: str
) -> float:
    """FLOP/s of forward passes of the real model over rows of `longest` tokens; takes about a second.

    Raises:
        ModelError: the weights cannot be loaded.
    """
    model = load_policy(config).to(device.kind).eval()
    rows = max(1, _MEASURED_TOKENS // longest) if device.kind == "cuda" else 1
    ids = torch.randint(sizes.vocabulary, (rows, longest), device=device.kind)
    autocast: Any = contextlib.nullcontext()
    if compute_dtype != config.dtype:
        autocast = torch.autocast(device.kind, getattr(torch, compute_dtype))
    seconds: list[float] = []
    with torch.inference_mode(), autocast:
        model(input_ids=ids)  # the first pass also sets libraries up
        while sum(seconds) < _MEASURED_SECONDS and len(seconds) < _MEASURED_PASSES:
            _synchronize(device)
            before = time.perf_counter()
            model(input_ids=ids)
            _synchronize(device)
            seconds.append(time.perf_counter() - before)
    work = Work(float(rows * longest), float(rows * longest**2))
    return forward_flops(sizes, work) / float(np.median(seconds))


def _synchronize(device: Device) -> None:
    if device.kind == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------
# Quantities as people read them: three digits and a unit.

UNKNOWN = "unknown"

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def readable(value: float | None, unit: str = "") -> str:
    """A quantity with three digits and a decimal prefix, such as "12.3 TFLOP"."""
    if value is None:
        return UNKNOWN
    size, prefix = next(((size, prefix) for size, prefix in _PREFIXES if value >= size), (1.0, ""))
    return f"{value / size:.3g} {prefix}{unit}".strip()


def readable_count(value: float) -> str:
    """A number with three digits and a decimal prefix, such as "7.62 G"."""
    return readable(value)


def readable_bytes(value: float | None) -> str:
    """Bytes in binary units, as devices are sold."""
    if value is None:
        return UNKNOWN
    for size, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value / 1024:.3g} KiB"


def readable_time(seconds: float | None) -> str:
    """Seconds in the unit that reads best."""
    if seconds is None:
        return UNKNOWN
    for size, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.2g} s"
