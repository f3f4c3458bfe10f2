"""What was measured of pairs, wherever it lies: a run, a curriculum, a record folder or a released file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.criteria import CRITERIA
from selective_dpo.curriculum.import_ import (
    column_names,
    imported_from,
    is_records,
    read_numbers,
    read_outside,
    read_record_folder,
)
from selective_dpo.curriculum.records import LossTable, difficulty, read_loss_table, text_array
from selective_dpo.curriculum.table import FLIPPED, Curriculum, curriculum_losses, paths_of
from selective_dpo.data.adapters import KEPT
from selective_dpo.data.store import pairs_file
from selective_dpo.errors import ArtifactError, DataError
from selective_dpo.identity import positions_of
from selective_dpo.losses import LN_2
from selective_dpo.stats.learning import margins_from_losses
from selective_dpo.storage.artifacts import MANIFEST, file_digest, read_manifest

Floats = NDArray[np.float64]

PAIR_CRITERIA = {
    "reference margin": "log-prob of the rejected minus that of the chosen answer, by the starting model",
    "length difference": "tokens of the chosen minus those of the rejected answer",
    "perplexity gap": "log-perplexity of the chosen minus that of the rejected answer, by the starting model",
    "reward gap": "the data's score of the rejected minus that of the chosen answer",
}
"""Other numbers that pairs could be selected by, and what each is: like a difficulty, larger is harder."""


@dataclass(frozen=True)
class Measured:
    """P pairs with their difficulty, in the order of their ids, and what else is known of them."""

    name: str
    kind: str
    """`run`, `curriculum`, `records` or `file`."""
    losses: LossTable
    """Ids and losses, without gaps; no seeds where only a difficulty is known. `others` holds margins [P, S,
    E], if they are known."""
    difficulty_P: Floats
    how: str
    """The criterion that makes a seed's own difficulties from its losses."""
    knows_prompts: bool
    """Whether `losses.prompt_ids_P` names prompts; else the pairs' ids stand in for them."""
    chance_loss: float | None
    """The loss of a policy that has not moved; None: not known, or nothing here is a loss."""
    criteria: Mapping[str, Floats]
    """Values [P] by the names in `PAIR_CRITERIA`; NaN where a pair has none."""
    notes: tuple[str, ...] = ()
    """What was left out, or taken for something else."""

    @property
    def level_P(self) -> Floats | None:
        """The mean loss of each pair; None: not known."""
        if self.losses.seeds_S:
            return np.asarray(self.losses.losses_PSE.mean(axis=(1, 2)))
        return None if self.chance_loss is None else self.difficulty_P

    @property
    def margins_PSE(self) -> Floats | None:
        """Held-out margins; None: not known."""
        return self.losses.others.get("margin")


def read_measured(path: str | Path) -> Measured:
    """Read what was measured of pairs; what `path` is decides how, as in `import_.read_outside`.

    - a run's folder, or a curriculum: its difficulties and losses. Beside a run's records and pairs also
      margins and `PAIR_CRITERIA`.
    - a folder of the original's records.
    - a CSV or Parquet file of ids and difficulties; with columns `loss_step00_seed41` ... its losses, too.

    Pairs that lack a record are left out, and a note says how many. Where margins were not recorded, and the
    loss at chance is ln 2, they are solved from the losses, which are then taken for DPO's own.

    Raises:
        DataError: nothing that can be read; a file is damaged.
        IdentityError: an id stands twice (named), or records and pairs of a run do not fit.
        ArtifactError: a damaged curriculum, or damaged records of a run.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"{path} does not exist: give a run's folder, a curriculum, a folder of records or a file"
        )
    if is_records(path):
        found = read_record_folder(path, allow_partial=True)
        losses = found.losses
        measured = difficulty(losses, allow_partial=True).difficulty_P
        made = Measured(path.resolve().name, "records", losses, measured, "mean", True, LN_2, {})
    elif path.is_dir() or paths_of(path)[1].is_file():
        made = _of_curriculum(path)
    else:
        made = _of_file(path)
    return _with_margins(_without_gaps(made))


def _without_gaps(made: Measured) -> Measured:
    whole_P = np.asarray(np.isfinite(made.losses.losses_PSE).all(axis=(1, 2)))
    if whole_P.all():
        return made
    if not whole_P.any():
        raise DataError(f"{made.name}: no pair has all of its records, so there is nothing to compare")
    return replace(
        made,
        losses=made.losses.of_pairs(whole_P),
        difficulty_P=made.difficulty_P[whole_P],
        criteria={name: values_P[whole_P] for name, values_P in made.criteria.items()},
        notes=(*made.notes, f"{(~whole_P).sum():,} pair(s) lack some of their records and are left out"),
    )


def _with_margins(made: Measured) -> Measured:
    losses = made.losses
    if not losses.seeds_S or "margin" in losses.others:
        return made
    if made.chance_loss != LN_2 or not (losses.losses_PSE > 0.0).all():
        return replace(made, notes=(*made.notes, "no margins: its loss is not DPO's own"))
    others = {**losses.others, "margin": margins_from_losses(losses.losses_PSE)}
    return replace(
        made,
        losses=replace(losses, others=others),
        notes=(*made.notes, "margins are solved from the losses, taken for DPO's own"),
    )


# --- A curriculum, and the run that it lies in ------------------------------------------------------------


def _of_curriculum(path: Path) -> Measured:
    curriculum = Curriculum.load(path)
    folder = (path if path.is_dir() else path.parent).resolve()
    table, facts = curriculum.measured.table, curriculum.facts
    imported = imported_from(facts)
    # A criterion of somebody else's file is not imported for this.
    how = facts["select"]["aggregate"]
    is_known = how in CRITERIA and CRITERIA[how].reads == ("loss",)
    chance = facts["agreement"].get("chance_loss", LN_2)
    if imported is not None:
        chance = LN_2 if imported["nats"] else None
    # Where ids stand for both, only their origin says what they name.
    is_one_id = bool(table["pair_id"].equals(table["prompt_id"]))
    losses, criteria, notes = curriculum_losses(curriculum), {}, []
    is_run = (folder / "scores").is_dir() and bool(losses.seeds_S) and imported is None
    if is_run:
        found = _records_of(folder, curriculum)
        if found is None:
            notes.append("its records are not those of its curriculum, or not complete: not read")
        else:
            losses, criteria = (
                replace(losses, others={"margin": found.others["margin"]}),
                _criteria(folder, found),
            )
    if FLIPPED in table.column_names and (flipped := pc.sum(table[FLIPPED]).as_py()):
        notes.append(
            f"{flipped:,} pairs were flipped (select.action): their difficulty is of the new label, margins "
            "and other criteria are of the old one"
        )
    if losses.seeds_S and not is_known:
        notes.append(f"criterion {how!r} is not known here: a seed's own difficulty is its mean loss")
    return Measured(
        folder.name,
        "run" if is_run else "curriculum",
        losses,
        curriculum.measured.difficulty_P,
        how if is_known else "mean",
        not is_one_id or imported is None or imported["joined_by"] == "prompt_id",
        chance,
        criteria,
        tuple(notes),
    )


_REFERENCE_COLUMNS = ("reference_chosen_logp", "reference_rejected_logp")


def _records_of(folder: Path, curriculum: Curriculum) -> LossTable | None:
    """Margins and the reference's log-probs of the curriculum's pairs; None unless its records lie here."""
    inputs = curriculum.facts["provenance"].get("inputs") or {}
    paths = []
    for scorer in sorted((folder / "scores").iterdir()):
        digest = inputs.get(scorer.name)
        files = read_manifest(scorer).files if digest and (scorer / MANIFEST).is_file() else {}
        paths += [scorer / name for name, at in files.items() if at == digest == file_digest(scorer / name)]
    if not paths:
        return None
    measured = curriculum.measured.table
    aside = set(curriculum.pair_ids) - set(measured["pair_id"].to_pylist())
    found = read_loss_table(paths, allow_partial=True, without=aside, columns=("margin", *_REFERENCE_COLUMNS))
    is_same = (
        found.pair_ids_P.tolist() == measured["pair_id"].to_pylist()
        and list(found.seeds_S) == curriculum.facts["seeds"]
        and list(found.evaluations_E) == curriculum.facts["evaluations"]
    )
    return found if is_same else None


def _criteria(folder: Path, records: LossTable) -> dict[str, Floats]:
    """`PAIR_CRITERIA` of a run's pairs, as far as its records and pairs hold what they need."""
    # The reference is the same in each record of a pair.
    chosen_P, rejected_P = (np.nanmean(records.others[name], axis=(1, 2)) for name in _REFERENCE_COLUMNS)
    made = {"reference margin": rejected_P - chosen_P}
    try:
        path = pairs_file(folder / "pairs")
    except ArtifactError:
        return made
    columns = ("chosen_tokens", "rejected_tokens", "score_chosen", "score_rejected")
    table = pq.read_table(path, columns=["pair_id", *columns], filters=pc.field("status") == KEPT)
    at_P = positions_of(records.pair_ids_P.tolist(), table["pair_id"].to_pylist(), what=str(path))
    # A score that is not there becomes NaN.
    of = {name: table[name].cast(pa.float64()).to_numpy()[at_P] for name in columns}
    chosen_tokens_P, rejected_tokens_P = of["chosen_tokens"], of["rejected_tokens"]
    if (chosen_tokens_P > 0).all() and (rejected_tokens_P > 0).all():
        made["length difference"] = chosen_tokens_P - rejected_tokens_P
        made["perplexity gap"] = rejected_P / rejected_tokens_P - chosen_P / chosen_tokens_P
    gap_P = of["score_rejected"] - of["score_chosen"]
    if np.isfinite(gap_P).any():
        made["reward gap"] = gap_P
    return made


# --- A released file: the original's `NAME_learning_order.csv`, or our export -----------------------------

_LOSS_COLUMN = re.compile(r"loss_step(\d{1,9})_seed(\d{1,9})", re.ASCII)
_SUFFIXES = re.compile(r"(\.csv|\.parquet)?(\.gz)?$")


def _of_file(path: Path) -> Measured:
    outside = read_outside(path)
    own, names = (outside.facts["id_column"],), column_names(path)
    prompts = outside.ids
    knows_prompts = outside.names == "prompt_id" or "prompt_id" in names
    if outside.names != "prompt_id" and knows_prompts:
        # Read with the same numbers as the ids, so in the same rows.
        prompts = read_numbers(path, ("prompt_id",), (outside.facts["difficulty_column"],)).ids
    # The original counts evaluations from 0 and calls them steps.
    places = {(int(m[2]), int(m[1]) + 1): m[0] for m in map(_LOSS_COLUMN.fullmatch, names) if m}
    seeds, evaluations = (tuple(sorted({place[axis] for place in places})) for axis in (0, 1))
    notes: tuple[str, ...] = ()
    if len(places) < len(seeds) * len(evaluations):
        seeds, evaluations = (), ()
        notes = ("it lacks the losses of some seeds' evaluations: the others were not read",)
    ids_P = text_array(outside.ids)
    order_P = np.argsort(ids_P, kind="stable")
    losses_PSE = np.empty((len(ids_P), len(seeds), len(evaluations)))
    for (s, seed), (e, evaluation) in itertools.product(enumerate(seeds), enumerate(evaluations)):
        losses_PSE[:, s, e] = read_numbers(path, own, (places[seed, evaluation],)).values_N
    table = LossTable(ids_P[order_P], text_array(prompts)[order_P], seeds, evaluations, losses_PSE[order_P])
    return Measured(
        _SUFFIXES.sub("", path.name),
        "file",
        table,
        outside.difficulty_N[order_P],
        "mean",
        knows_prompts,
        LN_2 if outside.facts["nats"] else None,
        {},
        notes,
    )
