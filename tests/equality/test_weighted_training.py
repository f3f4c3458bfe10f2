"""Weights multiply each pair's gradient, weights of 1 change nothing, and flips are relabelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from selective_dpo import Curriculum, SelectiveDPOTrainer
from selective_dpo.curriculum.table import ACTION, FLIPPED, WEIGHT
from selective_dpo.errors import ConfigError, IdentityError
from selective_dpo.identity import ids_digest
from selective_dpo.training.selective_trainer import OrderLog
from tests.fixtures.tokenizers import byte_tokenizer
from tests.fixtures.training import curriculum_of, dpo_config, load_model, pair_of, text_rows, tokens_of

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}
DIFFICULTIES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def acted_on(
    curriculum: Curriculum, rows: Sequence[dict[str, Any]], weights: Sequence[float], flipped: Sequence[bool]
) -> Curriculum:
    """With the columns of a curriculum that has an `action`; row `i` weighs `weights[i]`."""
    place = {pair_of(row).pair_id: number for number, row in enumerate(rows)}
    order = [place[name] for name in curriculum.pair_ids]
    table = curriculum.table.append_column(ACTION, pa.array([""] * len(order)))
    table = table.append_column(FLIPPED, pa.array([flipped[number] for number in order]))
    table = table.append_column(WEIGHT, pa.array([weights[number] for number in order]))
    return Curriculum(table, curriculum.facts)


def trainer_of(
    model_folder: Path,
    out: Path,
    dataset: Dataset,
    curriculum: Curriculum,
    *,
    lora: bool = False,
    **settings: Any,
) -> SelectiveDPOTrainer:
    path, held_out = settings.pop("path", "auto"), settings.pop("held_out", None)
    torch.manual_seed(0)  # of an adapter's first weights
    return SelectiveDPOTrainer(
        load_model(model_folder),
        None,
        dpo_config(out, **settings),
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=byte_tokenizer(bos=False),
        peft_config=LoraConfig(**LORA) if lora else None,
        curriculum=curriculum,
        path=path,
    )


def trained(trainer: SelectiveDPOTrainer) -> torch.Tensor:
    """All trained weights after the training."""
    trainer.train()
    return torch.cat([each.detach().flatten() for each in trainer.model.parameters() if each.requires_grad])


@pytest.mark.parametrize("path", ["auto", "padded"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_weights_of_one_give_the_same_weights_bit_by_bit(
    model_folder: Path, tmp_path: Path, lora: bool, path: str
) -> None:
    rows = text_rows(6)
    plain = curriculum_of(rows, DIFFICULTIES, rule="all")
    ones = acted_on(plain, rows, [1.0] * 6, [False] * 6)
    dataset = tokens_of(rows)
    settings: dict[str, Any] = {
        "lora": lora,
        "path": path,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
    }
    one, other = (
        trainer_of(model_folder, tmp_path / name, dataset, curriculum, **settings)
        for name, curriculum in (("plain", plain), ("ones", ones))
    )
    assert torch.equal(trained(one), trained(other))
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (one, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("path", ["auto", "padded"])
def test_a_pairs_gradient_is_multiplied_by_its_weight(model_folder: Path, tmp_path: Path, path: str) -> None:
    rows, weights = text_rows(3), [0.25, 1.0, 0.5]
    dataset, settings = Dataset.from_list(rows), {**SGD, "path": path, "learning_rate": 0.1}
    start = torch.cat([each.detach().flatten() for each in load_model(model_folder).parameters()])

    def moved(of: Sequence[int], weigh: Sequence[float], **more: Any) -> torch.Tensor:
        chosen = [rows[number] for number in of]
        curriculum = acted_on(
            curriculum_of(chosen, DIFFICULTIES[: len(of)], rule="all"), chosen, weigh, [False] * len(of)
        )
        name = f"{of}-{weigh}-{len(more)}"
        return (
            trained(trainer_of(model_folder, tmp_path / name, dataset, curriculum, **settings, **more))
            - start
        )

    # One step of plain gradient descent on each pair alone; then on all of them, in one batch of three, and
    # in batches of one that are accumulated. An update is the mean over its pairs of weight x gradient.
    alone = [moved([number], [1.0]) for number in range(3)]
    expected = sum(weight * step for weight, step in zip(weights, alone, strict=True)) / 3
    together = moved([0, 1, 2], weights, per_device_train_batch_size=3)
    assert expected.norm() > 1e-4  # type: ignore[union-attr]
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-6)
    accumulated = moved([0, 1, 2], weights, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    torch.testing.assert_close(accumulated, expected, rtol=1e-3, atol=1e-6)
    assert (moved([0], [0.0]) == 0.0).all()


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_flipped_pairs_are_trained_on_as_if_they_were_labelled_so(
    model_folder: Path, tmp_path: Path, form: str
) -> None:
    rows, flipped = text_rows(6), [False, True, True, False, False, True]
    relabelled = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if turn else row
        for row, turn in zip(rows, flipped, strict=True)
    ]
    make = tokens_of if form == "tokens" else Dataset.from_list
    curriculum = acted_on(curriculum_of(rows, DIFFICULTIES, rule="all"), rows, [1.0] * 6, flipped)
    ours = trainer_of(model_folder, tmp_path / "ours", make(rows), curriculum)
    by_hand = curriculum_of(relabelled, DIFFICULTIES, rule="all")
    theirs = trainer_of(model_folder, tmp_path / "theirs", make(relabelled), by_hand)
    assert torch.equal(trained(ours), trained(theirs))
    assert ours.consumed_order.matches


def test_reference_log_probs_and_scores_change_places_with_the_answers() -> None:
    rows = text_rows(2)
    columns = {"ref_chosen_logps": [-1.0, -2.0], "ref_rejected_logps": [-3.0, -4.0]}
    scores = {"score_chosen": [9.0, 8.0], "score_rejected": [1.0, 2.0]}
    dataset = Dataset.from_dict({**tokens_of(rows).to_dict(), **columns, **scores})
    curriculum = acted_on(curriculum_of(rows, [0.1, 0.2], rule="all"), rows, [1.0, 0.5], [False, True])
    found = curriculum.apply(dataset).to_dict()
    assert found["ref_chosen_logps"] == [-1.0, -4.0]
    assert found["ref_rejected_logps"] == [-3.0, -2.0]
    assert (found["score_chosen"], found["score_rejected"]) == ([9.0, 2.0], [1.0, 8.0])
    assert found["chosen_ids"][1] == dataset["rejected_ids"][1]
    assert found["weight"] == [1.0, 0.5]
    assert found["pair_id"] == dataset["pair_id"][:]


def test_the_certificate_covers_the_weights(model_folder: Path, tmp_path: Path) -> None:
    rows, weights = text_rows(4), [0.5, 1.0, 0.25, 1.0]
    curriculum = acted_on(
        curriculum_of(rows, DIFFICULTIES[:4], fraction=0.75), rows, weights, [False, False, True, False]
    )
    # A column of the data that is called so, too, is not what is trained with.
    dataset = Dataset.from_list([{**row, "weight": 7.0} for row in rows])
    trainer = trainer_of(model_folder, tmp_path / "out", dataset, curriculum, num_train_epochs=2)
    trainer.train()
    order = trainer.consumed_order
    assert order.matches
    once = [f"{name} {weight}" for name, weight in zip(curriculum.order, [0.5, 1.0, 0.25], strict=True)]
    assert curriculum.certified_order == once
    assert order.consumed_digest == ids_digest(2 * once)


def test_rows_to_evaluate_need_no_weights(model_folder: Path, tmp_path: Path) -> None:
    rows = text_rows(6)
    train, held_out = rows[:4], tokens_of(rows[4:])
    plain = curriculum_of(train, DIFFICULTIES[:4], rule="all")
    weighted = acted_on(plain, train, [1.0] * 4, [False] * 4)
    losses = []
    for name, curriculum in (("plain", plain), ("weighted", weighted)):
        trainer = trainer_of(
            model_folder,
            tmp_path / name,
            tokens_of(train),
            curriculum,
            held_out=held_out,
            eval_strategy="epoch",
        )
        trainer.train()
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert len(losses[0]) == 1
    assert losses[0] == losses[1]


def test_another_weight_is_another_order() -> None:
    log = OrderLog(["a", "b"], [0.5, 1.0])
    log.add([0, 1], [0.5, 1.0])
    assert log.result().matches
    log.add([0, 1], [0.5, 0.75])
    assert not log.result().matches


def test_a_checkpoint_without_weights_is_of_another_training(tmp_path: Path) -> None:
    plain, weighted = OrderLog(["a", "b"]), OrderLog(["a", "b"], [0.5, 1.0])
    plain.add([0, 1])
    plain.write_state(tmp_path)
    with pytest.raises(IdentityError, match="a training without weights, and this curriculum has some"):
        weighted.read_state(tmp_path)
    weighted.add([0], [0.5])
    weighted.write_state(tmp_path)
    again = OrderLog(["a", "b"], [0.5, 1.0])
    again.read_state(tmp_path)
    again.add([1], [1.0])
    assert again.result().matches
    with pytest.raises(IdentityError, match="a training with weights, and this curriculum has none"):
        plain.read_state(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
            "loss_type sigmoid, sft is not a mean",
        ),
        ({"accelerator_config": {"split_batches": True}}, "would lose the curriculum's weights"),
    ],
)
def test_what_would_ignore_weights_is_refused(
    model_folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    rows = text_rows(2)
    curriculum = acted_on(curriculum_of(rows, [0.1, 0.2], rule="all"), rows, [1.0, 0.5], [False] * 2)
    with pytest.raises(ConfigError, match=message):
        trainer_of(model_folder, tmp_path, Dataset.from_list(rows), curriculum, **settings)
