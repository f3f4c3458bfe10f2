"""Win rates at equal length: what judges think of answers beyond that they are longer.

The model is that of length-controlled AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475):

    logit P(the model's answer is preferred) = quality + slope * tanh(delta / sd(delta)) + prompt effect

delta is the baseline's answer's length minus the model's, in characters. The length-controlled win rate is
the mean over prompts of that probability at delta = 0. Fitted by maximum likelihood; preferences are
probabilities in [0, 1] or verdicts 0, 1/2, 1 (fractional logistic regression, Papke and Wooldridge 1996).

Shapes: N prompts, A arms, K coefficients, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from selective_dpo.stats.bootstrap import cluster_bootstrap, estimates
from selective_dpo.stats.estimates import Estimate

Floats = NDArray[np.float64]

EXTRA_ROWS = (-20.4, 31.4, 0.81, 0.0714)
"""AlpacaEval fits rows of its baseline beside answers that it was told to make long or short, without a
quality. They hold the slope near -2, and are in a file that comes with it. This stands for them: for each
prompt a row at +0.81 and one at -0.81 of the tanh, with weight 0.0714. Their preferences enter as two sums,
of weight times preference times tanh, and times difficulty. Found by fitting the published length-controlled
win rates of 37 models. Found on half of these, the mean error over the others is 0.30 and 0.46 points."""
EXTRA_WEIGHT = 0.1
"""Of a row of AlpacaEval's own file, where that is given."""
PROMPT_SCALE = 3.0
"""Standard deviation of a prompt's effect beforehand, as a logit, where difficulties are not given."""
MIN_PROMPTS = 20
"""With fewer the fit is not tried."""
REPLICATES = 400
_STEPS, _LARGEST_STEP, _CLOSE = 60, 2.0, 1e-9


class LengthControlled(NamedTuple):
    """A win rate at equal length, and the coefficients it comes from."""

    win_rate: Estimate
    """In [0, 1]; the interval is a bootstrap over prompts."""
    slope: float
    """Of tanh of the standardised length difference; below 0: longer answers are preferred."""
    quality: float
    difficulty: float
    """Of the difficulties; 0 where none were given."""
    first_minus: Estimate | None = None
    """Of several arms: the first one's win rate at equal length minus this one's, from the same resamples."""


class ExtraRows(NamedTuple):
    """The rows that AlpacaEval fits beside a model's; shapes [M]."""

    deltas_M: ArrayLike
    """Length differences in standard deviations."""
    difficulties_M: ArrayLike
    preferences_M: ArrayLike
    """In [0, 1]."""


def alpaca_eval_lc(
    preferences_N: ArrayLike,
    deltas_N: ArrayLike,
    difficulties_N: ArrayLike,
    *,
    extra: ExtraRows | None = None,
    replicates: int = REPLICATES,
) -> LengthControlled:
    """Length-controlled win rate of one model as AlpacaEval 2 fits it, up to its regularisation.

    Shapes: [N] each: the probability that the model's answer is preferred, the baseline's characters minus
    the model's, and the prompts' difficulties. AlpacaEval's are in its own file; re-estimated ones do, too.
    `extra` are the rows of that file; without them `EXTRA_ROWS` stands for them.

    Raises:
        ValueError: shapes that differ, too few prompts, lengths that do not vary, or a preference outside
            [0, 1].
    """
    y_N, d_N = _preferences(preferences_N), np.asarray(difficulties_N, dtype=np.float64)
    t_N = _standardised(np.asarray(deltas_N, dtype=np.float64))
    if not y_N.shape == d_N.shape == t_N.shape:
        raise ValueError(f"shapes differ: {y_N.shape}, {t_N.shape}, {d_N.shape}")
    if not np.isfinite(y_N + d_N + t_N).all():
        raise ValueError("a preference, a length or a difficulty is missing")
    rows_NK = np.stack([t_N, d_N, np.ones_like(t_N)], axis=1)
    if extra is None:
        of_t, of_d, tanh, weight = EXTRA_ROWS
        # The stand-in is for AlpacaEval's 805 prompts; of fewer it has the same share.
        sums_K = np.array([of_t, of_d, 0.0]) * len(d_N) / 805
        t_M, d_M = np.repeat([tanh, -tanh], len(d_N)), np.tile(d_N, 2)
        y_M = np.zeros(len(t_M))
    else:
        sums_K, weight = np.zeros(3), EXTRA_WEIGHT
        t_M, d_M, y_M = np.tanh(extra.deltas_M), np.asarray(extra.difficulties_M), np.asarray(extra[2])
    extra_MK = np.stack([t_M, d_M, np.zeros_like(t_M)], axis=1)
    x_RK, y_R = np.concatenate([rows_NK, extra_MK]), np.concatenate([y_N, y_M])

    def fit(weights_N: Floats, start_K: Floats) -> Floats:
        w_R = np.concatenate([weights_N, np.full(len(extra_MK), weight)])
        return logistic_fit(x_RK, y_R, w_R, start_K, sums_K)

    whole_K = fit(np.ones(len(y_N)), np.array([-1.0, 1.0, 0.0]))

    def statistic(weights_N: Floats) -> Floats:
        _, of_difficulty, quality = fit(weights_N, whole_K)
        return np.array([np.average(expit(of_difficulty * d_N + quality), weights=weights_N)])

    (rate,) = estimates(cluster_bootstrap(statistic, np.arange(len(y_N)), replicates=replicates))
    slope, of_difficulty, quality = map(float, whole_K)
    return LengthControlled(rate, slope, quality, of_difficulty)


def joint_lc(
    preferences_AN: ArrayLike, deltas_AN: ArrayLike, *, replicates: int = REPLICATES
) -> list[LengthControlled]:
    """Length-controlled win rates of several arms against one baseline on the same prompts, without any file.

    One slope is shared by all arms; each prompt has an effect of its own, normal beforehand with a standard
    deviation of `PROMPT_SCALE`. Shapes: [A, N] both, see `alpaca_eval_lc`; a NaN is a prompt that this arm
    was not judged on. Where length does not count, the length-controlled win rate is the plain one.

    Raises:
        ValueError: as `alpaca_eval_lc`.
    """
    y_AN, deltas_AN = _preferences(preferences_AN), np.asarray(deltas_AN, dtype=np.float64)
    if y_AN.shape != deltas_AN.shape or y_AN.ndim != 2:
        raise ValueError(f"shapes differ: {y_AN.shape} and {deltas_AN.shape}")
    seen_AN = np.isfinite(y_AN) & np.isfinite(deltas_AN)
    if (few := seen_AN.sum(axis=1).min()) < MIN_PROMPTS:
        raise ValueError(f"{few} prompts of an arm are too few; {MIN_PROMPTS} are needed")
    deltas_AN, y_AN = np.where(seen_AN, deltas_AN, 0.0), np.where(seen_AN, y_AN, 0.0)
    t_AN = _standardised(deltas_AN, seen_AN)
    arms, prompts = y_AN.shape

    def fit(weights_N: Floats, start: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        """The arms' qualities and the slope [A + 1], and the prompts' effects [N]."""
        b_K, u_N = (part.copy() for part in start)
        for _ in range(_STEPS):
            p_AN = expit(np.clip(b_K[:-1, None] + b_K[-1] * t_AN + u_N, -30, 30))
            w_AN = weights_N * seen_AN
            off_AN, h_AN = w_AN * (y_AN - p_AN), w_AN * p_AN * (1 - p_AN)
            gradient_K = np.append(off_AN.sum(axis=1), (off_AN * t_AN).sum())
            gradient_N = off_AN.sum(axis=0) - weights_N * u_N / PROMPT_SCALE**2
            # The prompts' block of the Hessian is diagonal, so they are eliminated first (Schur complement).
            h_N = h_AN.sum(axis=0) + weights_N / PROMPT_SCALE**2 + 1e-12
            cross_KN = np.concatenate([h_AN, (h_AN * t_AN).sum(axis=0)[None]])
            h_KK = np.zeros((arms + 1, arms + 1))
            h_KK[np.arange(arms), np.arange(arms)] = h_AN.sum(axis=1)
            h_KK[-1, :-1] = h_KK[:-1, -1] = (h_AN * t_AN).sum(axis=1)
            h_KK[-1, -1] = (h_AN * t_AN**2).sum()
            h_KK -= (cross_KN / h_N) @ cross_KN.T
            step_K = np.linalg.solve(
                h_KK + 1e-9 * np.eye(arms + 1), gradient_K - cross_KN @ (gradient_N / h_N)
            )
            step_N = (gradient_N - cross_KN.T @ step_K) / h_N
            largest = max(np.abs(step_K).max(), np.abs(step_N).max())
            damping = min(1.0, _LARGEST_STEP / max(largest, 1e-300))
            b_K, u_N = b_K + damping * step_K, u_N + damping * step_N
            if largest < _CLOSE:
                break
        return b_K, u_N

    whole = fit(np.ones(prompts), (np.zeros(arms + 1), np.zeros(prompts)))

    def statistic(weights_N: Floats) -> Floats:
        b_K, u_N = fit(weights_N, whole)
        rate_A = np.average(expit(b_K[:-1, None] + u_N), axis=1, weights=weights_N * seen_AN)
        return np.concatenate([rate_A, rate_A[0] - rate_A])

    found = estimates(cluster_bootstrap(statistic, np.arange(prompts), replicates=replicates))
    slope = float(whole[0][-1])
    return [
        LengthControlled(found[arm], slope, float(whole[0][arm]), 0.0, found[arms + arm] if arm else None)
        for arm in range(arms)
    ]


def logistic_fit(x_RK: Floats, y_R: Floats, w_R: Floats, start_K: Floats, sums_K: Floats) -> Floats:
    """Maximum of the weighted logistic log-likelihood plus `sums_K` times the coefficients."""
    b_K = start_K.copy()
    for _ in range(_STEPS):
        p_R = expit(x_RK @ b_K)
        gradient_K = x_RK.T @ (w_R * (y_R - p_R)) + sums_K
        hessian_KK = (x_RK.T * (w_R * p_R * (1 - p_R))) @ x_RK + 1e-9 * np.eye(len(b_K))
        step_K = np.linalg.solve(hessian_KK, gradient_K)
        largest = np.abs(step_K).max()
        b_K = b_K + step_K * min(1.0, _LARGEST_STEP / max(largest, 1e-300))
        if largest < _CLOSE:
            break
    return b_K


def _preferences(values: ArrayLike) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if not (np.isnan(found) | ((found >= 0) & (found <= 1))).all():
        raise ValueError("preferences must be probabilities, in [0, 1]")
    if found.shape[-1] < MIN_PROMPTS:
        raise ValueError(f"{found.shape[-1]} prompts are too few; {MIN_PROMPTS} are needed")
    return found


def _standardised(deltas: Floats, seen: NDArray[np.bool_] | None = None) -> Floats:
    """tanh of the differences over their standard deviation, which is that of those `seen`."""
    spread = (deltas if seen is None else deltas[seen]).std()
    if not spread > 0:
        raise ValueError("the lengths of the answers do not vary")
    return np.asarray(np.tanh(deltas / spread))
