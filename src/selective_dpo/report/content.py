"""What a report shows, read from a run folder. Nothing is drawn or put into sentences here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from selective_dpo.config import SelectConfig
from selective_dpo.criteria import CRITERIA
from selective_dpo.curriculum.audit import Audit, audit
from selective_dpo.curriculum.import_ import imported_from
from selective_dpo.curriculum.issues import load_issues
from selective_dpo.curriculum.records import codes, id_positions
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.adapters import KEPT
from selective_dpo.errors import ArtifactError
from selective_dpo.evaluation.results import (
    REFERENCE,
    SELECTED,
    EvaluationResults,
    estimate_from_json,
    from_json,
)
from selective_dpo.evaluation.side_effects import task_scores
from selective_dpo.identity import Text
from selective_dpo.losses import LN_2
from selective_dpo.report.browser import Packed, pack_pairs
from selective_dpo.report.inspect import OF_A_REPORT, ExampleGroup, example_groups
from selective_dpo.stats.estimates import Estimate
from selective_dpo.stats.rank_correlation import clustered_spearman
from selective_dpo.stats.side_effects import TaskScore
from selective_dpo.storage.artifacts import SCHEMA_VERSION, read_json, write_json

FINDINGS = "findings.json"
TRAINER_LOG = "trainer_log.json"


class Lengths(NamedTuple):
    """Token counts in the curriculum's row order; each [P] int64."""

    prompt_P: NDArray[np.int64]
    chosen_P: NDArray[np.int64]
    rejected_P: NDArray[np.int64]

    @property
    def pair_P(self) -> NDArray[np.int64]:
        """Tokens of the prompt and both completions, the prompt once."""
        return self.prompt_P + self.chosen_P + self.rejected_P


class LengthCorrelation(NamedTuple):
    """How closely the difficulty follows one length."""

    name: str
    label: str
    """What stands at its axis."""
    tokens_P: NDArray[np.int64]
    spearman: Estimate
    """Its rank correlation with the difficulty, clustered by prompt."""


class DropCount(NamedTuple):
    """How many input rows of a source ended with this status ("kept" or the reason of the drop)."""

    source: str
    status: str
    rows: int


class Curve(NamedTuple):
    """Values of one logged quantity; both tuples have one entry a logged step."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


class TrainingLog(NamedTuple):
    """What is drawn of one arm's training. A curve that was not logged is empty."""

    arm: str
    loss: Curve
    held_out_loss: Curve
    difficulty: Curve


CURVES = {"loss": "Training loss", "held_out_loss": "Held-out loss", "difficulty": "Difficulty of the batch"}
"""The curves of a `TrainingLog` and what they are called."""


class SampledAnswer(NamedTuple):
    """The first answer of one policy to a prompt."""

    arm: str
    answer: str
    score: float | None
    """Share of its comparisons that it wins; None for the starting model, or without a judge."""


class AnsweredPrompt(NamedTuple):
    """A prompt and what each policy says to it."""

    prompt: Text
    answers: tuple[SampledAnswer, ...]


class TruthRow(NamedTuple):
    """A property that only the embedded world knows, such as "flipped label"."""

    group: str
    selected: Estimate
    """Share of the selected pairs that have it."""
    deselected: Estimate
    """Share of the scored but not selected pairs that have it."""


@dataclass(frozen=True)
class ReportContent:
    """Everything in a report. Parts that a run does not have are empty or None."""

    title: str
    subtitle: str
    curriculum: Curriculum
    select: SelectConfig
    lengths: Lengths | None
    """None where nothing was tokenized."""
    examples: tuple[ExampleGroup, ...]
    agreement: Mapping[str, Any]
    results: EvaluationResults | None
    training_logs: tuple[TrainingLog, ...]
    drops: tuple[DropCount, ...]
    provenance: Mapping[str, Any]
    cost: Mapping[str, Any]
    config: Mapping[str, Any]
    answered: tuple[AnsweredPrompt, ...] = ()
    """The first prompts of the evaluation, by id: nobody has chosen them."""
    packed: Packed | None = None
    """The pairs of the page's browser."""
    guard: tuple[tuple[str, TaskScore], ...] = ()
    """Arm and score of each task of `evaluate.guard`."""
    audit: Audit | None = None
    """None where all pairs were selected."""
    issues: Mapping[str, Any] | None = None
    """What `selective-dpo issues` found, where it was run on this curriculum."""
    findings: tuple[str, ...] = ()
    truth: tuple[TruthRow, ...] = ()

    @property
    def is_loss(self) -> bool:
        """Whether difficulty is as large as a loss; mean ranks are not."""
        if self.imported is not None:
            return bool(self.imported["nats"])
        return CRITERIA[self.select.aggregate].is_loss

    @property
    def chance(self) -> float | None:
        """The loss of a policy that has not moved; None: not known, or difficulty is no loss."""
        return self.agreement.get("chance_loss", LN_2) if self.is_loss else None

    @property
    def digits(self) -> int:
        """Decimals that show the middle half of the difficulties in two digits: a narrow range needs more."""
        low, high = np.quantile(self.curriculum.difficulty_P, (0.25, 0.75))
        width = float(high - low)
        return 3 if width <= 0.0 else min(6, max(3, 1 - math.floor(math.log10(width))))

    @property
    def unit(self) -> str:
        """What stands behind "difficulty" at an axis."""
        if self.chance == LN_2:
            return " (nats)"
        words = "" if self.is_loss or self.imported else CRITERIA[self.select.aggregate].label
        return f" {words}".rstrip()

    @cached_property
    def length_correlations(self) -> tuple[LengthCorrelation, ...]:
        """Of the length of the pair, and of chosen over rejected; empty where nothing was tokenized."""
        if self.lengths is None:
            return ()
        clusters_P, _ = codes(self.curriculum.table["prompt_id"])
        longer_P = self.lengths.chosen_P - self.lengths.rejected_P
        return tuple(
            LengthCorrelation(
                name, label, tokens_P, clustered_spearman(tokens_P, self.curriculum.difficulty_P, clusters_P)
            )
            for name, label, tokens_P in (
                ("length of the pair", "tokens of the pair", self.lengths.pair_P),
                ("length of chosen over rejected", "chosen minus rejected (tokens)", longer_P),
            )
        )

    @property
    def imported(self) -> Mapping[str, Any] | None:
        """Where the difficulty was imported from; None: it was measured in this run."""
        return imported_from(self.curriculum.facts)


def load_report_content(run_folder: Path) -> ReportContent:
    """Read a run folder. All but `pairs/` and the curriculum may be absent.

    Raises:
        ArtifactError: a file is missing, damaged or of another schema version.
        IdentityError: the curriculum holds pairs that `pairs/` does not.
    """
    curriculum = Curriculum.load(run_folder).measured
    pairs_path = run_folder / "pairs" / "pairs.parquet"
    if not pairs_path.is_file():
        raise ArtifactError(f"{pairs_path} does not exist: the report shows the pairs' texts and lengths")
    try:
        select = SelectConfig.model_validate(curriculum.facts.get("select", {}))
    except ValidationError as error:
        raise ArtifactError(f"the curriculum in {run_folder} holds a selection that is not valid") from error
    config_path, results_path = run_folder / "config.json", run_folder / "evaluation" / "results.json"
    config = read_json(config_path) if config_path.is_file() else {}
    findings, truth = _read_findings(run_folder / FINDINGS)
    return ReportContent(
        title=str(config.get("name") or run_folder.resolve().name),
        subtitle=_subtitle(config),
        curriculum=curriculum,
        select=select,
        lengths=_read_lengths(pairs_path, curriculum),
        examples=example_groups(pairs_path, curriculum, OF_A_REPORT),
        agreement=curriculum.facts.get("agreement") or {},
        results=from_json(read_json(results_path)) if results_path.is_file() else None,
        training_logs=_read_training_logs(run_folder),
        drops=read_drops(pairs_path),
        provenance=_provenance(run_folder, curriculum),
        cost=curriculum.facts.get("cost") or {},
        config=config,
        answered=_read_answers(run_folder / "evaluation"),
        packed=pack_pairs(curriculum, run_folder),
        issues=issues.facts if (issues := load_issues(run_folder)) else None,
        guard=_read_guard(run_folder / "guard"),
        audit=audit(curriculum, pairs_path) if 0 < len(curriculum.order) < len(curriculum.table) else None,
        findings=findings,
        truth=truth,
    )


def save_findings(run_folder: Path, findings: Sequence[str], truth: Sequence[TruthRow] = ()) -> None:
    """Keep sentences that the caller measured, and the truth table, for this and later reports."""
    rows = [
        {"group": group, "selected": selected.as_json(), "deselected": deselected.as_json()}
        for group, selected, deselected in truth
    ]
    content = {"schema_version": SCHEMA_VERSION, "findings": list(findings), "truth": rows}
    write_json(run_folder / FINDINGS, content)


def _read_findings(path: Path) -> tuple[tuple[str, ...], tuple[TruthRow, ...]]:
    if not path.is_file():
        return (), ()
    value = read_json(path)
    try:
        truth = tuple(
            TruthRow(str(row["group"]), *(estimate_from_json(row[name]) for name in TruthRow._fields[1:]))
            for row in value.get("truth", [])
        )
        return tuple(str(sentence) for sentence in value.get("findings", [])), truth
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is not in the format of this version ({error!r})") from error


def _subtitle(config: Mapping[str, Any]) -> str:
    model = (config.get("model") or {}).get("path", "")
    sources = [source.get("path", "") for source in (config.get("data") or {}).get("train", [])]
    return " on ".join(part for part in (str(model), ", ".join(map(str, sources))) if part)


def _provenance(run_folder: Path, curriculum: Curriculum) -> dict[str, Any]:
    facts = {
        name: curriculum.facts[name] for name in ("key", "seeds", "evaluations") if name in curriculum.facts
    }
    summary_path = run_folder / "pairs" / "summary.json"
    # The counts by status are shown on their own, from the table itself.
    summary = read_json(summary_path) if summary_path.is_file() else {}
    summary.pop("schema_version", None)
    pairs = {name: value for name, value in summary.items() if not isinstance(value, dict | list)}
    return {**facts, **(curriculum.facts.get("provenance") or {}), **({"pairs": pairs} if pairs else {})}


_PROMPTS_SHOWN = 6


def _read_answers(folder: Path) -> tuple[AnsweredPrompt, ...]:
    """The first sample of each policy for a few prompts."""
    if not (folder / "generations.parquet").is_file():
        return ()
    table = pq.read_table(folder / "generations.parquet", filters=pc.field("sample") == 0)
    wanted = sorted(set(table["prompt_id"].to_pylist()))[:_PROMPTS_SHOWN]
    rows = table.filter(pc.is_in(table["prompt_id"], value_set=pa.array(wanted, pa.string()))).to_pylist()
    verdicts = pq.read_table(folder / "verdicts.parquet", filters=pc.field("sample") == 0).to_pylist()
    scores: dict[tuple[str, str], list[float]] = {}
    for row in verdicts:
        scores.setdefault((row["arm"], row["prompt_id"]), []).append(row["score"])
    found: dict[str, list[SampledAnswer]] = {name: [] for name in wanted}
    prompts: dict[str, Text] = {}
    for row in rows:
        prompts[row["prompt_id"]] = json.loads(row["prompt"])
        of_arm = scores.get((row["arm"], row["prompt_id"]), [])
        score = float(np.mean(of_arm)) if of_arm and row["arm"] != REFERENCE else None
        found[row["prompt_id"]].append(SampledAnswer(row["arm"], row["answer"], score))
    return tuple(AnsweredPrompt(prompts[name], tuple(found[name])) for name in wanted)


def _read_guard(folder: Path) -> tuple[tuple[str, TaskScore], ...]:
    """Scores of the arms that have some, the starting model's first."""
    start = folder / REFERENCE
    arms = [start, *(arm for arm in sorted(folder.glob("*")) if arm != start)] if start.is_dir() else []
    return tuple(
        (arm.name, score) for arm in arms for score in task_scores(arm, None if arm == start else start)
    )


def read_drops(path: Path) -> tuple[DropCount, ...]:
    """Rows of `pairs.parquet` by source and status, the kept ones first, then the largest count."""
    table = pq.read_table(path, columns=["source", "status"])
    counted = table.group_by(["source", "status"], use_threads=False).aggregate([([], "count_all")])
    drops = [DropCount(row["source"] or "", row["status"], row["count_all"]) for row in counted.to_pylist()]
    return tuple(sorted(drops, key=lambda drop: (drop.source, drop.status != KEPT, -drop.rows, drop.status)))


def _read_lengths(path: Path, curriculum: Curriculum) -> Lengths | None:
    columns = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
    table = pq.read_table(path, columns=["pair_id", *columns], filters=pc.field("status") == KEPT)
    what = "curriculum and pairs.parquet"
    where_P = id_positions(curriculum.table["pair_id"], table["pair_id"], what=what)
    lengths = Lengths(*(np.asarray(table[name].to_numpy(), dtype=np.int64)[where_P] for name in columns))
    return lengths if lengths.pair_P.any() else None


def _read_training_logs(run_folder: Path) -> tuple[TrainingLog, ...]:
    """The logs of the run's policy and of each control, if they are there, the run's own first."""
    policies = {SELECTED: run_folder / "policy"}
    policies |= {folder.name: folder / "policy" for folder in sorted((run_folder / "controls").glob("*"))}
    logs = []
    for arm, folder in policies.items():
        path = folder / TRAINER_LOG
        if not path.is_file():
            continue
        history = read_json(path).get("log_history")
        if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
            raise ArtifactError(f"{path} holds no log_history; run `train` again")
        curves = []
        for name in ("loss", "eval_loss", "difficulty"):
            points = {
                int(entry["step"]): float(entry[name])
                for entry in history
                if "step" in entry and isinstance(entry.get(name), int | float) and math.isfinite(entry[name])
            }
            curves.append(Curve(tuple(points), tuple(points.values())))
        logs.append(TrainingLog(arm, *curves))
    return tuple(logs)
