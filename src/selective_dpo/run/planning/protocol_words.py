"""The comparison of protocols as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from selective_dpo.config import SelectConfig
from selective_dpo.report.tables import text_table
from selective_dpo.run.planning.measured import MEASURED_ON, Range, nearest_fraction
from selective_dpo.run.planning.protocols import PlannedProtocol, Scoring, easiest_fraction
from selective_dpo.run.planning.quantities import readable_count

_HEADER = [
    "scoring by",
    "seeds x evaluations",
    "forward",
    "backward",
    "tokens",
    "plain",
    "share",
    "FLOPs",
    "DPO epochs",
    "Spearman",
    "overlap",
]


def protocols_text(protocols: Sequence[PlannedProtocol], select: SelectConfig, pairs: int | None) -> str:
    """The table, and below it what its columns mean."""
    table = text_table(_HEADER, [_row(each) for each in protocols])
    return "\n".join([table, *_legend(select, pairs)])


def _row(planned: PlannedProtocol) -> list[str]:
    scoring, costs, expected = planned.scoring, planned.costs, planned.expected
    is_measure = scoring.protocol == "paper"
    return [
        _name(scoring),
        f"{len(scoring.seeds)} x {scoring.evaluations}",
        _passes(planned.per_pair.forward, costs and costs.passes.forward),
        _passes(planned.per_pair.backward, costs and costs.passes.backward),
        readable_count(costs.tokens) if costs else "?",
        readable_count(costs.plain_tokens) if costs else "?",
        f"{costs.tokens / costs.plain_tokens:.0%}" if costs else "?",
        readable_count(costs.flops) if costs and costs.flops is not None else "?",
        f"{costs.plain_epochs:.3g}" if costs and costs.plain_epochs is not None else "?",
        "itself" if is_measure else _range(expected and expected.spearman, 4),
        "itself" if is_measure else _range(expected and expected.overlap, 3),
    ]


def _name(scoring: Scoring) -> str:
    part = {"least": ", at least", "most": ", at most"}.get(scoring.part, "")
    return f"{scoring.protocol}{part}{' (this recipe)' if scoring.is_own else ''}"


def _passes(per_pair: float, number: float | None) -> str:
    times = f"{per_pair:.4g} P"
    return times if number is None else f"{readable_count(number)} = {times}"


def _range(measured: Range | None, digits: int) -> str:
    return "?" if measured is None else f"{measured.low:.{digits}f} .. {measured.high:.{digits}f}"


def _legend(select: SelectConfig, pairs: int | None) -> list[str]:
    number = "P pairs" if pairs is None else f"P = {pairs:,} pairs"
    return [
        f"forward, backward: {number} through the model, each with both completions: the reference once, the "
        "scorers' training, each held-out evaluation; what checkpointing computes again is in the FLOPs only",
        "tokens: computed here. plain: for the same protocol in plain TRL batches, two rows a pair with the "
        "prompt in both, padded to the longest row of the batch, pairs in the order dealt (batches of the "
        "recipe's size in training, TRL's 8 pairs in evaluation), each batch through the reference as well",
        "FLOPs: of all the scoring, cached or not. DPO epochs: over one DPO epoch on all pairs in plain "
        "batches, with the settings of `train` and the reference in every step",
        f"Spearman, overlap: agreement with `paper`, least .. largest as measured on {MEASURED_ON}; "
        f"{_overlap_words(select, pairs)}; noisier scorers keep less (docs/protocols.md). ?: not measured",
    ]


def _overlap_words(select: SelectConfig, pairs: int | None) -> str:
    if select.aggregate != "mean":
        return "not with the aggregate of this recipe"
    fraction = easiest_fraction(select, pairs)
    if fraction is None:
        return "the overlap not with the selection of this recipe"
    nearest = nearest_fraction(fraction)
    exactly = math.isclose(nearest, fraction)
    which = "" if exactly else f", the nearest that was measured to this recipe's {fraction:.3g}"
    return f"overlap of the easiest {nearest:.0%}{which}"
