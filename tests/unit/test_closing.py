"""What a finished run says last."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selective_dpo.cli import verb_parser
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.report.content import load_report_content
from selective_dpo.report.page import closing, headline
from tests.fixtures.run_folder import make_run_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run_folder(tmp_path / "my run", pairs=80)


def test_it_says_what_was_found_where_the_policy_is_and_what_comes_next(run: Path) -> None:
    (run / "policy" / "adapter_config.json").write_text("{}")
    lines = closing(run)
    assert lines[: len(headline(load_report_content(run)))] == headline(load_report_content(run))
    assert any(line.startswith("Repetitions of the scoring agree to 0.") for line in lines)
    assert f"policy: {run / 'policy'}" in lines
    assert any("an adapter: load it with peft, or merge it: python -c '" in line for line in lines)
    # Each command that it names is one.
    commands = [
        line.split("selective-dpo ", 1)[1].split("#")[0] for line in lines if "selective-dpo " in line
    ]
    assert len(commands) == 3
    for command in commands:
        verb, *words = shlex.split(command)
        assert verb_parser(verb).parse_args(words).verb == verb


def test_whole_weights_need_no_merging(run: Path) -> None:
    assert not any("adapter" in line for line in closing(run))


def test_an_accuracy_whose_interval_holds_a_half_shows_nothing(run: Path) -> None:
    content = load_report_content(run)
    assert content.results is not None
    (arm, *_) = [each for each in content.results.arms if each.name == "selected"]
    assert arm.held_out is not None

    def said(low: float, high: float) -> str:
        accuracy = arm.held_out.accuracy._replace(value=(low + high) / 2, low=low, high=high)  # type: ignore[union-attr]
        own = arm._replace(win_rate=None, held_out=arm.held_out._replace(accuracy=accuracy))  # type: ignore[union-attr]
        results = content.results._replace(arms=(own,), repeats=())  # type: ignore[union-attr]
        return " ".join(headline(replace(content, results=results)))

    assert "the interval holds 50%, so this shows nothing" in said(0.34, 0.82)
    assert "better than chance." in said(0.55, 0.6) and "worse than chance." in said(0.4, 0.45)


def test_numbers_in_a_narrow_range_keep_the_digits_that_tell_them_apart(run: Path) -> None:
    content = load_report_content(run)

    def digits(width: float) -> int:
        table = content.curriculum.table
        place = table.column_names.index("difficulty")
        values = 0.693 + width * np.linspace(-1, 1, len(table))
        narrow = Curriculum(table.set_column(place, "difficulty", [values]), content.curriculum.facts)
        return replace(content, curriculum=narrow).digits

    assert (digits(1.0), digits(0.001), digits(0.0)) == (3, 4, 3)


def test_a_run_without_evaluation_ends_too(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    assert any("No evaluation is part of this run" in line for line in closing(run))
