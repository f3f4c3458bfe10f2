"""`compare` on real records: the paper's analyses on the authors' own, and on a finished run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from selective_dpo.curriculum.measured import read_measured
from selective_dpo.report.comparison import Comparison, SourceFindings, compare

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "learning_records"

here = pytest.mark.skipif(not FOLDER.is_dir(), reason="the authors' records (../shared/data) are not here")


@pytest.fixture(scope="module")
def authors() -> Comparison:
    # Values do not depend on how often is resampled; intervals are tested elsewhere.
    return compare([FOLDER / f"qwen-2.5-{size}-argilla" for size in ("1.5b", "7b", "14b")], replicates=10)


def column(source: SourceFindings) -> list[float]:
    """The published table's rows, in its order."""
    assert (
        source.dynamics and source.mean_loss and source.below_chance and source.least_alike and source.scorers
    )
    by_delta = {each.delta: each for each in source.dynamics.learned}
    fours = (
        source.mean_loss,
        source.below_chance,
        by_delta[0.4].share,
        by_delta[0.0].share,
    )
    threes = (
        by_delta[0.4].spearman,
        by_delta[0.1].spearman,
        source.least_alike,
        source.scorers.one_others,
    )
    return [round(each.value, 4) for each in fours] + [round(each.value, 3) for each in threes if each]


@here
def test_the_table_comes_out_to_its_digits(authors: Comparison) -> None:
    # As worked out from the same files by other code.
    assert [column(source) for source in authors.sources] == [
        [0.6544, 0.7145, 0.1996, 0.7142, 0.719, 0.942, 0.934, 0.973],
        [0.6367, 0.7359, 0.3394, 0.7343, 0.854, 0.943, 0.945, 0.977],
        [0.6536, 0.7451, 0.2044, 0.7422, 0.727, 0.935, 0.958, 0.982],
    ]
    assert [source.pairs for source in authors.sources] == [6_668] * 3
    assert authors.common == 6_668


@here
def test_second_axes_and_suspects_of_the_authors_records(authors: Comparison) -> None:
    ranges = {"forgetting": [], "spread": [], "seeds": [], "wrong": []}  # type: ignore[var-annotated]
    for source in authors.sources:
        assert source.dynamics and source.dynamics.forgetting_spearman
        assert source.spread_spearman and source.seed_spread_spearman
        ranges["forgetting"].append(round(source.dynamics.forgetting_spearman.value, 2))
        ranges["spread"].append(round(source.spread_spearman.value, 2))
        ranges["seeds"].append(round(source.seed_spread_spearman.value, 2))
        ranges["wrong"].append(round(source.dynamics.wrong_always.value, 3))
    ends = {name: (min(values), max(values)) for name, values in ranges.items()}
    assert ends["forgetting"] == (0.42, 0.52)
    assert ends["spread"] == (-0.56, -0.52)
    assert ends["seeds"] == (-0.28, -0.16)
    assert ends["wrong"] == (0.106, 0.147)
    assert authors.wrong_everywhere is not None
    assert round(authors.wrong_everywhere.value, 3) == 0.05


@here
def test_the_share_below_ln_2_does_not_tell_the_best_fraction(authors: Comparison) -> None:
    # The paper's sweep peaked at 71% (7B) and 81% (14B) of these pairs.
    shares = [source.below_chance for source in authors.sources[1:]]
    assert [round(share.value, 2) for share in shares if share] == [0.74, 0.75]
    assert not any(
        share.low <= best <= share.high for share, best in zip(shares, (0.71, 0.81), strict=True) if share
    )


@here
def test_a_released_file_holds_what_its_records_do() -> None:
    name = "qwen-2.5-7b-argilla"
    records, released = read_measured(FOLDER / name), read_measured(FOLDER / f"{name}_learning_order.csv.gz")
    np.testing.assert_array_equal(records.losses.pair_ids_P, released.losses.pair_ids_P)
    np.testing.assert_allclose(records.losses.losses_PSE, released.losses.losses_PSE, atol=1e-12)


def test_a_runs_records_are_read(finished_demo: Path) -> None:
    run = read_measured(finished_demo)
    assert (run.kind, run.notes, run.knows_prompts) == ("run", (), True)
    assert set(run.criteria) == {"reference margin", "length difference", "perplexity gap"}
    assert run.margins_PSE is not None
    # The recorded margins are those that the losses say.
    np.testing.assert_allclose(np.logaddexp(0.0, -run.margins_PSE), run.losses.losses_PSE, atol=1e-6)
