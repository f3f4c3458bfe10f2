"""`model.quantization: 4bit` (QLoRA): what of it does not need a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from selective_dpo import models
from selective_dpo.cli import main
from selective_dpo.config import ModelConfig, Recipe
from selective_dpo.config.load import make_recipe
from selective_dpo.errors import ModelError
from selective_dpo.models import load_policy, model_digest, quantization_config, require_quantization
from selective_dpo.run.costs import BYTES, job_memory, models_of
from tests.fixtures.models import LORA, recipe_file, tiny_model_folder, tiny_recipe


def quantized(tmp_path: Path, **blocks: Any) -> Recipe:
    raw = tiny_recipe(tmp_path).model_dump(mode="json", exclude_unset=True)
    raw["model"] = {**raw["model"], "dtype": "bfloat16", "quantization": "4bit"}
    raw["score"] = {**raw["score"], "lora": LORA}
    raw["train"] = {**raw["train"], "lora": LORA, **blocks.get("train", {})}
    return make_recipe(raw)


def test_all_weights_cannot_be_trained_in_four_bits(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"train\.lora is null: all weights would be trained"):
        quantized(tmp_path, train={"lora": None})
    with pytest.raises(ValidationError):
        ModelConfig.model_validate({"path": "m", "quantization": "8bit"})


def test_the_settings_are_qloras() -> None:
    config = quantization_config(ModelConfig(path="m", dtype="bfloat16"))
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == config.bnb_4bit_quant_storage == torch.bfloat16


def test_the_model_is_loaded_with_them_on_its_own_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    real = models.AutoModelForCausalLM.from_pretrained

    def from_pretrained(path: str, **options: Any) -> Any:
        asked.update(options)
        options.pop("quantization_config")
        return real(path, **{**options, "device_map": None})

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(models, "require_quantization", lambda config: None)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    load_policy(ModelConfig(path=str(tiny_model_folder(tmp_path / "m")), quantization="4bit"))
    assert asked["quantization_config"].load_in_4bit and asked["device_map"] == {"": 3}


def test_other_weights_have_another_key_and_whole_ones_keep_theirs(tmp_path: Path) -> None:
    path = str(tiny_model_folder(tmp_path / "m"))
    whole = model_digest(ModelConfig(path=path))
    assert model_digest(ModelConfig(path=path, quantization="4bit")) != whole
    assert model_digest(ModelConfig(path=path, dtype="float32")) == whole


def test_a_plan_counts_four_bits_for_matrices(tmp_path: Path) -> None:
    recipe = quantized(tmp_path)
    whole = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": ""})})
    sizes = models_of(recipe)
    saved = job_memory(whole, sizes, "policy").weights - job_memory(recipe, sizes, "policy").weights
    assert saved == pytest.approx(sizes.sizes.matrix_parameters * (BYTES["bfloat16"] - 0.516))


def test_without_bitsandbytes_or_a_gpu_it_is_one_line_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="4bit needs bitsandbytes, which is not there"):
        require_quantization(ModelConfig(path="m", quantization="4bit"))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match="4bit needs a GPU, which is not there"):
        require_quantization(ModelConfig(path="m", quantization="4bit"))
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    recipe = recipe_file(quantized(tmp_path), tmp_path / "r.yaml")
    capsys.readouterr()
    assert main(["run", str(recipe)]) == 2
    assert "model.quantization" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny" / "reference").exists()
    assert main(["plan", str(recipe)]) == 0
