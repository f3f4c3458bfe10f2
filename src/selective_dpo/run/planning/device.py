"""What this machine computes on, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import time
from typing import NamedTuple

import torch

ASSUMED_UTILISATION = 0.4
"""Share of the measured rate that a training or a forward pass is assumed to reach. Published large
trainings report 0.3 to 0.6; models too small to fill the device reach far less."""

_SIZE = {"cuda": 8192, "cpu": 1024}

_LEAST_SECONDS = 0.2


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
    return Device("cpu", name, 1, _machine_memory())


def measured_rate(device: Device, dtype: str) -> float:
    """FLOP/s of multiplying two square matrices of this type: the best of several rounds.

    Takes about a fifth of a second, and on a GPU half a gigabyte.
    """
    size = _SIZE[device.kind]
    kind = getattr(torch, dtype)
    left = torch.randn(size, size, dtype=torch.float32, device=device.kind).to(kind)
    best, started = float("inf"), time.perf_counter()
    left @ left  # the first call also loads the library
    while time.perf_counter() - started < _LEAST_SECONDS or best == float("inf"):
        _synchronize(device)
        before = time.perf_counter()
        left @ left
        _synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2.0 * size**3 / best


def _synchronize(device: Device) -> None:
    if device.kind == "cuda":
        torch.cuda.synchronize()


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return 0
