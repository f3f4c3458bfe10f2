"""Records -> difficulty -> selection -> order: the curriculum is computed again and compared row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.config import SelectConfig
from selective_dpo.curriculum.build import resolved_selection, rule_of
from selective_dpo.curriculum.import_ import Outside, imported_from, pairs_joined
from selective_dpo.curriculum.records import LossTable, difficulty
from selective_dpo.curriculum.select import select as apply_rule
from selective_dpo.curriculum.select import training_positions
from selective_dpo.curriculum.table import FACTS, TABLE, Curriculum, loss_column
from selective_dpo.data.store import TOKENS
from selective_dpo.difficulty.scorer import RECORDS, collect_losses
from selective_dpo.logprobs.nonfinite import read_quarantine
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import curriculum_key
from selective_dpo.run.verification.check import DAMAGE, Check, Checks
from selective_dpo.run.verification.files import artifact_name
from selective_dpo.run.verification.pairs import Kept
from selective_dpo.storage.artifacts import MANIFEST, read_json, read_manifest

MODEL = "model"
"""Name of the model's digest among the inputs in a curriculum's provenance; the others are scorers."""

_TOLERANCE = 1e-9
"""Nats; the same numbers in the same order give the same mean to the last bit on one machine."""


class Written(NamedTuple):
    """A curriculum as it lies on disk, sound or not."""

    table: pa.Table
    facts: dict[str, Any]

    @property
    def pair_ids(self) -> list[str]:
        """Of all rows."""
        return list(self.table["pair_id"].to_pylist())

    @property
    def measured(self) -> Written:
        """Without the pairs that were set aside as not finite, which have no difficulty."""
        return Written(self.table.filter(pc.is_valid(self.table["difficulty"])), self.facts)

    @property
    def order(self) -> list[str]:
        """Ids of the pairs that have a place in the training order, in that order."""
        placed = self.table.filter(pc.greater_equal(self.table["position"], 0))
        return list(placed.sort_by("position")["pair_id"].to_pylist())


class Arm(NamedTuple):
    """One selection of a run."""

    name: str
    folder: Path
    select: SelectConfig | None
    """As the recipe has it, where there is a recipe."""


def check_curriculum(
    checks: Checks, folder: RunDirectory, arm: Arm, kept: Kept | None, outside: Outside | None
) -> Written | None:
    """An arm's curriculum; returns it where it can be read. `outside` is what it was imported from, if that
    is still there."""
    name = artifact_name(folder.root, arm.folder / TABLE)
    written = None
    with checks.of(f"curriculum {arm.name}", name) as check:
        if not (arm.folder / TABLE).is_file() and not (arm.folder / FACTS).is_file():
            check.absent()
            return None
        try:
            Curriculum.load(arm.folder)
        except DAMAGE as error:  # the rest is looked at all the same
            check.wrong(name, str(error).replace(f"{folder.root}/", ""))
        written = Written(pq.read_table(arm.folder / TABLE), read_json(arm.folder / FACTS))
        measured = written.measured
        facts = written.facts
        check.counted = f"{len(measured.table):,} pairs, {len(written.order):,} selected"
        select = SelectConfig.model_validate(facts["select"])
        if arm.select is not None:
            wanted = resolved_selection(arm.select)
            check.equal(artifact_name(folder.root, arm.folder / FACTS), "select", select, wanted)
        if kept is not None:
            _check_ids(check, name, written, kept, select)
        losses = _own_losses(measured)
        if imported_from(facts):
            _check_import(check, folder, name, written, outside)
        else:
            _check_records(check, folder, arm, facts)
            _check_against_records(check, folder, name, written, losses)
            _check_measured(check, name, measured, losses, select)
        if arm.select is not None:
            facts_name = artifact_name(folder.root, arm.folder / FACTS)
            check.equal(facts_name, "key", facts["key"], curriculum_key(record_inputs(facts), arm.select))
        _check_rows(check, name, measured, losses, select)
    return written


def _check_ids(check: Check, name: str, curriculum: Written, kept: Kept, select: SelectConfig) -> None:
    ids = curriculum.pair_ids
    # A pair without any record is in no partial curriculum.
    wanted = sorted(set(ids) & set(kept.pair_ids)) if select.allow_partial else kept.pair_ids
    check.same_ids(name, ids, wanted, "the kept pairs")
    prompt_of = kept.prompt_of
    given = zip(ids, curriculum.table["prompt_id"].to_pylist(), strict=True)
    is_other = np.array([prompt_of.get(pair, prompt) != prompt for pair, prompt in given], dtype=bool)
    check.at_no_row(name, ids, is_other, "prompt_id is not that of the pairs")


def record_inputs(facts: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each scorer's records (or of what was imported, and of the pairs), as the curriculum's
    provenance says."""
    inputs = (facts.get("provenance") or {}).get("inputs") or {}
    return {name: digest for name, digest in inputs.items() if name != MODEL}


def _check_import(
    check: Check, folder: RunDirectory, name: str, written: Written, outside: Outside | None
) -> None:
    """The join, as far as it can be made again: pairs to their difficulties, and which have none."""
    inputs, imported = record_inputs(written.facts), imported_from(written.facts) or {}
    if (folder.pairs / MANIFEST).is_file():
        pairs = read_manifest(folder.pairs).files.get(TOKENS)
        check.equal(name, "digest of the pairs joined", inputs.get("pairs"), pairs)
    check.equal(name, "digest of what was imported", imported.get("sha256"), inputs.get("curriculum"))
    if outside is None or outside.digest != inputs.get("curriculum"):
        check.counted += f"; {imported.get('name')} is not here to compare"
        return
    check.counted += f"; compared with {imported.get('name')}"
    table = written.table
    again_P = pairs_joined(outside, table["pair_id"], table["prompt_id"]).difficulty_P
    found_P = np.asarray(table["difficulty"].to_numpy(), dtype=np.float64)
    is_same_P = (found_P == again_P) | (np.isnan(found_P) & np.isnan(again_P))
    check.at_no_row(name, written.pair_ids, ~is_same_P, "difficulty is not that of what was imported")


def _check_records(check: Check, folder: RunDirectory, arm: Arm, facts: Mapping[str, Any]) -> None:
    name = artifact_name(folder.root, arm.folder / FACTS)
    inputs = record_inputs(facts)
    for scorer, digest in inputs.items():
        place = folder.root / "scores" / scorer
        if not (place / MANIFEST).is_file() or not (place / RECORDS).is_file():
            check.wrong(name, f"made from the records of {scorer}, which are not there")
        elif read_manifest(place).files.get(RECORDS) != digest:
            check.wrong(name, f"made from other records than those in scores/{scorer}")


def _own_losses(curriculum: Written) -> LossTable:
    """The losses that the curriculum's own columns hold."""
    table, facts = curriculum.table, curriculum.facts
    seeds, evaluations = tuple(facts["seeds"]), tuple(facts["evaluations"])
    columns = [
        [table[loss_column(seed, evaluation)].to_numpy() for evaluation in evaluations] for seed in seeds
    ]
    losses_SEP = np.array(columns, dtype=np.float64).reshape(len(seeds), len(evaluations), len(table))
    losses_PSE = np.moveaxis(losses_SEP, 2, 0)
    ids = np.asarray(curriculum.pair_ids, dtype=np.str_)
    prompts = np.asarray(table["prompt_id"].to_pylist(), dtype=np.str_)
    return LossTable(ids, prompts, seeds, evaluations, losses_PSE)


def _check_against_records(
    check: Check, folder: RunDirectory, name: str, written: Written, losses: LossTable
) -> None:
    places = [folder.root / "scores" / scorer for scorer in record_inputs(written.facts)]
    if not places or not all((place / RECORDS).is_file() for place in places):
        return  # said already
    aside = written.table.filter(pc.is_null(written.table["difficulty"]))["pair_id"].to_pylist()
    check.same_ids(
        f"{name}, set aside", aside, list(read_quarantine([folder.reference, *places])), "the quarantine"
    )
    records = collect_losses(places, allow_partial=True)
    check.equal(name, "seeds", losses.seeds_S, records.seeds_S)
    check.equal(name, "evaluations", losses.evaluations_E, records.evaluations_E)
    ids = losses.pair_ids_P.tolist()
    if not check.same_ids(name, ids, records.pair_ids_P.tolist(), "the records"):
        return
    if losses.losses_PSE.shape != records.losses_PSE.shape:
        return
    place = {pair_id: row for row, pair_id in enumerate(records.pair_ids_P.tolist())}
    recorded_PSE = records.losses_PSE[[place[pair_id] for pair_id in ids]]
    is_same = (losses.losses_PSE == recorded_PSE) | (np.isnan(losses.losses_PSE) & np.isnan(recorded_PSE))
    check.at_no_row(name, ids, ~is_same.all(axis=(1, 2)), "losses are not those of the records")


def _check_measured(
    check: Check, name: str, curriculum: Written, losses: LossTable, select: SelectConfig
) -> None:
    """Difficulty, spread and count from the losses."""
    table, ids = curriculum.table, curriculum.pair_ids
    measured = difficulty(losses, select.aggregate, allow_partial=select.allow_partial)
    by_measurement: dict[str, NDArray[Any]] = {
        "difficulty": measured.difficulty_P,
        "spread": measured.spread_P,
        "count": measured.count_P,
    }
    for column, wanted_P in by_measurement.items():
        _compare(check, name, ids, column, np.asarray(table[column].to_numpy()), wanted_P, "the records'")


def _check_rows(
    check: Check, name: str, curriculum: Written, losses: LossTable, select: SelectConfig
) -> None:
    """Rank, selection and order from the difficulty."""
    table, facts, ids = curriculum.table, curriculum.facts, curriculum.pair_ids
    difficulty_P = np.asarray(table["difficulty"].to_numpy(), dtype=np.float64)
    chosen = apply_rule(difficulty_P, losses.pair_ids_P, rule_of(select))
    positions_P = training_positions(chosen, losses.pair_ids_P, select.order, select.seed or 0)
    by_selection: dict[str, NDArray[Any]] = {
        "rank": chosen.rank_P,
        "selected": chosen.selected_P,
        "position": positions_P,
        "reason": chosen.reason_P,
    }
    for column, wanted_P in by_selection.items():
        found_P = np.asarray(table[column].to_numpy(zero_copy_only=False))
        _compare(check, name, ids, column, found_P, wanted_P, "what the difficulty and the selection give")
    counted = {
        "pairs": len(ids),
        "selected": int(np.asarray(table["selected"]).sum()),
        "partial": int((losses.counts_P < losses.losses_PSE[0].size).sum()),
    }
    for key, wanted in counted.items():
        check.equal(str(Path(name).with_suffix(".json")), key, facts[key], wanted)


def _compare(
    check: Check,
    name: str,
    ids: Sequence[str],
    column: str,
    found_P: NDArray[Any],
    wanted_P: NDArray[Any],
    of: str,
) -> None:
    if found_P.dtype.kind == "f":
        differs = ~(np.abs(found_P - wanted_P) <= _TOLERANCE)
    else:
        differs = found_P.astype(wanted_P.dtype) != wanted_P
    check.at_no_row(name, ids, differs, f"{column} is not {of}")
