"""Official judgments: what counts of a row, what a question weighs, and what two models differ by."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import spearmanr

from selective_dpo.cli import main
from selective_dpo.errors import ConfigError, DataError
from selective_dpo.evaluation.judgments import read_difficulties, read_judgments
from selective_dpo.report.judgments import judgments_text
from selective_dpo.stats.estimates import Estimate
from selective_dpo.stats.style_control import style_control, style_features

DATA = Path(__file__).parents[3] / "shared" / "data"
T_1 = 12.7062
"""97.5% quantile of Student's t with one degree of freedom."""


def written(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, "utf-8")
    return str(path)


def grade(question: int, turn: int, score: float, model: str = "a", judge: str = "gpt-4") -> dict[str, Any]:
    return {
        "question_id": question,
        "model": model,
        "judge": [judge, "single-v1"],
        "user_prompt": "",
        "judgment": "",
        "score": score,
        "turn": turn,
        "tstamp": 0.0,
    }


def preferred(
    instruction: str, preference: float | None, model: str = "a", lengths: tuple[int, int] = (5, 5)
) -> dict[str, Any]:
    return {
        "instruction": instruction,
        "output_1": "x" * lengths[0],
        "generator_1": "baseline",
        "output_2": "y" * lengths[1],
        "generator_2": model,
        "annotator": "weighted_alpaca_eval_gpt4_turbo",
        "preference": preference,
    }


def games(uid: str, first: str | None, second: str | None, **more: Any) -> dict[str, Any]:
    both = [{"score": label, "judgment": {}, "prompt": []} for label in (first, second)]
    row = {"uid": uid, "category": "hard_prompt", "judge": "gpt-4.1", "model": "a", "baseline": "b"}
    return {**row, "games": both, **more}


# --- MT-Bench -----------------------------------------------------------------------------------------------


def test_mt_bench_is_the_mean_over_turns_and_its_error_that_of_questions(tmp_path: Path) -> None:
    rows = [grade(81, 1, 9), grade(81, 2, 8), grade(82, 1, 4), grade(82, 2, 3)]
    # Repeated with another grade, which counts, and one that could not be read, which does not.
    rows += [grade(81, 1, 7), grade(83, 1, -1)]
    found = read_judgments("mt-bench", [written(tmp_path / "gpt-4_single.jsonl", rows)])
    (score,) = found.scores
    # 7, 8 | 4, 3: mean 5.5, the questions' residuals 4 and -4; variance (16 + 16) / 4^2 * 2 = 4.
    assert (score.score.value, score.score.standard_error) == (5.5, 2.0)
    assert [turn.value for turn in score.turns] == [5.5, 5.5]
    assert (score.questions, found.judge, found.baseline) == (2, "gpt-4", "")
    assert found.notes == (
        "6 judgments in 1 file(s)",
        "1 repeated, of which the last counts",
        "1 without a verdict, left out",
    )
    digest = hashlib.sha256((tmp_path / "gpt-4_single.jsonl").read_bytes()).hexdigest()
    assert list(found.files.values()) == [digest]


def test_differences_are_paired_by_question_and_turn_in_any_order(tmp_path: Path) -> None:
    rows = [grade(81, 1, 9), grade(82, 1, 5), grade(83, 1, 10)]
    rows += [grade(82, 1, 4, "run-selected"), grade(81, 1, 6, "run-selected")]
    path = written(tmp_path / "gpt-4_single.jsonl", rows)
    selected, other = read_judgments("mt-bench", [path]).scores
    assert (selected.model, other.model) == ("run-selected", "a")
    assert selected.first_minus is None
    assert other.first_minus is not None
    # Of the shared ones 6 - 9 and 4 - 5: mean -2, residuals -1 and 1, variance 2 / 2^2 * 2 = 1.
    assert other.first_minus[:2] == (-2.0, 1.0)
    first, second = read_judgments("mt-bench", [path], models=["a", "run-selected"]).scores
    assert first.model == "a"
    assert second.first_minus is not None
    assert second.first_minus.value == 2.0
    with pytest.raises(ConfigError, match=r"no judgments of c; there are some of a, run-selected"):
        read_judgments("mt-bench", [path], models=["c"])
    written(tmp_path / "other_single.jsonl", [grade(81, 1, 9, judge="gpt-4o")])
    with pytest.raises(DataError, match="several judges, gpt-4, gpt-4o"):
        read_judgments("mt-bench", [str(tmp_path)])
    with pytest.raises(DataError, match=r"no verdict in .*: nothing is left"):
        read_judgments("mt-bench", [written(tmp_path / "other_single.jsonl", [grade(81, 1, -1)])])


# --- Arena-Hard ---------------------------------------------------------------------------------------------


def test_arena_hard_counts_a_strong_verdict_three_times(tmp_path: Path) -> None:
    # The baseline is A in the first game: the model wins it strongly (three times 1), and loses the second.
    # Then a tie and a win, and a row with a game without a verdict.
    rows = [games("q1", "B>>A", "B>A"), games("q2", "A=B", "A>B"), games("q3", None, "A>B")]
    found = read_judgments("arena-hard", [written(tmp_path / "a.jsonl", rows)])
    (score,) = found.scores
    # 1, 1, 1, 0 | 1/2, 1: 4.5 / 6. Residuals of the questions: 3 - 4 * .75 = 0 and 1.5 - 2 * .75 = 0.
    assert score.score.value == 0.75
    assert score.score.standard_error == pytest.approx(0.0, abs=1e-12)
    assert (score.questions, score.part, found.baseline, found.judge) == (2, "", "b", "gpt-4.1")
    assert "1 without a verdict, left out" in found.notes


def test_arena_hard_has_a_baseline_for_each_category(tmp_path: Path) -> None:
    rows = [games("q1", "B>A", "A>B"), games("q2", "A>B", "B>A", category="creative_writing", baseline="c")]
    found = read_judgments("arena-hard", [written(tmp_path / "a.jsonl", rows)])
    assert [(score.part, score.score.value) for score in found.scores] == [
        ("hard_prompt", 1.0),
        ("creative_writing", 0.0),
    ]
    assert found.baseline == "b, c"
    assert "creative_writing" in judgments_text(found)
    rows[1]["category"] = "hard_prompt"
    with pytest.raises(DataError, match="several baselines, b, c"):
        read_judgments("arena-hard", [written(tmp_path / "a.jsonl", rows)])


def test_style_features_are_differences_relative_to_their_sums() -> None:
    # 30 tokens with 3 headers, 6 list items, 0 bold; 10 tokens with 1, 0 and 5.
    found = style_features([[30, 3, 6, 0]], [[10, 1, 0, 5]])
    # 20 / 40; (.1 - .1) / 1.2; (.2 - 0) / 1.2; (0 - .5) / 1.5
    np.testing.assert_allclose(found, [[0.5, 0.0, 1 / 6, -1 / 3]])
    assert np.isfinite(style_features([[0, 0, 0, 0]], [[0, 0, 0, 0]])).all()  # empty answers


def test_style_control_finds_the_quality_behind_the_style() -> None:
    # Scores are the model's own probabilities, so the likelihood is largest at the truth: qualities 0.5 and
    # -1, and a slope of 2 for the first of two features, both with mean 0 over all comparisons.
    generator = np.random.default_rng(0)
    features_RF = generator.normal(size=(400, 2))
    features_RF -= features_RF.mean(axis=0)
    models = np.repeat(["a", "b"], 200)
    quality_R = np.where(models == "a", 0.5, -1.0)
    scores_R = expit(quality_R + 2.0 * features_RF[:, 0])
    found = style_control(
        scores_R, models.tolist(), features_RF, np.arange(400) // 2, models=["a", "b"], replicates=10
    )
    assert found["a"].win_rate.value == pytest.approx(expit(0.5), abs=1e-6)
    assert found["b"].win_rate.value == pytest.approx(expit(-1.0), abs=1e-6)
    assert found["a"].first_minus is None
    assert found["b"].first_minus is not None
    assert found["b"].first_minus.value == pytest.approx(expit(0.5) - expit(-1.0), abs=1e-6)
    # Without style it is the mean of the scores (unpenalised Bradley-Terry against one baseline).
    plain = style_control(
        scores_R, models.tolist(), np.zeros((400, 2)), np.arange(400), models=["a", "b"], replicates=2
    )
    assert plain["a"].win_rate.value == pytest.approx(scores_R[:200].mean(), abs=1e-6)


def test_style_control_reads_the_metadata_that_the_official_script_adds(tmp_path: Path) -> None:
    def answer(model: str, uid: str, tokens: int) -> dict[str, Any]:
        style = {
            "token_len": tokens,
            "header_count": {"h1": 0, "h2": 1},
            "list_count": {"ordered": 0, "unordered": 2},
            "bold_count": {"**": 1, "__": 0},
        }
        return {"uid": uid, "model": model, "messages": [], "metadata": style}

    # Half of the questions are won both times and half lost, at the same lengths: length does not count.
    uids = [f"q{number}" for number in range(8)]
    judgments = [
        games(uid, *(("B>A", "A>B") if number < 4 else ("A>B", "B>A"))) for number, uid in enumerate(uids)
    ]
    path = written(tmp_path / "judgments" / "a.jsonl", judgments)
    answers = tmp_path / "answers"
    written(answers / "a.jsonl", [answer("a", uid, 100 + number % 4) for number, uid in enumerate(uids)])
    with pytest.raises(DataError, match="has no answers of b on q0"):
        read_judgments("arena-hard", [path], answers=str(answers))
    written(answers / "b.jsonl", [answer("b", uid, 100) for uid in uids])
    found = read_judgments("arena-hard", [path], answers=str(answers))
    (score,) = found.scores
    assert score.controlled is not None
    assert score.controlled.value == pytest.approx(0.5, abs=1e-6)
    assert found.controlled_by.startswith("style")
    assert len(found.files) == 3
    written(answers / "b.jsonl", [{"uid": "q0", "model": "b", "messages": []}])
    with pytest.raises(DataError, match=r"add_markdown_info.py"):
        read_judgments("arena-hard", [path], answers=str(answers))


# --- AlpacaEval ---------------------------------------------------------------------------------------------


def test_alpaca_eval_preferences_are_probabilities_and_0_is_a_draw(tmp_path: Path) -> None:
    rows = [preferred("p", 1.75), preferred("q", 0.0), preferred("r", None), preferred("p", 1.25)]
    found = read_judgments("alpaca-eval", [written(tmp_path / "annotations.json", rows)])
    (score,) = found.scores
    assert (score.score.value, score.questions) == ((0.25 + 0.5) / 2, 2)
    # Residuals 1/8 of one question each: variance 2 / 64 / 2^2 * 2 = 1/64.
    assert score.score.standard_error == pytest.approx(0.125)
    assert score.characters == Estimate(5.0, 0.0, 5.0, 5.0)
    assert (found.controlled_by, score.controlled) == ("", None)
    assert (found.baseline, found.judge) == ("baseline", "weighted_alpaca_eval_gpt4_turbo")
    with pytest.raises(DataError, match=r"row 0: no judgment of alpaca-eval: ValueError preference 3 is not"):
        read_judgments("alpaca-eval", [written(tmp_path / "annotations.json", [preferred("p", 3)])])
    with pytest.raises(DataError, match=r"no judgment of mt-bench: KeyError 'question_id'"):
        read_judgments("mt-bench", [written(tmp_path / "annotations.json", rows)])


def test_difficulties_go_by_instruction_or_by_the_position_in_a_question_file(tmp_path: Path) -> None:
    asked = [{"instruction": text} for text in ("p", "q")]
    questions = Path(written(tmp_path / "alpaca_eval.json", asked))
    named = tmp_path / "named.csv"
    named.write_text("instruction,difficulty\nq,2.5\np,-1\n", "utf-8")
    placed = tmp_path / "df_gamed.csv"
    placed.write_text(
        "model,preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
        "concise,0.1,0,1.5,-1,False\nconcise,0.2,1,1.25,2.5,False\nverbose,0.6,1,-2,2.5,False\n",
        "utf-8",
    )
    by_name, by_place = read_difficulties(named), read_difficulties(placed, questions)
    np.testing.assert_array_equal(by_name.of(["p", "q"]), [-1.0, 2.5])
    np.testing.assert_array_equal(by_place.of(["q", "p"]), [2.5, -1.0])
    assert by_name.extra is None
    assert by_place.extra is not None
    np.testing.assert_array_equal(by_place.extra, [[1.5, 1.25, -2], [-1, 2.5, 2.5], [0.1, 0.2, 0.6]])
    with pytest.raises(DataError, match="1 instructions have no difficulty: r"):
        by_name.of(["p", "r"])
    with pytest.raises(ConfigError, match="goes by positions"):
        read_difficulties(placed)
    with pytest.raises(ConfigError, match="no effect"):
        read_difficulties(named, questions)
    named.write_text("instruction,hardness\np,1\n", "utf-8")
    with pytest.raises(DataError, match="needs a column `difficulty`"):
        read_difficulties(named)
    placed.write_text("index,difficulty\n2,1\n", "utf-8")
    with pytest.raises(DataError, match="out of range"):
        read_difficulties(placed, questions)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "annotations.json", [preferred("p", 1.75)])
    for benchmark, option in (("mt-bench", "difficulties"), ("alpaca-eval", "answers")):
        with pytest.raises(ConfigError, match=f"--{option} has no effect"):
            read_judgments(benchmark, [path], **{option: path})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--questions has no effect"):
        read_judgments("alpaca-eval", [path], questions=path)


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two models of the same wins at lengths that do not count: the win rate at equal length is the plain one.
    rows = [
        preferred(f"p{number}", 1.0 + (number % 4 != 0), model, (20, 10 if number < 20 else 30))
        for model in ("a", "b")
        for number in range(40)
    ]
    path = written(tmp_path / "annotations.json", rows)
    assert main(["read-judgments", "alpaca-eval", path, "--json", str(tmp_path / "found.json")]) == 0
    header, _, first, second, *notes = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "model"
    assert "a minus it, controlled" in header
    assert first.count("75.0%") == 2
    assert "+0.0 ± 0.0" in second
    assert "alpaca-eval, judged by weighted_alpaca_eval_gpt4_turbo, against baseline" in notes
    assert "controlled for length, one slope for 2 models, without difficulties" in notes
    content = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert [score["model"] for score in content["scores"]] == ["a", "b"]
    assert content["scores"][0]["controlled"]["value"] == pytest.approx(0.75, abs=1e-6)
    assert list(content["files"]) == [path]
    assert main(["read-judgments", "alpaca-eval", str(tmp_path / "none.json")]) == 2


def test_published_verdicts_give_the_published_figures(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"there is no {DATA}")
    with (DATA / "alpaca_eval_published.csv").open() as lines:
        published = {row["model"]: row for row in csv.DictReader(lines) if row["n_total"] == "805"}
    models = sorted(published)[::3]
    with gzip.open(DATA / "alpaca_eval_verdicts.csv.gz", "rt") as lines:
        rows = [row for row in csv.DictReader(lines) if row["model"] in models]
    order = np.random.default_rng(0).permutation(len(rows))  # joined by instruction, not by position
    path = written(
        tmp_path / "annotations.json",
        [
            preferred(
                f"instruction {row['idx']}",
                float(row["pref"]),
                row["model"],
                (int(row["len1"]), int(row["len2"])),
            )
            for row in (rows[place] for place in order)
        ],
    )
    questions = written(
        tmp_path / "alpaca_eval.json", [{"instruction": f"instruction {place}"} for place in range(805)]
    )
    difficulties = str(DATA / "alpaca_eval_difficulty_reestimated.csv")
    found = read_judgments(
        "alpaca-eval", [path], models=models, difficulties=difficulties, questions=questions
    )

    def of(column: str) -> list[float]:
        return [float(published[model][column]) for model in models]

    # The verdicts at hand have seven decimals.
    np.testing.assert_allclose([100 * each.score.value for each in found.scores], of("win_rate"), atol=1e-6)
    errors = [100 * each.score.standard_error for each in found.scores]
    np.testing.assert_allclose(errors, of("standard_error"), atol=1e-6)
    controlled = [100 * each.controlled.value for each in found.scores if each.controlled]
    assert np.abs(np.array(controlled) - of("length_controlled_winrate")).mean() < 0.7
    assert spearmanr(controlled, of("length_controlled_winrate")).statistic > 0.99
    lengths = [math.floor(each.characters.value) for each in found.scores if each.characters]
    assert np.abs(np.array(lengths) - of("avg_length")).max() <= 1
