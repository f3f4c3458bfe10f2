"""What the official judgments of a benchmark say, as text."""

from __future__ import annotations

from selective_dpo.evaluation.judgments import Judgments
from selective_dpo.report.tables import (
    number_with_interval,
    points_with_interval,
    printable,
    share_with_interval,
    text_table,
)


def judgments_text(found: Judgments) -> str:
    """A line a model, then how the numbers were found; columns that no model has a value for are left out."""
    is_share = found.benchmark != "mt-bench"
    of_value = share_with_interval if is_share else number_with_interval
    of_difference = points_with_interval if is_share else number_with_interval
    names = list(dict.fromkeys(score.model for score in found.scores))
    turns = max(len(score.turns) for score in found.scores)
    rows = [
        {
            "model": score.model,
            "category": score.part,
            "questions": f"{score.questions:,}",
            ("win rate" if is_share else "score") + " (95%)": of_value(score.score),
            **{
                f"turn {turn + 1}": of_value(score.turns[turn]) if turn < len(score.turns) else ""
                for turn in range(turns)
            },
            f"{names[0]} minus it": of_difference(score.first_minus),
            "controlled": share_with_interval(score.controlled),
            f"{names[0]} minus it, controlled": points_with_interval(score.controlled_first_minus),
            "characters": number_with_interval(score.characters, 0),
        }
        for score in found.scores
    ]
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    left = 2 if "category" in header else 1
    table = text_table(header, [[row[name] for name in header] for row in rows], left=left)
    against = f", against {found.baseline}" if found.baseline else ""
    notes = [f"{found.benchmark}, judged by {found.judge or 'an unnamed judge'}{against}"]
    notes += [f"controlled for {found.controlled_by}"] if found.controlled_by else []
    return "\n".join([table, "", *map(printable, notes), *found.notes, "The intervals are over questions."])
