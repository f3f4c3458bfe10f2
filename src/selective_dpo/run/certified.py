"""Protocol `certified`: seeds are added until the selected set is known to be stable, and how well.

It stops where the lower end of the predicted overlap with a fresh repetition reaches the target. That end
rests on an assumption (`ASSUMES`), which is said wherever the certificate is.

`scores/certificate.json` says how many seeds that took and what was predicted from them. It is made from the
records, so where it is missing or belongs to other records it is simply made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from selective_dpo.curriculum.build import rule_of
from selective_dpo.curriculum.stability import is_stable, predict_overlap, seeds_needed
from selective_dpo.difficulty.protocols import ScorerRun, planned_runs
from selective_dpo.difficulty.scorer import collect_losses
from selective_dpo.distributed.processes import this_process, wait_for_everyone
from selective_dpo.run.keys import Run, certificate_key, target_overlap
from selective_dpo.storage.artifacts import read_json, write_json

ASSUMES = "if all pairs of a seed share nothing, such as its scorers' taste for length"
"""What the interval rests on (see `curriculum.stability.predict_overlap`)."""


def scorers_until_stable(run: Run) -> Iterator[tuple[ScorerRun, ...]]:
    """The scorers to have, seed by seed: those of the next step follow when those of the last have records.

    It ends where the lower end of the prediction reaches the target, or the recipe has no further seed.
    """
    planned = planned_runs(run.recipe.score)
    for scorers in range(len(run.scorer_runs), len(planned) + 1, 2):
        yield planned[:scorers]
        if _certify(run, planned[:scorers])["reached"]:
            return
    run.tell(
        f"  NOT certified: the recipe's {len(run.recipe.score.seeds)} seeds are used up below the target; "
        "the curriculum says what was predicted"
    )


def certificate(run: Run) -> dict[str, Any] | None:
    """What the curriculum says of its stability; None for other protocols."""
    return read_json(run.folder.certificate) if run.recipe.score.protocol == "certified" else None


def _certify(run: Run, scorers: Sequence[ScorerRun]) -> dict[str, Any]:
    """The certificate of these scorers' records, made where it is not there."""
    key = certificate_key(run, scorers)
    found = read_json(run.folder.certificate) if run.folder.certificate.is_file() else {}
    if found.get("key") == key:
        return found
    wait_for_everyone()
    if this_process().is_main_process:
        how = run.recipe.select.aggregate
        table = collect_losses([run.folder.scores(scorer) for scorer in scorers], criteria=[how])
        prediction, target = predict_overlap(table, how, rule_of(run.recipe.select)), target_overlap(run)
        certified = {
            "key": key,
            "seeds": prediction.seeds,
            "target": target,
            "reached": is_stable(prediction, target),
            "assumes": ASSUMES,
            "seeds_needed": seeds_needed(prediction, target),
            "prediction": prediction.as_json(),
        }
        write_json(run.folder.certificate, certified)
    wait_for_everyone()
    found = read_json(run.folder.certificate)
    run.tell(f"  {_describe(found)}")
    return found


def _describe(found: dict[str, Any]) -> str:
    repetition = found["prediction"]["repetition"]
    low, high = (_percent(repetition[end]) for end in ("low", "high"))
    return (
        f"{found['seeds']} seeds: a fresh repetition is predicted to select {repetition['value']:.1%} of the "
        f"same pairs, 95% interval {low} to {high} {ASSUMES}; "
        f"the lower end decides, target {found['target']:.0%}"
    )


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"
