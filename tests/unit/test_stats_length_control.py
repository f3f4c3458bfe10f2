"""Length-controlled win rates: where the truth is known, and on AlpacaEval's own verdicts."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import spearmanr

from selective_dpo.stats import length_control
from selective_dpo.stats.length_control import ExtraRows, alpaca_eval_lc, joint_lc

DATA = Path(__file__).parents[3] / "shared" / "data"
GENERATOR = np.random.default_rng(0)
DELTAS_N = GENERATOR.normal(-300.0, 200.0, size=200)
"""The model's answers are longer by 300 characters."""
TANH_N = np.tanh(DELTAS_N / DELTAS_N.std())
DIFFICULTIES_N = GENERATOR.normal(size=200)


def test_a_model_without_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where preferences are the model's own probabilities, the likelihood is largest at the true coefficients.
    monkeypatch.setattr(length_control, "EXTRA_ROWS", (0.0, 0.0, 1.0, 0.0))
    found = alpaca_eval_lc(
        expit(0.4 - 1.5 * TANH_N + 0.8 * DIFFICULTIES_N), DELTAS_N, DIFFICULTIES_N, replicates=20
    )
    assert (found.quality, found.slope, found.difficulty) == pytest.approx((0.4, -1.5, 0.8), abs=1e-6)
    assert found.win_rate.value == pytest.approx(expit(0.4 + 0.8 * DIFFICULTIES_N).mean(), abs=1e-6)
    assert found.win_rate.low < found.win_rate.value < found.win_rate.high


def test_the_rows_beside_a_model_are_those_that_are_given() -> None:
    # They follow the same slope and difficulty, without a quality: the likelihood stays largest at the truth.
    tanh_N = np.tanh(DELTAS_N / DELTAS_N.std())
    extra = ExtraRows(DELTAS_N / DELTAS_N.std(), DIFFICULTIES_N, expit(-1.5 * tanh_N + 0.8 * DIFFICULTIES_N))
    preferences_N = expit(0.4 - 1.5 * tanh_N + 0.8 * DIFFICULTIES_N)
    found = alpaca_eval_lc(preferences_N, DELTAS_N, DIFFICULTIES_N, extra=extra, replicates=2)
    assert (found.quality, found.slope, found.difficulty) == pytest.approx((0.4, -1.5, 0.8), abs=1e-6)
    steeper = extra._replace(preferences_M=expit(-3.0 * tanh_N + 0.8 * DIFFICULTIES_N))
    # Their weight is a tenth of a row's, so the slope moves towards theirs by less than half of the way.
    moved = alpaca_eval_lc(preferences_N, DELTAS_N, DIFFICULTIES_N, extra=steeper, replicates=2)
    assert -2.25 < moved.slope < -1.5


def test_a_prompt_that_an_arm_was_not_judged_on_does_not_count_for_it() -> None:
    # Without noise the truth is found from what is left; the first arm's rate is over its own prompts.
    qualities_A = np.array([0.5, -0.5])
    deltas_AN = np.stack([DELTAS_N, DELTAS_N[::-1] / 2])
    preferences_AN = expit(qualities_A[:, None] - 2.0 * np.tanh(deltas_AN / deltas_AN[:, 20:].std()))
    preferences_AN[:, :20] = np.nan
    first, second = joint_lc(preferences_AN, deltas_AN, replicates=20)
    assert first.win_rate.value == pytest.approx(expit(0.5), abs=1e-6)
    assert first.first_minus is None
    assert second.first_minus is not None
    assert second.first_minus.value == pytest.approx(expit(0.5) - expit(-0.5), abs=1e-6)
    preferences_AN[1, 20:190] = np.nan
    with pytest.raises(ValueError, match="10 prompts of an arm are too few"):
        joint_lc(preferences_AN, deltas_AN)


def test_arms_that_win_by_length_alone_have_one_half() -> None:
    # Quality 0 and 1; no prompt has an effect, so their penalty is 0 at the truth, which is the maximum.
    qualities_A = np.array([0.0, 1.0])
    deltas_AN = np.stack([DELTAS_N, DELTAS_N[::-1] / 2])
    preferences_AN = expit(qualities_A[:, None] - 2.0 * np.tanh(deltas_AN / deltas_AN.std()))
    assert preferences_AN[0].mean() > 0.7
    first, second = joint_lc(preferences_AN, deltas_AN, replicates=20)
    assert first.slope == second.slope == pytest.approx(-2.0, abs=1e-6)
    assert first.win_rate.value == pytest.approx(0.5, abs=1e-6)
    assert second.win_rate.value == pytest.approx(expit(1.0), abs=1e-6)


def test_where_length_does_not_count_it_is_the_plain_win_rate() -> None:
    # Two halves of the prompts with the same preferences and opposite length differences: the slope is 0, and
    # the likelihood's derivative by an arm's quality says that its mean probability is its mean preference.
    half_N = GENERATOR.random(100)
    preferences_AN = np.concatenate([half_N, half_N])[None]
    deltas_AN = np.concatenate([DELTAS_N[:100], -DELTAS_N[:100]])[None]
    (found,) = joint_lc(preferences_AN, deltas_AN, replicates=20)
    assert found.slope == pytest.approx(0.0, abs=1e-6)
    assert found.win_rate.value == pytest.approx(half_N.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("preferences", "deltas", "message"),
    [
        ([[1.2] * 30], [[1.0] * 30], "probabilities"),
        ([[0.5] * 10], [[1.0] * 10], "10 prompts are too few"),
        ([[0.5] * 30], [[1.0] * 30], "do not vary"),
        ([[0.5] * 30], [[1.0] * 29], "shapes differ"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    preferences: list[list[float]], deltas: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        joint_lc(preferences, deltas)


# --- AlpacaEval's verdicts ----------------------------------------------------------------------------------


class _Published:
    """Verdicts and published figures of the models that have both."""

    def __init__(self) -> None:
        with (DATA / "alpaca_eval_published.csv").open() as lines:
            self.published = {row["model"]: row for row in csv.DictReader(lines)}
        with (DATA / "alpaca_eval_difficulty_reestimated.csv").open() as lines:
            self.difficulty_N = np.array([float(row["difficulty"]) for row in csv.DictReader(lines)])
        rows: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
        with gzip.open(DATA / "alpaca_eval_verdicts.csv.gz", "rt") as lines:
            for row in csv.DictReader(lines):
                if row["model"] in self.published:
                    delta = float(row["len1"]) - float(row["len2"])
                    rows[row["model"]].append((int(row["idx"]), float(row["pref"]) - 1.0, delta))
        self.rows = {model: np.array(found) for model, found in rows.items()}
        self.models = sorted(self.rows)

    def of(self, column: str) -> np.ndarray:
        return np.array([float(self.published[model][column]) for model in self.models])


@pytest.fixture(scope="module")
def alpaca() -> _Published:
    if not DATA.is_dir():
        pytest.skip(f"there is no {DATA}")
    return _Published()


def test_plain_win_rates_are_the_published_ones(alpaca: _Published) -> None:
    preferences = [alpaca.rows[model][:, 1] for model in alpaca.models]
    rates = np.array([100 * found.mean() for found in preferences])
    errors = np.array([100 * found.std(ddof=1) / len(found) ** 0.5 for found in preferences])
    np.testing.assert_allclose(rates, alpaca.of("win_rate"), atol=1e-6)
    np.testing.assert_allclose(errors, alpaca.of("standard_error"), atol=1e-6)


def test_length_control_with_difficulties_is_near_the_published(alpaca: _Published) -> None:
    found: list[float] = []
    aligned: list[float] = []
    for model in alpaca.models:
        place_N, preferences_N, deltas_N = alpaca.rows[model].T
        # Five models lack instructions, and their published figures are of difficulties shifted by the gap.
        for rates, at in ((found, np.arange(len(place_N))), (aligned, place_N.astype(int))):
            fit = alpaca_eval_lc(preferences_N, deltas_N, alpaca.difficulty_N[at], replicates=2)
            rates.append(100 * fit.win_rate.value)
    published = alpaca.of("length_controlled_winrate")
    assert np.abs(np.array(found) - published).mean() < 0.35
    assert spearmanr(found, published).statistic > 0.995
    assert np.abs(np.array(aligned) - published).mean() < 0.55


def test_length_control_without_difficulties_is_near_the_published(alpaca: _Published) -> None:
    values_AN = np.full((2, len(alpaca.models), len(alpaca.difficulty_N)), np.nan)
    for arm, model in enumerate(alpaca.models):
        place_N, preferences_N, deltas_N = alpaca.rows[model].T
        values_AN[:, arm, place_N.astype(int)] = preferences_N, deltas_N
    found = np.array([100 * each.win_rate.value for each in joint_lc(*values_AN, replicates=2)])
    is_whole = np.array([len(alpaca.rows[model]) == len(alpaca.difficulty_N) for model in alpaca.models])
    errors = np.abs(found - alpaca.of("length_controlled_winrate"))
    assert errors.mean() < 1.0
    assert errors[is_whole].mean() < 0.7  # the others' published figures are of shifted difficulties
