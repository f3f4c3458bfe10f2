"""Each pairwise loss, pair by pair, is what stock TRL's own trainer computes from the same log-probs."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from selective_dpo.losses import DIVERGENCES, LOSSES, NOT_PAIRWISE, OPTIONS, options_read, pair_losses
from tests.fixtures.models import tiny_model_folder
from tests.fixtures.tokenizers import byte_tokenizer
from tests.fixtures.training import dpo_config, load_model, text_rows

BETA = 0.3
PAIRS = 24
SMOOTHED = {"label_smoothing": 0.2}
OTHER_VALUE = {
    "label_smoothing": 0.1,
    "discopop_tau": 0.5,
    "f_divergence_type": "js_divergence",
    "use_weighting": True,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def trl_losses(
    model_folder: Path,
    settings: dict[str, Any],
    pairs: tuple[Any, Any, Any],
    kind: torch.dtype = torch.float64,
) -> list[float]:
    """Stock TRL's loss of each pair alone, of a model whose answer is made up."""
    trainer = DPOTrainer(
        load_model(model_folder),
        args=dpo_config(model_folder / "out", beta=BETA, **settings),
        train_dataset=Dataset.from_list(text_rows(2)),
        processing_class=byte_tokenizer(bos=False),
    )
    trainer.precompute_ref_logps = True  # the reference's log-probs are those in the batch
    losses = []
    for policy_2, reference_2, tokens_2 in zip(*pairs, strict=True):
        prompt, longest = 3, max(tokens_2)
        mask = torch.zeros(2, prompt + longest, dtype=torch.long)
        logps = torch.zeros(2, prompt + longest - 1, dtype=kind)
        for side, (logp, tokens) in enumerate(zip(policy_2, tokens_2, strict=True)):
            mask[side, prompt : prompt + tokens] = 1
            logps[side, prompt - 1 : prompt - 1 + tokens] = logp / tokens
        inputs = {
            "input_ids": torch.ones_like(mask),
            "attention_mask": torch.ones_like(mask),
            "completion_mask": mask,
            "ref_chosen_logps": torch.tensor(reference_2[:1], dtype=kind),
            "ref_rejected_logps": torch.tensor(reference_2[1:], dtype=kind),
        }
        answer = SimpleNamespace(
            log_probs=logps,
            entropy=torch.zeros_like(logps),
            mean_logits=torch.zeros_like(logps),
            is_top1=torch.zeros_like(logps, dtype=torch.bool),
            log_sum_sq_probs=torch.full_like(logps, -1.0),
        )
        losses.append(float(trainer._compute_loss(lambda answer=answer, **_: answer, inputs, False)))
    return losses


def made_up(spread: float) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(3)
    reference_P2 = generator.uniform(-60, -20, (PAIRS, 2))
    tokens_P2 = generator.integers(1, 9, (PAIRS, 2))
    policy_P2 = reference_P2 + generator.normal(0, spread, (PAIRS, 2))
    policy_P2[0] = reference_P2[0]  # a policy that has not moved
    return policy_P2, reference_P2, tokens_P2


def settings_of(loss_type: str) -> dict[str, Any]:
    return {"loss_type": loss_type, **(SMOOTHED if "label_smoothing" in options_read(loss_type) else {})}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_loss_is_trls(model_folder: Path, loss_type: str) -> None:
    given, settings = made_up(spread=8.0), settings_of(loss_type)
    ours = pair_losses(*given, {"beta": BETA, **settings})
    theirs = trl_losses(model_folder, settings, given)
    np.testing.assert_allclose(ours.loss_P, theirs, rtol=1e-9, atol=1e-6)
    assert np.ptp(theirs) > 0.1


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss_type", [name for name in LOSSES if LOSSES[name].takes_divergence])
def test_each_divergence_is_trls(model_folder: Path, loss_type: str, kind: str) -> None:
    given = made_up(spread=1.0)
    settings = {**settings_of(loss_type), "f_divergence_type": kind}
    settings |= {"f_alpha_divergence_coef": 0.7} if kind == "alpha_divergence" else {}
    ours = pair_losses(*given, {"beta": BETA, **settings}).loss_P
    # TRL knows the alpha divergence in float32 and below only.
    precision = torch.float32 if kind == "alpha_divergence" else torch.float64
    theirs = trl_losses(model_folder, settings, given, precision)
    tolerance = 2e-5 if kind == "alpha_divergence" else 1e-6
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_weighted_sum_is_trls(model_folder: Path) -> None:
    given = made_up(spread=8.0)
    settings = {"loss_type": ["sigmoid", "bco_pair", "ipo"], "loss_weights": [0.8, 0.2, 1.0]}
    theirs = trl_losses(model_folder, settings, given)
    np.testing.assert_allclose(
        pair_losses(*given, {"beta": BETA, **settings}).loss_P, theirs, rtol=1e-9, atol=1e-6
    )


def test_the_options_that_a_loss_reads_are_those_that_change_trls(model_folder: Path) -> None:
    given = made_up(spread=2.0)
    for loss_type in (*LOSSES, *NOT_PAIRWISE):
        before = trl_losses(model_folder, settings_of(loss_type), given)
        for option, value in OTHER_VALUE.items():
            try:
                after = trl_losses(model_folder, {**settings_of(loss_type), option: value}, given)
            except (ValueError, NotImplementedError):  # TRL refuses some that a loss does not read
                after = before
            assert (after != before) == (option in options_read(loss_type)), (loss_type, option)
    assert {*OTHER_VALUE, *DIVERGENCES} == OPTIONS


def test_every_loss_of_trl_is_in_a_table_and_the_defaults_are_trls() -> None:
    documented = (DPOConfig.__doc__ or "").split("loss_type (", 1)[1].split("If multiple loss types", 1)[0]
    assert {*LOSSES, *NOT_PAIRWISE} == set(re.findall(r"`'(\w+)'`", documented))
    config = DPOConfig("unused", bf16=False, use_cpu=True)
    given = made_up(spread=1.0)
    for loss_type in set(LOSSES) - {"exo_pair"}:
        stated = {option: getattr(config, option) for option in OPTIONS & options_read(loss_type)}
        own = {"beta": BETA, "loss_type": loss_type}
        assert (pair_losses(*given, own).loss_P == pair_losses(*given, {**own, **stated}).loss_P).all()
