"""`SelectiveDPOTrainer` trains on the curriculum's pairs in its order, and is TRL's trainer otherwise."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from torch.utils.data import RandomSampler
from trl import DPOTrainer

from selective_dpo import Curriculum, SelectiveDPOTrainer
from selective_dpo.errors import ConfigError, DataError, IdentityError
from selective_dpo.identity import ids_digest
from selective_dpo.logprobs.compute import pair_logps
from selective_dpo.logprobs.reference import with_reference
from tests.fixtures.tokenizers import PAD_ID, byte_tokenizer
from tests.fixtures.training import (
    InputSpy,
    chat_rows,
    curriculum_of,
    dpo_config,
    load_model,
    text_rows,
    tokens_of,
)

# TRL reads a name that transformers has deprecated.
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PAIRS = 12
# Row i's difficulty; the order of ease is 3, 7, 0, 10, 5, 1, ...
DIFFICULTIES = [0.30, 0.60, 0.85, 0.10, 0.80, 0.50, 0.95, 0.20, 0.70, 0.90, 0.40, 0.65]


def make_trainer(
    model_folder: Path,
    tmp_path: Path,
    dataset: Any,
    curriculum: Curriculum,
    *,
    lora: bool = False,
    eval_dataset: Any = None,
    model: Any = None,
    ref_model: Any = None,
    path: Any = "auto",
    **settings: Any,
) -> SelectiveDPOTrainer:
    return SelectiveDPOTrainer(
        model or load_model(model_folder),
        ref_model,
        dpo_config(tmp_path / "out", **settings),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=byte_tokenizer(bos=False),
        peft_config=LoraConfig(**LORA) if lora else None,
        curriculum=curriculum,
        path=path,
    )


def referenced_tokens(model_folder: Path, rows: list[dict[str, Any]]) -> Dataset:
    """Tokens of the rows with the starting model's log-probs, as the training stage has them."""
    from trl.trainer.utils import add_fused_lm_head

    model = load_model(model_folder)
    add_fused_lm_head(model)
    tokens = tokens_of(rows)
    logps = pair_logps(
        model, tokens, tokens_per_batch=256, pad_token_id=PAD_ID, autocast_dtype=None, what="reference"
    )
    return with_reference(tokens, logps)


def shuffled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return random.Random(3).sample(rows, len(rows))


# --- the order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "lora"),
    [("text", False), ("text", True), ("chat", False), ("implicit", False), ("implicit", True)],
)
def test_raw_rows_reach_the_model_in_the_order_of_the_curriculum(
    model_folder: Path, tmp_path: Path, form: str, lora: bool
) -> None:
    rows = text_rows(PAIRS + 2) if form == "text" else chat_rows(PAIRS + 2, implicit=form == "implicit")
    scored, unscored = rows[:PAIRS], rows[PAIRS:]
    curriculum = curriculum_of(scored, DIFFICULTIES, fraction=0.4)  # 5 of 12
    # Rows in another order, some twice, and some that were never scored.
    dataset = Dataset.from_list(shuffled([*scored, *unscored, *scored[2:8]]))
    trainer = make_trainer(model_folder, tmp_path, dataset, curriculum, lora=lora)
    spy = InputSpy(trainer)
    trainer.train()
    tokens = tokens_of(rows)
    assert spy.pairs(tokens) == curriculum.order
    assert spy.pairs(tokens) == [tokens["pair_id"][row] for row in (3, 7, 0, 10, 5)]
    order = trainer.consumed_order
    assert order.matches and order.consumed == order.pairs == 5 and order.repeated_to_fill == 0
    assert order.consumed_digest == curriculum.order_digest == ids_digest(spy.pairs(tokens))


@pytest.mark.parametrize("lora", [False, True])
def test_cached_reference_is_used_and_no_reference_model_is_loaded(
    model_folder: Path, tmp_path: Path, lora: bool
) -> None:
    rows = text_rows(PAIRS)
    tokens = referenced_tokens(model_folder, rows).shuffle(seed=1)
    held_out = tokens.select(range(4))
    curriculum = curriculum_of(rows, DIFFICULTIES, rule="hardest", count=7, order="hard-to-easy")
    trainer = make_trainer(
        model_folder, tmp_path, tokens, curriculum, lora=lora, eval_dataset=held_out, eval_strategy="epoch"
    )
    assert trainer.ref_model is None
    spy = InputSpy(trainer)
    trainer.train()
    assert spy.pairs(tokens) == curriculum.order
    assert trainer.consumed_order.consumed_digest == curriculum.order_digest
    # Before the first update policy and reference are the same model: the loss is ln 2, the margin 0.
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


def test_evaluation_rows_without_a_reference_get_the_starting_models(
    model_folder: Path, tmp_path: Path
) -> None:
    rows = text_rows(PAIRS)
    curriculum = curriculum_of(rows, DIFFICULTIES)
    trainer = make_trainer(
        model_folder,
        tmp_path,
        referenced_tokens(model_folder, rows),
        curriculum,
        eval_dataset=Dataset.from_list(rows[:3]),
    )
    assert trainer.ref_model is None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_several_epochs_accumulation_and_workers_keep_the_order(model_folder: Path, tmp_path: Path) -> None:
    rows = text_rows(PAIRS)
    curriculum = curriculum_of(rows, DIFFICULTIES, count=7, order="shuffled", seed=5)
    trainer = make_trainer(
        model_folder,
        tmp_path,
        tokens_of(shuffled(rows)),
        curriculum,
        num_train_epochs=3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        dataloader_num_workers=2,
    )
    spy = InputSpy(trainer)
    trainer.train()
    # Batches of 3, 3 and 1 pairs an epoch; two of them make an update, the last one makes its own. Inside
    # an update the pairs are dealt by length.
    assert trainer.state.global_step == 3 * 2
    seen = spy.pairs(tokens_of(rows))
    for epoch in range(3):
        for start, end in ((0, 6), (6, 7)):
            assert sorted(seen[7 * epoch + start : 7 * epoch + end]) == sorted(curriculum.order[start:end])
    order = trainer.consumed_order
    assert order.matches and order.consumed == 21 and order.epochs == 3 and order.repeated_to_fill == 0
    assert order.consumed_digest == order.expected_digest == ids_digest(3 * curriculum.order)


def test_training_again_starts_a_new_record_of_the_order(model_folder: Path, tmp_path: Path) -> None:
    rows = text_rows(PAIRS)
    curriculum = curriculum_of(rows, DIFFICULTIES)
    trainer = make_trainer(model_folder, tmp_path, tokens_of(rows), curriculum)
    assert not trainer.consumed_order.matches  # nothing was consumed yet
    trainer.train()
    trainer.train()
    assert trainer.consumed_order.matches and trainer.consumed_order.consumed == 6


def test_a_tampered_sampler_is_found_out(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = text_rows(PAIRS)
    curriculum = curriculum_of(rows, DIFFICULTIES, rule="all")
    trainer = make_trainer(model_folder, tmp_path, tokens_of(rows), curriculum)
    monkeypatch.setattr(trainer, "_get_train_sampler", lambda dataset=None: RandomSampler(dataset))
    spy = InputSpy(trainer)
    trainer.train()
    order = trainer.consumed_order
    assert not order.matches
    assert order.consumed_digest == ids_digest(spy.pairs(tokens_of(rows))) != curriculum.order_digest


# --- difficulty in the log -----------------------------------------------------------------------------


def test_difficulty_is_the_mean_over_the_pairs_of_each_step(model_folder: Path, tmp_path: Path) -> None:
    rows = text_rows(PAIRS)
    curriculum = curriculum_of(rows, DIFFICULTIES, count=9)
    trainer = make_trainer(
        model_folder,
        tmp_path,
        tokens_of(rows),
        curriculum,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    logged = [(entry["step"], entry["difficulty"]) for entry in trainer.state.log_history if "loss" in entry]
    # By ease: .10 .20 .30 .40 | .50 .60 .65 .70 | .80; an update takes 2 x 2 pairs, the last one 1.
    expected = [(0.1 + 0.2 + 0.3 + 0.4) / 4, (0.5 + 0.6 + 0.65 + 0.7) / 4, 0.8]
    assert [step for step, _ in logged] == [1, 2, 3]
    assert [value for _, value in logged] == pytest.approx(expected, abs=1e-12)


def test_difficulty_over_several_steps_weighs_pairs_and_not_batches(
    model_folder: Path, tmp_path: Path
) -> None:
    rows = text_rows(PAIRS)
    curriculum = curriculum_of(rows, DIFFICULTIES, count=5)
    trainer = make_trainer(
        model_folder,
        tmp_path,
        tokens_of(rows),
        curriculum,
        per_device_train_batch_size=4,
        logging_steps=2,
    )
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Batches of 4 and 1; the mean of their means would be (.25 + .5) / 2 = .375.
    assert entry["difficulty"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.5) / 5, abs=1e-12)


# --- equality with TRL ---------------------------------------------------------------------------------


def all_in_file_order(rows: list[dict[str, Any]]) -> Curriculum:
    return curriculum_of(rows, [float(place) for place in range(len(rows))], rule="all")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_all_pairs_in_file_order_give_the_weights_of_plain_trl(
    model_folder: Path, tmp_path: Path, lora: bool, cached: bool
) -> None:
    rows = text_rows(PAIRS)
    # A power of two as batch, full batches only, and padded rows: sums are then taken in the same order.
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "seed": 7}
    plain = DPOTrainer(
        load_model(model_folder),
        args=dpo_config(tmp_path / "plain", **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(bos=False),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    data = referenced_tokens(model_folder, rows) if cached else Dataset.from_list(rows)
    order = all_in_file_order(rows)
    ours = make_trainer(model_folder, tmp_path, data, order, lora=lora, path="padded", **settings)
    plain.train()
    ours.train()
    expected = dict(plain.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        # Cached log-probs come from batches of other shapes, which rounds differently.
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6 if cached else 0)
    # They agree on something: in the second epoch the policy has moved away from ln 2.
    assert ours.state.log_history[3]["loss"] < 0.68


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='random' would shuffle"),
        ({"train_sampling_strategy": "group_by_length"}, "would shuffle"),
        ({"train_sampling_strategy": "batch_rebalance"}, "would shuffle"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({"dataloader_in_order": False}, "dataloader_in_order"),
        ({"ignore_data_skip": True}, "ignore_data_skip"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    ],
)
def test_settings_that_would_break_the_order_are_refused(
    model_folder: Path, tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    rows = text_rows(PAIRS)
    curriculum = curriculum_of(rows, DIFFICULTIES)
    with pytest.raises(ConfigError, match=expected) as caught:
        make_trainer(model_folder, tmp_path, tokens_of(rows), curriculum, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (None, r"the pairs are a NoneType: pass a datasets\.Dataset$"),
        ("stream", r"the pairs are a IterableDataset: pass a datasets\.Dataset$"),
        ("folder", r"the pairs are a DatasetDict: pass a datasets\.Dataset, such as its split 'train'$"),
    ],
)
def test_only_a_dataset_is_taken(
    model_folder: Path, tmp_path: Path, dataset: str | None, expected: str
) -> None:
    rows = text_rows(PAIRS)
    given = {
        None: None,
        "stream": Dataset.from_list(rows).to_iterable_dataset(),
        "folder": DatasetDict(train=Dataset.from_list(rows)),
    }[dataset]
    with pytest.raises(ConfigError, match=expected):
        make_trainer(model_folder, tmp_path, given, curriculum_of(rows, DIFFICULTIES))


def test_missing_pairs_are_named(model_folder: Path, tmp_path: Path) -> None:
    rows = text_rows(PAIRS)
    curriculum = curriculum_of(rows, DIFFICULTIES)
    easiest = curriculum.order[0]
    rest = [row for place, row in enumerate(rows) if place != 3]  # row 3 is the easiest
    with pytest.raises(IdentityError, match=f"1 of 6 selected pairs are not in the data set: {easiest}"):
        make_trainer(model_folder, tmp_path, Dataset.from_list(rest), curriculum)


def test_a_curriculum_for_other_data_is_refused(model_folder: Path, tmp_path: Path) -> None:
    others = [{**row, "prompt": f"other {row['prompt']}"} for row in text_rows(PAIRS)]
    with pytest.raises(IdentityError, match="6 of 6 selected pairs are not in the data set"):
        make_trainer(
            model_folder,
            tmp_path,
            Dataset.from_list(text_rows(PAIRS)),
            curriculum_of(others, DIFFICULTIES),
        )


def test_raw_pairs_that_trl_would_drop_are_named(model_folder: Path, tmp_path: Path) -> None:
    rows = [*text_rows(3), {"prompt": "p" * 40, "chosen": "yes", "rejected": "no"}]
    curriculum = curriculum_of(rows, [0.1, 0.2, 0.3, 0.4], rule="all")
    with pytest.raises(
        DataError, match=f"prompt alone fills max_length 40 in 1 pairs .{curriculum.order[3]}"
    ):
        make_trainer(model_folder, tmp_path, Dataset.from_list(rows), curriculum, max_length=40)


def test_raw_pairs_that_trl_cuts_are_counted(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # 1 + 30 + the end token make 32 tokens.
    rows = [*text_rows(3), {"prompt": "p", "chosen": "c" * 30, "rejected": "no"}]
    curriculum = curriculum_of(rows, [0.1, 0.2, 0.3, 0.4], rule="all")
    with caplog.at_level(logging.WARNING, logger="selective_dpo"):
        make_trainer(model_folder, tmp_path, Dataset.from_list(rows), curriculum, max_length=31)
    assert "1 selected pairs are longer than max_length 31 (up to 32): TRL cuts" in caplog.text


def test_a_cached_reference_of_longer_pairs_is_refused(model_folder: Path, tmp_path: Path) -> None:
    rows = [*text_rows(3), {"prompt": "p", "chosen": "c" * 30, "rejected": "no"}]
    curriculum = curriculum_of(rows, [0.1, 0.2, 0.3, 0.4], rule="all")
    tokens = referenced_tokens(model_folder, rows)
    with pytest.raises(ConfigError, match=f"those of the whole pairs: .*{curriculum.order[3]}"):
        make_trainer(model_folder, tmp_path, tokens, curriculum, max_length=31)
    make_trainer(model_folder, tmp_path, tokens, curriculum, max_length=32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"sync_ref_model": True}, "sync_ref_model"), ({"ld_alpha": 0.5}, "ld_alpha")],
)
def test_options_that_need_a_live_reference_are_refused_with_a_cached_one(
    model_folder: Path, tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    rows = text_rows(PAIRS)
    tokens = referenced_tokens(model_folder, rows)
    with pytest.raises(ConfigError, match=expected):
        make_trainer(model_folder, tmp_path, tokens, curriculum_of(rows, DIFFICULTIES), **settings)


def test_a_reference_model_beside_a_cached_reference_is_refused(model_folder: Path, tmp_path: Path) -> None:
    rows = text_rows(PAIRS)
    tokens = referenced_tokens(model_folder, rows)
    with pytest.raises(ConfigError, match="ref_model would have no effect"):
        make_trainer(
            model_folder,
            tmp_path,
            tokens,
            curriculum_of(rows, DIFFICULTIES),
            ref_model=load_model(model_folder),
        )


# --- for other trainers --------------------------------------------------------------------------------


def test_rows_left_out_are_counted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    rows = text_rows(PAIRS + 2)
    curriculum = curriculum_of(rows[:PAIRS], DIFFICULTIES)
    with caplog.at_level(logging.WARNING, logger="selective_dpo"):
        curriculum.apply(Dataset.from_list(rows), allow_unscored=True)
    assert "2 of 14 rows are not in the curriculum and are left out" in caplog.text


def test_applied_rows_serve_a_trainer_of_unpaired_answers() -> None:
    from trl import unpair_preference_dataset

    rows = text_rows(PAIRS)
    curriculum = curriculum_of(rows, DIFFICULTIES, count=3)
    applied = curriculum.apply(Dataset.from_list(shuffled(rows)))
    assert applied["pair_id"][:] == curriculum.order
    assert applied["difficulty"][:] == [0.1, 0.2, 0.3]
    unpaired = unpair_preference_dataset(applied.select_columns(["prompt", "chosen", "rejected"]))
    assert sorted(unpaired["completion"]) == sorted(
        rows[row][side] for row in (3, 7, 0) for side in ("chosen", "rejected")
    )


def test_the_trainer_does_not_copy_the_tokens(model_folder: Path, tmp_path: Path) -> None:
    rows = text_rows(PAIRS)
    tokens = tokens_of(rows)
    trainer = make_trainer(model_folder, tmp_path, tokens, curriculum_of(rows, DIFFICULTIES))
    column = trainer.train_dataset.data.column("prompt_ids").chunk(0)
    assert column.buffers()[-1].address == tokens.data.column("prompt_ids").chunk(0).buffers()[-1].address
    assert json.dumps(trainer.train_dataset[0]["prompt_ids"]) == json.dumps(tokens[3]["prompt_ids"])
