"""A run with its frozen weights in 4 bits, by bitsandbytes' kernels for a CPU.

They round as those for a GPU do, at a speed that nobody would use: only the tests open the way to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from selective_dpo import models
from selective_dpo.cli import main
from selective_dpo.config import ModelConfig
from selective_dpo.config.load import make_recipe
from selective_dpo.data.store import load_tokens
from selective_dpo.logprobs.compute import PairLogps, pair_logps
from selective_dpo.logprobs.reference import load_reference
from selective_dpo.logprobs.rows import log_probs_only
from selective_dpo.run import doctor
from tests.fixtures.models import LORA, recipe_file, tiny_pairs_file, tiny_recipe


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Any:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, and bitsandbytes would use it")
    package = pytest.importorskip("bitsandbytes")
    for module in (models, doctor):
        monkeypatch.setattr(module, "require_quantization", lambda config: None)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: "cpu")
    # A layout of its own on some CPUs, which needs widths of 32.
    monkeypatch.setattr(package.nn.modules, "has_avx512bf16", lambda: False)
    return package


@pytest.mark.parametrize("protocol", ["custom", "one-step"])
def test_from_pairs_to_an_evaluated_adapter(tmp_path: Path, bitsandbytes: Any, protocol: str) -> None:
    tiny_pairs_file(tmp_path / "test.jsonl", seed=7)
    raw = tiny_recipe(tmp_path, data={"test": [{"path": str(tmp_path / "test.jsonl")}]}).model_dump(
        mode="json", exclude_unset=True
    )
    raw["model"] |= {"dtype": "bfloat16", "quantization": "4bit"}
    if protocol == "one-step":
        raw["score"] = {"protocol": protocol, "lora": LORA}
    path, run = recipe_file(make_recipe(raw), tmp_path / "r.yaml"), tmp_path / "runs" / "tiny"
    assert main(["run", str(path)]) == 0
    assert main(["verify", str(run)]) == 0
    adapter = load_file(run / "policy" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name), "nothing was learned"

    # The reference is that of the same weights rounded to 4 bits, as plain matrices.
    config = ModelConfig(path=str(tmp_path / "model"), dtype="bfloat16")
    tokens, pad = load_tokens(run / "pairs"), models.load_tokenizer(config).pad_token_id
    plain = models.load_policy(config)
    whole = logps_of(plain, tokens, pad)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = bitsandbytes.functional.quantize_4bit(
                module.weight.data, quant_type="nf4", compress_statistics=True
            )
            module.weight.data = bitsandbytes.functional.dequantize_4bit(packed, state)
    rounded, reference = logps_of(plain, tokens, pad), load_reference(run / "reference")
    assert reference.pair_ids == rounded.pair_ids
    np.testing.assert_allclose(reference.chosen_P, rounded.chosen_P, rtol=0.01)
    assert np.abs(whole.chosen_P / rounded.chosen_P - 1).max() > 0.05


def logps_of(model: Any, tokens: Any, pad: int) -> PairLogps:
    with log_probs_only(model):
        return pair_logps(model, tokens, tokens_per_batch=512, pad_token_id=pad, autocast_dtype=None, what="")
