"""Digests of values: one spelling, one hash."""

from __future__ import annotations

import hashlib
import json

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_json(value: object) -> str:
    """One spelling for equal values: sorted keys, no spaces, ASCII only.

    ASCII escapes make it defined for any Python string, lone surrogates included, which UTF-8 is not.
    Raises `ValueError` for NaN or infinity, which JSON has no word for.
    """
    return _CANONICAL.encode(value)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON of `value`, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()
