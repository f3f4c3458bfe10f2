"""`verify`: a run as it lies on disk, checked from its input rows to its results. Nothing is written.

It needs neither the model nor the data that the run was made from, and takes a run that is not finished as it
is: what is absent is said to be absent. What it cannot tell is whether the input files are still the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selective_dpo.config import Recipe
from selective_dpo.config.load import diff_config, dump_config, make_recipe
from selective_dpo.curriculum.import_ import Outside, imported_from, read_outside
from selective_dpo.curriculum.table import TABLE, Curriculum
from selective_dpo.difficulty.protocols import ScorerRun, planned_runs
from selective_dpo.errors import ArtifactError
from selective_dpo.evaluation.evaluate import check_arm_names, policy_names
from selective_dpo.evaluation.results import SELECTED, repeat_name
from selective_dpo.logprobs.compute import PairLogps
from selective_dpo.logprobs.reference import load_reference
from selective_dpo.report.tables import text_table
from selective_dpo.run.folder import CONFIG, RECIPE, RunDirectory
from selective_dpo.run.keys import (
    INPUTS,
    JUDGE,
    Run,
    evaluation_key,
    prompts_to_answer,
    scorer_job,
    training_job,
)
from selective_dpo.run.verification.check import DAMAGE, Check, Checks
from selective_dpo.run.verification.curricula import MODEL, Arm, Written, check_curriculum
from selective_dpo.run.verification.evaluation import check_evaluation
from selective_dpo.run.verification.files import check_files
from selective_dpo.run.verification.pairs import Kept, check_apart, check_pairs, check_reference
from selective_dpo.run.verification.policies import check_keys, check_policy, check_receipt
from selective_dpo.run.verification.scores import Inputs, check_scores
from selective_dpo.storage.artifacts import read_json

_SCORER = re.compile(r"seed(\d{1,18})-fold([01])")


@dataclass(frozen=True)
class Verification:
    """The answer."""

    root: Path
    checks: tuple[Check, ...]

    @property
    def problems(self) -> list[str]:
        """A line each: the artifact, what is wrong with it, examples of ids."""
        return [problem for check in self.checks for problem in check.problems]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        checks = [
            {"name": each.name, "status": each.status, "counted": each.counted, "problems": each.problems}
            for each in self.checks
        ]
        return {"run": str(self.root), "ok": not self.problems, "checks": checks}

    def text(self) -> str:
        """A table of the checks, and the verdict."""
        rows = [(check.name, check.status, check.counted) for check in self.checks]
        found = f"{len(self.problems):,} problem(s)" if self.problems else "nothing is wrong"
        return f"{text_table(('check', 'result', 'what was checked'), rows, left=3)}\n{self.root}: {found}"


def verify_run(root: str | Path) -> Verification:
    """Check every digest of the run in `root`, and that its ids and numbers reconcile from input to policy.

    Problems are collected, not raised: the first does not hide the others.

    Raises:
        ArtifactError: `root` is no run's folder.
    """
    folder = RunDirectory(Path(root))
    if not any((folder.root / name).exists() for name in (CONFIG, "pairs", TABLE)):
        raise ArtifactError(f"{root} is not a run's folder: it holds neither {CONFIG} nor pairs nor {TABLE}")
    checks = Checks()
    check_files(checks, folder.root)
    recipe = _check_recipe(checks, folder)
    kept = check_pairs(checks, folder.root, folder.pairs)
    arms = _arms(folder, recipe)
    imported = _trained(arms)
    if imported is None:
        is_imported = recipe is not None and bool(recipe.curriculum)
        ids = None if kept is None or is_imported else kept.pair_ids
        check_reference(checks, folder.root, folder.reference, ids)
    else:
        check_reference(checks, folder.root, folder.reference, imported, "those that are trained on")
    held_out = _check_held_out(checks, folder)
    scorers = _scorers(folder, recipe)
    check_scores(checks, folder, scorers, Inputs(recipe, kept, _reference(folder)))
    outside = _outside(recipe)
    curricula: dict[str, Written | None] = {}
    for arm in arms:
        curricula[arm.name] = check_curriculum(checks, folder, arm, kept, outside)
        check_policy(checks, folder.root, arm, curricula[arm.name])
    repeats = _repeats(folder, recipe)
    for repeat in repeats:
        curricula[repeat.name] = curricula[SELECTED]
        check_policy(checks, folder.root, repeat, curricula[SELECTED])
    arms += repeats
    run = None if recipe is None else _run(folder, recipe, curricula)
    check_evaluation(checks, folder.evaluation, arms, curricula, held_out, _prompts(run))
    if run is not None:
        check_keys(checks, folder.root, _keys(run, scorers, arms))
    check_receipt(checks, folder.root)
    return Verification(folder.root, tuple(checks.done))


def _check_recipe(checks: Checks, folder: RunDirectory) -> Recipe | None:
    """The recipe as it was resolved: all else is checked against it."""
    recipe = None
    with checks.of("recipe", CONFIG) as check:
        if not (folder.root / CONFIG).is_file():
            check.absent("what depends on the recipe is not checked")
            return None
        resolved = make_recipe(read_json(folder.root / CONFIG))
        check_arm_names(policy_names(resolved.evaluate))  # they name folders
        recipe = resolved
        check.counted = recipe.name
        given = yaml.safe_load((folder.root / RECIPE).read_text("utf-8"))
        for change in diff_config(dump_config(make_recipe(given)), dump_config(recipe)):
            check.wrong(CONFIG, f"differs from {RECIPE}: {change}")
    return recipe


def _check_held_out(checks: Checks, folder: RunDirectory) -> Kept | None:
    if not folder.test_pairs.is_dir():
        return None
    held_out = check_pairs(checks, folder.root, folder.test_pairs)
    check_reference(
        checks, folder.root, folder.test_reference, held_out.pair_ids if held_out is not None else None
    )
    check_apart(checks, folder.root, folder.pairs, folder.test_pairs)
    return held_out


def _reference(folder: RunDirectory) -> PairLogps | None:
    try:
        return load_reference(folder.reference)
    except DAMAGE:  # absent, or named already
        return None


def _scorers(folder: RunDirectory, recipe: Recipe | None) -> tuple[ScorerRun, ...]:
    """The scorers that the recipe plans; without one, those that are there."""
    if recipe is None:
        names = sorted(path.name for path in (folder.root / "scores").glob("seed*-fold*"))
        found = [match for match in map(_SCORER.fullmatch, names) if match]
        return tuple(ScorerRun(int(match[1]), int(match[2])) for match in found)
    if recipe.curriculum:
        return ()
    planned = planned_runs(recipe.score)
    if recipe.score.protocol == "certified" and folder.certificate.is_file():
        try:
            return planned[: 2 * int(read_json(folder.certificate)["seeds"])]
        except DAMAGE:
            return planned
    return planned


def _arms(folder: RunDirectory, recipe: Recipe | None) -> list[Arm]:
    if recipe is None:
        names = sorted(path.name for path in (folder.root / "controls").glob("*") if path.is_dir())
        return [Arm(SELECTED, folder.root, None), *(Arm(name, folder.control(name), None) for name in names)]
    return [Arm(name, place, select) for name, (select, place) in Run(recipe, folder).arms.items()]


def _trained(arms: Sequence[Arm]) -> list[str] | None:
    """The pairs that some arm trains on, where difficulty was imported: no others need a reference. None: it
    was measured, or a curriculum cannot be read, which is said elsewhere."""
    try:
        curricula = [Curriculum.load(arm.folder) for arm in arms]
    except DAMAGE:
        return None
    if not all(imported_from(each.facts) for each in curricula):
        return None
    return sorted({pair_id for each in curricula for pair_id in each.order})


def _outside(recipe: Recipe | None) -> Outside | None:
    """What the difficulty was imported from, if it is still there."""
    try:
        return read_outside(recipe.curriculum) if recipe is not None and recipe.curriculum else None
    except DAMAGE:
        return None


def _repeats(folder: RunDirectory, recipe: Recipe | None) -> list[Arm]:
    """The run's own training with other seeds: those that the recipe asks for, else those that are there."""
    if recipe is None:
        found = sorted(path.name for path in folder.root.glob("training-seeds/*") if path.name.isdecimal())
        seeds = tuple(map(int, found))
    else:
        seeds = recipe.evaluate.training_seeds
    return [Arm(repeat_name(seed), folder.repeat(seed), None) for seed in seeds]


def _run(folder: RunDirectory, recipe: Recipe, curricula: Mapping[str, Written | None]) -> Run | None:
    """The run with the model's digest, and the judge's, as written down then; None where it was not."""
    digests = [
        (each.facts.get("provenance") or {}).get("inputs", {}).get(MODEL)
        for each in curricula.values()
        if each
    ]
    try:
        inputs = read_json(folder.root / INPUTS)
    except ArtifactError:
        inputs = {}
    digests += [digest for name, digest in inputs.items() if name.startswith("model ")]
    known = next((digest for digest in digests if isinstance(digest, str)), None)
    if known is None:
        return None
    judge = next((digest for name, digest in inputs.items() if name.startswith(f"{JUDGE} ")), "")
    run = Run(recipe, folder)
    # Else they would be worked out from the weights, wherever these are now.
    vars(run).update(model_digest=known, judge_digest=judge)
    return run


def _asks_a_file_that_is_gone(run: Run) -> bool:
    source = run.recipe.evaluate.generation.source
    return bool(source) and not Path(source).is_file()


def _prompts(run: Run | None) -> Callable[[], set[str]] | None:
    if run is None or _asks_a_file_that_is_gone(run):
        return None
    return lambda: {prompt.prompt_id for prompt in prompts_to_answer(run)}


def _keys(run: Run, scorers: Sequence[ScorerRun], arms: Sequence[Arm]) -> dict[Path, Callable[[], str]]:
    """How the key of each folder is worked out from what it was made from."""
    keys: dict[Path, Callable[[], str]] = {}
    for scorer in scorers:
        keys[run.folder.scores(scorer)] = lambda scorer=scorer: scorer_job(run, scorer).key  # type: ignore[misc]
    for arm in arms:
        keys[arm.folder / "policy"] = lambda arm=arm: training_job(run, arm.name).key  # type: ignore[misc]
    if not _asks_a_file_that_is_gone(run):
        keys[run.folder.evaluation] = lambda: evaluation_key(run)
    return keys
