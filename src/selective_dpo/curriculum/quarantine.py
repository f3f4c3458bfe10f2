"""Pairs whose log-probs or loss are not finite: set aside by name, never averaged over, never silent.

A scorer's folder, or the reference's, then holds `quarantine.json`, and its table none of their rows. A pair
that stands in any of these files has no difficulty, whatever other scorers measured of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selective_dpo.artifacts import SCHEMA_VERSION, read_json, write_json
from selective_dpo.core.records import Records
from selective_dpo.errors import ArtifactError, RecordsError, name_some

FILE = "quarantine.json"
REASON = "not finite"
"""Why the curriculum does not select such a pair."""
MOST = 0.01
"""Share of the pairs beyond which it is not the pairs' fault."""
_VALUES = (
    "policy_chosen_logp",
    "policy_rejected_logp",
    "reference_chosen_logp",
    "reference_rejected_logp",
    "margin",
    "loss",
)


class Sifted(NamedTuple):
    """Records parted by pair."""

    records: Records
    """All records of the pairs that have only finite ones."""
    quarantined: list[dict[str, Any]]
    """The other pairs, for `write_quarantine`."""


def sift(records: Records) -> Sifted:
    """Part the pairs with a value that is not finite in any record from the others."""
    finite_VR = np.stack([np.isfinite(getattr(records, name)) for name in _VALUES])
    bad_rows = np.flatnonzero(~finite_VR.all(axis=0))
    if not len(bad_rows):
        return Sifted(records, [])
    found: dict[str, dict[str, Any]] = {}
    for row in bad_rows.tolist():
        pair = str(records.pair_id[row])
        entry = found.setdefault(pair, quarantined_pair(pair, str(records.prompt_id[row])))
        values = [name for name, is_finite in zip(_VALUES, finite_VR[:, row], strict=True) if not is_finite]
        place = {"evaluation": int(records.evaluation[row]), "step": int(records.step[row])}
        entry["not_finite"].append({**place, "values": values})
    kept_R = ~np.isin(records.pair_id, list(found))
    whole = Records(**{name: column[kept_R] for name, column in vars(records).items()})
    return Sifted(whole, [found[pair] for pair in sorted(found)])


def quarantined_pair(pair_id: str, prompt_id: str) -> dict[str, Any]:
    """An entry of the file; `not_finite` says which values, of which evaluation, are not."""
    return {"pair_id": pair_id, "prompt_id": prompt_id, "not_finite": []}


def require_few(quarantined: Sequence[Mapping[str, Any]], pairs: int, *, what: str, remedy: str) -> None:
    """Refuse to go on without more than 1% of `pairs` pairs; a single one may always be set aside.

    Raises:
        RecordsError: some of the pairs are named.
    """
    if len(quarantined) > max(1, MOST * pairs):
        named = name_some(entry["pair_id"] for entry in quarantined)
        raise RecordsError(
            f"{what} of {len(quarantined):,} of {pairs:,} pairs is not finite, more than can be set aside "
            f"({MOST:.0%}): {named}; {remedy}"
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
