"""The judge and the prompts' file count by their content: a change under the same path is a changed input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from selective_dpo.config import Recipe
from selective_dpo.errors import RunChangedError
from selective_dpo.run.keys import INPUTS
from selective_dpo.run.run import evaluate, open_run
from selective_dpo.run.verify import verify_run
from selective_dpo.storage.artifacts import read_json, read_manifest
from tests.fixtures.models import tiny_recipe
from tests.fixtures.tokenizers import PAD_ID, VOCABULARY_SIZE, byte_tokenizer


def write_judge(folder: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForSequenceClassification(
            Qwen2Config(
                vocab_size=VOCABULARY_SIZE,
                num_key_value_heads=1,
                num_labels=1,
                pad_token_id=PAD_ID,
                initializer_range=0.3,
                **sizes,
            )
        )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def write_prompts(path: Path, *prompts: str) -> None:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), "utf-8")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A run that was evaluated by a reward model, and its recipe."""
    folder = tmp_path_factory.mktemp("judged")
    write_judge(folder / "judge")
    write_prompts(folder / "prompts.jsonl", "why?", "how?")
    recipe = tiny_recipe(
        folder,
        score={"evaluations": 1},
        evaluate={
            "generation": {"prompts": 2, "max_new_tokens": 3, "source": str(folder / "prompts.jsonl")},
            "judge": "reward-model",
            "reward_model": str(folder / "judge"),
        },
    )
    evaluate(open_run(recipe, say=lambda line: None))
    return folder, recipe


def other_weights(folder: Path) -> None:
    path = folder / "judge" / "model.safetensors"
    weights = load_file(path)
    save_file({name: -weight for name, weight in weights.items()}, path, metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    path = folder / "judge" / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content), "utf-8")


def other_template(folder: Path) -> None:
    path = folder / "judge" / "chat_template.jinja"
    path.write_text(path.read_text("utf-8") + "{# as before, but for this #}", "utf-8")


def other_prompts(folder: Path) -> None:
    write_prompts(folder / "prompts.jsonl", "why?", "who?")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "judge"),
        (other_tokenizer, "judge"),
        (other_template, "judge"),
        (other_prompts, "evaluate.generation.source"),
    ],
)
def test_a_change_under_the_same_path_is_refused_and_with_fresh_evaluated_again(
    judged: tuple[Path, Recipe], tmp_path: Path, change: Callable[[Path], None], named: str
) -> None:
    folder, recipe = judged
    run = folder / "runs" / "tiny"
    for name in ("judge", "runs"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "prompts.jsonl", tmp_path)
    key = read_manifest(run / "evaluation").key
    policy = read_manifest(run / "policy")
    assert not verify_run(run).problems
    digest = next(value for name, value in read_json(run / INPUTS).items() if name.split()[0] == named)
    try:
        change(folder)
        with pytest.raises(RunChangedError, match=rf"{named} .*SHA-256 {digest[:12]} -> "):
            evaluate(open_run(recipe, say=lambda line: None))
        assert read_manifest(run / "evaluation").key == key
        evaluate(open_run(recipe, fresh=True, say=lambda line: None))
        assert read_manifest(run / "evaluation").key != key
        assert read_manifest(run / "policy") == policy
        assert not verify_run(run).problems
    finally:
        for name in ("judge", "runs"):
            shutil.rmtree(folder / name)
            shutil.move(tmp_path / name, folder / name)
        shutil.move(tmp_path / "prompts.jsonl", folder / "prompts.jsonl")


def test_a_judge_that_was_moved_is_the_same(judged: tuple[Path, Recipe]) -> None:
    folder, recipe = judged
    shutil.move(folder / "judge", folder / "moved")
    moved = recipe.model_copy(
        update={"evaluate": recipe.evaluate.model_copy(update={"reward_model": str(folder / "moved")})}
    )
    before = read_manifest(folder / "runs" / "tiny" / "evaluation")
    try:
        evaluate(open_run(moved, fresh=True, say=lambda line: None))
        assert read_manifest(folder / "runs" / "tiny" / "evaluation") == before
    finally:
        shutil.move(folder / "moved", folder / "judge")
