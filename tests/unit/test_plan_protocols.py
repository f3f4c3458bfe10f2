"""The plan's comparison of protocols: passes, tokens and FLOPs by hand, and agreement from the records."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from selective_dpo.config import Recipe, ScoreConfig, SelectConfig
from selective_dpo.curriculum.import_ import import_records
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.select import Rule, select
from selective_dpo.curriculum.table import curriculum_losses
from selective_dpo.data.store import PairsSummary
from selective_dpo.logprobs.packing_support import RowLayout as RowPath
from selective_dpo.logprobs.padded import PartLengths
from selective_dpo.run.planning.architecture import Architecture
from selective_dpo.run.planning.forwarding import Forwarding
from selective_dpo.run.planning.inputs import KeptPairs
from selective_dpo.run.planning.measured import MEASURED, Range, expected_agreement
from selective_dpo.run.planning.pricing import Models
from selective_dpo.run.planning.protocol_words import protocols_text
from selective_dpo.run.planning.protocols import (
    PlannedProtocol,
    Scoring,
    compared,
    easiest_fraction,
    planned_protocols,
)
from tests.fixtures.models import tiny_recipe

RECORDS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "learning_records"
MODELS = ("qwen-2.5-1.5b-argilla", "qwen-2.5-7b-argilla", "qwen-2.5-14b-argilla")

# 100 parameters of which 20 are looked up only; 2 layers, attention 4 wide.
SIZES = Architecture(100, 20, 2, 8, 4, 2, 2, 10)
SHARED = Forwarding(RowPath("shared", ""), None)
PADDED = Forwarding(RowPath("padded", ""), None)


def even_pairs(count: int = 24) -> KeptPairs:
    """Pairs of 2, 3 and 3 tokens, each with a prompt of its own: rows of 5, or a shared one of 2 + 2 + 2."""
    summary = PairsSummary(count, count, count, {"kept": count}, {}, count, 0, 0, 0, 0, 0, "", "")
    names = [f"{number:032x}" for number in range(count)]
    return KeptPairs(summary, names, names, PartLengths(*np.tile([[2], [3], [3]], (1, count))))


def by_name(planned: tuple[PlannedProtocol, ...]) -> dict[str, PlannedProtocol]:
    return {f"{each.scoring.protocol} {each.scoring.part}".strip(): each for each in planned}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path, score={"seeds": [41, 42, 7], "evaluations": 1}, train={"lora": None})


def test_passes_tokens_and_flops(recipe: Recipe) -> None:
    models = Models(SIZES, scorer_adapter=5, policy_adapter=0, forwarding=SHARED)
    found = by_name(planned_protocols(recipe, even_pairs(), models, SHARED))
    # The reference once, one epoch for each seed, all pairs once for each seed and evaluation.
    passes = {name: each.per_pair for name, each in found.items()}
    assert passes == {
        "paper": (1 + 3 + 15, 3),
        "fast": (1 + 1 + 2, 1),
        "certified least": (1 + 2 + 4, 2),
        "certified most": (1 + 6 + 12, 6),
        "custom": (1 + 3 + 3, 3),
    }
    assert [name for name, each in found.items() if each.scoring.is_own] == ["custom"]
    fast, paper = found["fast"].costs, found["paper"].costs
    assert fast is not None and paper is not None
    assert (fast.passes, paper.passes) == ((24 * 4, 24 * 1), (24 * 19, 24 * 3))
    # All rows are as long: nothing is padded. 24 x 6 tokens a pass.
    assert (fast.tokens, paper.tokens) == (144 * 4, 144 * 19)
    # Plain: two rows of 5 a pair, policy and reference; no reference beforehand.
    assert (fast.plain_tokens, paper.plain_tokens) == (24 * 20 * (1 + 2), 24 * 20 * (3 + 15))
    # A forward pass: 2 x 80 parameters x 144 tokens = 23,040; attention 4 x 2 x 4 x (144 x 6) = 27,648.
    reference = 23_040 + 27_648
    # The adapter's 5 parameters: 2 x 5 x 144 = 1,440, three times in training, the base weights twice.
    training = 2 * 23_040 + 3 * 1_440 + 3 * 27_648
    evaluations = 2 * (reference + 1_440)
    assert fast.flops == reference + training + evaluations
    # The plain epoch trains all weights: 240 tokens, 38,400 + 38,400 forward, three times that to train, and
    # the reference's.
    assert fast.plain_epochs == fast.flops / (4 * 76_800)


def test_one_long_pair(recipe: Recipe) -> None:
    # Of 24 pairs one has rows of 1 + 99 tokens (shared: 1 + 98 + 98 = 197), the others of 1 + 2 (shared: 3).
    columns = np.repeat([[1], [2], [2]], 24, axis=1)
    columns[1:, 5] = 99
    pairs = even_pairs()._replace(parts=PartLengths(*columns))
    fast = by_name(planned_protocols(recipe, pairs, None, SHARED))["fast"].costs
    assert fast is not None
    assert fast.flops is None and fast.plain_epochs is None
    # 512 tokens at a time: 2 x 197 in the first batch. So for the reference, and for each evaluation of both
    # scorers. In training, 4 pairs a batch, a pass of its own (256) for the long pair saves 3 x 194 tokens.
    reference, evaluation, training = 2 * 197 + 22 * 3, 2 * 197 + (10 + 12) * 3, 197 + 23 * 3
    assert fast.tokens == reference + 2 * evaluation + training
    # Plain: 4 pairs a batch in training, one batch with rows of 100. In evaluation 8 and 4 of the 12 pairs;
    # the split decides with how many the long pair stands. All of it twice, for the reference.
    trained = 8 * 100 + 40 * 3
    measured = [2 * many * 100 + 2 * (24 - many) * 3 for many in (8, 4)]
    assert fast.plain_tokens in [2 * (trained + 2 * each) for each in measured]


def test_without_pairs_or_sizes(recipe: Recipe) -> None:
    found = by_name(planned_protocols(recipe, None, None, SHARED))
    assert found["paper"].per_pair == (19, 3)
    assert found["certified most"].per_pair == (19, 6)
    assert {each.costs for each in found.values()} == {None}
    text = protocols_text(tuple(found.values()), recipe.select, None)
    assert "19 P" in text and "P pairs through the model" in text
    assert found["fast"].to_json()["costs"] is None


def test_epochs_are_trained_again(tmp_path: Path) -> None:
    twice = tiny_recipe(tmp_path, score={"trainer": {"num_train_epochs": 2}})
    for pairs in (None, even_pairs()):
        assert by_name(planned_protocols(twice, pairs, None, SHARED))["fast"].per_pair == (1 + 2 + 2, 2)


def test_which_protocols_are_compared(tmp_path: Path) -> None:
    def scorings(**score: Any) -> tuple[Scoring, ...]:
        config = ScoreConfig.model_validate(score)
        return compared(tiny_recipe(tmp_path).model_copy(update={"score": config}))

    paper = Scoring("paper", (41, 42, 43), 5)
    fast = Scoring("fast", (41,), 2)
    least = Scoring("certified", (41, 42), 2, "least")
    most = Scoring("certified", (41, 42, 43, 44, 45, 46), 2, "most")
    assert scorings(protocol="paper") == (paper._replace(is_own=True), fast, least, most)
    assert scorings(protocol="fast") == (paper, fast._replace(is_own=True), least, most)
    # The recipe's own seeds and evaluations.
    assert scorings(protocol="certified", seeds=[1, 2, 3], evaluations=4)[2:] == (
        Scoring("certified", (1, 2), 4, "least", True),
        Scoring("certified", (1, 2, 3), 4, "most", True),
    )
    assert scorings(protocol="custom", seeds=[9], evaluations=3)[-1] == Scoring("custom", (9,), 3, "", True)


def test_agreement_is_claimed_only_where_it_was_measured() -> None:
    half = expected_agreement(1, 2, 0.5)
    assert half is not None
    assert half.overlap == Range(0.977, 0.988)
    near = expected_agreement(1, 2, 0.64)
    assert near is not None
    assert (near.fraction, near.overlap) == (0.6, MEASURED[1, 2].overlap[0.6])
    edge = expected_agreement(2, 2, 0.01)
    assert edge is not None and edge.fraction == 0.1
    other_rule = expected_agreement(1, 2, None)
    assert other_rule is not None
    assert other_rule.overlap is None
    assert expected_agreement(1, 1, 0.5) is None
    assert expected_agreement(6, 2, 0.5) is None


def test_the_fraction_of_a_selection() -> None:
    def fraction(pairs: int | None = 24, **select: Any) -> float | None:
        return easiest_fraction(SelectConfig.model_validate(select), pairs)

    assert fraction() == 0.5
    assert fraction(fraction=0.3) == 0.3
    assert fraction(count=6) == 0.25
    assert fraction(count=6, pairs=None) is None
    assert fraction(rule="hardest", fraction=0.3) is None
    assert fraction(rule="below", threshold=0.7) is None


def test_the_words(tmp_path: Path, recipe: Recipe) -> None:
    def text(**select: Any) -> str:
        own = recipe.model_copy(update={"select": SelectConfig.model_validate(select)})
        return protocols_text(planned_protocols(own, even_pairs(), None, SHARED), own.select, 24)

    lines = {line.split("  ")[0]: line for line in text().splitlines()}
    assert lines["paper"].split()[-2:] == ["itself", "itself"]
    assert lines["fast"].endswith("0.9969 .. 0.9981  0.977 .. 0.988")
    # 456 forward passes of 24 pairs; 2,736 tokens against 8,640.
    assert "456 = 19 P" in lines["paper"] and "72 = 3 P" in lines["paper"]
    assert "2.74 k  8.64 k    32%" in lines["paper"]
    assert lines["certified, at most"].split()[-2:] == ["?", "?"]
    assert lines["custom (this recipe)"].split()[-2:] == ["?", "?"]
    assert "overlap of the easiest 50%;" in text()
    assert "overlap of the easiest 60%, the nearest that was measured to this recipe's 0.64;" in text(
        fraction=0.64
    )
    assert "the overlap not with the selection of this recipe" in text(rule="hardest")
    assert "not with the aggregate of this recipe" in text(aggregate="final")
    assert "0.9969" not in text(aggregate="final")


@cache
def losses_of(model: str) -> LossTable:
    return curriculum_losses(import_records(RECORDS / model).curriculum)


@pytest.mark.skipif(not RECORDS.is_dir(), reason="the authors' records (../shared/data) are not here")
@pytest.mark.parametrize("seeds", [1, 2])
def test_the_constants_are_those_of_the_records(seeds: int) -> None:
    kept = MEASURED[seeds, 2]
    spearman: list[float] = []
    overlaps: dict[float, list[float]] = {fraction: [] for fraction in kept.overlap}
    for model, some in itertools.product(MODELS, itertools.combinations(range(3), seeds)):
        table = losses_of(model)
        # Of five evaluations the third and the last stand for the middle and the end.
        cheap_P = table.losses_PSE[:, list(some)][:, :, [2, 4]].mean(axis=(1, 2))
        paper_P = table.losses_PSE.mean(axis=(1, 2))
        spearman.append(spearmanr(cheap_P, paper_P).statistic)
        for fraction, found in overlaps.items():
            rule = Rule(fraction=fraction)
            cheap, paper = (select(all_P, table.pair_ids_P, rule).selected_P for all_P in (cheap_P, paper_P))
            found.append((cheap & paper).sum() / paper.sum())
    assert len(spearman) == 9
    assert kept.spearman == (round(min(spearman), 4), round(max(spearman), 4))
    assert kept.overlap == {
        fraction: (round(float(min(found)), 3), round(float(max(found)), 3))
        for fraction, found in overlaps.items()
    }
