"""Which pairs are kept, and in which order they are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.config import DEFAULT_FRACTION
from selective_dpo.errors import ConfigError

RuleName = Literal["easiest", "hardest", "random", "below", "band", "all"]


# `random` and `shuffled` may share a seed and must still be independent draws.
_RULE_STREAM, _ORDER_STREAM = 1, 2


@dataclass(frozen=True)
class Rule:
    """A selection rule and its one setting, which `SelectConfig` has checked."""

    name: RuleName = "easiest"
    fraction: float | None = None
    """Share of the pairs, in (0, 1]; `DEFAULT_FRACTION` when a size is needed and none is given."""
    count: int | None = None
    """Number of pairs, instead of `fraction`."""
    threshold: float | None = None
    """Largest difficulty kept by `below`."""
    band: tuple[float, float] | None = None
    """Lower and upper quantile kept by `band`."""
    seed: int = 0
    """Of the draw of `random`."""


class Selection(NamedTuple):
    """What a rule made of each pair."""

    rank_P: NDArray[np.int64]
    """0 is the easiest; ties are broken by pair id, so ranks do not depend on the order of the rows."""
    selected_P: NDArray[np.bool_]
    reason_P: NDArray[np.str_]
    """Why the pair was selected or left out."""


def select(difficulty_P: NDArray[np.float64], pair_ids_P: NDArray[np.str_], rule: Rule) -> Selection:
    """Apply `rule` to difficulty_P [P] of the pairs pair_ids_P [P], each id once.

    Raises:
        ConfigError: the rule's setting does not fit these pairs: it would keep none, or more than there are.
        ValueError: no pairs, arrays of different length, or a difficulty that is not finite.
    """
    if difficulty_P.shape != pair_ids_P.shape or difficulty_P.ndim != 1 or not len(difficulty_P):
        raise ValueError(f"need a difficulty for each id: {difficulty_P.shape} and {pair_ids_P.shape}")
    if not np.isfinite(difficulty_P).all():
        raise ValueError("a difficulty is not finite")
    rank_P = ranks(difficulty_P, pair_ids_P)
    pairs = len(rank_P)
    if rule.name == "random":
        selected_P = _draw(pair_ids_P, size_of(pairs, rule), rule.seed)
        return Selection(rank_P, selected_P, np.where(selected_P, "random control", "not drawn"))
    if rule.name == "below":
        selected_P, named = up_to_threshold(difficulty_P, rule), f"the threshold {rule.threshold:g}"
        return Selection(rank_P, selected_P, np.where(selected_P, f"at or below {named}", f"above {named}"))
    low, high = rank_window(pairs, rule)
    reasons = _window_reasons(rule)
    place_P = np.where(rank_P < low, 0, np.where(rank_P < high, 1, 2))
    return Selection(rank_P, place_P == 1, np.array(reasons)[place_P])


def ranks(difficulty_P: NDArray[np.float64], pair_ids_P: NDArray[np.str_]) -> NDArray[np.int64]:
    """Rank of each pair from 0, the easiest; equal difficulties are ranked by pair id."""
    by_id = ascending(pair_ids_P)
    by_difficulty = by_id[np.argsort(difficulty_P[by_id], kind="stable")]
    rank_P = np.empty(len(by_id), dtype=np.int64)
    rank_P[by_difficulty] = np.arange(len(by_id))
    return rank_P


def ascending(pair_ids_P: NDArray[np.str_]) -> NDArray[np.int64]:
    """Rows in the order of their ids. Tables come sorted, and looking is much cheaper than sorting."""
    if bool(np.all(pair_ids_P[:-1] <= pair_ids_P[1:])):
        return np.arange(len(pair_ids_P))
    return np.argsort(pair_ids_P, kind="stable")


def size_of(pairs: int, rule: Rule) -> int:
    """How many of `pairs` pairs a sized rule keeps: fraction times pairs, halves up, at least one.

    Raises:
        ConfigError: the count is larger than the number of pairs.
    """
    if rule.count is not None:
        if rule.count > pairs:
            raise ConfigError(f"select.count is {rule.count:,}, but there are {pairs:,} scored pairs")
        return rule.count
    fraction = DEFAULT_FRACTION if rule.fraction is None else rule.fraction
    return max(1, _share_of(fraction, pairs))


def rank_window(pairs: int, rule: Rule) -> tuple[int, int]:
    """First rank that the rule keeps, and the first after it that it does not.

    Raises:
        ConfigError: more pairs are asked for than there are, or a band keeps none.
        ValueError: the rule does not go by rank (`random`, `below`).
    """
    if rule.name == "all":
        return 0, pairs
    if rule.name == "easiest":
        return 0, size_of(pairs, rule)
    if rule.name == "hardest":
        return pairs - size_of(pairs, rule), pairs
    if rule.name != "band" or rule.band is None:
        raise ValueError(f"rule '{rule.name}' does not go by rank")
    low, high = (_share_of(quantile, pairs) for quantile in rule.band)
    if low == high:
        raise ConfigError(f"select.band {list(rule.band)} keeps none of {pairs:,} pairs: widen it")
    return low, high


def _share_of(fraction: float, pairs: int) -> int:
    # In decimal: 0.29 * 50 is 14.499999999999998 in binary floating point, and should be 14.5.
    return int((Decimal(str(fraction)) * pairs).to_integral_value(ROUND_HALF_UP))


def _draw(pair_ids_P: NDArray[np.str_], size: int, seed: int) -> NDArray[np.bool_]:
    generator = np.random.default_rng([_RULE_STREAM, seed])
    drawn = ascending(pair_ids_P)[generator.permutation(len(pair_ids_P))[:size]]
    selected_P = np.zeros(len(pair_ids_P), dtype=np.bool_)
    selected_P[drawn] = True
    return selected_P


def up_to_threshold(difficulty: NDArray[np.float64], rule: Rule) -> NDArray[np.bool_]:
    """What `below` keeps, of difficulties of any shape.

    Raises:
        ConfigError: there is no threshold, or nothing is at or below it.
    """
    if rule.threshold is None:
        raise ConfigError("rule 'below' needs a threshold: set select.threshold, such as 0.693")
    kept = difficulty <= rule.threshold
    if not kept.any():
        raise ConfigError(
            f"no pair has a difficulty at or below select.threshold {rule.threshold:g} "
            f"(the smallest is {difficulty.min():.4g}): raise it"
        )
    return kept


def _window_reasons(rule: Rule) -> tuple[str, str, str]:
    """The reason of pairs easier than the window, in it, and harder than it."""
    if rule.name == "all":
        return "", "all scored pairs", ""
    if rule.name == "band" and rule.band is not None:
        named = f"the band {_percent(rule.band[0])} to {_percent(rule.band[1])}"
        return f"easier than {named}", f"within {named}", f"harder than {named}"
    size = f"{rule.count:,} pairs" if rule.count is not None else _percent(rule.fraction or DEFAULT_FRACTION)
    named = f"the {rule.name} {size}"
    return f"easier than {named}", f"among {named}", f"harder than {named}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g}%"


# --- In which order the selected pairs are trained on -----------------------------------------------------


Order = Literal["easy-to-hard", "hard-to-easy", "shuffled"]

NOT_SELECTED = -1


def training_positions(
    selection: Selection, pair_ids_P: NDArray[np.str_], order: Order = "easy-to-hard", seed: int = 0
) -> NDArray[np.int64]:
    """Place of each pair [P] in the training order, from 0; `NOT_SELECTED` for the others.

    `shuffled` is a permutation of the selected ids in ascending order: it depends on which pairs are
    selected and on `seed`, neither on the rows' order nor on the difficulties.
    """
    if order == "shuffled":
        by_id = ascending(pair_ids_P)
        first_to_last = by_id[selection.selected_P[by_id]]
        generator = np.random.default_rng([_ORDER_STREAM, seed])
        first_to_last = generator.permutation(first_to_last)
    elif order in ("easy-to-hard", "hard-to-easy"):
        by_rank = np.empty(len(pair_ids_P), dtype=np.int64)
        by_rank[selection.rank_P] = np.arange(len(pair_ids_P))
        first_to_last = by_rank[selection.selected_P[by_rank]]
        if order == "hard-to-easy":
            first_to_last = first_to_last[::-1]
    else:
        raise ValueError(f"unknown order {order!r}")
    position_P = np.full(len(pair_ids_P), NOT_SELECTED, dtype=np.int64)
    position_P[first_to_last] = np.arange(len(first_to_last))
    return position_P
