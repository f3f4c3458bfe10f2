"""What a run's arms came to: each beside the random control of its size, and by the share that was kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq

from selective_dpo.config import DEFAULT_FRACTION, SelectConfig
from selective_dpo.errors import ArtifactError
from selective_dpo.evaluation.results import (
    REFERENCE,
    SELECTED,
    ArmResult,
    EvaluationResults,
    from_json,
    main_measure,
)
from selective_dpo.report.tables import points_with_interval, seeds_note, share_with_interval, text_table
from selective_dpo.stats.estimates import Estimate
from selective_dpo.stats.win_rates import Verdicts, win_rate_difference
from selective_dpo.storage.artifacts import read_json

STUDY = "study.json"


class StudyArm(NamedTuple):
    """One trained policy, or the starting model."""

    name: str
    label: str
    pairs: int
    updates: int
    fraction: float | None
    """The share that it was trained on; None: another rule says."""
    value: Estimate | None
    """The study's measure."""
    control: str
    """The random arm that was trained on as many pairs; empty: there is none, or this is it."""
    above_control: Estimate | None
    """Win rate minus that of the control, paired by prompt."""
    length_controlled: Estimate | None = None
    """The win rate at equal length, where answers were judged and differ in length."""


class Study(NamedTuple):
    """All arms, the starting model first."""

    measure: str
    """`win rate`, `held-out accuracy`; empty where nothing was measured."""
    arms: tuple[StudyArm, ...]
    note: str
    """What the intervals leave out."""

    def as_json(self) -> dict[str, Any]:
        """JSON values by the fields' names."""
        arms = [
            {
                name: value.as_json() if isinstance(value, Estimate) else value
                for name, value in arm._asdict().items()
            }
            for arm in self.arms
        ]
        return {**self._asdict(), "arms": arms}


def study_findings(run_folder: Path) -> Study:
    """What the evaluation of the run in this folder says about its arms.

    Raises:
        ArtifactError: it is not there, or damaged.
    """
    results = from_json(read_json(run_folder / "evaluation" / "results.json"))
    selects = arm_selections(read_json(run_folder / "config.json"))
    measure = main_measure(results)
    values = {} if measure is None else measure.values
    verdicts = pq.read_table(
        run_folder / "evaluation" / "verdicts.parquet", columns=["arm", "prompt_id", "score"]
    )

    def verdicts_of(name: str) -> Verdicts:
        rows = verdicts.filter(pc.equal(verdicts["arm"], name))
        return Verdicts(rows["prompt_id"].to_pylist(), rows["score"])

    def of(arm: ArmResult) -> StudyArm:
        control = _control(arm, results, selects)
        above = None
        if control and arm.win_rate is not None:
            above = win_rate_difference(verdicts_of(arm.name), verdicts_of(control))
        fraction = fraction_of(selects[arm.name]) if arm.name in selects else None
        value = values.get(arm.name)
        return StudyArm(
            arm.name,
            arm.label,
            arm.pairs,
            arm.updates,
            fraction,
            value,
            control,
            above,
            arm.length_controlled,
        )

    return Study("" if measure is None else measure.name, tuple(map(of, results.arms)), seeds_note(results))


def arm_selections(config: Mapping[str, Any]) -> dict[str, SelectConfig]:
    """The selection of each arm, by its name, from a run's `config.json`.

    Raises:
        ArtifactError: one is no selection.
    """
    controls = (config.get("evaluate") or {}).get("controls") or {}
    found = {SELECTED: config.get("select") or {}, **controls}
    try:
        return {name: SelectConfig.model_validate(select) for name, select in found.items()}
    except ValueError as error:
        raise ArtifactError(f"config.json does not say what the arms select ({error!r})") from error


def fraction_of(select: SelectConfig) -> float | None:
    """The share that a selection keeps; None where it has no such setting."""
    if select.rule == "all":
        return 1.0
    if select.rule not in ("easiest", "hardest", "random") or select.count is not None:
        return None
    return DEFAULT_FRACTION if select.fraction is None else select.fraction


def sweep(selects: Mapping[str, SelectConfig]) -> dict[str, dict[float, str]]:
    """Arms that differ by their share alone: of the easiest pairs as the run's own, and of random ones.

    Returns the arms' names by share, under what they select.
    """
    own = selects[SELECTED]
    found: dict[str, dict[float, str]] = {"easiest": {}, "random": {}}
    for name, select in selects.items():
        share = fraction_of(select)
        is_like = (select.order, select.aggregate, select.source) == (own.order, own.aggregate, own.source)
        if share is not None and (select.rule == "random" or (is_like and select.rule in ("easiest", "all"))):
            found["random" if select.rule == "random" else "easiest"].setdefault(share, name)
    return {rule: dict(sorted(arms.items())) for rule, arms in found.items()}


def _control(arm: ArmResult, results: EvaluationResults, selects: Mapping[str, SelectConfig]) -> str:
    """The random arm of as many pairs, if `arm` is none itself."""
    if arm.name not in selects or selects[arm.name].rule == "random":
        return ""
    same = (
        other.name
        for other in results.arms
        if other.pairs == arm.pairs and other.name in selects and selects[other.name].rule == "random"
    )
    return next(same, "")


def study_text(found: Study) -> str:
    """The table of the arms, then what its intervals leave out."""
    header = ["arm", "selection", "pairs", "updates", f"{found.measure} (95%)", "minus random of its size"]
    at_equal_length = any(arm.length_controlled for arm in found.arms)
    header += ["at equal length"] if at_equal_length else []
    rows = []
    for arm in found.arms:
        trained = ["", ""] if arm.name == REFERENCE else [f"{arm.pairs:,}", f"{arm.updates:,}"]
        measured = [share_with_interval(arm.value), points_with_interval(arm.above_control)]
        measured += [share_with_interval(arm.length_controlled)] if at_equal_length else []
        rows.append([arm.name, arm.label, *trained, *measured])
    return "\n".join([text_table(header, rows, left=2), "", found.note])
