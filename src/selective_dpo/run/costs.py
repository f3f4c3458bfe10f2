"""What a run costs: FLOPs, memory and disk from sizes and counts, and the speed of this machine.

All are estimates; each docstring says what its numbers leave out.

FLOPs. A forward pass costs 2 N per token with N parameters (Kaplan et al. 2020, "Scaling Laws for Neural
Language Models", section 2.1), attention left out. N leaves out an embedding that is only looked up, and
counts the output head at every position. A backward pass costs twice the forward one: gradients of the inputs
and of the weights. With an adapter the base weights get no gradient, so only the adapter's parameters cost
three times. Activation checkpointing adds one forward pass.

Dimension suffixes: P pairs.
"""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM

from selective_dpo.config import ModelConfig, Recipe, ScoreConfig, Settings, TrainConfig
from selective_dpo.difficulty.protocols import planned_runs
from selective_dpo.errors import ConfigError
from selective_dpo.logprobs.memory import Budget, TokenBudget, bounded_batches, most_tokens
from selective_dpo.logprobs.packing_support import RowCollator, packed_saves, packing_obstacle, row_costs
from selective_dpo.logprobs.rows import Pairs, PartLengths, RowKind
from selective_dpo.models import load_model_config, load_policy, loading
from selective_dpo.training.arguments import TrainingSettings, training_settings, weights_dtype
from selective_dpo.training.batching import PairBatch, PairRow, group_batches, token_columns
from selective_dpo.training.checkpointing import KEPT

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

JobKind = Literal["reference", "scorer", "policy", "held-out", "answers"]

_QUANTIZED_BYTES = 0.516
"""Of a weight in 4 bits: 4.127 with the scales of its block (Dettmers et al. 2023, "QLoRA", section 3)."""
_ADAPTER_BYTES = 4
"""PEFT keeps adapters in float32."""

_VALUES_PER_LAYER = 17
"""Activations that one layer keeps for its backward pass, in units of tokens x hidden size: 34 bytes at two
each (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", eq. 1)."""

_EAGER_ATTENTION_BYTES = 5
"""Bytes per head and pair of positions that eager attention keeps (the same equation)."""


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


def block_of(recipe: Recipe, kind: JobKind) -> ScoreConfig | TrainConfig:
    """The block of the recipe that says how a job of this kind computes."""
    is_scoring = kind == "scorer" or (kind == "reference" and not recipe.curriculum)
    return recipe.score if is_scoring else recipe.train


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
    key_value_width: int
    """Heads times head size, of keys and of values."""
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
    """1 where prompt, chosen and rejected can share a row; else 2."""

    def adapter(self, kind: JobKind) -> int:
        """Parameters of the adapter that a job of this kind computes with; 0: none."""
        return {"reference": 0, "scorer": self.scorer_adapter}.get(kind, self.policy_adapter)


def models_of(recipe: Recipe) -> Models:
    """Sizes of the recipe's model and adapters.

    Raises:
        ModelError: the model's configuration cannot be had.
        ConfigError: an adapter does not fit the model.
    """
    model = build_on_meta(recipe.model)
    sizes = architecture_of(model)
    obstacle = packing_obstacle(model, recipe.data.max_length)
    score_lora = None if recipe.curriculum else recipe.score.lora
    return Models(
        sizes,
        adapter_parameters(build_on_meta(recipe.model), score_lora, "score.lora") if score_lora else 0,
        adapter_parameters(model, recipe.train.lora, "train.lora"),
        rows_per_pair=1 if obstacle is None else 2,
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
        model = from_config(
            architecture, attn_implementation="eager", trust_remote_code=config.trust_remote_code
        )
    model.config._attn_implementation = config.attention
    return model


def architecture_of(model: Any) -> Architecture:
    """The sizes of a model of transformers. Experts of a mixture are counted as if all were used."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # a model without attention has none
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    is_shared = head is not None and head.weight is embedding
    return Architecture(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        lookup_parameters=0 if is_shared else embedding.numel(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
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
# Tokens and FLOPs.


class RowCounter:
    """Tokens that a recipe's model computes for pairs of given lengths on a device, "cuda" or "cpu".

    The rows are those of the engine and of the trainer, made by their own functions. Not counted: the pair
    that packed rows are tried on, and that a trainer may have to leave them (`batching.row_collator`).

    Raises:
        ModelError: the model's configuration cannot be had.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self._model, self._device = build_on_meta(recipe.model), device
        # What rows cost depends on the device of the first parameter.
        self._model.register_parameter("placed", torch.nn.Parameter(torch.empty(0, device=device)))
        self._is_packable = packing_obstacle(self._model, recipe.data.max_length) is None
        self._splits = device == "cpu" and recipe.launch.processes == 1

    def forward(self, lengths: PartLengths, budget: TokenBudget) -> int:
        """One forward pass over the pairs, in batches of at most `budget` tokens, sorted by length.

        Batches that memory makes smaller hold less padding.
        """
        kind: RowKind = "masked"
        if self._is_packable:
            saves = packed_saves(row_costs(self._model), lengths.packed_P, lengths.padded_P)
            kind = "packed" if saves else "padded"
        lengths_P, rows = (lengths.packed_P, 1) if kind == "packed" else (lengths.padded_P, 2)
        tokens = most_tokens(self._device) if budget == "auto" else budget
        unbounded = Budget(tokens, tokens * int(lengths_P.max(initial=1)))
        batches = bounded_batches(lengths_P, unbounded, rows_per_pair=rows)
        collate = RowCollator(self._model, pad_token_id=0, kind=kind)
        updates = (PairBatch([PairRow({}, pair) for pair in _blank_pairs(lengths, rows)]) for rows in batches)
        return sum(_tokens(collate, token_columns(batch)) for batch in updates)

    def training(self, lengths: PartLengths, settings: TrainingSettings) -> int:
        """One epoch of training on the pairs in this order, on one process."""
        size, per_update = settings.pairs_per_batch, settings.pairs_per_batch * settings.accumulation
        collate = RowCollator(self._model, pad_token_id=0, splits=self._splits) if self._is_packable else None
        order_P, tokens = np.arange(len(lengths.prompt_P)), 0
        for start in range(0, len(order_P), per_update):
            update = [
                PairRow({}, pair) for pair in _blank_pairs(lengths, order_P[start : start + per_update])
            ]
            cut = [update[at : at + size] for at in range(0, len(update), size)]
            for batch in group_batches([PairBatch(pairs, weight=len(pairs)) for pairs in cut]):
                # TRL's own rows hold the last token, too.
                tokens += _tokens(collate, token_columns(batch)) if collate else batch.padded_tokens
        return tokens


def _blank_pairs(lengths: PartLengths, rows: NDArray[np.int64]) -> list[Any]:
    """Prompt, chosen and rejected of some pairs, as long as theirs."""
    return [tuple(np.zeros(part_P[row], dtype=np.int64) for part_P in lengths) for row in rows]


def _tokens(collate: RowCollator, pairs: Pairs) -> int:
    return sum(rows.input_ids.numel() for rows in collate(pairs).groups)


def job_flops(recipe: Recipe, models: Models, kind: JobKind, trained: float, forwarded: float) -> float:
    """FLOPs of a job that trains on `trained` tokens and computes `forwarded` without gradients.

    See the module's text.
    """
    settings = training_settings(block_of(recipe, kind).trainer, recipe.model, recipe.launch.processes)
    base, own = 2.0 * models.sizes.matrix_parameters, 2.0 * models.adapter(kind)
    backward = base + 2 * own if own else 2 * base
    recomputed = base + own if settings.recomputes else 0.0
    return (base + own) * forwarded + (base + own + backward + recomputed) * trained


# ----------------------------------------------------------------------------------------------------
# Memory and disk.


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


def job_memory(recipe: Recipe, models: Models, kind: JobKind, lengths: PartLengths | None = None) -> Memory:
    """Memory of a job of this kind on pairs of these lengths; None: of the longest that the recipe allows.

    Forward passes keep one layer's activations; answers keep keys and values of all tokens, and logits.
    Gradients have the trained parameters' type. What is sharded is divided among the processes.
    """
    sizes, generation, block = models.sizes, recipe.evaluate.generation, block_of(recipe, kind)
    settings, adapter = (
        training_settings(block.trainer, recipe.model, recipe.launch.processes),
        models.adapter(kind),
    )
    held: str = recipe.model.dtype
    if kind in ("reference", "scorer", "policy"):
        held = weights_dtype(recipe.model, block.lora, block.trainer)
    # Embeddings and norms are left as they are.
    quantized = sizes.matrix_parameters if recipe.model.quantization else 0
    base = (sizes.parameters - quantized) * BYTES[held] + quantized * _QUANTIZED_BYTES
    weights = float(base + adapter * _ADAPTER_BYTES)
    if kind == "answers":
        longest = recipe.data.max_prompt_length + generation.max_new_tokens
        tokens = generation.batch_size * longest
        cache = 2 * sizes.layers * tokens * sizes.key_value_width * BYTES[held]
        return Memory(weights, 0.0, 0.0, cache + 4.0 * generation.batch_size * sizes.vocabulary)
    # A shared row holds one prompt and two completions: at most twice the longest sequence.
    length = recipe.data.max_length * (2 if models.rows_per_pair == 1 else 1)
    if lengths is not None:
        length = int((lengths.packed_P if models.rows_per_pair == 1 else lengths.padded_P).max())

    def layer(rows: int) -> float:
        values = _VALUES_PER_LAYER * BYTES[settings.compute_dtype] * rows * length * sizes.hidden
        is_eager = recipe.model.attention == "eager"
        return values + (_EAGER_ATTENTION_BYTES * rows * length**2 * sizes.heads if is_eager else 0.0)

    budget = (recipe.evaluate if kind == "held-out" else recipe.score).tokens_per_batch
    tokens = most_tokens(this_device().kind) if budget == "auto" else budget
    forward = layer(max(models.rows_per_pair, tokens // length))
    divides = settings.shards == "weights" and not recipe.model.quantization
    if kind in ("reference", "held-out"):
        spread = recipe.launch.processes if kind == "reference" and divides else 1
        return Memory(weights / spread, 0.0, 0.0, forward)
    rows = models.rows_per_pair * settings.pairs_per_batch
    activations = sizes.layers * layer(rows)
    if settings.recomputes:  # each layer keeps its input; one layer at a time has all of its activations
        kept = rows * length * sizes.hidden * BYTES[settings.compute_dtype]
        activations = sizes.layers * kept + layer(rows)
    if kind == "scorer":  # it measures, too
        activations = max(activations, forward)
    if not adapter and settings.compute_dtype != held and settings.shards != "weights":
        # Autocast keeps its copy until a forward pass ends.
        weights += sizes.parameters * BYTES[settings.compute_dtype]
    trained, trained_bytes = adapter or sizes.parameters, _ADAPTER_BYTES if adapter else BYTES[held]
    states = trained * _state_bytes(settings, trained_bytes)
    shards = ("optimizer", "gradients", "weights")
    shared = [recipe.launch.processes if settings.shards in shards[place:] else 1 for place in range(3)]
    if kind == "scorer" and recipe.score.protocol == "one-step":
        # No optimizer: a fold's two sums, a micro-batch's gradient and the weights to go back to, in float32.
        states = 4 * 4 * trained
        shared = [1, 1, recipe.launch.processes if divides and adapter else 1]
    parts = (states, trained * trained_bytes, weights)
    optimizer, gradients, weights = (part / count for part, count in zip(parts, shared, strict=True))
    return Memory(weights, gradients, optimizer, activations)


def _state_bytes(settings: TrainingSettings, held: int) -> int:
    """Bytes that the optimizer keeps for a trained parameter of `held` bytes."""
    name = settings.optimizer
    master = 4 if settings.keeps_master_weights else 0
    if name == "sgd" or "adafactor" in name:
        return master  # Adafactor's states are of the size of rows and columns, not of their product.
    state = 1 if "8bit" in name else 4 if "32bit" in name or master else held
    return master + state * (1 if any(one in name for one in ("lion", "rmsprop", "adagrad")) else 2)


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
            full = BYTES[weights_dtype(recipe.model, block.lora, block.trainer)]
            held = _ADAPTER_BYTES if adapter else full
            one = trained * (
                held
                + _state_bytes(training_settings(block.trainer, recipe.model, recipe.launch.processes), held)
            )
            # Of each training under way: those that are kept, and the next one while it is written.
            checkpoints = max(checkpoints, min(launch.workers, jobs) * (KEPT + 1) * one)
    return Disk(results, checkpoints)


# ----------------------------------------------------------------------------------------------------
# This machine, and how fast it runs the model.

_MEASURED_TOKENS = 4096
"""Tokens of a measured batch on a GPU."""
_MEASURED_SECONDS = 1.0


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
    return Device("cpu", name, 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def fits(config: ModelConfig, sizes: Architecture, device: Device) -> bool:
    """Whether the model's weights are a folder of this machine and take at most half of its memory."""
    if config.quantization:
        return False  # its speed is that of other kernels, and it needs a GPU of its own to be loaded
    size = sizes.parameters * BYTES[config.dtype]
    return Path(config.path).is_dir() and not (device.memory and size > device.memory / 2)


def measured_rate(
    config: ModelConfig, sizes: Architecture, device: Device, *, longest: int, compute_dtype: str
) -> float:
    """FLOP/s of a few forward passes of the real model over rows of `longest` tokens.

    Raises:
        ModelError: the weights cannot be loaded.
    """
    model = load_policy(config).to(device.kind).eval()
    # On a CPU a batch gains nothing.
    rows = max(1, _MEASURED_TOKENS // longest) if device.kind == "cuda" else 1
    ids = torch.randint(sizes.vocabulary, (rows, longest), device=device.kind)
    autocast: Any = contextlib.nullcontext()
    if compute_dtype != config.dtype:
        autocast = torch.autocast(device.kind, getattr(torch, compute_dtype))
    timer = Timer(
        "model(input_ids=ids)", globals={"model": model, "ids": ids}, num_threads=torch.get_num_threads()
    )
    with torch.inference_mode(), autocast:
        # The fastest: on a shared machine the others are about its neighbours.
        seconds = min(timer.blocked_autorange(min_run_time=_MEASURED_SECONDS).times)
    return 2.0 * sizes.matrix_parameters * rows * longest / seconds


# ----------------------------------------------------------------------------------------------------
# Quantities as people read them: three digits and a unit.

UNKNOWN = "?"


def readable(value: float | None, unit: str = "") -> str:
    """A quantity with a decimal prefix, such as "12.3 TFLOP"."""
    return _in_units(value, {1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: ""}, unit)


def readable_bytes(value: float | None) -> str:
    """Bytes in binary units, as devices are sold."""
    return _in_units(value, {1 << 40: "TiB", 1 << 30: "GiB", 1 << 20: "MiB", 1 << 10: "KiB"})


def readable_time(seconds: float | None) -> str:
    """Seconds in the unit that reads best."""
    return _in_units(seconds, {86_400: "d", 3600: "h", 60: "min", 1: "s"})


def _in_units(value: float | None, names: Mapping[float, str], unit: str = "") -> str:
    """In the largest of the units, which are given from the largest to the smallest, that `value` reaches."""
    if value is None:
        return UNKNOWN
    size = next((size for size in names if value >= size), min(names))
    return f"{value / size:.3g} {names[size]}{unit}".strip()
