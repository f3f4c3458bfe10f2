"""`SelectiveDPOTrainer` beside stock `DPOTrainer` in one process: every loss, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from selective_dpo import SelectiveDPOTrainer
from selective_dpo.losses import LOSSES
from tests.fixtures.tokenizers import byte_tokenizer
from tests.fixtures.training import curriculum_of, dpo_config, load_model, text_rows

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
OF_BATCHES = {"aot", "aot_unpaired", "sft"}
"""These compare the pairs of a batch, or weigh them by their length: they need TRL's very batches."""
PAIRS = 13
"""Updates of 8 and 5 pairs: the last one has batches of 4 and 1."""
LOGGED = (
    "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
    "logps/rejected", "learning_rate", "num_tokens", "rewards/accuracies",
)  # fmt: skip


def test_every_loss_type_of_trl_is_tested_here() -> None:
    documented = DPOConfig.__doc__ or ""
    listed = documented.split("loss_type (", 1)[1].split("If multiple loss types", 1)[0]
    assert {name for name in LOSS_TYPES if f"`'{name}'`" in listed} == set(LOSS_TYPES)
    assert listed.count("`'") == len(LOSS_TYPES)
    assert set(LOSS_TYPES) - set(LOSSES) == OF_BATCHES


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_step_and_the_weights_equal_stock_trls(
    model_folder: Path, tmp_path: Path, loss_type: str, lora: bool
) -> None:
    rows = text_rows(PAIRS)
    settings: dict[str, Any] = {
        "loss_type": loss_type,
        "beta": 0.5,
        "num_train_epochs": 2,
        # exo_pair must have it, and robust means nothing without.
        "label_smoothing": 0.1 if loss_type in ("exo_pair", "robust") else 0.0,
        # Where a gradient is hardly more than rounding, Adam would make a whole step of it.
        "optim": "sgd",
        "learning_rate": 1e-2,
    }
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    # In TRL a pair of an uneven update weighs more in its smaller batch; in one batch, all weigh the same.
    stocks = accumulated if loss_type in OF_BATCHES else {"per_device_train_batch_size": 8}
    common: dict[str, Any] = {
        "train_dataset": Dataset.from_list(rows),
        "processing_class": byte_tokenizer(bos=False),
        "peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    }
    stock = DPOTrainer(
        load_model(model_folder), args=dpo_config(tmp_path / "stock", **settings, **stocks), **common
    )
    ours = SelectiveDPOTrainer(
        load_model(model_folder),
        args=dpo_config(tmp_path / "ours", **settings, **accumulated),
        curriculum=curriculum_of(rows, [float(place) for place in range(PAIRS)], rule="all"),
        **common,
    )
    stock.train()
    ours.train()
    steps = [[entry for entry in each.state.log_history if "loss" in entry] for each in (ours, stock)]
    assert len(steps[0]) == len(steps[1]) == 4
    for own, expected in zip(*steps, strict=True):
        for name in LOGGED:
            assert own[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (own["step"], name)
    # The policy has left the reference.
    assert steps[0][0]["rewards/margins"] != pytest.approx(steps[0][2]["rewards/margins"], abs=1e-3)
    weights = dict(stock.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5, msg=name)
