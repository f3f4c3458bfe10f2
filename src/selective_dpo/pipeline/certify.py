"""Protocol `certified`: seeds are added until the selected set is known to be stable, and how well.

It stops where the lower end of the predicted overlap with a fresh repetition reaches the target. That end
assumes what `ASSUMES` says, which is told wherever the certificate is.

`scores/certificate.json` says how many seeds that took and what was predicted from them. It is made from
the records, so where it is missing or belongs to other records it is simply made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from selective_dpo.artifacts import content_key, read_json, write_json
from selective_dpo.config import DEFAULT_TARGET
from selective_dpo.core.stability import Prediction, is_stable, predict_overlap, seeds_needed
from selective_dpo.curriculum.build import rule_of
from selective_dpo.engine.processes import this_process, wait_for_everyone
from selective_dpo.errors import ArtifactError
from selective_dpo.pipeline.jobs import record_digests, scorer_job
from selective_dpo.scoring.plan import ScorerRun, planned_runs
from selective_dpo.scoring.score import collect_losses

if TYPE_CHECKING:
    from selective_dpo.pipeline.stages import Run

FEWEST_SEEDS = 2
"""Below this there is nothing to compare."""
ASSUMES = "if all pairs of a seed share nothing, such as its scorers' taste for length"
"""What the interval rests on (see `core.stability.predict_overlap`)."""


def certified_runs(run: Run) -> tuple[ScorerRun, ...]:
    """The scorers that `run` needs as far as is known: those of its certificate, else of two seeds."""
    planned = planned_runs(run.recipe.score)
    try:
        found = read_json(run.folder.certificate)
        scorers = planned[: 2 * int(found["seeds"])]
        is_valid = found["key"] == _key(run, scorers)
    except ArtifactError:
        is_valid = False
    return scorers if is_valid else planned[: 2 * FEWEST_SEEDS]


def ensure_certified(run: Run, score: Callable[[Sequence[ScorerRun]], None]) -> None:
    """Score seed after seed until the lower end reaches the target, or the recipe has no further seed.

    `score` makes the records of the scorers it is given, where they are missing.
    """
    planned = planned_runs(run.recipe.score)
    for scorers in range(len(certified_runs(run)), len(planned) + 1, 2):
        score(planned[:scorers])
        if _certificate(run, planned[:scorers])["reached"]:
            return
    run.tell(
        f"  NOT certified: the recipe's {len(run.recipe.score.seeds)} seeds are used up below the target; "
        "the curriculum says what was predicted"
    )


def certificate(run: Run) -> dict[str, Any] | None:
    """What the curriculum says of its stability; None for other protocols."""
    return read_json(run.folder.certificate) if run.recipe.score.protocol == "certified" else None


def _certificate(run: Run, scorers: Sequence[ScorerRun]) -> dict[str, Any]:
    """The certificate of these scorers' records, made where it is not there."""
    key = _key(run, scorers)
    found = read_json(run.folder.certificate) if run.folder.certificate.is_file() else {}
    if found.get("key") == key:
        return found
    wait_for_everyone()
    if this_process().is_main_process:
        table = collect_losses([run.folder.scores(scorer) for scorer in scorers])
        prediction = predict_overlap(table, run.recipe.select.aggregate, rule_of(run.recipe.select))
        write_json(run.folder.certificate, _as_json(prediction, key, _target(run)))
    wait_for_everyone()
    found = read_json(run.folder.certificate)
    run.tell(f"  {_words(found)}")
    return found


def _key(run: Run, scorers: Sequence[ScorerRun]) -> str:
    select = run.recipe.select
    return content_key(
        records=record_digests([scorer_job(run, scorer) for scorer in scorers]),
        aggregate=select.aggregate,
        rule=asdict(rule_of(select)),
        target=_target(run),
        decides="lower end",
    )


def _target(run: Run) -> float:
    return run.recipe.score.target_overlap or DEFAULT_TARGET


def _as_json(prediction: Prediction, key: str, target: float) -> dict[str, Any]:
    return {
        "key": key,
        "seeds": prediction.seeds,
        "target": target,
        "reached": is_stable(prediction, target),
        "assumes": ASSUMES,
        "seeds_needed": seeds_needed(prediction, target),
        "prediction": prediction.as_json(),
    }


def _words(found: dict[str, Any]) -> str:
    repetition = found["prediction"]["repetition"]
    low, high = (_percent(repetition[end]) for end in ("low", "high"))
    return (
        f"{found['seeds']} seeds: a fresh repetition is predicted to select {repetition['value']:.1%} of the "
        f"same pairs, 95% interval {low} to {high} {ASSUMES}; "
        f"the lower end decides, target {found['target']:.0%}"
    )


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"
