"""FLOPs and memory of jobs, from sizes alone. Estimates: what they leave out is said at each.

FLOPs. A forward pass costs 2 N per token for multiplications with N parameters (Kaplan et al. 2020,
"Scaling Laws for Neural Language Models", section 2.1) plus 4 L D T per token for attention of T keys in L
layers of width D, scores and weighted values (Chowdhery et al. 2022, "PaLM", appendix B). As there, nothing
is taken off for the causal mask; N leaves out an embedding that is only looked up, and counts the output
head at every position, although a GPU computes it for the completions only. A backward pass costs twice the
forward one: gradients of the inputs and of the weights. With an adapter the base weights get no gradient,
so only its own parameters, and attention, cost three times. Checkpointing adds one forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

from selective_dpo.run.planning.architecture import Architecture
from selective_dpo.run.planning.batches import Work
from selective_dpo.run.planning.settings import TrainingSettings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_ADAPTER_BYTES = 4
"""PEFT keeps adapters in float32."""

_VALUES_PER_LAYER = 17
"""Activations that one layer keeps for its backward pass, in units of tokens x hidden size: 34 bytes at two
each (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", eq. 1)."""

_EAGER_ATTENTION_BYTES = 5
"""Bytes per head and pair of positions that attention keeps where it is written out (the same equation)."""


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


def forward_flops(sizes: Architecture, work: Work, adapter: int = 0) -> float:
    """FLOPs of a forward pass with `adapter` additional parameters; see the module's text."""
    return 2.0 * (sizes.matrix_parameters + adapter) * work.tokens + _attention_flops(sizes, work)


def training_flops(sizes: Architecture, work: Work, *, adapter: int, recomputes: bool) -> float:
    """FLOPs of forward and backward passes; `adapter` 0 is full fine-tuning. See the module's text."""
    base = 2.0 * sizes.matrix_parameters * work.tokens
    own = 2.0 * adapter * work.tokens
    flops = (2 if adapter else 3) * base + 3 * own + 3 * _attention_flops(sizes, work)
    return flops + (forward_flops(sizes, work, adapter) if recomputes else 0.0)


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

    `dtype` is what the weights are held in, `eager` whether attention is written out. Gradients are kept in
    the trained parameters' type. Optimizer states by its name; what shards are divided among is `processes`.
    """
    trained = adapter or sizes.parameters
    trained_bytes = _ADAPTER_BYTES if adapter else BYTES[dtype]
    weights = sizes.parameters * BYTES[dtype] + adapter * _ADAPTER_BYTES
    if not adapter and settings.compute_dtype != dtype and settings.shards != "weights":
        weights += (
            sizes.parameters * BYTES[settings.compute_dtype]
        )  # autocast's copy, until a forward pass ends
    gradients = trained * trained_bytes
    optimizer = _states_bytes(settings, trained, trained_bytes)
    shared = ("optimizer", "gradients", "weights")
    shares = [processes if settings.shards in shared[place:] else 1 for place in range(3)]
    rows = rows_per_pair * settings.pairs_per_batch
    layer = _layer_bytes(sizes, rows, longest, settings.compute_dtype, eager=eager)
    if settings.recomputes:
        # Each layer keeps its input; one layer at a time has all of its activations.
        kept = sizes.layers * rows * longest * sizes.hidden * BYTES[settings.compute_dtype] + layer
    else:
        kept = sizes.layers * layer
    return Memory(weights / shares[2], gradients / shares[1], optimizer / shares[0], kept)


def inference_memory(
    sizes: Architecture, *, adapter: int, dtype: str, compute_dtype: str, eager: bool, rows: int, longest: int
) -> Memory:
    """Memory of forward passes over a batch of `rows` rows of `longest` tokens: one layer's activations."""
    weights = sizes.parameters * BYTES[dtype] + adapter * _ADAPTER_BYTES
    return Memory(weights, 0.0, 0.0, _layer_bytes(sizes, rows, longest, compute_dtype, eager=eager))


def generation_memory(sizes: Architecture, *, adapter: int, dtype: str, rows: int, longest: int) -> Memory:
    """Memory of sampling `rows` answers at once: keys and values of up to `longest` tokens, and logits."""
    weights = sizes.parameters * BYTES[dtype] + adapter * _ADAPTER_BYTES
    cache = 2 * sizes.layers * rows * longest * sizes.key_value_width * BYTES[dtype]
    return Memory(weights, 0.0, 0.0, cache + rows * sizes.vocabulary * 4)


def saved_bytes(sizes: Architecture, *, adapter: int, dtype: str) -> float:
    """What a trained policy takes on disk: its adapter, or all of its weights."""
    return float(adapter * _ADAPTER_BYTES if adapter else sizes.parameters * BYTES[dtype])


def checkpoint_bytes(sizes: Architecture, settings: TrainingSettings, *, adapter: int, dtype: str) -> float:
    """What a checkpoint in the middle of a training takes on disk: its weights, and the optimizer's states.

    After the last step there are no states.
    """
    trained, trained_bytes = (adapter, _ADAPTER_BYTES) if adapter else (sizes.parameters, BYTES[dtype])
    states = _states_bytes(settings, trained, trained_bytes)
    return saved_bytes(sizes, adapter=adapter, dtype=dtype) + states


def _states_bytes(settings: TrainingSettings, trained: int, trained_bytes: int) -> float:
    """Of an optimizer over `trained` parameters; all processes together."""
    if not settings.keeps_master_weights:
        return trained * _optimizer_bytes(settings.optimizer, trained_bytes)
    return trained * (4 + _optimizer_bytes(settings.optimizer, 4))


def _attention_flops(sizes: Architecture, work: Work) -> float:
    return 4.0 * sizes.layers * sizes.attention_width * work.squares


def _layer_bytes(sizes: Architecture, rows: int, longest: int, dtype: str, *, eager: bool) -> float:
    values = _VALUES_PER_LAYER * BYTES[dtype] * rows * longest * sizes.hidden
    scores = _EAGER_ATTENTION_BYTES * rows * longest**2 * sizes.heads if eager else 0
    return float(values + scores)


def _optimizer_bytes(name: str, state_bytes: int) -> float:
    """Bytes of optimizer state per trained parameter, by transformers' name of the optimizer."""
    if "8bit" in name:
        return 1 if "lion" in name or "rmsprop" in name else 2
    if "32bit" in name:
        state_bytes = 4
    if name == "sgd" or "adafactor" in name:
        return 0  # Adafactor's states are of the size of rows and columns, not of their product.
    return state_bytes * (1 if any(one in name for one in ("lion", "rmsprop", "adagrad")) else 2)
