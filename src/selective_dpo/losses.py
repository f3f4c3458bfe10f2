"""The loss of one pair: TRL's pairwise losses, each a pure function of the pair's two log-ratios.

`pair_losses` is the one function that scorers, held-out evaluation and `verify` compute a loss with. It
takes the loss from the same settings as TRL's trainer does: `loss_type`, `loss_weights`, `beta` and the
options that a loss reads. To add a loss, write one function below `@pairwise_loss(name)`: its keyword
arguments are the options that it reads, and their defaults must be TRL's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LN_2 = float(np.log(2.0))
"""DPO's own loss of a policy that has not moved from the reference (margin 0), in nats."""


class PairLosses(NamedTuple):
    """Margin and loss of each pair; shapes [P]."""

    margin_P: Floats
    loss_P: Floats


class LogRatios(NamedTuple):
    """log pi(y|x) - log pi_ref(y|x) of both completions, summed over their tokens, in nats; [P] each."""

    chosen_P: Floats
    rejected_P: Floats
    chosen_tokens_P: Floats
    rejected_tokens_P: Floats

    @property
    def delta_P(self) -> Floats:
        """Chosen minus rejected."""
        return self.chosen_P - self.rejected_P

    @property
    def delta_per_token_P(self) -> Floats:
        """Chosen minus rejected, each divided by its completion's tokens."""
        chosen_P = self.chosen_P / np.maximum(self.chosen_tokens_P, 1.0)
        return chosen_P - self.rejected_P / np.maximum(self.rejected_tokens_P, 1.0)


class PairwiseLoss(NamedTuple):
    """A loss that each pair has for itself."""

    of: Callable[..., Floats]
    reads: frozenset[str]
    """The options of TRL's `DPOConfig` that change it, but for `beta`, which also scales all margins."""
    takes_divergence: bool


DIVERGENCES = frozenset({"f_divergence_type", "f_alpha_divergence_coef"})

LOSSES: dict[str, PairwiseLoss] = {}
"""TRL's `loss_type` -> the loss of a pair."""

NOT_PAIRWISE: dict[str, tuple[str, frozenset[str]]] = {
    "aot": ("it sorts the log-ratios of a batch", frozenset({"label_smoothing"})),
    "aot_unpaired": ("it sorts the log-ratios of a batch", frozenset({"label_smoothing"})),
    "sft": ("it is a mean over all chosen tokens of a batch", frozenset({"use_weighting"})),
}
"""TRL's other `loss_type`s -> why a pair has none of its own, and the options that they read."""

OPTIONS = DIVERGENCES | {"label_smoothing", "discopop_tau", "use_weighting"}
"""The options that some of TRL's losses read and others do not."""


def pairwise_loss(
    name: str, *, takes_divergence: bool = False
) -> Callable[[Callable[..., Floats]], Callable[..., Floats]]:
    """Register the decorated function, log-ratios and options -> loss [P], as TRL's `loss_type` `name`.

    With `takes_divergence` it gets f-DPO's scores in place of the log-ratios, as `f_divergence_type` says.
    """

    def register(function: Callable[..., Floats]) -> Callable[..., Floats]:
        own = set(list(inspect.signature(function).parameters)[1:]) - {"beta"}
        reads = own | {"use_weighting"} | (DIVERGENCES if takes_divergence else set())
        LOSSES[name] = PairwiseLoss(function, frozenset(reads), takes_divergence)
        return function

    return register


def options_read(name: str) -> frozenset[str]:
    """Which of `OPTIONS` change TRL's `loss_type` `name`."""
    return LOSSES[name].reads if name in LOSSES else NOT_PAIRWISE[name][1]


def loss_names(settings: Mapping[str, Any]) -> Sequence[str]:
    """The `loss_type`s of a trainer's settings: one or several."""
    given = settings.get("loss_type", "sigmoid")
    return [given] if isinstance(given, str) else list(given)


def is_pairwise(settings: Mapping[str, Any]) -> bool:
    """Whether a pair has the loss of these settings for itself, so that it can be a difficulty."""
    return LOSSES.keys() >= set(loss_names(settings))


def pair_losses(
    policy_P2: ArrayLike, reference_P2: ArrayLike, tokens_P2: ArrayLike, settings: Mapping[str, Any]
) -> PairLosses:
    """Margin and loss of each pair, as TRL's `DPOTrainer` computes them under `settings`.

    margin = beta * [(log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))]

    The loss is the sum of the `loss_type`s' losses, each times its entry of `loss_weights` (default 1).

    Shapes: each argument [P, 2], chosen before rejected: log-probabilities summed over the completion's
    tokens, in nats, under policy and reference; the completions' numbers of tokens. `settings` are
    `DPOConfig` keys, `beta` among them; other keys are not looked at. Computed in float64; a non-finite
    input gives a non-finite loss, which callers must not average away.

    Raises:
        ValueError: shapes differ; beta is not positive; another option is out of its loss's range, or a
            loss is not pairwise (see `is_pairwise`).
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (policy_P2, reference_P2, tokens_P2)]
    if len({column.shape for column in columns}) != 1 or columns[0].shape[1:] != (2,):
        raise ValueError(f"arguments must have one shape [P, 2], got {[column.shape for column in columns]}")
    beta = settings["beta"]
    if not beta > 0.0:
        raise ValueError(f"beta must be positive, got {beta}")
    policy, reference, tokens = columns
    names = loss_names(settings)
    weights = settings.get("loss_weights") or [1.0] * len(names)
    # The callers look for what is not finite; a NumPy warning beside their error would say nothing more.
    with np.errstate(invalid="ignore", over="ignore"):
        chosen_P, rejected_P = (policy - reference).T
        ratios = LogRatios(chosen_P, rejected_P, *tokens.T)
        loss_P = np.zeros(len(policy))
        for name, weight in zip(names, weights, strict=True):
            loss_P = loss_P + weight * _loss(name, ratios, settings)
        return PairLosses(beta * ratios.delta_P, loss_P)


def chance_loss(settings: Mapping[str, Any]) -> float:
    """The loss of a policy that has not moved from the reference: both log-ratios 0, so the margin as well.

    For DPO's own loss, ln 2, it is that of a policy that cannot tell chosen from rejected.

    Raises:
        ValueError: as `pair_losses`.
    """
    nothing_12 = np.zeros((1, 2))
    return float(pair_losses(nothing_12, nothing_12, nothing_12 + 1, settings).loss_P[0])


def is_dpos_own(losses: PairLosses, tolerance: float = 1e-6) -> bool:
    """Whether the losses are -log sigmoid(margin)."""
    with np.errstate(invalid="ignore"):
        own_P = negative_log_sigmoid(losses.margin_P)
    return np.allclose(losses.loss_P, own_P, rtol=0.0, atol=tolerance)


def negative_log_sigmoid(x: Floats) -> Floats:
    """log(1 + e^-x), without overflow for either sign of x."""
    return np.asarray(np.logaddexp(0.0, -x), dtype=np.float64)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(np.exp(-negative_log_sigmoid(x)), dtype=np.float64)


def _loss(name: str, ratios: LogRatios, settings: Mapping[str, Any]) -> Floats:
    if name not in LOSSES:
        raise ValueError(f"{name!r} is not a pairwise loss: use one of {', '.join(LOSSES)}")
    loss = LOSSES[name]
    if loss.takes_divergence:
        chosen_P, rejected_P = (
            _f_score(ratio_P, settings) for ratio_P in (ratios.chosen_P, ratios.rejected_P)
        )
        ratios = ratios._replace(chosen_P=chosen_P, rejected_P=rejected_P)
    options = inspect.signature(loss.of).parameters.keys() & settings.keys()
    return loss.of(ratios, **{key: settings[key] for key in options})


def _f_score(ratio_P: Floats, settings: Mapping[str, Any]) -> Floats:
    """f'(pi / pi_ref) of a divergence f, but for a constant (Wang et al. 2023, arXiv 2309.16240, table 1)."""
    kind = settings.get("f_divergence_type", "reverse_kl")
    alpha = float(settings.get("f_alpha_divergence_coef", 0.5))
    if kind == "reverse_kl" or (kind == "alpha_divergence" and abs(alpha - 1.0) < 1e-6):
        return ratio_P
    if kind == "forward_kl":
        return 1.0 - np.exp(-ratio_P)
    if kind == "js_divergence":
        return LN_2 - negative_log_sigmoid(ratio_P)
    if kind == "alpha_divergence":
        # TRL's bound, which keeps its float32 finite.
        return (np.exp(np.minimum((alpha - 1.0) * ratio_P, 80.0)) - 1.0) / (alpha - 1.0)
    raise ValueError(
        f"f_divergence_type {kind!r} is none of reverse_kl, forward_kl, js_divergence, alpha_divergence"
    )


@pairwise_loss("sigmoid", takes_divergence=True)
def _sigmoid_loss(ratios: LogRatios, beta: float) -> Floats:
    """DPO's own (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""
    return negative_log_sigmoid(beta * ratios.delta_P)


@pairwise_loss("hinge", takes_divergence=True)
def _hinge(ratios: LogRatios, beta: float) -> Floats:
    """Liu et al. 2023, arXiv 2309.06657."""
    return np.maximum(0.0, 1.0 - beta * ratios.delta_P)


@pairwise_loss("ipo", takes_divergence=True)
def _ipo(ratios: LogRatios, beta: float) -> Floats:
    """Azar et al. 2023, arXiv 2310.12036, eq. 17, with log-ratios per token."""
    return np.square(ratios.delta_per_token_P - 1.0 / (2.0 * beta))


@pairwise_loss("exo_pair", takes_divergence=True)
def _exo_pair(ratios: LogRatios, beta: float, label_smoothing: float = 0.0) -> Floats:
    """Ji et al. 2024, arXiv 2402.00856, eq. 16: KL from the policy's to the smoothed preference."""
    if not 0.0 < label_smoothing < 1.0:
        raise ValueError("exo_pair needs a label_smoothing above 0 and below 1, such as 0.001")
    margin_P = beta * ratios.delta_P
    won_P, lost_P = negative_log_sigmoid(margin_P), negative_log_sigmoid(-margin_P)
    first_P = np.exp(-won_P) * (-won_P - math.log1p(-label_smoothing))
    return np.asarray(first_P + np.exp(-lost_P) * (-lost_P - math.log(label_smoothing)))


@pairwise_loss("nca_pair")
def _nca_pair(ratios: LogRatios, beta: float) -> Floats:
    """Chen et al. 2024, arXiv 2402.05369."""
    chosen_P, rejected_P = beta * ratios.chosen_P, beta * ratios.rejected_P
    both_P = negative_log_sigmoid(-chosen_P) + negative_log_sigmoid(-rejected_P)
    return negative_log_sigmoid(chosen_P) + 0.5 * both_P


@pairwise_loss("robust", takes_divergence=True)
def _robust(ratios: LogRatios, beta: float, label_smoothing: float = 0.0) -> Floats:
    """Chowdhury et al. 2024, arXiv 2403.00409."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError("robust needs a label_smoothing of at least 0 and below 0.5, such as 0.1")
    margin_P = beta * ratios.delta_P
    clean_P = (1.0 - label_smoothing) * negative_log_sigmoid(margin_P)
    return (clean_P - label_smoothing * negative_log_sigmoid(-margin_P)) / (1.0 - 2.0 * label_smoothing)


@pairwise_loss("bco_pair")
def _bco_pair(ratios: LogRatios, beta: float) -> Floats:
    """Jung et al. 2024, arXiv 2404.04656; as TRL has it, without the running mean of rewards."""
    return negative_log_sigmoid(beta * ratios.chosen_P) + negative_log_sigmoid(-beta * ratios.rejected_P)


@pairwise_loss("sppo_hard")
def _sppo_hard(ratios: LogRatios, beta: float) -> Floats:
    """Wu et al. 2024, arXiv 2405.00675, with probabilities of 1 and 0."""
    return np.square(ratios.chosen_P - 0.5 / beta) + np.square(ratios.rejected_P + 0.5 / beta)


@pairwise_loss("apo_zero")
def _apo_zero(ratios: LogRatios, beta: float) -> Floats:
    """D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7."""
    return _sigmoid(-beta * ratios.chosen_P) + _sigmoid(beta * ratios.rejected_P)


@pairwise_loss("apo_down")
def _apo_down(ratios: LogRatios, beta: float) -> Floats:
    """D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8."""
    return _sigmoid(beta * ratios.chosen_P) + _sigmoid(-beta * ratios.delta_P)


@pairwise_loss("discopop", takes_divergence=True)
def _discopop(ratios: LogRatios, beta: float, discopop_tau: float = 0.05) -> Floats:
    """Lu et al. 2024, arXiv 2406.08414, eq. 5."""
    margin_P = beta * ratios.delta_P
    share_P = _sigmoid(margin_P / discopop_tau)
    return negative_log_sigmoid(margin_P) * (1.0 - share_P) + np.exp(-margin_P) * share_P


@pairwise_loss("sigmoid_norm", takes_divergence=True)
def _sigmoid_norm(ratios: LogRatios, beta: float) -> Floats:
    """DPO with log-ratios per token (Lambert et al. 2024, arXiv 2411.15124)."""
    return negative_log_sigmoid(beta * ratios.delta_per_token_P)
