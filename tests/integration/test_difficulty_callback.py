"""`DifficultyCallback` on a plain `DPOTrainer`: the losses it records are those that the training logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from selective_dpo import DifficultyCallback, import_curriculum
from selective_dpo.errors import ConfigError
from selective_dpo.identity import pair_id
from tests.fixtures.models import tiny_model_folder, tiny_pairs_file

PAIRS = 12
BATCH = 2


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., DPOTrainer]:
    rows = [json.loads(line) for line in tiny_pairs_file(tmp_path / "p", PAIRS).read_text().splitlines()]
    data = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    tiny_model_folder(tmp_path / "model")

    def make(has_adapter: bool = True, **settings: Any) -> DPOTrainer:
        args = DPOConfig(
            str(tmp_path / "out"),
            per_device_train_batch_size=BATCH,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            num_train_epochs=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        torch.manual_seed(0)
        return DPOTrainer(
            str(tmp_path / "model"),
            args=args,
            train_dataset=data,
            peft_config=lora() if has_adapter else None,
        )

    return make


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("has_adapter", "precomputed"),
    [(True, False), (False, False), (False, True)],
    ids=["lora", "full", "precomputed"],
)
def test_the_losses_are_those_of_the_training_before_a_pairs_first_update(
    make: Callable[..., DPOTrainer], has_adapter: bool, precomputed: bool, accumulation: int
) -> None:
    settings = {
        "train_sampling_strategy": "sequential",
        "precompute_ref_log_probs": precomputed,
        "gradient_accumulation_steps": accumulation,
    }
    plain = make(has_adapter, **settings)
    plain.train()
    trainer = make(has_adapter, **settings)
    recorded = DifficultyCallback(trainer)
    trainer.add_callback(recorded)
    trainer.train()

    table = recorded.table().to_pylist()
    rows = trainer.train_dataset
    ids = [pair_id(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    assert sorted(row["pair_id"] for row in table) == sorted(ids)
    found = {row["pair_id"]: row for row in table}
    size = BATCH * accumulation
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for update in range(PAIRS // size):  # of the first epoch: the second's losses are not recorded
        pairs = [found[name] for name in ids[size * update : size * (update + 1)]]
        assert sum(pair["difficulty"] for pair in pairs) / size == pytest.approx(logged[update], abs=2e-4)
        assert {pair["seen"] // size for pair in pairs} == {update}
    assert found[ids[0]]["difficulty"] == pytest.approx(0.693147, abs=1e-5)  # nothing was learned yet
    assert abs(found[ids[-1]]["difficulty"] - 0.6931) > 1e-3
    # Listening changes nothing.
    for mine, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_saved_table_is_a_file_of_difficulties(make: Callable[..., DPOTrainer], tmp_path: Path) -> None:
    trainer = make()
    recorded = DifficultyCallback(trainer)
    trainer.add_callback(recorded)
    trainer.train()
    curriculum = import_curriculum(recorded.save(tmp_path / "first-losses.parquet"))
    assert len(curriculum.pair_ids) == PAIRS and len(curriculum.order) == PAIRS // 2


def test_what_cannot_be_listened_to_is_refused(make: Callable[..., DPOTrainer]) -> None:
    with pytest.raises(ConfigError, match="dataloader_num_workers=0"):
        DifficultyCallback(make(dataloader_num_workers=1))
    with pytest.raises(ConfigError, match="f_divergence_type"):
        DifficultyCallback(make(f_divergence_type="js_divergence"))
