"""The plan's comparison of protocols: passes, tokens and FLOPs by hand, and agreement from the records."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from selective_dpo.config import PROTOCOLS, Protocol, Recipe, ScoreConfig
from selective_dpo.curriculum.import_ import import_records
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.select import Rule, select
from selective_dpo.curriculum.table import curriculum_losses
from selective_dpo.logprobs.rows import PartLengths
from selective_dpo.run.costs import Architecture, Models, RowCounter
from selective_dpo.run.plan import (
    MEASURED,
    PASSES,
    Passes,
    PlannedProtocol,
    make_plan,
    planned_protocols,
    protocols_text,
    scoring_passes,
)
from tests.fixtures.models import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT.parent / "shared" / "data" / "learning_records"
MODELS = ("qwen-2.5-1.5b-argilla", "qwen-2.5-7b-argilla", "qwen-2.5-14b-argilla")

# 100 parameters of which 20 are looked up only.
SIZES = Architecture(100, 20, 2, 8, 2, 2, 10)
MODELS_OF = Models(SIZES, scorer_adapter=5, policy_adapter=0, rows_per_pair=1)


def planned(recipe: Recipe, lengths: PartLengths) -> dict[str, PlannedProtocol]:
    work = scoring_passes(recipe, lengths, RowCounter(recipe, "cpu"))
    return by_name(planned_protocols(recipe, MODELS_OF, work))


def even_pairs() -> PartLengths:
    """24 pairs of 2, 3 and 3 tokens: packed rows of 2 + 2 + 2."""
    return PartLengths(*np.tile([[2], [3], [3]], (1, 24)))


def by_name(planned: Iterable[PlannedProtocol]) -> dict[str, PlannedProtocol]:
    return {f"{each.protocol} {each.part}".strip(): each for each in planned}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path, score={"seeds": [41, 42, 7], "evaluations": 1}, train={"lora": None})


def test_passes_arithmetic_tokens_and_flops(recipe: Recipe) -> None:
    found = planned(recipe, even_pairs())
    # The reference once, one epoch for each seed, all pairs once for each seed and evaluation. One-step takes
    # gradients once, with the reference from the same forward pass, and measures once.
    assert {name: (each.forward_passes, each.backward_passes) for name, each in found.items()} == {
        "one-step": (1 + 1, 1),
        "paper": (1 + 3 + 15, 3),
        "fast": (1 + 1 + 2, 1),
        "certified at least": (1 + 2 + 4, 2),
        "certified at most": (1 + 6 + 12, 6),
        "custom": (1 + 3 + 3, 3),
    }
    assert [name for name, each in found.items() if each.own] == ["custom"]
    fast, paper = found["fast"], found["paper"]
    # 2 a forward pass, 2 a backward pass with LoRA. All weights are trained in `train`: with its reference a
    # DPO epoch is 2 + 2 + 4.
    assert (fast.nt, fast.dpo_epochs) == (10, 10 / 8)
    assert (paper.nt, found["certified at least"].nt, found["one-step"].nt) == (44, 18, 6)
    # All rows are as long: nothing is padded. 24 x 6 tokens a pass.
    assert (fast.tokens, paper.tokens) == (144 * 4, 144 * 19)
    # A forward pass: 2 x 80 parameters x 144 tokens.
    reference = 23_040
    # The adapter's 5 parameters: 2 x 5 x 144 = 1,440, three times in training, the base weights twice.
    training = 2 * 23_040 + 3 * 1_440
    evaluations = 2 * (reference + 1_440)
    assert fast.flops == reference + training + evaluations


def test_the_arithmetic_of_the_documentation(tmp_path: Path) -> None:
    # docs/protocols.md: with gradient checkpointing 50, 22, 12 and 8 NT, and a full DPO epoch of 10.
    again = {"activation_checkpointing": True}
    blocks: dict[str, Any] = {"score": {"trainer": again}, "train": {"lora": None, "trainer": again}}
    found = by_name(planned_protocols(tiny_recipe(tmp_path, **blocks), None, None))
    assert [found[name].nt for name in ("paper", "certified at least", "fast", "one-step")] == [
        *(50, 22, 12, 8),
    ]
    assert found["fast"].dpo_epochs == 12 / 10
    # Two epochs of all weights: 1 + 2 + 2 passes, and 2 x (4 + 2).
    blocks["score"] = {"lora": None, "trainer": {**again, "num_train_epochs": 2}}
    assert by_name(planned_protocols(tiny_recipe(tmp_path, **blocks), None, None))["fast"].nt == 10 + 12


def test_another_protocol_is_one_entry(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, "one-pass", Protocol((41,), 1))
    # The gradient of all pairs, and their log-probs once more.
    monkeypatch.setitem(PASSES, "one-pass", lambda seeds, evaluations, epochs: Passes(1, 1))
    assert planned(recipe, even_pairs())["one-pass"].nt == 6


def test_padding_of_one_long_pair(recipe: Recipe) -> None:
    # Of 24 pairs one has 1 + 99 + 99 tokens, the others 1 + 2 + 2. The long one costs less in padded rows.
    columns = np.repeat([[1], [2], [2]], 24, axis=1)
    columns[1:, 5] = 99
    fast = planned(recipe, PartLengths(*columns))["fast"]
    # Forward passes compute all pairs alike: 512 tokens hold 2 pairs in 4 rows of 100; then the other 22.
    forward = 4 * 99 + 2 * 22 * 2  # without the last tokens
    # In training the long pair's rows are a group of their own, and the others packed rows of 1 + 1 + 1.
    assert fast.tokens == 3 * forward + (2 * 99 + 23 * 3)


def test_without_pairs_or_sizes(recipe: Recipe) -> None:
    found = by_name(planned_protocols(recipe, None, None))
    assert found["paper"].forward_passes == 19 and found["paper"].nt == 44
    assert {each.tokens for each in found.values()} == {each.flops for each in found.values()} == {None}


def test_which_protocols_are_compared(tmp_path: Path) -> None:
    def compared(**score: Any) -> list[tuple[str, tuple[int, ...], int, bool]]:
        config = ScoreConfig.model_validate(score)
        planned = planned_protocols(tiny_recipe(tmp_path).model_copy(update={"score": config}), None, None)
        return [
            (f"{each.protocol} {each.part}".strip(), each.seeds, each.evaluations, each.own)
            for each in planned
        ]

    least, most = (
        ("certified at least", (41, 42), 2, False),
        ("certified at most", (41, 42, 43, 44, 45, 46), 2, False),
    )
    one_step = ("one-step", (41,), 1, False)
    assert compared(protocol="paper") == [
        one_step, ("paper", (41, 42, 43), 5, True), ("fast", (41,), 2, False), least, most
    ]  # fmt: skip
    # The recipe's own seeds and evaluations.
    assert compared(protocol="certified", seeds=[1, 2, 3], evaluations=4)[3:] == [
        ("certified at least", (1, 2), 4, True), ("certified at most", (1, 2, 3), 4, True)
    ]  # fmt: skip
    assert compared(protocol="custom", seeds=[9], evaluations=3)[-1] == ("custom", (9,), 3, True)


def test_the_table_as_text(tmp_path: Path) -> None:
    def text(**select: Any) -> str:
        return protocols_text(make_plan(tiny_recipe(tmp_path, score={"evaluations": 1}, select=select)))

    whole = text()
    lines = {line.split("  ")[0]: line for line in whole.splitlines()}
    assert lines["paper"].split()[-2:] == ["itself", "itself"]
    assert lines["fast"].endswith("0.9969 .. 0.9981  0.977 .. 0.988")
    assert "19 P" in lines["paper"] and "44 NT" in lines["paper"]
    assert lines["certified, at most"].split()[-2:] == ["?", "?"]
    assert lines["custom (this recipe)"].split()[-2:] == ["?", "?"]
    assert "overlap of the easiest half" in whole
    assert "0.9969" not in text(aggregate="final")


@cache
def losses_of(model: str) -> LossTable:
    return curriculum_losses(import_records(RECORDS / model).curriculum)


@pytest.mark.slow
@pytest.mark.skipif(not RECORDS.is_dir(), reason="the authors' records (../shared/data) are not here")
@pytest.mark.parametrize(("seeds", "name"), [(1, "`fast`"), (2, "two seeds")])
def test_what_is_claimed_is_in_the_records(seeds: int, name: str) -> None:
    tenths = range(1, 10)
    spearman: list[float] = []
    overlaps: dict[int, list[float]] = {tenth: [] for tenth in tenths}
    for model, some in itertools.product(MODELS, itertools.combinations(range(3), seeds)):
        table = losses_of(model)
        # Of five evaluations the third and the last stand for the middle and the end.
        cheap_P = table.losses_PSE[:, list(some)][:, :, [2, 4]].mean(axis=(1, 2))
        paper_P = table.losses_PSE.mean(axis=(1, 2))
        spearman.append(spearmanr(cheap_P, paper_P).statistic)
        for tenth, found in overlaps.items():
            rule = Rule(fraction=tenth / 10)
            cheap, paper = (select(all_P, table.pair_ids_P, rule).selected_P for all_P in (cheap_P, paper_P))
            found.append((cheap & paper).sum() / paper.sum())
    assert len(spearman) == 9
    measured = MEASURED[seeds, 2]
    assert measured["spearman"] == (round(min(spearman), 4), round(max(spearman), 4))
    assert measured["overlap"] == (round(min(overlaps[5]), 3), round(max(overlaps[5]), 3))
    ranges = [f"{min(overlaps[tenth]):.3f}-{max(overlaps[tenth]):.3f}" for tenth in tenths]
    row = " | ".join([f"| {name}", *ranges]).replace("0.", ".") + " |"
    assert row in (ROOT / "docs" / "protocols.md").read_text("utf-8")
