"""Who is who: ids made from content, and joins that refuse to guess."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selective_dpo.errors import IdentityError, name_some
from selective_dpo.storage.digests import digest

ID_HEX_DIGITS = 32

MAX_ID_BYTES = 1024
"""Bytes of an id that comes with the data. Tables of ids are as wide as their longest."""

Text = str | list[dict[str, Any]]
"""Plain text, or chat messages: dictionaries with `role` and `content`."""


def canonical_text(text: Text) -> object:
    """`text` with only what the model will see: a string, or each message's role and content."""
    if isinstance(text, str):
        return text
    return [{"content": message["content"], "role": message["role"]} for message in text]


def pair_id(prompt: Text, chosen: Text, rejected: Text) -> str:
    """The id of a preference pair: 32 hex digits of SHA-256 over (prompt, chosen, rejected).

    Swapping chosen and rejected gives another id: a relabelled pair is another pair.
    """
    content = [canonical_text(prompt), canonical_text(chosen), canonical_text(rejected)]
    return digest(content)[:ID_HEX_DIGITS]


def prompt_id(prompt: Text) -> str:
    """The id of a prompt for data that brings none: 32 hex digits of SHA-256 over its content."""
    return digest(canonical_text(prompt))[:ID_HEX_DIGITS]


def swaps_answers(pair_id: str) -> bool:
    """Whether a reader is shown the rejected answer first: a fair coin, drawn by the id."""
    return int(digest(pair_id)[0], 16) % 2 == 1


def ids_digest(ids: Sequence[str]) -> str:
    """SHA-256 of a sequence of ids *in this order*, as 64 hex digits; what `order.json` compares."""
    running = hashlib.sha256()
    for item in ids:
        running.update(item.encode("utf-8"))
        running.update(b"\n")
    return running.hexdigest()


def positions_of(wanted: Sequence[str], available: Sequence[str], *, what: str) -> NDArray[np.int64]:
    """Where each of `wanted` stands in `available`: `available[result[i]] == wanted[i]`.

    Shapes: wanted [N], available [M], result [N] int64. `what` names the join in the error.

    Raises:
        IdentityError: an id is wanted but not available, or stands twice in either sequence.
    """
    require_unique(wanted, what=f"{what}: wanted ids")
    require_unique(available, what=f"{what}: available ids")
    where = {item: position for position, item in enumerate(available)}
    missing = [item for item in wanted if item not in where]
    if missing:
        raise IdentityError(
            f"{what}: {len(missing):,} of {len(wanted):,} ids are missing: {name_some(missing)}"
        )
    return np.fromiter((where[item] for item in wanted), dtype=np.int64, count=len(wanted))


def require_unique(ids: Sequence[str], *, what: str) -> None:
    """Raise `IdentityError` naming the ids that stand more than once in `ids`."""
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for item in ids:
        if item in seen:
            repeated[item] = None
        seen.add(item)
    raise IdentityError(f"{what}: {len(repeated):,} ids stand more than once: {name_some(repeated)}")


def require_same(left: Sequence[str], right: Sequence[str], *, what: str) -> None:
    """Raise `IdentityError` unless both sequences hold the same set of ids, each once."""
    require_unique(left, what=what)
    require_unique(right, what=what)
    missing = sorted(set(left) - set(right))
    extra = sorted(set(right) - set(left))
    if missing or extra:
        raise IdentityError(
            f"{what}: {len(missing):,} ids missing ({name_some(missing) or 'none'}), "
            f"{len(extra):,} not asked for ({name_some(extra) or 'none'})"
        )
