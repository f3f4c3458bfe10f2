"""The mathematics of one-step difficulty: held-out margins from one gradient pass, without training.

Scorers that are trained for an epoch with small steps hardly leave the linear regime around the starting
policy. There the log-ratio difference of a pair j, after training on pairs of other prompts, is to first
order

    delta_j = eta <g_j, D gbar>

with g_j the gradient of log pi(chosen_j) - log pi(rejected_j) at the starting policy, gbar minus the mean
gradient of the other pairs' losses, and D the diagonal preconditioner of an adaptive optimizer such as Adam.
A learning rate, a schedule and DPO's beta set eta, but not the order of the pairs. So a *one-step scorer* is
the starting policy moved by `size * step_direction(...)`, and measuring the pairs with it is all the training
that their order needs. What eta stands for is found afterwards: `cross_fitted_scale`.

Related: TracIn (arXiv 2002.08484), TRAK (2303.14186), LESS (2402.04333), and the kernel view of fine-tuning
(2210.05643).

Dimension suffixes: P pairs, 2 chosen and rejected, W weights that a scorer may change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

from selective_dpo.losses import pair_losses

Floats = NDArray[np.float64]

FOLDS = 8

MICRO_BATCH_PAIRS = 8
"""Pairs whose mean gradient is squared for the preconditioner."""

TARGET_DELTA = 0.01
"""Root mean square of the pairs' log-ratio differences under a one-step scorer, in nats for each token of
their completions: small against the curvature of the log-probabilities (benchmarks/one_step.py)."""

ROUNDED_TARGET_DELTA = 0.04
"""The same for a model that computes in 16 bits, whose roundings drown a smaller step where completions are
short (docs/real-model.md has the figures)."""

_FLOOR = 1e-3
"""Part of the typical root mean square gradient that is added to each weight's own."""

_SCALES = (1e-3, 1e4)
"""Range of the factor that puts log-ratios on the loss's scale."""

_SLOPE_STEP = 1e-4


class GradientSums(NamedTuple):
    """What a gradient pass over pairs leaves; the arrays may be NumPy's or torch's."""

    gradient_W: Any
    """Sum over the pairs of the gradients of their losses."""
    squares_W: Any
    """Sum over the micro-batches of their squared mean gradients."""
    pairs: int
    micro_batches: int

    def plus(self, gradient_W: Any, pairs: int) -> GradientSums:
        """The sums with one more micro-batch, whose gradients add up to `gradient_W`. Works in place."""
        self.gradient_W.__iadd__(gradient_W)
        self.squares_W.__iadd__((gradient_W / pairs) ** 2)
        return self._replace(pairs=self.pairs + pairs, micro_batches=self.micro_batches + 1)


def add_sums(parts: Iterable[GradientSums]) -> GradientSums:
    """The sums over all pairs of several parts."""
    gradients, squares, pairs, micro_batches = zip(*parts, strict=True)
    return GradientSums(sum(gradients), sum(squares), sum(pairs), sum(micro_batches))


def micro_batches(pair_ids_P: Sequence[str], lengths_P: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Row numbers of micro-batches of `MICRO_BATCH_PAIRS` pairs of similar length; the last may be smaller.

    They depend on the pairs, and not on the order of the rows.
    """
    order = np.lexsort((np.asarray(pair_ids_P, dtype=np.str_), lengths_P))
    return [order[start : start + MICRO_BATCH_PAIRS] for start in range(0, len(order), MICRO_BATCH_PAIRS)]


def loss_slopes(tokens_P2: ArrayLike, settings: Mapping[str, Any]) -> Floats:
    """Derivatives of each pair's loss by its two log-ratios, for a policy that has not moved: [P, 2].

    For DPO's own loss they are -beta/2 and beta/2. Central differences of `losses.pair_losses`.

    Args:
        tokens_P2: tokens of chosen and rejected, which some losses divide by.
        settings: `DPOConfig` keys, as `pair_losses` takes them.
    """
    tokens = np.asarray(tokens_P2, dtype=np.float64)
    nothing, slopes = np.zeros_like(tokens), np.zeros_like(tokens)
    for side in (0, 1):
        step = np.zeros_like(tokens)
        step[:, side] = _SLOPE_STEP
        up, down = (pair_losses(sign * step, nothing, tokens, settings).loss_P for sign in (1, -1))
        slopes[:, side] = (up - down) / (2 * _SLOPE_STEP)
    return slopes


def step_direction(sums: GradientSums) -> NDArray[np.float32]:
    """Where one preconditioned full-batch step leads: minus the mean gradient, each weight's divided by the
    root mean square of its micro-batches' gradients. [W] float32, entries between about -1 and 1.

    A constant factor of the loss, such as beta, has no effect on it.

    Args:
        sums: of the pairs that the scorer learns from.

    Raises:
        ValueError: the gradient is zero, or not finite.
    """
    rms_W = np.sqrt(np.asarray(sums.squares_W) / sums.micro_batches)
    typical = float(np.sqrt(np.mean(np.square(rms_W, dtype=np.float64))))
    if not 0.0 < typical < np.inf:
        raise ValueError("the gradient of the pairs' loss is " + ("not finite" if typical else "zero"))
    mean_W = np.asarray(sums.gradient_W) / sums.pairs
    return np.asarray(-mean_W / (rms_W + _FLOOR * typical), dtype=np.float32)


def better_size(size: float, delta_P: ArrayLike, tokens_P: ArrayLike, target: float) -> float:
    """The size of a step under which log-ratio differences would be as large as `target` says.

    Where the step changed nothing, or gave no numbers, one that is 16 times as large, or as small.

    Args:
        size: of a step that was tried.
        delta_P: the differences in nats that it made, of some pairs.
        tokens_P: the tokens of both completions of each.
        target: their root mean square, in nats a token.
    """
    per_token_P = np.asarray(delta_P, dtype=np.float64) / np.maximum(np.asarray(tokens_P), 1)
    rms = float(np.sqrt(np.mean(np.square(per_token_P))))
    if rms == 0.0:
        return 16.0 * size
    if not rms < np.inf:
        return size / 16.0
    return size * target / rms


def cross_fitted_scale(
    policy_P2: ArrayLike,
    reference_P2: ArrayLike,
    tokens_P2: ArrayLike,
    held_out_P: NDArray[np.bool_],
    settings: Mapping[str, Any],
) -> float:
    """The factor of log-ratios with the smallest mean loss over the pairs that are *not* held out.

    For DPO's own loss this is a logistic regression without intercept on the margin, so that afterwards
    sigmoid(margin) of a held-out pair estimates the probability of its label.

    Args:
        policy_P2, reference_P2, tokens_P2, settings: as `losses.pair_losses` takes them.
        held_out_P: the fold that the factor is for.
    """
    fitted = [
        np.asarray(each, dtype=np.float64)[~held_out_P] for each in (policy_P2, reference_P2, tokens_P2)
    ]
    policy, reference, tokens = fitted

    def mean_loss(log_scale: float) -> float:
        moved = scaled_logps(policy, reference, np.exp(log_scale))
        return float(pair_losses(moved, reference, tokens, settings).loss_P.mean())

    found = minimize_scalar(mean_loss, bounds=tuple(np.log(_SCALES)), method="bounded")
    return float(np.exp(found.x))


def scaled_logps(policy_P2: Floats, reference_P2: Floats, scale: float) -> Floats:
    """Log-probabilities whose log-ratios are `scale` times as large: to first order, those of a policy that
    went so many times as far."""
    return np.asarray(reference_P2 + scale * (policy_P2 - reference_P2))
