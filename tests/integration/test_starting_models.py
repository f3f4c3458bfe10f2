"""Starting models that are no plain weights, as adapters, GGUF and quantized ones: refused by all verbs."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_dpo import Curriculum, SelectiveDPOTrainer, score_difficulty
from selective_dpo.cli import main
from selective_dpo.errors import ModelError
from selective_dpo.storage.artifacts import read_json
from tests.fixtures.models import LORA, TRAINER, recipe_file, tiny_model_folder, tiny_recipe
from tests.fixtures.tokenizers import byte_tokenizer
from tests.fixtures.training import curriculum_of, load_model, text_rows

STILL = {**TRAINER, "learning_rate": 1e-9}
"""A rate at which nothing changes."""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `base`, and an adapter of it, `model`, that changes what it says."""
    folder = tmp_path_factory.mktemp("tuned")
    tiny_model_folder(folder / "base")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        peft.get_peft_model(load_model(folder / "base"), config).save_pretrained(folder / "model")
    byte_tokenizer(bos=False).save_pretrained(folder / "model")
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(40).reshape(2, 20)).logits
    return found


def merging_command(line: str) -> str:
    """The Python code of the command in an error's line."""
    words = shlex.split(line[line.index("python -c") :])
    assert words[:2] == ["python", "-c"]
    return words[2]


def test_an_adapter_is_refused_everywhere_and_merged_by_the_command_it_is_refused_with(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tuned, score={"trainer": STILL}, train={"trainer": STILL})
    path = recipe_file(recipe.model_copy(update={"output_dir": str(tmp_path)}), tmp_path / "recipe.yaml")
    lines = []
    for verb in ("run", "score", "train", "plan"):
        assert main([verb, str(path)]) == 2
        lines.append(capsys.readouterr().err.strip())
    assert main(["doctor", str(path)]) == 2
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL  model")]
    command = merging_command(lines[0])
    assert lines == [f"selective-dpo: error: {told.removeprefix('FAIL  model: ')}"] * 4
    assert f"{str(tuned / 'model')!r} is a PEFT adapter of {str(tuned / 'base')!r}" in told
    assert not (tmp_path / "tiny").exists()

    exec(compile(command, "command", "exec"), {})
    merged = tuned / "model-merged"
    adapted = peft.PeftModel.from_pretrained(load_model(tuned / "base"), tuned / "model")
    torch.testing.assert_close(logits(load_model(merged)), logits(adapted))
    assert (logits(load_model(merged)) - logits(load_model(tuned / "base"))).abs().max() > 0.1

    # Where nothing can change, reference, scorers and policy are one model: each loss is ln 2.
    assert main(["train", str(path), "--model.path", str(merged)]) == 0
    run = tmp_path / "tiny"
    losses = Curriculum.load(run).difficulty_P
    assert len(losses) == 24
    np.testing.assert_allclose(losses, math.log(2.0), atol=1e-5)
    history = read_json(run / "policy" / "trainer_log.json")["log_history"]
    np.testing.assert_allclose([row["loss"] for row in history if "loss" in row], math.log(2.0), atol=1e-5)
    policy = peft.PeftModel.from_pretrained(load_model(merged), run / "policy")
    torch.testing.assert_close(logits(policy), logits(adapted), atol=1e-5, rtol=0)


def test_from_python_an_adapter_is_refused_as_a_folder_and_as_a_loaded_model(
    tuned: Path, tmp_path: Path
) -> None:
    rows = text_rows(4)
    with pytest.raises(ModelError, match=r"is a PEFT adapter of .*merge it with python -c"):
        score_difficulty(
            tuned / "model", Dataset.from_list(rows), output_dir=tmp_path / "run", dtype="float32"
        )
    curriculum = curriculum_of(rows, [0.1, 0.2, 0.3, 0.4])
    for model in (str(tuned / "model"), AutoModelForCausalLM.from_pretrained(tuned / "model")):
        with pytest.raises(ModelError, match="PEFT adapter"):
            SelectiveDPOTrainer(
                model,
                train_dataset=Dataset.from_list(rows),
                processing_class=AutoTokenizer.from_pretrained(tuned / "base"),
                peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
                curriculum=curriculum,
            )


def test_an_adapter_beside_a_configuration_is_one(tuned: Path, tmp_path: Path) -> None:
    """Some trainers save the base's config.json with it: it looks like a model, and is loaded as one."""
    shutil.copytree(tuned / "model", tmp_path / "model")
    shutil.copy(tuned / "base" / "config.json", tmp_path / "model")
    assert main(["doctor", str(recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml"))]) == 2


@pytest.mark.parametrize("kind", ["file", "folder", "quantized"])
def test_other_formats_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = tiny_model_folder(tmp_path / "model")
    expected = f"model {str(model)!r} is GGUF, which is not supported: convert it"
    if kind == "quantized":
        config = json.loads((model / "config.json").read_text("utf-8"))
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (model / "config.json").write_text(json.dumps(config), "utf-8")
        expected = f"model {str(model)!r} is quantized already"
    elif kind == "folder":
        (model / "model.safetensors").rename(model / "model-Q4_K_M.gguf")
    else:
        (model / "model.safetensors").rename(tmp_path / "model.gguf")
        expected = expected.replace("/model'", "/model.gguf'")
    path = str(tmp_path / "model.gguf") if kind == "file" else str(model)
    recipe = recipe_file(
        tiny_recipe(tmp_path, model={"path": path, "tokenizer": str(model)}), tmp_path / "recipe.yaml"
    )
    for verb in ("doctor", "score"):
        assert main([verb, str(recipe)]) == 2
        told = capsys.readouterr()
        (line,) = [line for line in (told.out + told.err).splitlines() if str(model) in line and ": " in line]
        assert expected in line


def test_asking_for_quantization_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    for key in ("load_in_4bit", "quantization_config"):
        assert main(["run", str(recipe), f"--model.{key}", "true"]) == 2
        assert "weights in 4 bits are model.quantization: 4bit" in capsys.readouterr().err
