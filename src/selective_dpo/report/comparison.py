"""What a comparison of measured difficulties shows. Nothing is trained, drawn or put into sentences here.

Every number that is estimated comes with its 95% interval, clustered by prompt: shares, means and rank
correlations with analytic errors, what depends on a selection by the bootstrap over prompts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from selective_dpo.criteria import CRITERIA
from selective_dpo.curriculum.agreement import agreement
from selective_dpo.curriculum.measured import Measured, read_measured
from selective_dpo.curriculum.records import LossTable, difficulty
from selective_dpo.curriculum.select import Rule
from selective_dpo.curriculum.stability import TARGET, mean_overlap, predict_overlap, seed_sets, seeds_needed
from selective_dpo.errors import DataError
from selective_dpo.evaluation.results import estimate_from_json
from selective_dpo.stats.bootstrap import cluster_bootstrap, estimates
from selective_dpo.stats.estimates import Estimate, clustered_mean, clustered_share
from selective_dpo.stats.learning import chance_jaccard, forgetting_events, learned_steps
from selective_dpo.stats.rank_correlation import clustered_spearman

Floats = NDArray[np.float64]

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the pairs, easiest first, at which selections are compared."""

HALF = 0.5
DELTAS = (0.4, 0.1)
"""Margins above which a pair counts as learned; 0 is always among them. The paper's is 0.4."""

REPLICATES = 400
"""Resamples of the prompts; a bound is then off by some 4% of the interval's width."""


class Likeness(NamedTuple):
    """How alike two rankings of the same pairs are."""

    a: str
    b: str
    pairs: int
    spearman: Estimate
    fractions: tuple[float, ...]
    """Shares of the pairs, easiest first, whose selections are compared; a half is among them."""
    overlap: tuple[Estimate, ...]
    """|A and B| / |A| at each of them; by chance the fraction itself."""
    jaccard: tuple[Estimate, ...]
    """|A and B| / |A or B|; by chance `Comparison.jaccard_by_chance`."""

    def of_half(self, name: Literal["overlap", "jaccard"]) -> Estimate:
        """Of the easiest halves."""
        found: Estimate = getattr(self, name)[self.fractions.index(HALF)]
        return found


class Learned(NamedTuple):
    """Which pairs are learned, where that means a margin above `delta`."""

    delta: float
    share: Estimate
    """Of pairs and seeds: learned by the last evaluation."""
    spearman: Estimate | None
    """Of the learned step, averaged over seeds, with the difficulty; None of a single evaluation."""
    above: tuple[Estimate, ...]
    """Share of pairs and seeds above `delta` at each evaluation."""


class Scorers(NamedTuple):
    """What the number of scoring seeds does to the easiest half: overlaps."""

    one_one: Estimate
    """Of one seed's half with another's, the mean over all two."""
    one_others: Estimate
    """Of one seed's half with that of all others together, the mean over seeds."""
    fresh: Estimate
    """Predicted: of the half of all seeds together with that of as many fresh ones."""
    needed: int | None
    """Fewest seeds whose half is predicted to overlap by 0.95 with that of as many fresh ones."""


class Dynamics(NamedTuple):
    """What the margins and losses of single evaluations say; margins of a run, or solved from losses."""

    wrong_always: Estimate
    """Share of pairs with a margin below 0 in every record."""
    learned: tuple[Learned, ...]
    forgetting: Estimate | None
    """Mean of the forgetting events of a pair and seed, at a margin of 0; None of a single evaluation."""
    forgetting_spearman: Estimate | None
    """Of a pair's events with its difficulty."""


class SourceFindings(NamedTuple):
    """One source by itself. None: it does not hold what a number needs."""

    name: str
    kind: str
    pairs: int
    clusters: int
    knows_prompts: bool
    """Whether clusters are prompts; else each id is one."""
    seeds: tuple[int, ...]
    evaluations: tuple[int, ...]
    chance_loss: float | None
    mean_loss: Estimate | None
    below_chance: Estimate | None
    """Share of the pairs whose mean loss is below that of a policy that has not moved; DPO's own: ln 2."""
    dynamics: Dynamics | None
    spread_spearman: Estimate | None
    """Of the standard deviation of a pair's losses with its difficulty."""
    seed_spread_spearman: Estimate | None
    """The same of its seeds' own difficulties."""
    first_last: Likeness | None
    """Of the first evaluation with the last, each averaged over seeds."""
    seeds_alike: tuple[Likeness, ...]
    """Of each two seeds' own difficulties."""
    scorers: Scorers | None
    criteria: tuple[Likeness, ...]
    """Of other criteria (`a`) with the difficulty (`b`)."""
    notes: tuple[str, ...]

    @property
    def least_alike(self) -> Estimate | None:
        """Jaccard of the easiest halves of the two seeds that share least."""
        return min((each.of_half("jaccard") for each in self.seeds_alike), default=None)


class Comparison(NamedTuple):
    """Several sources, each by itself and any two on the pairs that all have."""

    sources: tuple[SourceFindings, ...]
    common: int
    """Pairs that all sources have; 0 of a single one."""
    alike: tuple[Likeness, ...]
    wrong_everywhere: Estimate | None
    """Share of the common pairs with a margin below 0 in every record of every source."""
    replicates: int
    fractions: tuple[float, ...] = FRACTIONS
    jaccard_by_chance: tuple[float, ...] = tuple(map(chance_jaccard, FRACTIONS))

    def as_json(self) -> dict[str, Any]:
        """JSON values by the fields' names; a number that does not exist is null."""
        made: dict[str, Any] = _as_json(self)
        return made


def compare(
    paths: Sequence[str | Path], *, deltas: Sequence[float] = DELTAS, replicates: int = REPLICATES
) -> Comparison:
    """Compare what was measured of the same pairs: by other models, seeds, protocols or criteria.

    Each path is as `read_measured` takes it. Numbers about one source are over all of its pairs; what
    compares sources, over the pairs that all have. These are joined by the pairs' ids; where a source's ids
    name prompts, its difficulty of a prompt is that of all its pairs. Deterministic.

    Raises:
        SelectiveDPOError: a source cannot be read, or no pair is in all of them.
    """
    read = [read_measured(path) for path in paths]
    times = Counter(each.name for each in read)
    seen: Counter[str] = Counter()
    names = []
    for each in read:
        seen[each.name] += 1
        names.append(each.name if times[each.name] == 1 else f"{each.name} ({seen[each.name]})")
    together = _Together(0, (), None) if len(read) == 1 else _together(names, read, replicates)
    deltas = tuple(dict.fromkeys((*deltas, 0.0)))
    sources = tuple(_findings(name, each, deltas, replicates) for name, each in zip(names, read, strict=True))
    return Comparison(sources, *together, replicates)


class _Together(NamedTuple):
    """The part of a comparison that is about more than one source; its fields are there."""

    common: int
    alike: tuple[Likeness, ...]
    wrong_everywhere: Estimate | None


def _together(names: Sequence[str], read: Sequence[Measured], replicates: int) -> _Together:
    # The source whose ids are finest: its pairs may share the prompts that others know.
    base = next((each for each in read if _names_pairs(each)), read[0]).losses
    at_MP = np.array([_places(base, each.losses) for each in read])
    found_P = np.asarray((at_MP >= 0).all(axis=0))
    if not found_P.any():
        counts = ", ".join(
            f"{name} {len(each.difficulty_P):,} such as {each.losses.pair_ids_P[0]}"
            for name, each in zip(names, read, strict=True)
        )
        raise DataError(
            f"no pair is in all of these sources, so they cannot be compared: ids of {counts}; measure the "
            "same pairs, or give them their ids with import-curriculum --pairs"
        )
    at_MC = at_MP[:, found_P]
    ids_C, prompts_C = base.pair_ids_P[found_P], base.prompt_ids_P[found_P]
    scores_CM = np.stack([each.difficulty_P[at_C] for each, at_C in zip(read, at_MC, strict=True)], axis=1)
    wrong_MC = [
        _always_wrong(each.margins_PSE)[at_C]
        for each, at_C in zip(read, at_MC, strict=True)
        if each.margins_PSE is not None
    ]
    wrong = None
    if len(wrong_MC) == len(read):
        wrong = clustered_share(np.all(wrong_MC, axis=0).astype(float), prompts_C)
    alike = _likenesses(names, ids_C, prompts_C, scores_CM, replicates)
    return _Together(int(found_P.sum()), alike, wrong)


def _names_pairs(measured: Measured) -> bool:
    return not (measured.losses.pair_ids_P == measured.losses.prompt_ids_P).all()


def _places(base: LossTable, other: LossTable) -> NDArray[np.int64]:
    """Where each pair of `base` stands in `other`, by its id or else by its prompt; or -1."""
    available = pa.array(other.pair_ids_P)
    for ids_P in (base.pair_ids_P, base.prompt_ids_P):
        at_P = np.asarray(pc.fill_null(pc.index_in(pa.array(ids_P), value_set=available), -1))
        if (at_P >= 0).any():
            break
    return at_P.astype(np.int64)


# --- One source -------------------------------------------------------------------------------------------


def _findings(name: str, measured: Measured, deltas: Sequence[float], replicates: int) -> SourceFindings:
    table, prompts_P, hard_P = measured.losses, measured.losses.prompt_ids_P, measured.difficulty_P
    level_P, chance, margins_PSE = measured.level_P, measured.chance_loss, measured.margins_PSE

    def follows(values_P: Floats) -> Estimate:
        return clustered_spearman(values_P, hard_P, prompts_P)

    seeds, several = len(table.seeds_S), len(table.evaluations_E) > 1
    own_PS = np.empty((len(hard_P), 0))
    if seeds:
        own_PS = np.stack(
            [difficulty(table.of_seed(s), measured.how).difficulty_P for s in range(seeds)], axis=1
        )
    alike: tuple[Likeness, ...] = ()
    if seeds > 1:
        seed_names = [f"seed {seed}" for seed in table.seeds_S]
        alike = _likenesses(seed_names, table.pair_ids_P, prompts_P, own_PS, replicates)
    first_last = None
    if several:
        ends_PE = table.losses_PSE.mean(axis=1)[:, [0, -1]]
        ends = [f"evaluation {table.evaluations_E[end]}" for end in (0, -1)]
        (first_last,) = _likenesses(ends, table.pair_ids_P, prompts_P, ends_PE, replicates, (HALF,))
    return SourceFindings(
        name=name,
        kind=measured.kind,
        pairs=len(hard_P),
        clusters=len(np.unique(prompts_P)),
        knows_prompts=measured.knows_prompts,
        seeds=table.seeds_S,
        evaluations=table.evaluations_E,
        chance_loss=chance,
        mean_loss=None if level_P is None else clustered_mean(level_P, prompts_P),
        below_chance=None
        if level_P is None or chance is None
        else clustered_share((level_P < chance).astype(float), prompts_P),
        dynamics=None if margins_PSE is None else _dynamics(margins_PSE, follows, prompts_P, deltas),
        spread_spearman=follows(table.losses_PSE.std(axis=(1, 2))) if table.complete > 1 else None,
        seed_spread_spearman=follows(own_PS.std(axis=1)) if seeds > 1 else None,
        first_last=first_last,
        seeds_alike=alike,
        scorers=_scorers(measured, own_PS, replicates) if seeds > 1 else None,
        criteria=_criteria(measured, replicates),
        notes=measured.notes,
    )


def _dynamics(
    margins_PSE: Floats, follows: Any, prompts_P: NDArray[np.str_], deltas: Sequence[float]
) -> Dynamics:
    evaluations = margins_PSE.shape[2]
    several = evaluations > 1
    learned = []
    for delta in deltas:
        steps_PS = learned_steps(margins_PSE, delta)
        by_end_P = (steps_PS <= evaluations).mean(axis=1)
        above_PE = (margins_PSE > delta).mean(axis=1)
        learned.append(
            Learned(
                delta,
                clustered_share(by_end_P, prompts_P),
                follows(steps_PS.mean(axis=1)) if several else None,
                tuple(clustered_share(above_P, prompts_P) for above_P in above_PE.T),
            )
        )
    events_PS = forgetting_events(margins_PSE)
    return Dynamics(
        wrong_always=clustered_share(_always_wrong(margins_PSE).astype(float), prompts_P),
        learned=tuple(learned),
        forgetting=clustered_mean(events_PS.mean(axis=1), prompts_P) if several else None,
        forgetting_spearman=follows(events_PS.sum(axis=1).astype(float)) if several else None,
    )


def _always_wrong(margins_PSE: Floats) -> NDArray[np.bool_]:
    return np.asarray((margins_PSE < 0.0).all(axis=(1, 2)))


def _scorers(measured: Measured, own_PS: Floats, replicates: int) -> Scorers:
    """Overlaps of easiest halves by the number of seeds."""
    table, seeds = measured.losses, own_PS.shape[1]
    others_PS = (own_PS.sum(axis=1, keepdims=True) - own_PS) / (seeds - 1)
    sets = seed_sets(
        _scores(table.pair_ids_P, table.prompt_ids_P, np.hstack([own_PS, others_PS])), "mean", Rule()
    )
    couples = list(itertools.combinations(range(seeds), 2))

    def overlaps(weights_P: Floats) -> Floats:
        one_one = [mean_overlap(sets.take(a, b), weights_P) for a, b in couples]
        one_others = [mean_overlap(sets.take(s, seeds + s), weights_P) for s in range(seeds)]
        return np.array([np.mean(one_one), np.mean(one_others)])

    one_one, one_others = estimates(cluster_bootstrap(overlaps, table.prompt_ids_P, replicates=replicates))
    predicted = predict_overlap(table, measured.how, Rule(), replicates=replicates)
    return Scorers(one_one, one_others, predicted.repetition, seeds_needed(predicted, TARGET))


def _criteria(measured: Measured, replicates: int) -> tuple[Likeness, ...]:
    """Other criteria against the difficulty, each on the pairs that have it."""
    table, found = measured.losses, dict(measured.criteria)
    if table.seeds_S:
        ready = {name: each for name, each in CRITERIA.items() if each.reads == ("loss",)}
        found = {each.axis: difficulty(table, name).difficulty_P for name, each in ready.items()} | found
    made: list[Likeness] = []
    for name, values_P in found.items():
        has_P = np.isfinite(values_P)
        if has_P.sum() < 2 or np.array_equal(values_P, measured.difficulty_P):
            continue
        of_two = np.stack([values_P[has_P], measured.difficulty_P[has_P]], axis=1)
        ids_P, prompts_P = table.pair_ids_P[has_P], table.prompt_ids_P[has_P]
        made += _likenesses((name, "difficulty"), ids_P, prompts_P, of_two, replicates, (HALF,))
    return tuple(made)


# --- Any two rankings -------------------------------------------------------------------------------------


def _likenesses(
    names: Sequence[str],
    ids_P: NDArray[np.str_],
    prompts_P: NDArray[np.str_],
    scores_PN: Floats,
    replicates: int,
    fractions: tuple[float, ...] = FRACTIONS,
) -> tuple[Likeness, ...]:
    """How alike each two of N rankings are."""
    table = _scores(ids_P, prompts_P, scores_PN)
    by_fraction = [
        agreement(table, rule=Rule(fraction=fraction), chance_loss=None, replicates=replicates)["seeds"]
        for fraction in fractions
    ]
    made = []
    for (a, b), entries in zip(itertools.combinations(names, 2), zip(*by_fraction, strict=True), strict=True):
        overlap, jaccard = (
            tuple(estimate_from_json(entry[name]) for entry in entries) for name in ("overlap", "jaccard")
        )
        spearman = estimate_from_json(entries[0]["spearman"])
        made.append(Likeness(a, b, len(ids_P), spearman, fractions, overlap, jaccard))
    return tuple(made)


def _scores(ids_P: NDArray[np.str_], prompts_P: NDArray[np.str_], scores_PN: Floats) -> LossTable:
    """N scores a pair as a table of one evaluation of N seeds, which is what agreement is measured on."""
    return LossTable(ids_P, prompts_P, tuple(range(scores_PN.shape[1])), (1,), scores_PN[:, :, None])


def _as_json(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.as_json()
    if hasattr(value, "_asdict"):
        return {name: _as_json(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _as_json(item) for name, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value
