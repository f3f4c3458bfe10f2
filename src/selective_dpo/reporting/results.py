"""`evaluation/results.json` as types: what each arm was trained on and how it did, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from selective_dpo.core.estimates import Estimate
from selective_dpo.core.preference_metrics import PreferenceMetrics
from selective_dpo.errors import ArtifactError

SELECTED = "selected"
"""Name of the run's own policy among the arms."""
REFERENCE = "reference"
"""Name of the starting model among the arms."""


class Arm(NamedTuple):
    """One policy that was evaluated."""

    name: str
    label: str
    """Its selection in words, such as "easiest 50%, easy to hard"."""
    pairs: int
    updates: int
    held_out: PreferenceMetrics | None
    win_rate: Estimate | None
    """Against the starting model, in [0, 1]; ties count one half."""
    difference: Estimate | None
    """Win rate of the arm "selected" minus this arm's, paired by prompt."""
    answer_tokens: Estimate | None


class Results(NamedTuple):
    """An evaluation: who judged, on how many prompts, and each arm."""

    judge: str
    prompts: int
    samples: int
    arms: tuple[Arm, ...]

    def arm(self, name: str) -> Arm | None:
        """The arm of that name, if it was evaluated."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def has_win_rates(self) -> bool:
        """Whether any trained arm's answers were judged."""
        return any(arm.win_rate is not None for arm in self.arms if arm.name != REFERENCE)


class Measure(NamedTuple):
    """The quantity that the arms are compared by."""

    name: str
    values: dict[str, Estimate]
    """Arm's name -> estimate in [0, 1], in the arms' order; only arms that have one."""


def main_measure(results: Results) -> Measure | None:
    """The win rate where answers were judged, else the accuracy on held-out pairs, else nothing."""
    if results.has_win_rates:
        return Measure("win rate", {arm.name: arm.win_rate for arm in results.arms if arm.win_rate})
    held_out = {arm.name: arm.held_out.accuracy for arm in results.arms if arm.held_out}
    return Measure("held-out accuracy", held_out) if held_out else None


def parse_results(value: Mapping[str, Any]) -> Results:
    """Read the object in `results.json`.

    Raises:
        ArtifactError: a field is missing or of the wrong kind.
    """
    try:
        return Results(
            judge=str(value["judge"]),
            prompts=int(value["prompts"]),
            samples=int(value["samples"]),
            arms=tuple(_arm(entry) for entry in value["arms"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"results.json is not in the format of this version ({error!r}); run `evaluate` again"
        ) from error


def parse_estimate(value: Mapping[str, Any]) -> Estimate:
    """An `Estimate` from its JSON object; null stands for NaN, which JSON lacks."""
    return Estimate(
        *(float("nan") if value[field] is None else float(value[field]) for field in Estimate._fields)
    )


def estimate_to_json(estimate: Estimate) -> dict[str, float | None]:
    """The inverse of `parse_estimate`."""
    return {name: None if math.isnan(number) else number for name, number in estimate._asdict().items()}


def _optional_estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    return None if value is None else parse_estimate(value)


def _arm(entry: Mapping[str, Any]) -> Arm:
    held_out = entry.get("held_out")
    return Arm(
        name=str(entry["name"]),
        label=str(entry["label"]),
        pairs=int(entry["pairs"]),
        updates=int(entry["updates"]),
        held_out=None if held_out is None else _held_out(held_out),
        win_rate=_optional_estimate(entry.get("win_rate")),
        difference=_optional_estimate(entry.get("difference")),
        answer_tokens=_optional_estimate(entry.get("answer_tokens")),
    )


def _held_out(value: Mapping[str, Any]) -> PreferenceMetrics:
    return PreferenceMetrics(
        pairs=int(value["pairs"]),
        prompts=int(value["prompts"]),
        loss=parse_estimate(value["loss"]),
        accuracy=parse_estimate(value["accuracy"]),
        margin=parse_estimate(value["margin"]),
    )
