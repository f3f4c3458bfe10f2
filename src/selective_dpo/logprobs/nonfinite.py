"""Pairs whose log-probs or loss are not finite: set aside by name, never averaged over, never silent.

A scorer's folder, or the reference's, then holds `quarantine.json`, and its table none of their rows. A pair
that stands in any of these files has no difficulty, whatever other scorers measured of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selective_dpo.errors import ArtifactError, RecordsError, name_some
from selective_dpo.storage.artifacts import SCHEMA_VERSION, read_json, write_json

FILE = "quarantine.json"

REASON = "not finite"
"""Why the curriculum does not select such a pair."""

MAX_SHARE = 0.01
"""Share of the pairs beyond which it is not the pairs' fault."""


def quarantined_pair(pair_id: str, prompt_id: str) -> dict[str, Any]:
    """An entry of the file; `not_finite` says which values, of which evaluation, are not."""
    return {"pair_id": pair_id, "prompt_id": prompt_id, "not_finite": []}


def require_few(quarantined: Sequence[Mapping[str, Any]], pairs: int, *, what: str, remedy: str) -> None:
    """Refuse to go on without more than 1% of `pairs` pairs; a single one may always be set aside.

    Raises:
        RecordsError: some of the pairs are named.
    """
    if len(quarantined) > max(1, MAX_SHARE * pairs):
        named = name_some(entry["pair_id"] for entry in quarantined)
        raise RecordsError(
            f"{what} of {len(quarantined):,} of {pairs:,} pairs is not finite, more than can be set aside "
            f"({MAX_SHARE:.0%}): {named}; {remedy}"
        )


def write_quarantine(folder: Path, quarantined: Sequence[Mapping[str, Any]], *, pairs: int) -> None:
    """Write the file into a folder that is still being filled; without such pairs there is none."""
    if quarantined:
        head = {"schema_version": SCHEMA_VERSION, "reason": REASON, "of_pairs": pairs}
        write_json(folder / FILE, {**head, "pairs": list(quarantined)})


def read_quarantine(folders: Iterable[Path]) -> dict[str, str]:
    """The pairs set aside in any of these folders, with their prompt ids, sorted by pair id.

    Raises:
        ArtifactError: a file is damaged.
    """
    found: dict[str, str] = {}
    for path in (folder / FILE for folder in folders):
        if not path.is_file():
            continue
        try:
            found |= {str(pair["pair_id"]): str(pair["prompt_id"]) for pair in read_json(path)["pairs"]}
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} does not hold quarantined pairs; delete its folder and run again"
            ) from error
    return dict(sorted(found.items()))
