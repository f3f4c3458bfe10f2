"""How far cheaper protocols agree with `paper`: figures measured once, and where they come from.

They are the least and the largest of nine values: three models, and whichever one (or two) of the three
seeds. Source: the original authors' records, of which seeds and evaluations were left out;
docs/protocols.md says how, and tests/unit/test_plan_protocols.py takes these numbers from the records again.
"""

from __future__ import annotations

from typing import NamedTuple

MEASURED_ON = "dpo-mix-7k with Qwen2.5 of 1.5B, 7B and 14B"


class Range(NamedTuple):
    """The least and the largest value measured."""

    low: float
    high: float


class Kept(NamedTuple):
    """What a protocol keeps of `paper`."""

    spearman: Range
    """Rank correlation of the difficulties."""
    overlap: dict[float, Range]
    """Share of the easiest pairs that are also among the easiest of `paper`, by the fraction selected."""


MEASURED = {
    # (seeds, evaluations of each scorer); the evaluations are the third and the last of five.
    (1, 2): Kept(
        Range(0.9969, 0.9981),
        {
            0.1: Range(0.927, 0.948),
            0.2: Range(0.951, 0.969),
            0.3: Range(0.967, 0.975),
            0.4: Range(0.976, 0.983),
            0.5: Range(0.977, 0.988),
            0.6: Range(0.985, 0.991),
            0.7: Range(0.989, 0.993),
            0.8: Range(0.993, 0.996),
            0.9: Range(0.995, 0.998),
        },
    ),
    (2, 2): Kept(
        Range(0.9984, 0.9993),
        {
            0.1: Range(0.951, 0.975),
            0.2: Range(0.968, 0.980),
            0.3: Range(0.979, 0.988),
            0.4: Range(0.984, 0.991),
            0.5: Range(0.987, 0.993),
            0.6: Range(0.990, 0.995),
            0.7: Range(0.993, 0.996),
            0.8: Range(0.995, 0.998),
            0.9: Range(0.997, 0.999),
        },
    ),
}


class Expected(NamedTuple):
    """The agreement with `paper` that a protocol's records lead to expect, as far as was measured."""

    spearman: Range
    overlap: Range | None
    """None: not measured for this selection."""
    fraction: float | None
    """The measured fraction nearest to the one in use."""


def expected_agreement(seeds: int, evaluations: int, fraction: float | None) -> Expected | None:
    """What was measured for this many seeds and evaluations, the easiest `fraction` being selected.

    None where nothing was. `fraction` None: the selection is not one of the easiest share, so nothing is
    known of its overlap.
    """
    kept = MEASURED.get((seeds, evaluations))
    if kept is None:
        return None
    if fraction is None:
        return Expected(kept.spearman, None, None)
    nearest = nearest_fraction(fraction)
    return Expected(kept.spearman, kept.overlap[nearest], nearest)


def nearest_fraction(fraction: float) -> float:
    """The measured fraction that is nearest."""
    return min(max(round(10 * fraction), 1), 9) / 10
