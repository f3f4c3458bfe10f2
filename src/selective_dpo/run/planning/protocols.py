"""What scoring costs and keeps under each protocol, side by side, for the recipe's model and pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from selective_dpo.config import PROTOCOLS, Recipe, SelectConfig
from selective_dpo.difficulty.folds import FOLDS
from selective_dpo.difficulty.protocols import ScorerRun
from selective_dpo.report.tables import DEFAULT_FRACTION
from selective_dpo.run.keys import MIN_SEEDS
from selective_dpo.run.planning.batches import Work, total_work
from selective_dpo.run.planning.costs import forward_flops, training_flops
from selective_dpo.run.planning.forwarding import Forwarding
from selective_dpo.run.planning.inputs import KeptPairs
from selective_dpo.run.planning.measured import MEASURED_ON, Expected, expected_agreement
from selective_dpo.run.planning.plain import plain_epoch_flops, plain_scorer
from selective_dpo.run.planning.pricing import Models
from selective_dpo.run.planning.scorer_work import scorer_work
from selective_dpo.run.planning.settings import training_settings


class Passes(NamedTuple):
    """Passes through the model. One is chosen and rejected of one pair; recomputed activations are none."""

    forward: float
    """The reference's, those of the scorers' training, and of every held-out evaluation."""
    backward: float
    """Of the scorers' training."""


class Scoring(NamedTuple):
    """A protocol with its numbers filled in."""

    protocol: str
    seeds: tuple[int, ...]
    evaluations: int
    part: str = ""
    """Of `certified`, which may stop early: "least" or "most"."""
    is_own: bool = False
    """The recipe asks for it."""


class Costs(NamedTuple):
    """What scoring all pairs takes, as if nothing were there yet."""

    passes: Passes
    tokens: float
    """Computed, padding included."""
    plain_tokens: float
    """The same protocol's in plain batches with a live reference (see `plain`)."""
    flops: float | None
    """None: the model's sizes are not known."""
    plain_epochs: float | None
    """FLOPs over those of one plain DPO epoch on all pairs."""


@dataclass(frozen=True)
class PlannedProtocol:
    """One protocol beside the others. What is not known is None."""

    scoring: Scoring
    per_pair: Passes
    """Passes over the number of pairs."""
    costs: Costs | None
    expected: Expected | None
    """Agreement with `paper`, where it was measured; None for `paper` itself."""

    def to_json(self) -> dict[str, Any]:
        """The protocol as JSON values."""
        costs = None
        if self.costs is not None:
            costs = {**self.costs._asdict(), "passes": self.costs.passes._asdict()}
        return {
            "protocol": self.scoring.protocol,
            "part": self.scoring.part,
            "own": self.scoring.is_own,
            "seeds": list(self.scoring.seeds),
            "evaluations": self.scoring.evaluations,
            "passes_per_pair": self.per_pair._asdict(),
            "costs": costs,
            "expected_agreement": None if self.expected is None else _expected_json(self.expected),
        }


def compared(recipe: Recipe) -> tuple[Scoring, ...]:
    """The published protocols, and the recipe's own in its place among them.

    `certified` stands there twice: with the fewest seeds and with all.
    """
    return tuple(_compared(recipe))


def planned_protocols(
    recipe: Recipe, pairs: KeptPairs | None, models: Models | None, forwarding: Forwarding
) -> tuple[PlannedProtocol, ...]:
    """What each of the protocols takes and keeps; nothing where the difficulty is imported.

    Raises:
        DataError: too few prompts to halve.
    """
    if recipe.curriculum:
        return ()
    comparison = None if pairs is None else _Comparison(recipe, pairs, models, forwarding)
    fraction = easiest_fraction(recipe.select, None if pairs is None else len(pairs.pair_ids))
    epochs = training_settings(recipe.score.trainer, recipe.model).epochs
    planned = []
    for scoring in compared(recipe):
        costs = None if comparison is None else comparison.costs(scoring)
        per_pair = _passes(scoring, epochs * len(scoring.seeds), 1)
        if comparison is not None and costs is not None:
            per_pair = Passes(*(number / len(comparison.pairs.pair_ids) for number in costs.passes))
        # What was measured is the mean over all records.
        is_measured = recipe.select.aggregate == "mean"
        expected = (
            expected_agreement(len(scoring.seeds), scoring.evaluations, fraction) if is_measured else None
        )
        planned.append(PlannedProtocol(scoring, per_pair, costs, expected))
    return tuple(planned)


def easiest_fraction(select: SelectConfig, pairs: int | None) -> float | None:
    """The share of easiest pairs that a selection keeps; None for other rules, or where it is not known."""
    if select.rule != "easiest":
        return None
    if select.count is not None:
        return min(1.0, select.count / pairs) if pairs else None
    return DEFAULT_FRACTION if select.fraction is None else select.fraction


class _Seed(NamedTuple):
    """Both scorers of one seed."""

    trained_pairs: float
    trained: Work
    measured: Work
    """Of one evaluation."""
    plain_trained: float
    """Tokens in plain batches."""
    plain_measured: float


class _Comparison:
    """What the protocols of one recipe take on its pairs; each seed is worked out once."""

    def __init__(
        self, recipe: Recipe, pairs: KeptPairs, models: Models | None, forwarding: Forwarding
    ) -> None:
        self.pairs = pairs
        self._recipe, self._models, self._forwarding = recipe, models, forwarding
        self._reference = forwarding.work(pairs, recipe.score.tokens_per_batch)
        self._seeds: dict[int, _Seed] = {}

    def costs(self, scoring: Scoring) -> Costs:
        """What `scoring` takes."""
        seeds = [self._seed(number) for number in scoring.seeds]
        trained = total_work(seed.trained for seed in seeds)
        measured = total_work(seed.measured for seed in seeds).times(scoring.evaluations)
        plain = sum(seed.plain_trained + scoring.evaluations * seed.plain_measured for seed in seeds)
        flops = self._flops(trained, measured)
        return Costs(
            _passes(scoring, sum(seed.trained_pairs for seed in seeds), len(self.pairs.pair_ids)),
            tokens=self._reference.tokens + trained.tokens + measured.tokens,
            plain_tokens=plain,
            flops=flops,
            plain_epochs=None if flops is None else flops / self._plain_epoch,
        )

    def _flops(self, trained: Work, measured: Work) -> float | None:
        if self._models is None:
            return None
        sizes, adapter = self._models.sizes, self._models.scorer_adapter
        recomputes = training_settings(self._recipe.score.trainer, self._recipe.model).recomputes
        return (
            forward_flops(sizes, self._reference)
            + training_flops(sizes, trained, adapter=adapter, recomputes=recomputes)
            + forward_flops(sizes, measured, adapter)
        )

    @cached_property
    def _plain_epoch(self) -> float:
        assert self._models is not None
        return plain_epoch_flops(self._recipe, self.pairs, self._models)

    def _seed(self, number: int) -> _Seed:
        if number not in self._seeds:
            self._seeds[number] = self._worked_out(number)
        return self._seeds[number]

    def _worked_out(self, number: int) -> _Seed:
        works = [
            scorer_work(self._recipe, ScorerRun(number, fold), self.pairs, self._forwarding) for fold in FOLDS
        ]
        plain = [
            plain_scorer(
                self._recipe, self.pairs.rows(work.split.train), self.pairs.rows(work.split.held_out)
            )
            for work in works
        ]
        return _Seed(
            sum(work.epochs * len(work.split.train) for work in works),
            total_work(work.trained for work in works),
            total_work(work.measured for work in works),
            sum(work.epochs * each.epoch for work, each in zip(works, plain, strict=True)),
            sum(each.evaluation for each in plain),
        )


def _compared(recipe: Recipe) -> Iterator[Scoring]:
    own = recipe.score
    for name, published in PROTOCOLS.items():
        is_own = name == own.protocol
        seeds, evaluations = (own.seeds, own.evaluations) if is_own else published
        if name == "certified":
            parts = {"least": seeds[:MIN_SEEDS], "most": seeds}
            for part, some in parts.items():
                yield Scoring(name, some, evaluations, part, is_own)
        elif is_own or name != "custom":
            yield Scoring(name, seeds, evaluations, is_own=is_own)


def _passes(scoring: Scoring, trained: float, pairs: int) -> Passes:
    """With `trained` pairs trained in all: each seed's two halves hold every pair once."""
    measured = len(scoring.seeds) * scoring.evaluations * pairs
    return Passes(pairs + trained + measured, trained)


def _expected_json(expected: Expected) -> dict[str, Any]:
    return {
        "spearman": list(expected.spearman),
        "overlap": None if expected.overlap is None else list(expected.overlap),
        "fraction": expected.fraction,
        "measured_on": MEASURED_ON,
    }
