"""Answers and verdicts -> results: each answer once, of known prompts, and win rates as the verdicts give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selective_dpo.errors import name_some
from selective_dpo.evaluation.evaluate import GENERATIONS, RESULTS, VERDICTS
from selective_dpo.evaluation.results import REFERENCE, EvaluationResults, from_json
from selective_dpo.run.verification.check import Check, Checks
from selective_dpo.run.verification.curricula import Arm, Written
from selective_dpo.run.verification.pairs import Kept
from selective_dpo.stats.win_rates import Verdicts, win_rate
from selective_dpo.storage.artifacts import read_json

COST = "cost.json"

_TOLERANCE = 1e-9


def check_evaluation(
    checks: Checks,
    folder: Path,
    arms: Sequence[Arm],
    curricula: Mapping[str, Written | None],
    held_out: Kept | None,
    prompts: Callable[[], set[str]] | None,
) -> None:
    """Answers and verdicts of known prompts, and the results that they give.

    `prompts` gives the ids of the prompts that could be asked; None where nobody knows.
    """
    with checks.of("evaluation") as check:
        if not (folder / RESULTS).is_file():
            check.absent()
            return
        results = from_json(read_json(folder / RESULTS))
        answers = pq.read_table(folder / GENERATIONS)
        verdicts = pq.read_table(folder / VERDICTS)
        check.counted = f"{len(results.policies)} arms, {len(answers):,} answers, {len(verdicts):,} verdicts"
        wanted = sorted([REFERENCE, *(arm.name for arm in arms)])
        check.equal(f"evaluation/{RESULTS}", "arms", sorted(arm.name for arm in results.policies), wanted)
        _check_arms(check, arms, curricula, results, held_out)
        _check_answers(check, answers, results)
        known = set(answers["prompt_id"].to_pylist())
        if prompts is not None:
            unknown = sorted(known - prompts())
            problem = f"{len(unknown):,} prompts are not among those to ask: {name_some(unknown)}"
            check.require(not unknown, f"evaluation/{GENERATIONS}", problem)
        _check_verdicts(check, answers, verdicts, results)


def _check_arms(
    check: Check,
    arms: Sequence[Arm],
    curricula: Mapping[str, Written | None],
    results: EvaluationResults,
    held_out: Kept | None,
) -> None:
    name = f"evaluation/{RESULTS}"
    for arm in arms:
        found, curriculum = results.arm(arm.name), curricula.get(arm.name)
        cost = arm.folder / "policy" / COST
        if found is None:
            continue
        if curriculum is not None:
            check.equal(name, f"pairs of {arm.name}", found.pairs, len(curriculum.order))
        if cost.is_file():
            check.equal(name, f"updates of {arm.name}", found.updates, read_json(cost)["optimizer_steps"])
    for result in results.policies:
        if result.held_out is not None and held_out is not None:
            counts = (result.held_out.pairs, result.held_out.prompts)
            wanted = (len(held_out.pair_ids), len(set(held_out.prompt_ids)))
            check.equal(name, f"held-out pairs and prompts of {result.name}", counts, wanted)


def _check_answers(check: Check, answers: pa.Table, results: EvaluationResults) -> None:
    name = f"evaluation/{GENERATIONS}"
    columns = (answers[column].to_pylist() for column in ("arm", "prompt_id", "sample"))
    found = Counter(zip(*columns, strict=True))
    prompts = sorted(set(answers["prompt_id"].to_pylist()))
    arms = [arm.name for arm in results.policies] if len(answers) else []
    wanted = set(product(arms, prompts, range(results.samples)))
    check.equal(f"evaluation/{RESULTS}", "prompts", results.prompts, len(prompts))
    for keys, problem in (
        (sorted(key for key, count in found.items() if count > 1), "stand more than once"),
        (sorted(wanted - found.keys()), "are missing"),
        (sorted(found.keys() - wanted, key=str), "were not asked for"),
    ):
        if keys:
            named = name_some(" ".join(map(str, key)) for key in keys)
            check.wrong(name, f"{len(keys):,} answers (arm, prompt_id, sample) {problem}: {named}")


def _check_verdicts(check: Check, answers: pa.Table, verdicts: pa.Table, results: EvaluationResults) -> None:
    name = f"evaluation/{VERDICTS}"
    given = {
        key: set(zip(*(rows[column].to_pylist() for column in ("prompt_id", "sample")), strict=True))
        for key, rows in _by_arm(answers).items()
    }
    opponents = given.get(REFERENCE, set())
    by_arm = _by_arm(verdicts)
    for arm, rows in by_arm.items():
        columns = [rows[column].to_pylist() for column in ("prompt_id", "sample", "opponent_sample")]
        unknown = [
            f"{prompt} {sample}:{other}"
            for prompt, sample, other in zip(*columns, strict=True)
            if (prompt, sample) not in given.get(arm, set()) or (prompt, other) not in opponents
        ]
        check.require(
            not unknown, name, f"{arm}: verdicts on answers that are not there: {name_some(unknown)}"
        )
        judged, wanted = set(columns[0]), {prompt for prompt, _ in given.get(arm, set())}
        missing = sorted(wanted - judged)
        check.require(
            not missing, name, f"{arm}: no verdict on {len(missing):,} prompts: {name_some(missing)}"
        )
        result = results.arm(str(arm))
        if result is not None and result.win_rate is not None:
            again = win_rate(Verdicts(columns[0], np.array(rows["score"].to_pylist()))).value
            problem = f"win rate of {arm} is {result.win_rate.value:.6f}, and its verdicts give {again:.6f}"
            is_same = abs(again - result.win_rate.value) <= _TOLERANCE
            check.require(is_same, f"evaluation/{RESULTS}", problem)
    silent = [arm.name for arm in results.policies if arm.win_rate is not None and arm.name not in by_arm]
    check.require(not silent, name, f"win rates without verdicts: {name_some(silent)}")


def _by_arm(table: pa.Table) -> dict[str, pa.Table]:
    arms = table["arm"].to_pylist()
    rows_of: dict[str, list[int]] = {}
    for row, arm in enumerate(arms):
        rows_of.setdefault(arm, []).append(row)
    return {arm: table.take(rows) for arm, rows in rows_of.items()}
