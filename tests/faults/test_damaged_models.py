"""Models, reward models and tokenizers that are not whole: one line, and never random weights."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForSequenceClassification

from selective_dpo import models
from selective_dpo.cli import main
from selective_dpo.config import ModelConfig
from selective_dpo.errors import ModelError
from selective_dpo.evaluation.judges import RewardModelJudge
from selective_dpo.models import load_policy, load_tokenizer
from selective_dpo.run.costs import build_on_meta
from selective_dpo.run.doctor import diagnose
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import Run
from selective_dpo.run.stages import load_arm
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_recipe

Damage = Callable[[Path], object]
WEIGHTS, CONFIG, TOKENIZER, SETTINGS = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def content(name: str, data: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def cut(name: str, share: float) -> Damage:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def without(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def key(name: str, **values: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")

    return change


def in_parts(index: str) -> Damage:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(index)

    return change


OF_WEIGHTS: dict[str, tuple[Damage, str]] = {
    "half": (cut(WEIGHTS, 0.5), "not fully covered"),
    "empty": (content(WEIGHTS, ""), "header too small"),
    "text": (content(WEIGHTS, "x" * 100), "header too large"),
    "a header of an exabyte": (content(WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}"), "header too large"),
    "a header that is a list": (content(WEIGHTS, struct.pack("<Q", 2) + b"[]"), "invalid JSON in header"),
    "missing": (without(WEIGHTS), "no file named model.safetensors"),
    "of another width": (key(CONFIG, hidden_size=32), "other shapes than config.json says"),
    "of fewer layers": (
        key(CONFIG, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "model.layers.2.",
    ),
    "an index of text": (in_parts("x"), ""),
    "an index that is a list": (in_parts("[]"), "TypeError"),
    "an index without its parts": (
        in_parts('{"weight_map": {"a": "b.safetensors"}, "metadata": {}}'),
        "b.safe",
    ),
}
OF_CONFIG: dict[str, tuple[Damage, str]] = {
    "empty": (content(CONFIG, ""), "not a valid JSON file"),
    "half": (cut(CONFIG, 0.5), "not a valid JSON file"),
    "a list": (content(CONFIG, "[]"), ""),
    "null": (content(CONFIG, "null"), "TypeError"),
    "a number": (content(CONFIG, "3"), "TypeError"),
    "no text": (content(CONFIG, b"\xff\xfe{"), ""),
    "lists in lists without end": (content(CONFIG, "[" * 100_000), "RecursionError"),
    "missing": (without(CONFIG), ""),
    "nothing in it": (content(CONFIG, "{}"), "model_type"),
    "an unknown architecture": (key(CONFIG, model_type="unheard-of"), "unheard-of"),
    "a width of text": (key(CONFIG, hidden_size="x"), "Field 'hidden_size' expected int, got str"),
    "a width of -1": (key(CONFIG, hidden_size=-1), "RuntimeError"),
    "no heads": (key(CONFIG, num_attention_heads=0), "ZeroDivisionError"),
    "an unknown activation": (key(CONFIG, hidden_act="nope"), "nope"),
}
OF_TOKENIZER: dict[str, tuple[Damage, str]] = {
    "missing": (without(TOKENIZER), "knows no tokens but 3 special one(s): its vocabulary (tokenizer.json"),
    "missing with its settings": (
        without(TOKENIZER, SETTINGS),
        "knows no tokens but 1 special one(s): its vocabulary (tokenizer.json",
    ),
    "empty": (content(TOKENIZER, ""), ""),
    "half": (cut(TOKENIZER, 0.5), ""),
    "a list": (content(TOKENIZER, "[]"), "TypeError"),
    "nothing in it": (content(TOKENIZER, "{}"), ""),
    "no text": (content(TOKENIZER, b"\xff\xfe"), ""),
    "settings: empty": (content(SETTINGS, ""), ""),
    "settings: a list": (content(SETTINGS, "[]"), "AttributeError"),
    "settings: a number": (content(SETTINGS, "3"), "AttributeError"),
    "settings: a token that is a number": (key(SETTINGS, eos_token=3), "eos_token has to be either str"),
    "settings: a length of text": (
        key(SETTINGS, model_max_length="x"),
        "model_max_length in tokenizer_config",
    ),
}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy `model`, a reward model `judge`, and pairs."""
    folder = tmp_path_factory.mktemp("things")
    tiny_recipe(folder)
    shutil.copytree(folder / "model", folder / "judge")
    config = AutoConfig.from_pretrained(folder / "model", num_labels=1)
    judge: Any = Qwen2ForSequenceClassification(config)
    judge.save_pretrained(folder / "judge")
    return folder


def damaged(folder: Path, to: Path, damage: Damage) -> ModelConfig:
    shutil.copytree(folder, to)
    damage(to)
    return ModelConfig(path=str(to), dtype="float32")


def refused(load: Callable[[], object], path: str, expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        load()
    assert path in str(caught.value) and expected in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fault(row=4)
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_weights(things: Path, tmp_path: Path, name: str) -> None:
    """Row 4. Weights that are truncated, of other shapes, or fewer than the configuration says: refused for
    the policy and the reward model. transformers fills in random numbers for those that are missing."""
    damage, expected = OF_WEIGHTS[name]
    policy = damaged(things / "model", tmp_path / "model", damage)
    refused(lambda: load_policy(policy), policy.path, expected)
    path = damaged(things / "judge", tmp_path / "judge", damage).path
    refused(lambda: RewardModelJudge(path, device="cpu").rewards(["a"], ["b"]), path, expected)


@pytest.mark.fault(row=4)
@pytest.mark.parametrize("name", OF_CONFIG)
def test_configurations(things: Path, tmp_path: Path, name: str) -> None:
    """Row 4. A config.json that is empty, no mapping, no JSON, or of impossible sizes: refused wherever it is
    read, for a plan as for a training."""
    damage, expected = OF_CONFIG[name]
    policy = damaged(things / "model", tmp_path / "model", damage)
    refused(lambda: load_policy(policy), policy.path, expected)
    refused(lambda: build_on_meta(policy), policy.path, expected)
    path = damaged(things / "judge", tmp_path / "judge", damage).path
    refused(lambda: RewardModelJudge(path, device="cpu").rewards(["a"], ["b"]), path, expected)


@pytest.mark.fault(row=4)
@pytest.mark.parametrize("name", OF_TOKENIZER)
def test_tokenizers(things: Path, tmp_path: Path, name: str) -> None:
    """Row 4. Files of a tokenizer that are damaged or missing. Without its vocabulary transformers makes a
    tokenizer to which every text is empty."""
    damage, expected = OF_TOKENIZER[name]
    policy = damaged(things / "model", tmp_path / "model", damage)
    refused(lambda: load_tokenizer(policy), policy.path, expected)
    path = damaged(things / "judge", tmp_path / "judge", damage).path
    refused(lambda: RewardModelJudge(path, device="cpu"), path, expected)


def test_sound_ones_are_loaded(things: Path) -> None:
    config = ModelConfig(path=str(things / "model"), dtype="float32")
    assert load_policy(config).num_parameters() == build_on_meta(config).num_parameters()
    assert len(load_tokenizer(config)) == 261
    (reward,) = RewardModelJudge(str(things / "judge"), device="cpu").rewards(["a"], ["b"])
    assert isinstance(reward, float)


def test_a_tokenizer_of_few_words_is_one(tmp_path: Path) -> None:
    """None of them is in the text that is tried, and there is no token for what is unknown."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"x": 0, "y": 1}, unk_token="x")), eos_token="<eos>"
    )
    tokenizer.save_pretrained(tmp_path)
    assert len(models.read_tokenizer(str(tmp_path))) == 3


# --- what the commands say ---------------------------------------------------------------------------------


def failures(things: Path, **blocks: Any) -> dict[str, str]:
    checks = diagnose(tiny_recipe(things, **blocks))
    return {check.name: check.line() for check in checks if check.status == "FAIL"}


@pytest.mark.parametrize("name", ["half", "empty", "text", "a header that is a list"])
def test_doctor_looks_at_the_headers_of_weights(things: Path, tmp_path: Path, name: str) -> None:
    damage, expected = OF_WEIGHTS[name]
    path = damaged(things / "model", tmp_path / "model", damage).path
    found = failures(things, model={"path": path})
    assert list(found) == ["model"]
    assert f"{WEIGHTS} is damaged or not whole (" in found["model"] and expected in found["model"]
    path = damaged(things / "judge", tmp_path / "judge", damage).path
    generation = {"prompts": 1, "source": str(things / "pairs.jsonl"), "max_new_tokens": 8}
    evaluate = {"generation": generation, "judge": "reward-model"}
    found = failures(things, evaluate={**evaluate, "reward_model": path})
    assert list(found) == ["judge"] and f"{WEIGHTS} is damaged or not whole (" in found["judge"]
    assert not failures(things, evaluate={**evaluate, "reward_model": str(things / "judge")})


@pytest.mark.parametrize("damages", [OF_CONFIG, OF_TOKENIZER], ids=["config", "tokenizer"])
def test_doctor_answers_for_every_damage(things: Path, tmp_path: Path, damages: dict[str, Any]) -> None:
    for number, (damage, _) in enumerate(damages.values()):
        path = damaged(things / "model", tmp_path / f"model-{number}", damage).path
        found = failures(things, model={"path": path})
        assert {"model", "tokenizer"} & set(found)
        assert all("\n" not in line for line in found.values())


@pytest.mark.parametrize(
    "damage",
    [OF_WEIGHTS["half"], OF_WEIGHTS["of fewer layers"], OF_CONFIG["a list"], OF_TOKENIZER["missing"]],
)
def test_a_run_stops_with_one_line(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: tuple[Damage, str]
) -> None:
    path = damaged(things / "model", tmp_path / "model", damage[0]).path
    recipe = tiny_recipe(things, model={"path": path}, output_dir=str(tmp_path / "runs"))
    assert main(["score", str(recipe_file(recipe, tmp_path / "recipe.yaml"))]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("selective-dpo: error: ") and path in last and damage[1] in last
    assert not (tmp_path / "runs" / "tiny" / "scores").exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter_model.safetensors", cut("adapter_model.safetensors", 0.5)),
        ("adapter_config.json", content("adapter_config.json", "[]")),
        ("adapter_config.json", content("adapter_config.json", "")),
        ("adapter_model.safetensors", without("adapter_model.safetensors")),
    ],
)
def test_a_trained_adapter(things: Path, tmp_path: Path, name: str, damage: Damage) -> None:
    recipe = tiny_recipe(things)
    model = AutoModelForCausalLM.from_pretrained(things / "model", dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "policy")
    run = Run(recipe, RunDirectory.of(recipe))
    load_arm(run, tmp_path / "policy")
    damage(tmp_path / "policy")
    refused(lambda: load_arm(run, tmp_path / "policy"), str(tmp_path / "policy"), "cannot load adapter")


# --- what is not the files' --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), KeyboardInterrupt()]
)
def test_memory_is_not_the_files_fault(
    things: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(type(error)):
        load_tokenizer(ModelConfig(path=str(things / "model")))


def test_another_model_of_the_same_name_is_another_one(things: Path, tmp_path: Path) -> None:
    """All weights there are is enough, whatever kind of model it is."""
    llama = tiny_model_folder(tmp_path / "llama", kind="llama")
    assert load_policy(ModelConfig(path=str(llama), dtype="float32")).config.model_type == "llama"
