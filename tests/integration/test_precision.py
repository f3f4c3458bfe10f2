"""Full fine-tuning of a bfloat16 model learns from small updates, and starts where its reference is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.cli import main
from selective_dpo.config import Recipe
from selective_dpo.data.store import load_tokens
from selective_dpo.logprobs.compute import pair_logps
from selective_dpo.logprobs.reference import load_reference
from selective_dpo.models import load_policy
from selective_dpo.run.run import open_run
from selective_dpo.run.stages import bring_up
from selective_dpo.storage.artifacts import read_json, read_manifest
from selective_dpo.training import train as train_module
from selective_dpo.training.arguments import autocast_dtype, dpo_arguments, hold_for_training, weights_dtype
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_recipe

pytestmark = pytest.mark.slow

# As the paper's recipes train a 7B: 10 pairs, 2 in an update, ten epochs are 50 updates.
SMALL = {"learning_rate": 8e-7, "per_device_train_batch_size": 2, "num_train_epochs": 10, "bf16": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose weights are numbers of bfloat16, of the usual size."""
    folder = tmp_path_factory.mktemp("precision")
    path = tiny_model_folder(folder / "model")
    model = load_policy(tiny_recipe(folder).model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(0.1)
    model.to(torch.bfloat16).float().save_pretrained(path)
    return folder


def recipe_of(place: Path, dtype: str, **blocks: Any) -> Recipe:
    return tiny_recipe(
        place,
        name=f"{dtype}-{len(blocks)}",
        model={"dtype": dtype, **blocks.pop("model", {})},
        select={"count": 10},
        train={"lora": None, "trainer": SMALL},
        **blocks,
    )


def share_changed(recipe: Recipe, place: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of the weights in training, after `selective-dpo train`."""
    trained: dict[str, torch.Tensor] = {}
    save = train_module.save_policy

    def noted(trainer: Any, *args: Any, **others: Any) -> None:
        assert trainer.state.global_step == 50
        trained.update({name: one.detach().float() for name, one in trainer.model.named_parameters()})
        save(trainer, *args, **others)

    monkeypatch.setattr(train_module, "save_policy", noted)
    assert main(["train", str(recipe_file(recipe, place / f"{recipe.name}.yaml"))]) == 0
    start = load_file(place / "model" / "model.safetensors")
    changed = sum(int((trained[name] != weight).sum()) for name, weight in start.items())
    return changed / sum(weight.numel() for weight in start.values())


def test_a_bfloat16_model_changes_as_a_float32_one_does(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    float32 = share_changed(recipe_of(place, "float32"), place, monkeypatch)
    bfloat16 = share_changed(recipe_of(place, "bfloat16"), place, monkeypatch)
    assert "pure" not in caplog.text
    pure = share_changed(
        recipe_of(place, "bfloat16", model={"master_weights": False}, launch={}), place, monkeypatch
    )
    assert "WARNING: full fine-tuning in pure bfloat16 loses the updates" in caplog.text
    # Never: the rows of tokens that no pair has, and weights of exactly one, whose float32 step is 1e-7.
    assert float32 > 0.5
    assert bfloat16 == pytest.approx(float32, abs=0.02)
    assert pure < 0.02
    policy = place / "runs" / "bfloat16-0" / "policy"
    assert {weight.dtype for weight in load_file(policy / "model.safetensors").values()} == {torch.bfloat16}
    assert read_json(policy / "config.json")["dtype"] == "bfloat16"


@pytest.mark.parametrize(("lora", "nats_a_token"), [(None, 0.0), ({"r": 4}, 0.05)])
def test_policy_and_reference_agree_at_the_start(
    place: Path, tmp_path: Path, lora: dict[str, Any] | None, nats_a_token: float
) -> None:
    """The reference is held as the scorers are: in float32 where all of their weights are trained, and then
    it equals the policy to the last bit. Else a policy in float32 differs by bfloat16's rounding."""
    score = {"lora": lora, "trainer": {"bf16": True}}
    recipe = recipe_of(place, "bfloat16", score=score, output_dir=str(tmp_path))
    run = open_run(recipe, say=lambda line: None)
    bring_up(run, "reference")
    reference = load_reference(run.folder.reference)
    tokens = load_tokens(run.folder.pairs)
    settings = recipe.train.trainer
    args = dpo_arguments(
        settings, model=recipe.model, max_length=64, output_dir=tmp_path / "out", seed=0, sequential=True
    )
    held = weights_dtype(recipe.model, recipe.train.lora, settings)
    policy = hold_for_training(load_policy(recipe.model), args, held)
    add_fused_lm_head(policy)
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    started = pair_logps(
        policy,
        tokens,
        tokens_per_batch=recipe.score.tokens_per_batch,
        pad_token_id=run.tokenizer.pad_token_id,
        autocast_dtype=autocast_dtype(settings, recipe.model),
        what="start",
    )
    assert started.pair_ids == reference.pair_ids
    for side in ("chosen", "rejected"):
        counts_P = np.array([len(ids) for ids in tokens[f"{side}_ids"]])
        ours_P, theirs_P = (getattr(each, f"{side}_P") for each in (started, reference))
        assert (np.abs(ours_P - theirs_P) <= nats_a_token * counts_P + 1e-5).all()


def test_the_keys_of_full_fine_tuning_in_16_bits_differ_from_those_of_pure_ones(
    place: Path, tmp_path: Path
) -> None:
    keys = set()
    for master_weights in (True, False):
        recipe = recipe_of(
            place,
            "bfloat16",
            score={"lora": None},
            model={"master_weights": master_weights},
            output_dir=str(tmp_path),
        )
        run = open_run(recipe, fresh=True, say=lambda line: None)
        bring_up(run, "reference")
        keys.add(read_manifest(run.folder.reference).key)
    assert len(keys) == 2
