"""What each arm reached, and how sure that is: the content of `results.json` as types."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selective_dpo.errors import ArtifactError
from selective_dpo.stats.estimates import Estimate, clustered_mean, clustered_share
from selective_dpo.stats.side_effects import Change
from selective_dpo.storage.artifacts import SCHEMA_VERSION

SELECTED = "selected"
"""Name of the arm that is the run's own policy."""

REFERENCE = "reference"
"""Name of the arm that is the starting model, every arm's opponent."""


def repeat_name(seed: int) -> str:
    """Name of a further training of the arm `selected`, with this seed."""
    return f"{SELECTED}-seed{seed}"


class PreferenceMetrics(NamedTuple):
    """Means over pairs, each with its uncertainty clustered by prompt."""

    pairs: int
    prompts: int
    loss: Estimate
    """The trained loss; DPO's own, in nats, where that is not pairwise (see `losses`)."""
    accuracy: Estimate
    """Share of pairs with a margin above 0; a margin of exactly 0 counts one half."""
    margin: Estimate
    """Beta times the difference of the chosen and rejected log-ratios."""
    chosen_change: Estimate | None = None
    """Log-probability of the chosen answers minus the starting model's: sums over their tokens, in nats."""
    rejected_change: Estimate | None = None
    """The same of the rejected answers."""

    @property
    def both_fall(self) -> bool:
        """Whether chosen answers have clearly become less likely than they were, as rejected ones have.

        DPO rewards the difference alone, so the probability of both can go to answers that nobody preferred
        ("likelihood displacement", Razin et al. 2024, arXiv 2410.08847).
        """
        changes = (self.chosen_change, self.rejected_change)
        return all(change is not None and change.high < 0 for change in changes)


class SideEffects(NamedTuple):
    """What a training changed beside what it was for; None where it was not measured."""

    ended: Change | None = None
    """Share of the answers that end by themselves."""
    repeated: Change | None = None
    """Share of an answer's word 4-grams that stood in it before."""
    nats: Change | None = None
    """Of other text: mean negative log-probability a token. Its exponential is the perplexity."""

    @property
    def worse(self) -> list[str]:
        """What is worse than with the starting model by more than a little, in words.

        Any training changes these numbers a little, and the intervals are narrow: so the whole interval must
        lie beyond 2 points of the answers, or beyond 5% of perplexity.
        """
        found = []
        for name, sign, least, what in (
            ("ended", -1.0, 0.02, "fewer answers end by themselves"),
            ("repeated", 1.0, 0.02, "answers repeat themselves more"),
            ("nats", 1.0, 0.05, "other text has become less likely"),
        ):
            each = getattr(self, name)
            if each is not None and each.minus_start is not None:
                nearest = min(sign * each.minus_start.low, sign * each.minus_start.high)
                found += [what] if nearest > least else []
        return found


class ArmResult(NamedTuple):
    """One trained policy, or the starting model."""

    name: str
    label: str
    """What it was trained on, for people."""
    pairs: int
    """Pairs it was trained on."""
    updates: int
    held_out: PreferenceMetrics | None = None
    """On the pairs of `data.test`."""
    win_rate: Estimate | None = None
    """Against the starting model; of the starting model, between its own samples."""
    difference: Estimate | None = None
    """Win rate of the arm `selected` minus this one's, paired by prompt."""
    answer_tokens: Estimate | None = None
    """Mean length of its answers."""
    length_controlled: Estimate | None = None
    """The win rate of answers as long as the starting model's (`stats.length_control.joint_lc` over all);
    None where too few prompts were judged, or all answers are of one length."""
    answer_characters: Estimate | None = None
    """Mean length of its answers in characters, which length control goes by."""
    length_controlled_difference: Estimate | None = None
    """Length-controlled win rate of the arm `selected` minus this one's."""
    side_effects: SideEffects | None = None
    """None in results of earlier versions."""


class EvaluationResults(NamedTuple):
    """All arms, the starting model first."""

    judge: str
    prompts: int
    """Prompts that were answered."""
    samples: int
    """Answers per prompt and arm; 0 where none were generated."""
    arms: tuple[ArmResult, ...]
    repeats: tuple[ArmResult, ...] = ()
    """Further trainings of the arm `selected`, each with a seed of its own."""
    judge_notes: tuple[str, ...] = ()
    """What the judge tells of itself: unparsed questions, preference for a place."""

    @property
    def policies(self) -> tuple[ArmResult, ...]:
        """Arms and repeats."""
        return (*self.arms, *self.repeats)

    def arm(self, name: str) -> ArmResult | None:
        """The arm or repeat of that name, if it was evaluated."""
        return next((arm for arm in self.policies if arm.name == name), None)


class Measure(NamedTuple):
    """The quantity that the arms are compared by."""

    name: str
    values: dict[str, Estimate]
    """Arm's name -> estimate in [0, 1], in the arms' order; only arms that have one."""


def main_measure(results: EvaluationResults) -> Measure | None:
    """The win rate where answers were judged, else the accuracy on held-out pairs, else nothing."""
    if any(arm.win_rate for arm in results.arms if arm.name != REFERENCE):
        return Measure("win rate", {arm.name: arm.win_rate for arm in results.arms if arm.win_rate})
    held_out = {arm.name: arm.held_out.accuracy for arm in results.arms if arm.held_out}
    return Measure("held-out accuracy", held_out) if held_out else None


class TrainingSpread(NamedTuple):
    """The main measure of trainings that differ by their seed alone, the arm `selected` first."""

    measure: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the trainings."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the trainings. It holds what sampling other answers changes, too."""
        return statistics.stdev(self.values)


def training_spread(results: EvaluationResults) -> TrainingSpread | None:
    """How far apart the trainings of `selected` lie; None where there was one, or nothing was measured."""
    measure = main_measure(results)
    trained = main_measure(results._replace(arms=results.repeats))
    if measure is None or trained is None or SELECTED not in measure.values:
        return None
    estimates = [measure.values[SELECTED], *trained.values.values()]
    return TrainingSpread(measure.name, tuple(estimate.value for estimate in estimates))


def to_json(results: EvaluationResults) -> dict[str, Any]:
    """The content of `results.json`, by the fields' names. A number that does not exist (NaN) is null."""
    return {"schema_version": SCHEMA_VERSION, **_as_json(results)}


def _as_json(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _as_json(item) for name, item in value._asdict().items()}
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def from_json(content: Mapping[str, Any]) -> EvaluationResults:
    """The inverse of `to_json`.

    Raises:
        ArtifactError: another schema version, or fields that are missing or unknown.
    """
    fields = dict(content)
    version = fields.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"results.json has schema version {version}, this package reads {SCHEMA_VERSION}")
    try:
        arms = tuple(_arm_from_json(arm) for arm in fields.pop("arms"))
        repeats = tuple(_arm_from_json(arm) for arm in fields.pop("repeats", ()))
        notes = tuple(fields.pop("judge_notes", ()))
        return EvaluationResults(arms=arms, repeats=repeats, judge_notes=notes, **fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"results.json is not in the format of this version: {error}") from error


def estimate_from_json(content: Mapping[str, float | None]) -> Estimate:
    """The inverse of `Estimate.as_json`."""
    return Estimate(**{name: math.nan if value is None else value for name, value in content.items()})


_ESTIMATES = (
    "win_rate",
    "difference",
    "answer_tokens",
    "length_controlled",
    "answer_characters",
    "length_controlled_difference",
)


def _arm_from_json(content: Mapping[str, Any]) -> ArmResult:
    fields = dict(content)
    held_out = fields["held_out"]
    if held_out is not None:
        names = ("loss", "accuracy", "margin", "chosen_change", "rejected_change")
        estimates = {name: estimate_from_json(held_out[name]) for name in names if held_out.get(name)}
        fields["held_out"] = PreferenceMetrics(**{**held_out, **estimates})
    if effects := fields.get("side_effects"):
        fields["side_effects"] = SideEffects(
            **{name: _change_from_json(each) for name, each in effects.items() if each is not None}
        )
    for name in _ESTIMATES:
        fields[name] = None if fields.get(name) is None else estimate_from_json(fields[name])
    return ArmResult(**fields)


def _change_from_json(content: Mapping[str, Any]) -> Change:
    minus = content["minus_start"]
    return Change(estimate_from_json(content["value"]), None if minus is None else estimate_from_json(minus))


def preference_metrics(
    loss_P: ArrayLike,
    margin_P: ArrayLike,
    prompt_ids_P: ArrayLike,
    changes_P2: NDArray[np.float64] | None = None,
) -> PreferenceMetrics:
    """Loss, accuracy and margin of P pairs.

    Shapes: loss_P, margin_P [P] float; prompt_ids_P [P] strings, equal for pairs of one prompt; changes_P2
    [P, 2], log-probs of chosen and rejected minus the starting model's. A tie counts one half because a
    policy that has not moved from its reference must score chance, 0.5.

    Raises:
        ValueError: no pairs, shapes that differ, or a value that is not finite.
    """
    loss, margin = np.asarray(loss_P, dtype=np.float64), np.asarray(margin_P, dtype=np.float64)
    prompt_ids = np.asarray(prompt_ids_P)
    if not (np.isfinite(loss).all() and np.isfinite(margin).all()):
        raise ValueError("losses and margins must be finite: leaving pairs out would change the mean")
    accuracy = np.heaviside(margin, 0.5)
    return PreferenceMetrics(
        pairs=loss.size,
        prompts=len(np.unique(prompt_ids)),
        loss=clustered_mean(loss, prompt_ids),
        accuracy=clustered_share(accuracy, prompt_ids),
        margin=clustered_mean(margin, prompt_ids),
        **{}
        if changes_P2 is None
        else {
            name: clustered_mean(change_P, prompt_ids)
            for name, change_P in zip(("chosen_change", "rejected_change"), changes_P2.T, strict=True)
        },
    )
