"""`SelectiveDPOTrainer` with transformers' own checkpoints: what was consumed before one counts after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOTrainer

from selective_dpo import SelectiveDPOTrainer
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import ArtifactError, IdentityError, SelectiveDPOError
from selective_dpo.identity import ids_digest
from selective_dpo.storage.artifacts import read_json
from selective_dpo.training.selective_trainer import STATE
from tests.fixtures.fork_server import ForkServer
from tests.fixtures.models import tiny_model_folder
from tests.fixtures.tokenizers import byte_tokenizer
from tests.fixtures.training import InputSpy, curriculum_of, dpo_config, load_model, text_rows, tokens_of

ROWS = text_rows(9)
CURRICULUM = curriculum_of(ROWS, [0.3, 0.6, 0.9, 0.1, 0.8, 0.5, 0.2, 0.7, 0.4], count=7)
# 7 pairs, 2 in a batch, 2 batches in an update: updates of 4 and 3 pairs, two of them an epoch.
SETTINGS: dict[str, Any] = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_strategy": "steps"}
EPOCHS, UPDATES = 2, 4
CONSUMED = {1: 4, 2: 7, 3: 11, 4: 14}
"""Rows by update."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


class StopsAfter(TrainerCallback):
    """As a killed process: nothing is tidied up."""

    def __init__(self, update: int) -> None:
        self._update = update

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._update:
            raise KeyboardInterrupt


@pytest.fixture
def make(model_folder: Path, tmp_path: Path) -> Callable[..., SelectiveDPOTrainer]:
    """Makes the same trainer each time, as a new process would."""

    def made(curriculum: Curriculum = CURRICULUM, **others: Any) -> SelectiveDPOTrainer:
        callbacks = others.pop("callbacks", [])
        settings = {**SETTINGS, "save_steps": 1, **others}
        return SelectiveDPOTrainer(
            load_model(model_folder),
            args=dpo_config(tmp_path / "out", **settings),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=byte_tokenizer(bos=False),
            curriculum=curriculum,
            callbacks=callbacks,
        )

    return made


def weights_of(trainer: SelectiveDPOTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


@pytest.mark.parametrize("update", [1, 2, 3])
@pytest.mark.parametrize("how", ["raised", "max_steps"])
def test_resumed_is_undisturbed(
    make: Callable[..., SelectiveDPOTrainer], tmp_path: Path, update: int, how: str
) -> None:
    """Two epochs with accumulation, interrupted within the first, between the two and within the second: the
    same ids, digest and verdict as without, and the same weights."""
    whole = make(save_strategy="no")
    spy = InputSpy(whole)
    whole.train()
    tokens = tokens_of(ROWS)
    undisturbed, seen = whole.consumed_order, spy.pairs(tokens)
    assert undisturbed.matches and undisturbed.consumed == CONSUMED[UPDATES] and undisturbed.epochs == EPOCHS

    if how == "raised":
        interrupted = make(callbacks=[StopsAfter(update)])
        first = InputSpy(interrupted)
        with pytest.raises(KeyboardInterrupt):
            interrupted.train()
    else:
        interrupted = make(max_steps=update, lr_scheduler_type="constant_with_warmup")
        first = InputSpy(interrupted)
        interrupted.train()
    assert interrupted.consumed_order.consumed == CONSUMED[update] and interrupted.consumed_order.matches

    resumed = make()
    second = InputSpy(resumed)
    where = tmp_path / "out" / f"checkpoint-{update}"
    resumed.train(resume_from_checkpoint=str(where) if update > 1 else True)
    assert resumed.consumed_order == undisturbed
    assert first.pairs(tokens) + second.pairs(tokens) == seen
    assert resumed.consumed_order.consumed_digest == ids_digest(2 * CURRICULUM.order)
    assert resumed.state.global_step == UPDATES
    if how == "raised":  # the other one had another schedule up to there
        ours, theirs = weights_of(resumed), weights_of(whole)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_training_resumed_twice_remembers_all_of_it(
    make: Callable[..., SelectiveDPOTrainer], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(callbacks=[StopsAfter(1)]).train()
    again = make(callbacks=[StopsAfter(3)])
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=True)
    assert again.consumed_order.consumed == CONSUMED[3] and again.consumed_order.matches
    last = make()
    last.train(resume_from_checkpoint=True)
    order = last.consumed_order
    assert order.matches and order.consumed_digest == ids_digest(2 * CURRICULUM.order)
    # And the same trainer from the beginning knows nothing of it.
    last.train()
    assert last.consumed_order.consumed == CONSUMED[UPDATES]


def test_what_a_checkpoint_says(make: Callable[..., SelectiveDPOTrainer], tmp_path: Path) -> None:
    make(max_steps=3).train()
    said = json.loads((tmp_path / "out" / "checkpoint-3" / STATE).read_text("utf-8"))
    assert said == {
        "curriculum": CURRICULUM.order_digest,
        "repeated_to_fill": 0,
        "positions": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3],
    }


# --- other checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_of_trl_is_refused(
    make: Callable[..., SelectiveDPOTrainer], model_folder: Path, tmp_path: Path
) -> None:
    """What a plain `DPOTrainer` consumed is not known: nobody could say that the order was followed."""
    plain = DPOTrainer(
        load_model(model_folder),
        args=dpo_config(tmp_path / "out", **{**SETTINGS, "save_steps": 1, "max_steps": 1}),
        train_dataset=CURRICULUM.apply(Dataset.from_list(ROWS), allow_unscored=True).select_columns(
            ["prompt", "chosen", "rejected"]
        ),
        processing_class=byte_tokenizer(bos=False),
    )
    plain.train()
    with pytest.raises(ArtifactError, match=r"checkpoint-1 does not say in .* which pairs were consumed"):
        make().train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_curriculum_is_refused(
    make: Callable[..., SelectiveDPOTrainer], tmp_path: Path
) -> None:
    other = curriculum_of(ROWS, [0.6, 0.3, 0.9, 0.1, 0.8, 0.5, 0.2, 0.7, 0.4], count=7)
    assert sorted(other.order) == sorted(CURRICULUM.order) and other.order != CURRICULUM.order
    make(other, max_steps=1).train()
    trainer = make()
    with pytest.raises(IdentityError) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert f"checkpoint-1/{STATE} is of a training on another curriculum" in str(caught.value)
    assert other.order_digest[:12] in str(caught.value) and CURRICULUM.order_digest[:12] in str(caught.value)
    assert trainer.consumed_order.consumed == 0


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", ArtifactError),
        ("[]", ArtifactError),
        ("{}", ArtifactError),
        ('{"curriculum": "x", "repeated_to_fill": 0, "positions": []}', IdentityError),
    ],
)
def test_what_is_no_record_is_refused(
    make: Callable[..., SelectiveDPOTrainer], tmp_path: Path, content: str, error: type[SelectiveDPOError]
) -> None:
    make(max_steps=1).train()
    (tmp_path / "out" / "checkpoint-1" / STATE).write_text(content)
    with pytest.raises(error, match=STATE):
        make().train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_two_processes(model_folder: Path, tmp_path: Path, server: ForkServer) -> None:
    """7 pairs in batches of one: 4 rounds an epoch, 2 an update; a row fills the last round of each."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), "utf-8")
    CURRICULUM.save(tmp_path)
    settings = {**SETTINGS, "save_steps": 1, "per_device_train_batch_size": 1, "lora": False}

    def train(**others: Any) -> dict[str, Any]:
        words = json.dumps({**settings, **others})
        ended = server.run_ranks(2, "-m", "tests.fixtures.processes", tmp_path, words)
        assert [each.code for each in ended] == [0, 0], ended
        return read_json(tmp_path / "order.json")

    assert train(max_steps=3)["consumed"] == 11
    order = train(resume_from_checkpoint=True)
    assert order["matches"] and (order["consumed"], order["repeated_to_fill"]) == (14, 2)
    assert order["consumed_digest"] == ids_digest(2 * CURRICULUM.order)
