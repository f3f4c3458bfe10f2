"""What a piece of work makes of the GPU: tokens a second, utilisation, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Work(NamedTuple):
    """How much there is to do, in whatever way it is done."""

    tokens: int
    """Of pairs, prompts counted twice, as often as a pair is trained on or measured."""
    flops: float
    """Model FLOPs: of the weights' products with the tokens that must be computed. Padding, attention and
    what activation checkpointing computes again do not count."""


class OnGPU(NamedTuple):
    """How fast a piece of work was done."""

    seconds: float
    pair_tokens_per_second: float
    model_flops_utilisation: float
    """Model FLOPs a second over the matrix rate."""
    matrix_tflops: float
    peak_gib: float
    """Most memory that tensors took."""


def measure_on_gpu(run: Callable[[], object], work: Work, rate: float | None = None) -> OnGPU:
    """`run` once, against a matrix rate that is measured first where none is given."""
    rate = rate or matrix_rate()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return OnGPU(
        seconds,
        work.tokens / seconds,
        work.flops / seconds / rate,
        rate / 1e12,
        torch.cuda.max_memory_allocated() / 2**30,
    )


def matrix_rate(size: int = 8192, seconds: float = 2.0) -> float:
    """FLOPs a second of bfloat16 matrix products on this GPU."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        left @ right
    torch.cuda.synchronize()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(10):
            left @ right
        torch.cuda.synchronize()
        count += 10
    return 2 * size**3 * count / (time.perf_counter() - started)
