"""Quantities as people read them: three digits and a unit."""

from __future__ import annotations

UNKNOWN = "unknown"

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def readable(value: float | None, unit: str) -> str:
    """A quantity with three digits and a decimal prefix, such as "12.3 TFLOP"."""
    if value is None:
        return UNKNOWN
    for size, prefix in _PREFIXES:
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def readable_count(value: float) -> str:
    """A number with three digits and a decimal prefix, such as "7.62 G"."""
    return readable(value, "").strip()


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
