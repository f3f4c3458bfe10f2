"""Labels and plain-text tables, and the reading of results.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from selective_dpo.config import SelectConfig
from selective_dpo.errors import ArtifactError
from selective_dpo.evaluation.results import (
    ArmResult,
    EvaluationResults,
    from_json,
    main_measure,
    preference_metrics,
    to_json,
)
from selective_dpo.report.tables import (
    agreement_table,
    arms_table,
    check_note,
    displacement_notes,
    label_for,
    movement_note,
    share_with_interval,
)
from selective_dpo.stats.estimates import Estimate
from selective_dpo.storage.artifacts import SCHEMA_VERSION


@pytest.mark.parametrize(
    ("select", "label"),
    [
        ({}, "easiest 50%, easy to hard"),
        ({"fraction": 0.5}, "easiest 50%, easy to hard"),
        ({"fraction": 1 / 3, "order": "hard-to-easy"}, "easiest 33.33%, hard to easy"),
        ({"rule": "hardest", "count": 1200}, "hardest 1,200 pairs, easy to hard"),
        ({"rule": "random", "order": "shuffled", "seed": 3}, "random 50%, shuffled"),
        ({"rule": "all", "order": "shuffled"}, "all pairs, shuffled"),
        ({"rule": "below", "threshold": 0.69}, "difficulty <= 0.69, easy to hard"),
        ({"rule": "band", "band": (0.1, 0.6)}, "quantiles 0.1-0.6, easy to hard"),
        ({"aggregate": "final"}, "easiest 50%, easy to hard, by final loss"),
    ],
)
def test_labels(select: dict[str, Any], label: str) -> None:
    assert label_for(SelectConfig(**select)) == label


def estimate(value: float, half: float) -> dict[str, float]:
    return Estimate(value, half / 1.96, value - half, value + half)._asdict()


def arm(name: str, win_rate: float | None, difference: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "label": f"the {name} pairs",
        "pairs": 1500,
        "updates": 47,
        "held_out": None,
        "win_rate": None if win_rate is None else estimate(win_rate, 0.014),
        "difference": None if difference is None else estimate(difference, 0.02),
        "answer_tokens": None,
    }


def results(*arms: dict[str, Any]) -> dict[str, Any]:
    return {"schema_version": 1, "judge": "embedded-world", "prompts": 600, "samples": 4, "arms": list(arms)}


def test_the_arms_table_is_aligned_and_has_intervals() -> None:
    text = arms_table(
        from_json(
            results(arm("reference", 0.503, 0.055), arm("selected", 0.558, None), arm("all", 0.6, -0.042))
        )
    )
    header, rule, *lines, empty, note = text.splitlines()
    assert header.split("  ")[0] == "arm"
    assert not empty and "0.6 to 1.4 points" in note
    assert set(rule) == {"-"}
    assert "50.3% ± 1.4" in lines[0]
    assert "1,500" not in lines[0], "the starting model was not trained on pairs"
    assert "1,500       47     55.8% ± 1.4" in lines[1]
    assert lines[2].endswith("60.0% ± 1.4         -4.2 ± 2.0")
    assert len({line.index("±") for line in lines}) == 1


def test_win_rates_stand_beside_those_at_equal_length_and_the_lengths() -> None:
    controlled = {
        "length_controlled": estimate(0.521, 0.03),
        "answer_characters": estimate(812.0, 20.0),
        "length_controlled_difference": estimate(0.037, 0.02),
    }
    parsed = from_json(
        results(
            {**arm("reference", 0.5, 0.1), "answer_characters": estimate(640.0, 15.0)},
            {**arm("all", 0.6, -0.042), **controlled},
        )
    )
    header, _, reference, line, *_ = arms_table(parsed).splitlines()
    assert header.endswith("at equal length    characters")
    assert line.endswith("60.0% ± 1.4         -4.2 ± 2.0      52.1% ± 3.0  812.0 ± 20.0")
    assert reference.endswith("640.0 ± 15.0")
    assert parsed.arms[1].length_controlled_difference == Estimate(**estimate(0.037, 0.02))


def test_without_win_rates_the_arms_table_shows_held_out_accuracy() -> None:
    # Margins above 0 in 3 of 4 pairs.
    metrics = preference_metrics([0.5, 0.6, 0.6, 0.8], [0.3, 0.1, 0.2, -0.2], ["a", "b", "c", "d"])
    measured = {
        name: value._asdict() if isinstance(value, Estimate) else value
        for name, value in metrics._asdict().items()
    }
    parsed = from_json(results({**arm("selected", None, None), "held_out": measured}))
    measure = main_measure(parsed)
    assert measure is not None
    assert measure.name == "held-out accuracy"
    # 3 of 4 with t = 3.1824 of 3 degrees of freedom: w = t^2 / 4 = 2.5320, centre (.75 + w / 2) / (1 + w)
    # = .5708, reach sqrt(.1875 w + w^2 / 4) / (1 + w) = .4081.
    assert "75.0% [16.3, 97.9]" in arms_table(parsed)


def test_a_lopsided_interval_is_shown_by_its_ends() -> None:
    assert share_with_interval(Estimate(0.98, 0.01, 0.931, 0.9942)) == "98.0% [93.1, 99.4]"
    assert share_with_interval(Estimate(1.0, 0.0, 0.82, 1.0)) == "100.0% [82.0, 100.0]"
    # Sides of 2.0 and 2.1 points: as good as symmetric.
    assert share_with_interval(Estimate(0.55, 0.01, 0.53, 0.571)) == "55.0% ± 2.0"


def test_one_cluster_has_no_interval() -> None:
    entry = arm("selected", 0.5, None)
    entry["win_rate"] = {"value": 0.5, "standard_error": None, "low": None, "high": None}
    assert "50.0% (no interval)" in arms_table(from_json(results(entry)))


def test_results_are_read_as_they_were_written() -> None:
    metrics = preference_metrics([0.5, 0.6], [0.3, 0.1], ["a", "b"])
    lone = Estimate(0.5, np.nan, np.nan, np.nan)
    arms = (
        ArmResult("reference", "starting model", 0, 0, metrics, lone, lone, lone),
        ArmResult("selected", "easiest 50%", 10, 5, None, Estimate(0.6, 0.1, 0.4, 0.8)),
    )
    read = from_json(to_json(EvaluationResults("none", 3, 2, arms)))
    assert (read.judge, read.prompts, read.samples) == ("none", 3, 2)
    assert read.arms[0].held_out == metrics
    assert read.arms[1].win_rate == arms[1].win_rate
    assert np.isnan(read.arms[0].win_rate or 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize("broken", [{}, {"judge": "x", "prompts": 1, "samples": 1, "arms": [{"name": "a"}]}])
def test_broken_results_are_one_clear_error(broken: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"results\.json is not in the format"):
        from_json({"schema_version": SCHEMA_VERSION, **broken})


def test_agreement_table() -> None:
    seeds = {"a": 41, "b": 42, **{name: estimate(0.9, 0.02) for name in ("spearman", "overlap", "jaccard")}}
    text = agreement_table({"seeds": [seeds], "above_chance": estimate(0.183, 0.01)})
    assert text.splitlines()[2].split("  ")[0] == "seeds 41 and 42"
    assert text.count("0.90 ± 0.02") == 3
    assert text.endswith("pairs above ln 2 (the scorers disagree with the label): 18.3% ± 1.0")
    hinge = agreement_table({"seeds": [], "chance_loss": 1.0, "above_chance": estimate(0.183, 0.01)})
    assert hinge == "pairs above 1 (the scorers do worse than a policy that has not moved): 18.3% ± 1.0"
    assert agreement_table({"seeds": [], "chance_loss": None, "above_chance": None}) == ""
    assert agreement_table({"seeds": []}) == ""


def test_control_characters_do_not_reach_the_terminal() -> None:
    agreed = {name: estimate(0.9, 0.0) for name in ("spearman", "overlap", "jaccard")}
    text = agreement_table({"seeds": [{"a": "\x1b[31mred", "b": 2, **agreed}]})
    assert "\x1b" not in text and "31mred" in text


def test_chosen_answers_that_become_less_likely_are_warned_of() -> None:
    falls = preference_metrics([0.5, 0.6], [0.3, 0.1], ["a", "b"], np.array([[-3.0, -9.0], [-2.0, -8.0]]))
    arms = (
        ArmResult("selected", "easiest 50%", 2, 1, held_out=falls),
        ArmResult("all", "all pairs", 2, 1, held_out=preference_metrics([0.5, 0.6], [0.3, 0.1], ["a", "b"])),
    )
    (note,) = displacement_notes(EvaluationResults("none", 0, 0, arms))
    # -2.5 and -8.5, standard error 1/2, times 1.96.
    assert "selected makes the chosen answers of held-out pairs less likely (-2.5 ± 1.0 nats)" in note
    assert "(-8.5 ± 1.0)" in note


def test_scorers_that_hardly_moved_are_called_so() -> None:
    note = movement_note({"movement": 0.0002, "chance_loss": 0.693147})
    assert note.startswith("Warning: the scorers hardly moved: losses differ from 0.6931")
    assert "by 0.0002" in note and "protocol one-step" in note
    assert movement_note({"movement": 0.0051, "chance_loss": 0.693147}) == ""
    assert movement_note({"chance_loss": 0.693147}) == ""  # a curriculum made before it was measured
    assert movement_note({"movement": None, "chance_loss": None}) == ""


def test_a_check_that_disagrees_names_the_protocols_to_use() -> None:
    def check(spearman: float) -> dict[str, Any]:
        near = {"standard_error": 0.02, "low": spearman - 0.04, "high": spearman + 0.04}
        estimate = {"value": spearman, **near}
        return {"pairs": 2000, "spearman": estimate, "overlap": estimate, "evaluations": estimate}

    assert check_note(None) == ""
    good = check_note(check(0.71))
    assert "trained on 2,000 pairs one-step agrees to 0.71 ± 0.04 (Spearman)" in good
    assert "Warning" not in good
    bad = check_note(check(0.38))
    assert bad.startswith("check: ") and "less than 0.5" in bad and "use score.protocol fast or paper" in bad
