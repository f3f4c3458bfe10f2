"""What is kept of a training: no pickle, no number that JSON cannot hold, no weights that are not numbers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selective_dpo.artifacts import read_json, write_json
from selective_dpo.errors import ConfigError
from selective_dpo.training.publish import require_finite_weights, save_policy, training_log


def trainer_with(*, bad: float | None = None, frozen: float | None = None, others: int = 0) -> Any:
    """A trainer whose other process found `others` bad weights."""
    model = torch.nn.Linear(2, 2)
    for value, weight in ((bad, model.weight), (frozen, model.bias)):
        if value is not None:
            weight.data.view(-1)[0] = value
    model.bias.requires_grad_(False)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda count: torch.cat([count, torch.tensor([others])])
    )
    return SimpleNamespace(model=model, accelerator=accelerator, state=SimpleNamespace(global_step=1500))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(
        ConfigError, match=r"diverged.* after 1,500 updates; lower train\.trainer\.learning_rate"
    ):
        require_finite_weights(trainer_with(bad=bad), settings="train.trainer")


def test_all_processes_refuse_what_one_of_them_has() -> None:
    with pytest.raises(ConfigError, match="diverged"):
        require_finite_weights(trainer_with(others=1), settings="train.trainer")


def test_finite_weights_pass_and_frozen_ones_are_not_looked_at() -> None:
    # A model's own frozen buffers of -inf are no fault of the training.
    require_finite_weights(trainer_with(frozen=-math.inf), settings="train.trainer")


def test_the_log_holds_null_for_what_is_not_finite(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 0.5, "grad_norm": math.inf}, {"step": 2, "loss": math.nan, "epoch": 1.0}]
    log = training_log(SimpleNamespace(state=SimpleNamespace(log_history=history)))
    write_json(tmp_path / "log.json", log)
    assert read_json(tmp_path / "log.json") == {
        "log_history": [{"step": 1, "loss": 0.5, "grad_norm": None}, {"step": 2, "loss": None, "epoch": 1.0}]
    }


def test_no_pickle_is_kept(tmp_path: Path) -> None:
    def save_model(folder: str) -> None:
        for name in ("model.safetensors", "training_args.bin"):
            (Path(folder) / name).touch()

    save_policy(SimpleNamespace(save_model=save_model), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
