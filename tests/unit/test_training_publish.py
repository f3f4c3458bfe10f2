"""What is kept of a training: no pickle, no number that JSON cannot hold, no weights that are not numbers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from selective_dpo.errors import ConfigError, ModelError
from selective_dpo.storage.artifacts import read_json, write_json
from selective_dpo.training.checkpointing import weights_of
from selective_dpo.training.publish import save_policy, training_log


def test_the_log_holds_null_for_what_is_not_finite(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 0.5, "grad_norm": math.inf}, {"step": 2, "loss": math.nan, "epoch": 1.0}]
    log = training_log(SimpleNamespace(state=SimpleNamespace(log_history=history)))
    write_json(tmp_path / "log.json", log)
    assert read_json(tmp_path / "log.json") == {
        "log_history": [{"step": 1, "loss": 0.5, "grad_norm": None}, {"step": 2, "loss": None, "epoch": 1.0}]
    }


class Saving:
    """A trainer of a model of two layers, tied to each other, which saves without what is `lost`."""

    def __init__(self, *, lost: str = "", cut: str = "") -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3))
        self.model[1].weight = self.model[0].weight
        self.weights = weights_of(self.model)
        self.is_deepspeed_enabled = False
        state = {name: weight for name, weight in self.model.state_dict().items() if name != lost}
        state |= {cut: state[cut][:0]} if cut else {}
        self.accelerator = SimpleNamespace(get_state_dict=lambda _: state, unwrap_model=lambda model: model)
        self.args, self.state = SimpleNamespace(should_save=True), SimpleNamespace(global_step=1500)

    def _save(self, folder: str, state: dict[str, torch.Tensor]) -> None:
        assert state["1.weight"] is state["0.weight"]
        kept = {name: one for name, one in state.items() if name != "1.weight"}
        save_file(kept, Path(folder) / "model.safetensors")
        (Path(folder) / "training_args.bin").touch()
        write_json(Path(folder) / "config.json", {"dtype": "float32"})


def test_no_pickle_is_kept_and_weights_have_the_starting_models_type(tmp_path: Path) -> None:
    save_policy(Saving(), tmp_path, dtype="bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    written = load_file(tmp_path / "model.safetensors")
    assert {name: weight.dtype for name, weight in written.items()} == {
        "0.weight": torch.bfloat16,
        "1.bias": torch.bfloat16,
    }
    assert read_json(tmp_path / "config.json") == {"dtype": "bfloat16"}


@pytest.mark.parametrize("fault", [{"cut": "1.bias"}, {"lost": "1.bias"}])
def test_weights_that_are_not_whole_are_an_error(tmp_path: Path, fault: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"saved whole \(without 1 of 2, 1\.bias\); nothing was"):
        save_policy(Saving(**fault), tmp_path, dtype="float32")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    trainer = Saving()
    trainer.model[1].bias.data[1] = bad
    with pytest.raises(ConfigError, match=r"diverged.* after 1,500 updates; lower learning_rate"):
        save_policy(trainer, tmp_path, dtype="float32")
    assert not list(tmp_path.iterdir())
