"""The disk that a plan names: worked out by hand, and against checkpoints that trainings have written."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from selective_dpo.config import Recipe
from selective_dpo.run.costs import Disk, disk_need, models_of
from selective_dpo.run.plan import make_plan, plan_text
from tests.fixtures.fork_server import ForkServer, Moment
from tests.fixtures.models import TRAINER, recipe_file, tiny_recipe
from tests.fixtures.tokenizers import END_ID, PAD_ID, VOCABULARY_SIZE, byte_tokenizer

HIDDEN, INNER, LAYERS = 64, 128, 2
# Query, key, value (all HIDDEN wide) with biases, output; gate, up, down; two norms; a last norm, two tables.
LAYER = 4 * HIDDEN**2 + 3 * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
PARAMETERS = LAYERS * LAYER + HIDDEN + 2 * VOCABULARY_SIZE * HIDDEN
RANK = 64
# On the seven matrices of each layer: rank x (inputs + outputs).
ADAPTER = LAYERS * RANK * (4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + INNER))
LORA = {"r": RANK, "target_modules": "all-linear"}
TOLERANCE = 0.2
"""Of checkpoints above noise: the tokenizer's files and JSON beside the tensors are some 60 KB here."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose weights are far larger than what else a checkpoint holds."""
    folder = tmp_path_factory.mktemp("place")
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model: Any = Qwen2ForCausalLM(config)
    model.save_pretrained(folder / "model")
    byte_tokenizer(bos=False).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def make(place: Path) -> Callable[..., Recipe]:
    """A recipe in that folder, whose trainings are as `training` and `lora` say."""

    def made(lora: Any = LORA, dtype: str = "float32", training: Any = None, **blocks: Any) -> Recipe:
        block = {"lora": lora, "trainer": {**TRAINER, **(training or {})}}
        given = {"launch": {"checkpoint_steps": 1}, **blocks}
        return tiny_recipe(place, model={"dtype": dtype}, score=block, train=block, **given)

    return made


def need(recipe: Recipe) -> Disk:
    found = disk_need(recipe, models_of(recipe))
    assert found is not None
    return found


# --- by hand ---------------------------------------------------------------------------------------------


def test_an_adapter_with_adamw(make: Callable[..., Recipe]) -> None:
    # float32, twice as much again for AdamW's two states; two are kept while a third is written.
    assert need(make()) == Disk(4 * ADAPTER, 3 * (4 + 8) * ADAPTER)
    assert need(make()).total == 40 * ADAPTER


def test_full_weights(make: Callable[..., Recipe]) -> None:
    assert need(make(lora=None)) == Disk(4 * PARAMETERS, 3 * (4 + 8) * PARAMETERS)
    # Trained in float32, and saved as it was; DeepSpeed's weights are bfloat16, beside a float32 copy.
    half: dict[str, Any] = {"lora": None, "dtype": "bfloat16", "training": {"bf16": True}}
    assert need(make(**half)) == Disk(2 * PARAMETERS, 3 * (4 + 8) * PARAMETERS)
    half["training"] = {"bf16": True, "deepspeed": {"zero_optimization": {"stage": 3}}}
    assert need(make(**half)) == Disk(2 * PARAMETERS, 3 * (2 + 8 + 4) * PARAMETERS)


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 0), ("adagrad", 4), ("adamw_bnb_8bit", 2)])
def test_other_optimizers(make: Callable[..., Recipe], optimizer: str, states: int) -> None:
    assert need(make(training={"optim": optimizer})).checkpoints == 3 * (4 + states) * ADAPTER


def test_arms_and_scorers_that_are_kept_and_trainings_side_by_side(make: Callable[..., Recipe]) -> None:
    controls = {"controls": {"all": {"rule": "all"}, "random": {"rule": "random", "fraction": 0.5}}}
    recipe = make(evaluate=controls)
    # Three policies, one after the other.
    assert need(recipe) == Disk(3 * 4 * ADAPTER, 3 * 12 * ADAPTER)
    kept = recipe.model_copy(update={"score": recipe.score.model_copy(update={"keep_scorers": True})})
    assert need(kept).results == (3 + 2) * 4 * ADAPTER
    # Five workers: two scorers at a time, and later three policies.
    assert need(make(evaluate=controls, launch={"workers": 5})).checkpoints == 3 * 3 * 12 * ADAPTER
    assert need(make(launch={"workers": 5})).checkpoints == 2 * 3 * 12 * ADAPTER


def test_the_larger_stage_counts(make: Callable[..., Recipe], place: Path) -> None:
    recipe = tiny_recipe(place, score={"lora": None}, train={"lora": {**LORA, "r": RANK // 16}})
    assert need(recipe) == Disk(4 * ADAPTER / 16, 3 * 12 * PARAMETERS)


def test_without_checkpoints_there_are_none(make: Callable[..., Recipe]) -> None:
    without = make(launch={"checkpoint_minutes": 0.0, "checkpoint_steps": 0})
    assert need(without) == Disk(4 * ADAPTER, 0.0)
    assert "disk: 544 KiB for trained weights\n" in plan_text(make_plan(without)) + "\n"


def test_the_plan_says_so(make: Callable[..., Recipe]) -> None:
    plan = make_plan(make())
    # ADAPTER is 2 x 64 x (4 x 128 + 3 x 192) = 139,264: x 4 bytes = 544 KiB, x 36 bytes = 4.78 MiB.
    assert ADAPTER == 139_264
    assert "disk: 544 KiB for trained weights, and up to 4.78 MiB for checkpoints meanwhile" in plan_text(
        plan
    )
    assert plan.to_json()["disk_bytes"] == {
        "results": 4 * ADAPTER,
        "checkpoints": 36 * ADAPTER,
        "total": 40 * ADAPTER,
    }


# --- against what is written -----------------------------------------------------------------------------


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": None},
        {"lora": None, "dtype": "bfloat16", "training": {"bf16": True}},
        {"lora": None, "training": {"optim": "sgd"}},
        {"training": {"optim": "adagrad"}},
    ],
    ids=["adapter", "full", "bfloat16", "sgd", "adagrad"],
)
def test_checkpoints_are_as_large_as_planned(
    make: Callable[..., Recipe], place: Path, server: ForkServer, settings: dict[str, Any]
) -> None:
    """A scorer's training is killed while it writes its third checkpoint: the two before it, and all three
    together, are within 20% of a third and of the whole of the planned number."""
    recipe = make(**settings)
    planned = need(recipe).checkpoints
    shutil.rmtree(place / "runs", ignore_errors=True)
    command = ["score", recipe_file(recipe, place / "recipe.yaml"), "--only", "seed41-fold0"]
    command += ["--score.trainer.num_train_epochs", "2"]  # six updates, so that the third is not the last
    outcome = server.run(command, Moment("step", 3))
    assert outcome.code == -signal.SIGKILL, outcome.output
    folder = place / "runs" / "tiny" / "checkpoints" / "seed41-fold0"
    written = sorted(folder.glob("step-*"))
    assert [path.name for path in written] == ["step-000001", "step-000002"]
    for checkpoint in written:
        assert abs(size_of(checkpoint) - planned / 3) < TOLERANCE * planned / 3
    # Going on writes step 3's first; it is whole, and not yet in its place, at the rename.
    outcome = server.run(command, Moment("rename", 3))
    assert outcome.code == -signal.SIGKILL, outcome.output
    names = [path.name for path in folder.iterdir() if path.name.startswith((".partial-", "step-"))]
    assert len(names) == 3 and size_of(folder) < (1 + TOLERANCE) * planned
    assert size_of(folder) > (1 - TOLERANCE) * planned
