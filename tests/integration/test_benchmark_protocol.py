"""`benchmarks/protocol.py` is one command; here with a few short pairs, so that both sides stay equal."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "protocol.py"
SMALL = ["--pairs", "20", "--longest", "24", "--width", "16", "--batch", "2", "--accumulation", "1"]
SMALL += ["--rounds", "1", "--threads", "1", "--epoch-pairs", "20", "--trainings", "lora"]
FIELDS = {"name", "ratio_median", "ratio_min", "ratio_max", "rounds", "max_abs_diff", "details"}

Results = dict[str, dict[str, Any]]


def run_the_benchmark(*arguments: object) -> None:
    """As the command does, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        importlib.import_module("protocol").main()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("protocol") / "protocol.json"
    run_the_benchmark(*SMALL, "--json", out)
    return {each["name"]: each for each in json.loads(out.read_text())["results"]}


def test_every_comparison_is_there_and_has_the_fields(results: Results) -> None:
    protocols = {"protocol paper", "protocol certified", "protocol fast", "protocol one-step"}
    assert set(results) == protocols | {"selective lora", "selective one-step lora"}
    for each in results.values():
        assert set(each) == FIELDS
        assert each["rounds"] == 1
        assert each["ratio_min"] <= each["ratio_median"] <= each["ratio_max"]
        assert each["details"]["reached"] in (True, False)


def test_both_sides_measured_the_same_losses(results: Results) -> None:
    # Half of 20 pairs, 2 an update: five updates. `paper` is measured after each, as theirs is: 20 pairs, 3
    # seeds, 5 evaluations. `fast` after 3 and 5, seed 41.
    compared = {name: each["details"]["losses_compared"] for name, each in results.items()}
    assert compared["protocol paper"] == 20 * 3 * 5
    assert compared["protocol fast"] == 20 * 1 * 2
    # Of `one-step` the reference's log-probs are compared: of both completions of each pair.
    assert compared["protocol one-step"] == 20 * 2
    # `certified` takes 2 to 6 seeds, of which theirs has the first three.
    seeds = results["protocol certified"]["details"]["seeds"]
    assert seeds == list(range(41, 41 + len(seeds)))
    assert compared["protocol certified"] == 20 * min(3, len(seeds)) * 2
    for each in results.values():
        assert each["max_abs_diff"] <= each["details"]["tolerance"]


def test_what_cheaper_protocols_keep_has_intervals(results: Results) -> None:
    assert "agreement" not in results["protocol paper"]["details"]
    for name in ("protocol fast", "protocol certified", "protocol one-step"):
        for estimate in results[name]["details"]["agreement"]["paper"].values():
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert results["protocol certified"]["details"]["certificate"]["seeds"] >= 2


def test_selective_dpo_is_given_as_a_share_of_an_epoch(results: Results) -> None:
    for name in ("selective lora", "selective one-step lora"):
        (seconds,) = results[name]["details"]["seconds"]
        assert results[name]["ratio_median"] == pytest.approx(seconds["ours"] / seconds["theirs"])
        assert 0 < results[name]["details"]["selected_tokens"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # A half of 10 pairs in batches of 4 leaves a batch of 2, whose pairs TRL weighs twice.
        (["--pairs", "20", "--batch", "4"], "their half of the batch size"),
        # A half of 10 pairs, 10 an update: one update cannot be evaluated five times.
        (["--pairs", "20", "--batch", "2", "--accumulation", "5"], "a scorer makes 1 updates"),
    ],
)
def test_pairs_with_which_the_sides_would_differ_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run_the_benchmark(*arguments)
