"""`verify`: a run as it lies on disk, checked from its input rows to its results. Nothing is written.

- Each published folder is what its manifest says.
- Ids reconcile: from the input rows to the pairs, their records, the curriculum, the policy and the answers.
- The stages' own functions, run again on what is stored, give what is stored: ids, losses, difficulty,
  selection, order, win rates, content keys.

It needs neither the model nor the data that the run was made from, so it cannot say whether these are still
the same. An unfinished run is taken as it is: what is absent is said to be absent.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from numpy.typing import ArrayLike

from selective_dpo.config import SelectConfig
from selective_dpo.config.load import diff_config, dump_config, make_recipe
from selective_dpo.curriculum.actions import treat
from selective_dpo.curriculum.balance import read_attributes
from selective_dpo.curriculum.build import assemble, resolved_selection
from selective_dpo.curriculum.import_ import Outside, imported_from, outside_curriculum
from selective_dpo.curriculum.issues import issues_of_losses
from selective_dpo.curriculum.records import difficulty, read_records
from selective_dpo.curriculum.table import FACTS, TABLE, Curriculum
from selective_dpo.data.adapters import KEPT
from selective_dpo.data.store import (
    PAIRS,
    SUMMARY,
    TOKENS,
    load_summary,
    load_tokens,
    pairs_file,
    prompt_keys,
)
from selective_dpo.difficulty.held_out import Measurement, evaluation_steps
from selective_dpo.difficulty.protocols import ScorerRun, split_pairs
from selective_dpo.difficulty.scorer import COST, RECORDS, collect_losses, to_records
from selective_dpo.errors import ArtifactError, DataError, IdentityError, Interrupted, RecordsError, name_some
from selective_dpo.evaluation.evaluate import (
    GENERATIONS,
    RESULTS,
    VERDICTS,
    arm_result,
    at_equal_length,
    check_arm_names,
    length_controlled,
    policy_names,
)
from selective_dpo.evaluation.generate import Answer, choose_prompts
from selective_dpo.evaluation.results import REFERENCE, SELECTED, ArmResult, from_json
from selective_dpo.identity import ids_digest, pair_id, require_same
from selective_dpo.logprobs.compute import PairLogps
from selective_dpo.logprobs.nonfinite import REASON, read_quarantine
from selective_dpo.logprobs.reference import FILE as LOGPS
from selective_dpo.logprobs.reference import load_reference
from selective_dpo.report.tables import text_table
from selective_dpo.run.folder import CONFIG, RECIPE, RunDirectory
from selective_dpo.run.keys import (
    INPUTS,
    JUDGE,
    Run,
    Training,
    action_inputs,
    attribute_inputs,
    benchmark_key,
    check_inputs,
    curriculum_key,
    evaluation_key,
    imported_inputs,
    prompts_to_answer,
    scorer_job,
    trained_ids,
    training_job,
    trainings,
)
from selective_dpo.stats.estimates import Estimate
from selective_dpo.stats.win_rates import Verdicts, cross_pairing, self_pairing
from selective_dpo.storage.artifacts import MANIFEST, read_json, read_manifest, verify_folder
from selective_dpo.training.arguments import ORIGINAL_DEFAULTS

TEXTS = ("prompt", "chosen", "rejected")

_TRAINED = ("scores/*", "policy", "*/*/policy")

PUBLISHED = ("*pairs", "*reference", *_TRAINED, "evaluation", "benchmarks/*/*", "guard/*", "world")
"""Where a run's published folders are."""

LOSS_TOLERANCE = 1e-6
"""Largest difference, in nats, between a stored loss and the one of its log-probs in float64."""

TOLERANCE = 1e-9
"""Of other numbers: the same numbers in the same order give the same mean on every machine but for this."""


@dataclass
class Check:
    """What was checked, and what is wrong with it."""

    name: str
    counted: str = ""
    """What was looked at, in numbers."""
    problems: list[str] = field(default_factory=list)
    """A line each: the artifact, what is wrong with it, some ids."""

    @property
    def status(self) -> str:
        """`ok`, `absent` or `WRONG`."""
        if self.problems:
            return "WRONG"
        return "absent" if self.counted.startswith("absent") else "ok"

    def wrong(self, place: str, problem: str) -> None:
        """Add a problem of the artifact `place`."""
        self.problems.append(" ".join(f"{place}: {problem}".split()))

    def equal(self, place: str, what: str, found: object, wanted: object) -> None:
        """`found` must be `wanted`."""
        if found != wanted:
            self.wrong(place, f"{what} is {str(found)[:200]} and should be {str(wanted)[:200]}")

    def same_ids(self, place: str, found: Sequence[str], wanted: Sequence[str], what: str) -> bool:
        """`found` must hold each of `wanted` once, and nothing else; `what` says whose ids they are."""
        try:
            require_same(wanted, found, what=what)
        except IdentityError as error:
            self.wrong(place, str(error))
            return False
        return True

    def same_rows(
        self, place: str, found: pa.Table, wanted: pa.Table, keys: Sequence[str], tolerance: float = TOLERANCE
    ) -> None:
        """Both tables must hold the same rows, in any order; the columns `keys` name a row."""
        found, wanted = (table.sort_by([(key, "ascending") for key in keys]) for table in (found, wanted))
        ids, wanted_ids = _names(found, keys), _names(wanted, keys)
        if not self.same_ids(place, ids, wanted_ids, f"rows by {', '.join(keys)}"):
            return
        for column in wanted.column_names:
            left, right = found[column], wanted[column]
            is_same = pc.equal(left, right)
            if pa.types.is_floating(right.type):
                is_same = pc.less_equal(pc.abs(pc.subtract(left, right)), tolerance)
            both_null = pc.and_(pc.is_null(left), pc.is_null(right))
            problem = f"{column} is not what the stored inputs give"
            self.all_rows(place, ids, pc.or_(pc.fill_null(is_same, False), both_null), problem)

    def all_rows(self, place: str, ids: Sequence[str], is_right: ArrayLike, problem: str) -> None:
        """`is_right` [P] must hold for all of `ids` [P]; the problem names the others."""
        wrong = [name for name, right in zip(ids, np.asarray(is_right), strict=True) if not right]
        if wrong:
            self.wrong(place, f"{problem} for {len(wrong):,} ids: {name_some(wrong)}")


@dataclass(frozen=True)
class Verification:
    """The answer."""

    root: Path
    checks: tuple[Check, ...]

    @property
    def problems(self) -> list[str]:
        """Those of all checks."""
        return [problem for check in self.checks for problem in check.problems]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        checks = [{**asdict(check), "status": check.status} for check in self.checks]
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
    checks = _Checks(folder)
    checks.digests()
    run = checks.recipe()
    kept = checks.pairs(folder.pairs)
    held_out = checks.pairs(folder.test_pairs) if folder.test_pairs.is_dir() else None
    if held_out is not None:
        checks.apart()
        checks.reference(folder.test_reference, held_out["pair_id"].to_pylist())
    if run is not None and kept is not None:
        checks.reference(folder.reference, kept["pair_id"].to_pylist(), run)
        checks.scores(run)
        curricula = {
            place: checks.curriculum(run, name, place, kept) for name, (_, place) in run.arms.items()
        }
        for name, training in trainings(run).items():
            checks.policy(name, training, curricula.get(training.curriculum))
        checks.evaluation(run)
        checks.keys(run)
    return Verification(folder.root, tuple(checks.done))


class _Checks:
    """The checks of one run, a method each, in the order of its stages."""

    def __init__(self, folder: RunDirectory) -> None:
        self.folder = folder
        self.done: list[Check] = []

    @contextlib.contextmanager
    def check(self, name: str, place: Path | None = None) -> Iterator[Check]:
        """A new check of the artifact `place`; absent if that is not there.

        What is so damaged that it cannot be looked at is a problem of this check only.
        """
        check = Check(name)
        self.done.append(check)
        if place is not None and not place.exists():
            check.counted = "absent"
        try:
            yield check
        except Interrupted:
            raise
        except Exception as error:  # of reading a damaged file, by any library
            where = name if place is None else self.name_of(place)
            check.wrong(where, f"cannot be checked: {self.below_root(error)}")

    def below_root(self, error: Exception) -> str:
        """The first line of an error, with paths as problems name them."""
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        line = f"{line} is missing" if isinstance(error, KeyError) else line
        return line.replace(f"{self.folder.root}/", "")[:300]

    def name_of(self, place: Path) -> str:
        """A path as problems name it: below the run's folder."""
        return place.relative_to(self.folder.root).as_posix()

    def digests(self) -> None:
        """Every published folder holds the files of its manifest, and every curriculum those of its facts."""
        root, files = self.folder.root, 0
        with self.check("digests") as check:
            found = [place for pattern in PUBLISHED for place in sorted(root.glob(pattern))]
            folders = [place for place in found if place.is_dir() and not place.name.startswith(".")]
            for place in folders:
                try:
                    files += len(verify_folder(place).files)
                except (ArtifactError, OSError) as error:
                    check.wrong(self.name_of(place), self.below_root(error))
            check.counted = f"{files:,} files in {len(folders):,} folders"
            partial = [path for path in root.rglob(".partial-*") if "checkpoints" not in path.parts]
            if partial:
                check.counted += f"; {len(partial):,} unfinished, which the next command removes"

    def recipe(self) -> Run | None:
        """The run as its resolved recipe describes it: all else is checked against it."""
        run, place = None, self.folder.root / CONFIG
        with self.check("recipe", place) as check:
            if not place.exists():
                check.counted = "absent: what depends on the recipe is not checked"
                return None
            recipe = make_recipe(read_json(place))
            check_arm_names(policy_names(recipe.evaluate))  # they name folders
            check.counted = recipe.name
            given = yaml.safe_load((self.folder.root / RECIPE).read_text("utf-8"))
            for change in diff_config(dump_config(make_recipe(given)), dump_config(recipe)):
                check.wrong(CONFIG, f"differs from {RECIPE}: {change}")
            inputs = read_json(self.folder.root / INPUTS)
            digest_of = {name.split()[0]: digest for name, digest in inputs.items()}
            run = Run(recipe, self.folder)
            # As written down when the run began: the weights may not be here any more.
            vars(run).update(model_digest=digest_of["model"], judge_digest=digest_of.get(JUDGE, ""))
        return run

    def pairs(self, folder: Path) -> pa.Table | None:
        """Every input row is counted; the kept ones have the ids of their texts, and their tokens.

        Returns the kept rows; None if they cannot be read.
        """
        rows, name = None, folder.name
        with self.check(name, folder) as check:
            if not folder.exists():
                return None
            table, tokens = pq.read_table(folder / PAIRS), pq.read_table(folder / TOKENS)
            rows = table.filter(pc.equal(table["status"], KEPT))
            counts = Counter(table["status"].to_pylist())
            dropped = ", ".join(f"{why} {count:,}" for why, count in sorted(counts.items()) if why != KEPT)
            check.counted = f"{len(table):,} rows = {len(rows):,} kept + {len(table) - len(rows):,} dropped"
            check.counted += f" ({dropped})" if dropped else ""
            summary = load_summary(folder)
            counted = {why: count for why, count in summary.counts.items() if count}
            check.equal(f"{name}/{SUMMARY}", "rows", summary.rows, len(table))
            check.equal(f"{name}/{SUMMARY}", "counts", counted, dict(counts))
            texts = zip(*(map(json.loads, rows[side].to_pylist()) for side in TEXTS), strict=True)
            ids = rows["pair_id"].to_pylist()
            is_own = [pair_id(*text) == given for text, given in zip(texts, ids, strict=True)]
            check.all_rows(f"{name}/{PAIRS}", ids, is_own, "the id is not that of the texts")
            lengths = {f"{side}_tokens": pc.list_value_length(tokens[f"{side}_ids"]) for side in TEXTS}
            found = pa.table({"pair_id": tokens["pair_id"], "prompt_id": tokens["prompt_id"], **lengths})
            check.same_rows(f"{name}/{TOKENS}", found, rows.select(found.column_names), ["pair_id"])
        return rows

    def apart(self) -> None:
        """No prompt is in the training and in the held-out pairs."""
        with self.check("held-out prompts", self.folder.test_pairs) as check:
            held_out = prompt_keys(self.folder.test_pairs)
            check.counted = f"{len(held_out):,} prompts, none of which is trained on"
            if both := held_out & prompt_keys(self.folder.pairs):
                check.wrong("test-pairs", f"{len(both):,} prompts are in the training pairs, too")

    def reference(self, folder: Path, ids: Sequence[str], run: Run | None = None) -> None:
        """There are finite log-probs of the pairs `ids`, but for those set aside; of a `run` with imported
        difficulties, of the pairs that are trained on."""
        with self.check(folder.name, folder) as check:
            if not folder.exists():
                return
            logps, aside, place = load_reference(folder), read_quarantine([folder]), f"{folder.name}/{LOGPS}"
            check.counted = f"{len(logps.pair_ids):,} pairs"
            check.counted += f", {len(aside):,} more set aside as not finite" if aside else ""
            trained = None if run is None else trained_ids(run)
            wanted = ids if trained is None else trained
            check.same_ids(place, [*logps.pair_ids, *aside], wanted, "pairs that need a reference")
            is_finite = np.isfinite(logps.chosen_P) & np.isfinite(logps.rejected_P)
            check.all_rows(place, logps.pair_ids, is_finite, "log-probs are not finite")

    def scores(self, run: Run) -> None:
        """The scorers of the protocol; the records of those that are there."""
        there: list[ScorerRun] = []
        with self.check("scores") as check:
            planned = run.scorer_runs
            there = [scorer for scorer in planned if self.folder.scores(scorer).exists()]
            check.counted = f"{len(there)} of {len(planned)} scorers" if there else "absent"
        for scorer in there:
            with self.check(f"scores/{scorer.name}") as check:
                self._check_records(check, run, scorer)

    def _check_records(self, check: Check, run: Run, scorer: ScorerRun) -> None:
        """A scorer's records are of its held-out half at each evaluation; with the reference's log-probs, and
        the margins and losses that these and its own give."""
        folder, count = self.folder.scores(scorer), run.recipe.score.evaluations
        records = read_records(folder / RECORDS)
        check.counted = f"{len(records):,} records: {count} evaluations"
        tokens = load_tokens(self.folder.pairs)
        ids, aside = list(tokens["pair_id"]), read_quarantine([self.folder.reference, folder])
        rows = split_pairs(list(tokens["prompt_id"]), scorer).held_out
        held_out = tokens.select([row for row in rows if ids[row] not in aside])
        steps = evaluation_steps(read_json(folder / COST)["optimizer_steps"], count)
        measurements = []
        for number, step in enumerate(steps, start=1):
            at = records.evaluation == number
            logps = (records.policy_chosen_logp[at], records.policy_rejected_logp[at])
            measurements.append(Measurement(number, step, PairLogps(records.pair_id[at].tolist(), *logps)))
        settings = {**ORIGINAL_DEFAULTS, **run.recipe.score.trainer}
        again = to_records(scorer, held_out, load_reference(self.folder.reference), measurements, settings)
        found, wanted = (pa.table(vars(each)) for each in (records, again))
        check.same_rows(
            f"scores/{scorer.name}/{RECORDS}", found, wanted, ["pair_id", "evaluation"], LOSS_TOLERANCE
        )

    def curriculum(self, run: Run, name: str, folder: Path, kept: pa.Table) -> Curriculum | None:
        """An arm's curriculum is what the records (or imported difficulties) and its selection give.

        Returns it, if it can be read.
        """
        found = None
        with self.check(f"curriculum {name}", folder / TABLE) as check:
            if not (folder / FACTS).exists() and not (folder / TABLE).exists():
                return None
            found, select, place = Curriculum.load(folder), run.arms[name][0], self.name_of(folder / FACTS)
            check.counted = f"{len(found.measured.pair_ids):,} pairs, {len(found.order):,} selected"
            inputs = {**found.facts["provenance"]["inputs"]}
            check.equal(place, "model", inputs.pop("model"), run.model_digest)
            if imported_from(found.facts):
                outside = self._outside(check, run, select, found)
                select = select.model_copy(update={"source": ""})
                wanted = imported_inputs(run, outside.digest)
                attributes = partial(read_attributes, self.folder.pairs / PAIRS)
                ids = (kept["pair_id"], kept["prompt_id"])
                again = outside_curriculum(outside, *ids, select, attributes=attributes)
            else:
                wanted, again = self._select_again(run, select, inputs)
            wanted = {**wanted, **attribute_inputs(run, select)}
            check.equal(place, "inputs", inputs, wanted)
            check.equal(place, "key", found.facts["key"], curriculum_key(wanted, select))
            for key in ("select", "seeds", "evaluations", "pairs", "selected", "quarantined", "partial"):
                check.equal(place, key, found.facts[key], again.facts[key])
            table = self.name_of(folder / TABLE)
            check.same_rows(table, found.table, again.table, ["pair_id"])
            if not select.allow_partial:  # else a pair without any record is in no curriculum
                check.same_ids(table, found.pair_ids, kept["pair_id"].to_pylist(), "kept pairs")
        return found

    def _select_again(
        self, run: Run, select: SelectConfig, used: Collection[str]
    ) -> tuple[dict[str, str], Curriculum]:
        """The digests of the records of all scorers (of a partial curriculum, of those `used`), and the
        curriculum that they give."""
        scorers = [each for each in run.scorer_runs if each.name in used or not select.allow_partial]
        folders = [self.folder.scores(scorer) for scorer in scorers]
        inputs = {folder.name: read_manifest(folder).files[RECORDS] for folder in folders}
        inputs |= check_inputs(run)
        config = resolved_selection(select)
        losses = collect_losses(folders, allow_partial=select.allow_partial, criteria=[config.aggregate])
        treatment = None
        if config.action:
            issues = issues_of_losses(losses, pairs_file(self.folder.pairs), run.recipe.issues)
            treatment = treat(losses, issues, config.action)
            losses = treatment.losses
        measured = difficulty(losses, config.aggregate, allow_partial=select.allow_partial)
        aside = read_quarantine([self.folder.reference, *folders])
        made = assemble(
            losses,
            measured,
            config,
            {},
            aside=aside,
            reason=REASON,
            attributes=partial(read_attributes, self.folder.pairs / PAIRS),
            treatment=treatment,
        )
        return inputs | action_inputs(run, select), made

    def _outside(self, check: Check, run: Run, select: SelectConfig, found: Curriculum) -> Outside:
        """What was imported; where that is not here any more, the difficulties in the curriculum's table."""
        imported = dict(imported_from(found.facts) or {})
        with contextlib.suppress(ArtifactError, DataError, IdentityError, RecordsError, OSError):
            outside = run.outside_of(select)
            if outside is not None and outside.digest == imported["sha256"]:
                check.counted += f"; compared with {imported['name']}"
                return outside
        check.counted += f"; {imported['name']} is not here to compare"
        ids = found.measured.table["pair_id"].combine_chunks()
        return Outside("pair_id", ids, found.measured.difficulty_P, imported["sha256"], imported)

    def policy(self, name: str, training: Training, curriculum: Curriculum | None) -> None:
        """A policy: safetensors weights, trained on the curriculum's pairs in its order."""
        with self.check(f"policy {name}", training.policy) as check:
            if not training.policy.exists() or curriculum is None:
                return
            place = self.name_of(training.policy)
            if not list(training.policy.glob("*.safetensors")):
                check.wrong(place, "there are no weights (*.safetensors)")
            order, ids = read_json(training.policy / "order.json"), curriculum.certified_order
            check.counted = f"{order['pairs']:,} pairs consumed {order['epochs']:g} time(s)"
            consumed = int(order["consumed"])
            again = ids_digest((ids * (1 + consumed // len(ids)))[:consumed])
            wanted = {"pairs": len(ids), "epochs": consumed / len(ids), "matches": True}
            for key, value in {**wanted, "expected_digest": again, "consumed_digest": again}.items():
                check.equal(f"{place}/order.json", key, order[key], value)

    def evaluation(self, run: Run) -> None:
        """Every arm answered every prompt, every answer was judged, and the results are what these give."""
        folder = self.folder.evaluation
        with self.check("evaluation", folder) as check:
            if not folder.exists():
                return
            results = from_json(read_json(folder / RESULTS))
            answers, verdicts = (pq.read_table(folder / name) for name in (GENERATIONS, VERDICTS))
            check.counted = f"{len(results.policies)} arms, {len(answers):,} answers"
            check.counted += f", {len(verdicts):,} verdicts"
            place, arms = f"evaluation/{RESULTS}", [REFERENCE, *trainings(run)]
            check.equal(place, "arms", sorted(arm.name for arm in results.policies), sorted(arms))
            prompts = sorted(set(answers["prompt_id"].to_pylist()))
            if not _asks_a_file_that_is_gone(run):
                chosen = choose_prompts(prompts_to_answer(run), run.recipe.evaluate.generation)
                prompts = [prompt.prompt_id for prompt in chosen]
            samples = run.recipe.evaluate.generation.samples if prompts else 0
            check.equal(
                place, "prompts and samples", (results.prompts, results.samples), (len(prompts), samples)
            )
            asked = product(arms, prompts, range(samples))
            keys = ["arm", "prompt_id", "sample"]
            check.same_ids(f"evaluation/{GENERATIONS}", _names(answers, keys), _joined(asked), "answers")
            compared: list[tuple[object, ...]] = []
            for arm in arms if results.judge != "none" else ():
                pairing = self_pairing(samples) if arm == REFERENCE else cross_pairing(samples, samples)
                pairs = list(zip(*(side.tolist() for side in pairing), strict=True))
                compared += [(arm, prompt, *pair) for prompt in prompts for pair in pairs]
            keys = [*keys, "opponent_sample"]
            check.same_ids(f"evaluation/{VERDICTS}", _names(verdicts, keys), _joined(compared), "verdicts")
            controlled = length_controlled(
                {name: judged for name in arms if (judged := _verdicts_on(name, verdicts))},
                {name: _answers_of(name, answers) for name in arms},
            )
            for result in results.policies:
                again = self._result_again(run, result, answers, verdicts)
                numbers = ["pairs", "updates", "win_rate", "difference", "answer_tokens"]
                if result.answer_characters is not None:  # results of older versions have no such numbers
                    numbers += ["answer_characters", "length_controlled", "length_controlled_difference"]
                    again = at_equal_length(again, controlled)
                for what in numbers:
                    found, wanted = (_rounded(getattr(each, what)) for each in (result, again))
                    check.equal(place, f"{what} of {result.name}", found, wanted)

    def _result_again(self, run: Run, arm: ArmResult, answers: pa.Table, verdicts: pa.Table) -> ArmResult:
        """An arm's result from its answers and verdicts, its curriculum and its policy."""
        training = trainings(run).get(arm.name)
        return arm_result(
            name=arm.name,
            label=arm.label,
            pairs=len(Curriculum.load(training.curriculum).order) if training else 0,
            updates=read_json(training.policy / COST)["optimizer_steps"] if training else 0,
            held_out=arm.held_out,
            answers=_answers_of(arm.name, answers),
            verdicts=_verdicts_on(arm.name, verdicts),
            selected_verdicts=_verdicts_on(SELECTED, verdicts) if arm.name != SELECTED else None,
        )

    def keys(self, run: Run) -> None:
        """The content keys in the manifests are those that the recipe and the inputs give now."""
        with self.check("keys") as check:
            key_of: dict[Path, Callable[[], str]] = {}
            for scorer in run.scorer_runs:
                key_of[self.folder.scores(scorer)] = lambda scorer=scorer: scorer_job(run, scorer).key  # type: ignore[misc]
            for name, training in trainings(run).items():
                key_of[training.policy] = lambda name=name: training_job(run, name).key  # type: ignore[misc]
            if not _asks_a_file_that_is_gone(run):
                key_of[self.folder.evaluation] = lambda: evaluation_key(run)
            for benchmark, arm in product(run.recipe.evaluate.benchmarks, (REFERENCE, *trainings(run))):
                if Path(run.recipe.evaluate.benchmarks[benchmark].source).exists():
                    key_of[self.folder.benchmark(benchmark, arm)] = partial(
                        benchmark_key, run, benchmark, arm
                    )
            there = [folder for folder in key_of if (folder / MANIFEST).is_file()]
            check.counted = f"{len(there):,} folders were made from what is here" if there else "absent"
            for folder in there:
                place = f"{self.name_of(folder)}/{MANIFEST}"
                try:
                    is_same = read_manifest(folder).key == key_of[folder]()
                except (ArtifactError, DataError, IdentityError) as error:
                    check.wrong(place, f"its key cannot be worked out: {self.below_root(error)}")
                    continue
                if not is_same:
                    check.wrong(place, f"made from other inputs than {CONFIG} and the folders before it name")


def _asks_a_file_that_is_gone(run: Run) -> bool:
    source = run.recipe.evaluate.generation.source
    return bool(source) and not Path(source).is_file()


def _answers_of(arm: str, answers: pa.Table) -> dict[str, list[Answer]]:
    given: dict[str, list[Answer]] = {}
    for row in answers.filter(pc.equal(answers["arm"], arm)).to_pylist():
        given.setdefault(row["prompt_id"], []).append(Answer(row["answer"], row["tokens"], row.get("ended")))
    return given


def _verdicts_on(arm: str, verdicts: pa.Table) -> Verdicts | None:
    rows = verdicts.filter(pc.equal(verdicts["arm"], arm))
    return Verdicts(rows["prompt_id"].to_pylist(), rows["score"].to_pylist()) if len(rows) else None


def _names(table: pa.Table, keys: Sequence[str]) -> list[str]:
    """What each row of a table is called in problems."""
    return _joined(zip(*(table[key].to_pylist() for key in keys), strict=True))


def _joined(rows: Iterable[tuple[object, ...]]) -> list[str]:
    return [" ".join(map(str, row)) for row in rows]


def _rounded(value: int | Estimate | None) -> object:
    """An estimate's numbers as texts of nine decimals: what differs by a rounding error is the same."""
    return value if value is None or isinstance(value, int) else [f"{number:.9f}" for number in value]
