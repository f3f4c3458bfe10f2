"""One arm's result, from its answers and verdicts."""

from __future__ import annotations

from selective_dpo.core.estimates import Estimate, clustered_mean
from selective_dpo.core.preference_metrics import PreferenceMetrics
from selective_dpo.core.results import ArmResult
from selective_dpo.core.winrates import Verdicts, win_rate, win_rate_difference
from selective_dpo.evaluation.generation import Answers


def arm_result(
    *,
    name: str,
    label: str,
    pairs: int,
    updates: int,
    held_out: PreferenceMetrics | None,
    answers: Answers,
    verdicts: Verdicts | None,
    selected_verdicts: Verdicts | None,
) -> ArmResult:
    """The result of one arm from its answers and verdicts.

    `selected_verdicts` are those of the arm `selected`, None for that arm itself.

    Raises:
        IdentityError: the arm and `selected` were judged on different prompts.
    """
    difference = None
    if verdicts is not None and selected_verdicts is not None:
        difference = win_rate_difference(selected_verdicts, verdicts)
    return ArmResult(
        name=name,
        label=label,
        pairs=pairs,
        updates=updates,
        held_out=held_out,
        win_rate=win_rate(verdicts) if verdicts is not None else None,
        difference=difference,
        answer_tokens=mean_answer_tokens(answers) if answers else None,
    )


def mean_answer_tokens(answers: Answers) -> Estimate:
    """Mean number of tokens of an answer, clustered by prompt."""
    lengths = [answer.tokens for samples in answers.values() for answer in samples]
    prompt_ids = [prompt_id for prompt_id, samples in answers.items() for _ in samples]
    return clustered_mean(lengths, prompt_ids)
