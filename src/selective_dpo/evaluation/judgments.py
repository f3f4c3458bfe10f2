"""Official judgments of benchmark answers, read back: scores, their uncertainty, differences between models.

Rows are joined by instruction or id, never by position. Where a row stands twice the last one counts, as the
programs append; what is left out is counted. Intervals are over questions: two turns, two games and repeated
verdicts of a question say less than as many questions would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.config.schema import BenchmarkName
from selective_dpo.data.readers import Malformed, read_file
from selective_dpo.errors import ArtifactError, ConfigError, DataError, name_some
from selective_dpo.evaluation.benchmarks import BENCHMARKS, read_questions
from selective_dpo.evaluation.results import estimate_from_json
from selective_dpo.identity import require_unique
from selective_dpo.stats.estimates import Estimate, clustered_mean, clustered_share
from selective_dpo.stats.length_control import MIN_PROMPTS, ExtraRows, alpaca_eval_lc, joint_lc
from selective_dpo.stats.style_control import markdown_counts, style_control, style_features
from selective_dpo.storage.artifacts import file_digest

STRONG = 3
"""How often Arena-Hard counts a verdict of much better, `>>`."""


class Score(NamedTuple):
    """What one model reached."""

    model: str
    part: str
    """The category of Arena-Hard's questions, where there are several; else empty."""
    questions: int
    score: Estimate
    """A win rate against the baseline, in [0, 1]; of MT-Bench the mean grade, 1 to 10."""
    first_minus: Estimate | None
    """The first model's score minus this one's, paired by question; None for the first."""
    controlled: Estimate | None = None
    """The win rate at equal length (AlpacaEval) or style (Arena-Hard)."""
    controlled_first_minus: Estimate | None = None
    characters: Estimate | None = None
    """Mean length of AlpacaEval's answers."""
    turns: tuple[Estimate, ...] = ()
    """MT-Bench's mean grade by turn."""


class Judgments(NamedTuple):
    """What the judgments of a benchmark say."""

    benchmark: BenchmarkName
    scores: tuple[Score, ...]
    baseline: str
    """Whom the models were compared with; empty for MT-Bench."""
    judge: str
    controlled_by: str
    """How the length-controlled or style-controlled win rate was found; empty: there is none."""
    files: dict[str, str]
    """SHA-256 of each file that was read, by its path as it was given."""
    notes: tuple[str, ...]
    """What was left out, counted."""

    def as_json(self) -> dict[str, Any]:
        """JSON values by the fields' names."""
        scores = [
            {
                name: value.as_json() if isinstance(value, Estimate) else value
                for name, value in score._asdict().items()
            }
            | {"turns": [turn.as_json() for turn in score.turns]}
            for score in self.scores
        ]
        return {**self._asdict(), "scores": scores}


def judgments_from_json(content: Mapping[str, Any]) -> Judgments:
    """The inverse of `Judgments.as_json`.

    Raises:
        ArtifactError: it is not of this format.
    """
    try:
        scores = tuple(
            Score(**{name: _value_from_json(value) for name, value in score.items()})
            for score in content["scores"]
        )
        found = Judgments(**{**content, "scores": scores, "notes": tuple(content["notes"])})
        if found.benchmark not in BENCHMARKS or not all(isinstance(each.score, Estimate) for each in scores):
            raise ValueError("no benchmark or no score")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"not what `read-judgments --json` writes: {error}") from error
    return found


def _value_from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_value_from_json, value))
    return estimate_from_json(value) if isinstance(value, dict) else value


class _Verdict(NamedTuple):
    """The numbers that count of one model's answer to one question, or turn of a question."""

    question: str
    values: tuple[float, ...]
    """Several of Arena-Hard's: two games, a strong verdict three times."""
    row: Mapping[str, Any]


_Key = tuple[str, ...]
"""Part, model, question and, of MT-Bench, the turn."""


def read_judgments(
    name: BenchmarkName,
    paths: Sequence[str],
    *,
    models: Sequence[str] = (),
    difficulties: str = "",
    questions: str = "",
    answers: str = "",
) -> Judgments:
    """What the judgment files, or all files of these folders, say of `models` (default: all).

    Differences are the first model's minus each other one's. For AlpacaEval `difficulties` is a file of the
    instructions' difficulties (see `read_difficulties`) and `questions` the question file that its positions
    are of; without difficulties, several models share a slope of length. For Arena-Hard `answers` is a folder
    of answer files with the `metadata` that its own script adds; they are needed for style control.

    Raises:
        ConfigError: an option that has no effect on this benchmark, or an unknown model.
        DataError: a file cannot be read, a row has not the benchmark's shape, or nothing is left.
        IdentityError: an instruction without a difficulty, or ids that stand twice.
    """
    wrong = {
        "difficulties": name != "alpaca-eval",
        "questions": not difficulties,
        "answers": name != "arena-hard",
    }
    given = {"difficulties": difficulties, "questions": questions, "answers": answers}
    for option, has_no_effect in wrong.items():
        if given[option] and has_no_effect:
            raise ConfigError(f"--{option} has no effect here: leave it out")
    files = list(_files(paths))
    rows = list(_rows(files))
    read = {"alpaca-eval": _alpaca_row, "arena-hard": _arena_row, "mt-bench": _mt_bench_row}[name]
    verdicts: dict[_Key, _Verdict | None] = {}
    repeated = 0
    for where, row in rows:
        try:
            key, verdict = read(row)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"{where}: no judgment of {name}: {type(error).__name__} {error}") from error
        repeated += key in verdicts
        verdicts[key] = verdict
    unusable = sum(verdict is None for verdict in verdicts.values())
    usable = {key: verdict for key, verdict in verdicts.items() if verdict is not None}
    if not usable:
        raise DataError(f"no verdict in {name_some([str(path) for path in files])}: nothing is left to show")
    judged = list(dict.fromkeys(key[1] for key in usable))
    chosen = list(models) or sorted(judged, key=lambda model: not model.endswith("-selected"))
    if unknown := [model for model in chosen if model not in judged]:
        raise ConfigError(f"no judgments of {name_some(unknown)}; there are some of {name_some(judged, 12)}")
    require_unique(chosen, what="--models")
    notes = [f"{len(rows):,} judgments in {len(files)} file(s)"]
    notes += [f"{repeated:,} repeated, of which the last counts"] if repeated else []
    notes += [f"{unusable:,} without a verdict, left out"] if unusable else []
    digests = {str(path): file_digest(path) for path in files}
    scores: list[Score] = []
    parts = list(dict.fromkeys(key[0] for key in usable))
    of_part = {
        part: {
            model: {key[2:]: verdict for key, verdict in usable.items() if key[:2] == (part, model)}
            for model in chosen
        }
        for part in parts
    }
    for part, by_model in of_part.items():
        shown = part if len(parts) > 1 else ""
        scores += [
            _score(name, shown, model, found, by_model[chosen[0]] if model != chosen[0] else None)
            for model, found in by_model.items()
            if found
        ]
    controlled_by = ""
    if name == "alpaca-eval":
        scores, controlled_by, more = _length_controlled(scores, of_part[parts[0]], difficulties, questions)
        digests |= more
    if answers:
        scores, more = _style_controlled(scores, of_part, Path(answers), len(parts) > 1)
        controlled_by, digests = "style: length, headers, lists, bold", digests | more
    return Judgments(
        name,
        tuple(scores),
        _baseline_of(name, [each.row for each in usable.values()], len(parts)),
        _judge_of([row for _, row in rows]),
        controlled_by,
        digests,
        tuple(notes),
    )


def _baseline_of(name: BenchmarkName, rows: Iterable[Mapping[str, Any]], parts: int) -> str:
    """Whom the models were compared with: one, but for Arena-Hard, which has one for each category."""
    column = {"alpaca-eval": "generator_1", "arena-hard": "baseline"}.get(name)
    found = sorted({str(row.get(column, "")) for row in rows} if column else set())
    if len(found) > parts:
        raise DataError(f"judgments against several baselines, {name_some(found)}: read one's at a time")
    return ", ".join(found)


def _judge_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """The judge, which must be one: grades of two are no repetitions of each other."""
    found = set()
    for row in rows:
        judge = row.get("annotator", row.get("judge", ""))
        found.add(str(judge[0] if isinstance(judge, list) and judge else judge))
    if len(found) > 1:
        raise DataError(f"judgments of several judges, {name_some(sorted(found))}: read one's at a time")
    return found.pop()


def _files(paths: Sequence[str]) -> Iterator[Path]:
    for given in paths:
        path = Path(given).expanduser()
        inside = sorted(each for each in path.rglob("*.json*") if each.is_file()) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{given} holds no .json or .jsonl file")
        yield from inside


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in files:
        for number, row in enumerate(read_file(path)):
            where = f"{path}, row {number:,}"
            if isinstance(row, Malformed):
                raise DataError(f"{where}: {row.problem}")
            yield where, row


# One row of each format: its key, and what counts of it.


def _alpaca_row(row: Mapping[str, Any]) -> tuple[_Key, _Verdict | None]:
    instruction, preference = str(row["instruction"]), row["preference"]
    key = ("", str(row["generator_2"]), instruction)
    len(row["output_1"]), len(row["output_2"])
    if preference is None or np.isnan(preference):
        return key, None
    value = 0.5 if preference == 0 else float(preference) - 1.0
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"preference {preference} is not between 1 and 2")
    return key, _Verdict(instruction, (value,), row)


_LABELS = {"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "A<B": (0.0, 1), "A<<B": (0.0, STRONG)}
_LABELS |= {"B>>A": (0.0, STRONG), "B>A": (0.0, 1), "B=A": (0.5, 1), "B<A": (1.0, 1), "B<<A": (1.0, STRONG)}


def _arena_row(row: Mapping[str, Any]) -> tuple[_Key, _Verdict | None]:
    question = str(row["uid"])
    key = (str(row["category"]), str(row["model"]), question)
    # The baseline is A in the first game, and B in the second.
    labels = [game and game["score"] for game in row["games"]]
    if len(labels) != 2 or any(label not in _LABELS for label in labels):
        return key, None
    (first, often), (second, as_often) = (_LABELS[label] for label in labels)
    return key, _Verdict(question, (1.0 - first,) * often + (second,) * as_often, row)


def _mt_bench_row(row: Mapping[str, Any]) -> tuple[_Key, _Verdict | None]:
    question, turn = str(row["question_id"]), str(int(row["turn"]))
    key = ("", str(row["model"]), question, turn)
    grade = float(row["score"])
    return key, None if grade == -1 or np.isnan(grade) else _Verdict(question, (grade,), row)


# Scores.


def _score(
    name: BenchmarkName,
    part: str,
    model: str,
    found: Mapping[_Key, _Verdict],
    first: Mapping[_Key, _Verdict] | None,
) -> Score:
    questions = [each.question for each in found.values() for _ in each.values]
    values = [value for each in found.values() for value in each.values]
    is_share = name != "mt-bench"
    difference = None
    if first is not None and (shared := [key for key in first if key in found]):
        by_question = [_mean(first[key]) - _mean(found[key]) for key in shared]
        clusters = [found[key].question for key in shared]
        difference = (
            clustered_share(by_question, clusters, least=-1.0)
            if is_share
            else clustered_mean(by_question, clusters)
        )
    turns: dict[str, tuple[list[float], list[str]]] = {}
    for key, each in found.items():
        if name == "mt-bench":
            grades, of_questions = turns.setdefault(key[1], ([], []))
            grades.append(_mean(each))
            of_questions.append(each.question)
    lengths = [len(each.row["output_2"]) for each in found.values()] if name == "alpaca-eval" else []
    return Score(
        model=model,
        part=part,
        questions=len(set(questions)),
        score=clustered_share(values, questions) if is_share else clustered_mean(values, questions),
        first_minus=difference,
        characters=clustered_mean(lengths, questions) if lengths else None,
        turns=tuple(clustered_mean(*turns[turn]) for turn in sorted(turns)),
    )


def _mean(verdict: _Verdict) -> float:
    return float(np.mean(verdict.values))


def _length_controlled(
    scores: list[Score],
    by_model: Mapping[str, Mapping[_Key, _Verdict]],
    difficulties: str,
    questions: str,
) -> tuple[list[Score], str, dict[str, str]]:
    """AlpacaEval's win rates at equal length, how they were found, and the files that were read for it."""
    instructions = list(dict.fromkeys(key[0] for found in by_model.values() for key in found))
    place = {instruction: number for number, instruction in enumerate(instructions)}
    preferences_AN, deltas_AN = np.full((2, len(by_model), len(instructions)), np.nan)
    for arm, found in enumerate(by_model.values()):
        for (instruction,), verdict in found.items():
            preferences_AN[arm, place[instruction]] = verdict.values[0]
            lengths = (len(verdict.row[f"output_{side}"]) for side in (1, 2))
            deltas_AN[arm, place[instruction]] = next(lengths) - next(lengths)
    if any(score.questions < MIN_PROMPTS for score in scores) or np.nanstd(deltas_AN, axis=1).min() == 0.0:
        return scores, "", {}
    if difficulties:
        known = read_difficulties(Path(difficulties), Path(questions) if questions else None)
        difficulty_N = known.of(instructions)
        fits = []
        for preference_N, delta_N in zip(preferences_AN, deltas_AN, strict=True):
            seen_N = np.isfinite(preference_N)
            columns = (preference_N[seen_N], delta_N[seen_N], difficulty_N[seen_N])
            fits.append(alpaca_eval_lc(*columns, extra=known.extra))
        how = "length and difficulties" + (", with the file's own rows" if known.extra else "")
        files = {path: file_digest(Path(path)) for path in (difficulties, questions) if path}
    elif len(scores) > 1:
        fits = joint_lc(preferences_AN, deltas_AN)
        how, files = f"length, one slope for {len(scores)} models, without difficulties", {}
    else:
        # From one model alone the slope is hardly known: 7 points off on the published verdicts.
        return scores, "", {}
    controlled = [
        score._replace(controlled=fit.win_rate, controlled_first_minus=fit.first_minus)
        for score, fit in zip(scores, fits, strict=True)
    ]
    return controlled, how, files


def _style_controlled(
    scores: list[Score],
    of_part: Mapping[str, Mapping[str, Mapping[_Key, _Verdict]]],
    folder: Path,
    has_parts: bool,
) -> tuple[list[Score], dict[str, str]]:
    """Arena-Hard's win rates at equal style, and the answer files that were read for it."""
    counts: dict[tuple[str, str], list[float]] = {}
    files = list(_files([str(folder)]))
    for where, row in _rows(files):
        try:
            counts[str(row["model"]), str(row["uid"])] = markdown_counts(row["metadata"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}: no answer with metadata of style ({error!r}): arena-hard-auto's "
                "utils/add_markdown_info.py adds it"
            ) from error
    controlled = {}
    for part, by_model in of_part.items():
        judged = [(model, each) for model, found in by_model.items() for each in found.values()]
        wanted = [(model, str(each.row["baseline"]), each.question) for model, each in judged]
        lacking = [
            f"{who} on {question}"
            for model, baseline, question in wanted
            for who in (model, baseline)
            if (who, question) not in counts
        ]
        if lacking:
            raise DataError(f"{folder} has no answers of {name_some(lacking)}, which style control needs")
        often = [len(each.values) for _, each in judged]
        own, other = (
            np.repeat([counts[names[side], names[2]] for names in wanted], often, axis=0) for side in (0, 1)
        )
        controlled[part if has_parts else ""] = style_control(
            [value for _, each in judged for value in each.values],
            np.repeat([model for model, _, _ in wanted], often).tolist(),
            style_features(own, other),
            np.repeat([question for _, _, question in wanted], often),
            models=[model for model, found in by_model.items() if found],
        )
    filled = [
        score._replace(
            controlled=fit.win_rate, controlled_first_minus=fit.first_minus if score.first_minus else None
        )
        for score in scores
        for fit in [controlled[score.part][score.model]]
    ]
    return filled, {str(path): file_digest(path) for path in files}


# Difficulties of AlpacaEval's instructions.


class Difficulties(NamedTuple):
    """By instruction; `extra` are AlpacaEval's own rows, if the file has them."""

    by_instruction: Mapping[str, float]
    extra: ExtraRows | None

    def of(self, instructions: Sequence[str]) -> NDArray[np.float64]:
        """[N]. Raise `DataError` for an instruction that has none."""
        if missing := [each[:60] for each in instructions if each not in self.by_instruction]:
            raise DataError(f"{len(missing):,} instructions have no difficulty: {name_some(missing, 3)}")
        return np.array([self.by_instruction[each] for each in instructions])


def read_difficulties(path: Path, questions: Path | None = None) -> Difficulties:
    """The difficulties of AlpacaEval's instructions from a CSV file.

    It is AlpacaEval's `df_gamed.csv`, whose own rows are fitted, too, or its `instruction_difficulty.csv`, or
    one of re-estimated ones: a column `instruction_difficulty` or `difficulty` beside `instruction`, or
    beside `index` or `idx`, the position in the question file `questions`.

    Raises:
        ConfigError: positions without a question file, or a question file that has no effect.
        DataError: a column is missing, a number cannot be read, or a position is not in the question file.
    """
    rows = [row for _, row in _rows([path])]
    columns = set(rows[0]) if rows else set()
    value = next((name for name in ("instruction_difficulty", "difficulty") if name in columns), None)
    identity = next((name for name in ("instruction", "index", "idx", "") if name in columns), None)
    if value is None or identity is None:
        raise DataError(f"{path}: needs a column `difficulty` beside `instruction` or `index`")
    if (identity == "instruction") != (questions is None):
        raise ConfigError(
            f"{path} has instructions, so --questions has no effect: leave it out"
            if questions
            else f"{path} goes by positions: give the question file that they are of with --questions"
        )
    asked = [each.identity for each in read_questions("alpaca-eval", questions)] if questions else []
    found: dict[str, float] = {}
    try:
        for row in rows:
            of = row[identity] if identity == "instruction" else asked[int(row[identity])]
            if found.setdefault(of, float(row[value])) != float(row[value]):
                raise ValueError(f"{row[identity]} has two difficulties")
        extra = None
        if {"std_delta_len", "preference", "not_gamed_baseline"} <= columns:
            gamed = [row for row in rows if str(row["not_gamed_baseline"]).lower() in ("false", "0", "0.0")]
            names = ("std_delta_len", value, "preference")
            extra = ExtraRows(*(np.array([float(row[name]) for row in gamed]) for name in names))
    except (ValueError, IndexError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error
    return Difficulties(found, extra)
