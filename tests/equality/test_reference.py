"""The cached reference log-probs are what TRL computes live, and they are computed once for everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from selective_dpo.data.store import load_tokens
from selective_dpo.difficulty import scorer as scorer_module
from selective_dpo.difficulty.scorer import collect_records
from selective_dpo.identity import pair_id, positions_of
from selective_dpo.logprobs.reference import CHOSEN_COLUMN, REJECTED_COLUMN, load_reference, with_reference
from selective_dpo.models import load_policy, load_tokenizer
from selective_dpo.run import stages
from selective_dpo.run.keys import Run
from selective_dpo.run.run import open_run, train
from selective_dpo.run.stages import bring_up
from selective_dpo.training import train as train_module
from selective_dpo.training.arguments import dpo_arguments, lora_config
from selective_dpo.training.batching import PAIRS as BATCH
from selective_dpo.training.trainer import PairTrainer
from tests.fixtures.models import LORA, tiny_model_folder, tiny_pairs_file, tiny_recipe

pytestmark = pytest.mark.slow

PAIRS = 17
KINDS = ("lora", "full")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 17 text pairs whose reference is published."""
    folder = tmp_path_factory.mktemp("reference")
    tiny_model_folder(folder / "model")
    tiny_pairs_file(folder / "pairs.jsonl", PAIRS)
    made = open_run(tiny_recipe(folder), say=lambda line: None)
    bring_up(made, "reference")
    return made


def arguments(run: Run, folder: Path) -> DPOConfig:
    return dpo_arguments(
        run.recipe.score.trainer,
        model=run.recipe.model,
        max_length=64,
        output_dir=folder,
        seed=1,
        sequential=True,
    )


def live_trainer(run: Run, kind: str, folder: Path) -> DPOTrainer:
    """TRL's own trainer on the raw text, with its live reference."""
    rows = [json.loads(line) for line in Path(run.recipe.data.train[0].path).read_text().splitlines()]
    return DPOTrainer(
        load_policy(run.recipe.model),
        None if kind == "lora" else load_policy(run.recipe.model),
        arguments(run, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(run.recipe.model),
        peft_config=lora_config(LORA if kind == "lora" else None),
    )


def cached_trainer(run: Run, kind: str, folder: Path) -> PairTrainer:
    """This package's trainer, on its own tokens and the published reference."""
    rows = with_reference(load_tokens(run.folder.pairs), load_reference(run.folder.reference))
    return PairTrainer(
        load_policy(run.recipe.model),
        args=arguments(run, folder),
        train_dataset=rows,
        processing_class=load_tokenizer(run.recipe.model),
        peft_config=lora_config(LORA if kind == "lora" else None),
    )


def move_weights(trainer: DPOTrainer) -> None:
    """Put the policy somewhere else than the reference, the same place for equal trainers."""
    generator = torch.Generator().manual_seed(5)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise, alpha=0.05)


def batch_of(trainer: DPOTrainer, rows: list[int]) -> dict[str, Any]:
    batch: dict[str, Any] = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_cached_log_probs_are_trls_live_ones(run: Run, kind: str, tmp_path: Path) -> None:
    trainer = live_trainer(run, kind, tmp_path)
    # With the policy moved, only the disabled adapter or the reference model gives these numbers.
    move_weights(trainer)
    ids = [
        pair_id(row["prompt"], row["chosen"], row["rejected"])
        for row in map(json.loads, Path(run.recipe.data.train[0].path).read_text().splitlines())
    ]
    live_P2 = []
    for start in range(0, PAIRS, 5):
        batch = batch_of(trainer, list(range(PAIRS))[start : start + 5])
        model = trainer.ref_model or trainer.model
        live_P2.append(torch.stack(trainer.compute_ref_log_probs(model, batch), dim=1).double().numpy())
    cached = load_reference(run.folder.reference)
    at = positions_of(ids, cached.pair_ids, what="cached")
    cached_P2 = np.stack([cached.chosen_P[at], cached.rejected_P[at]], axis=1)
    # float32 sums of up to 150 nats carry 7 digits.
    np.testing.assert_allclose(cached_P2, np.concatenate(live_P2), rtol=3e-7, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_steps_loss_with_the_cached_reference_is_trls_live_one(run: Run, kind: str, tmp_path: Path) -> None:
    live, cached = live_trainer(run, kind, tmp_path), cached_trainer(run, kind, tmp_path)
    assert cached.ref_model is None and not live.precompute_ref_logps
    losses, gradients = [], []
    for trainer in (live, cached):
        move_weights(trainer)
        trainer.model.train()
        rows = [3, 0, 16, 7]
        loss = trainer.compute_loss(trainer.model, batch_of(trainer, rows))
        loss.backward()
        losses.append(loss.item())
        trained = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
        gradients.append(torch.cat(trained))
    assert abs(losses[0] - np.log(2.0)) > 1e-3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_reference_pass_serves_scorers_evaluations_and_the_final_training(
    run: Run, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LORA if kind == "lora" else None
    settings = {"lora": lora, "trainer": {"learning_rate": 1e-3}}
    recipe = tiny_recipe(
        Path(run.recipe.model.path).parent, output_dir=str(tmp_path), score=settings, train=settings
    )
    events: list[str] = []
    trained_on: dict[str, tuple[float, float]] = {}

    def counted(folder: Path, *, model: Any, **others: Any) -> None:
        assert type(model) is Qwen2ForCausalLM and not isinstance(model, PeftModel)
        events.append("reference")
        publish(folder, model=model, **others)

    def spied(trainer_class: type[DPOTrainer]) -> type[DPOTrainer]:
        class Spy(trainer_class):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **others: Any) -> None:
                super().__init__(*args, **others)
                assert self.ref_model is None and self.precompute_ref_logps
                events.append(trainer_class.__name__)

            def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **others: Any) -> Any:
                for pair in inputs[BATCH].pairs:
                    prompt, chosen, _ = pair.tokens
                    reference = (pair.example[name] for name in (CHOSEN_COLUMN, REJECTED_COLUMN))
                    trained_on[json.dumps([*prompt, *chosen])] = tuple(reference)
                return super().compute_loss(model, inputs, *args, **others)

        return Spy

    def no_live_reference(*args: Any, **others: Any) -> Any:
        raise AssertionError("a live reference")

    publish = stages.publish_reference
    monkeypatch.setattr(stages, "publish_reference", counted)
    monkeypatch.setattr(scorer_module, "_Scorer", spied(scorer_module._Scorer))
    monkeypatch.setattr(train_module, "_PolicyTrainer", spied(train_module._PolicyTrainer))
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", no_live_reference)
    # Nor does TRL take a digest of all weights at each trainer's start, or load a second model.
    for name in ("hash_module", "create_model_from_path"):
        monkeypatch.setattr(dpo_trainer, name, no_live_reference)
    whole = open_run(recipe, say=lambda line: None)
    train(whole)
    assert events == ["reference", "_Scorer", "_Scorer", "_PolicyTrainer"]

    table = load_reference(whole.folder.reference)
    reference = dict(zip(table.pair_ids, zip(table.chosen_P, table.rejected_P, strict=True), strict=True))
    # What the trainers were given ...
    for row in load_tokens(whole.folder.pairs):
        given = trained_on[json.dumps([*row["prompt_ids"], *row["chosen_ids"]])]
        assert given == reference[row["pair_id"]]
    # ... and what every evaluation of every scorer recorded are the table's numbers.
    records = collect_records([whole.folder.scores(scorer) for scorer in whole.scorer_runs])
    assert len(records) == 2 * PAIRS
    for row in range(len(records)):
        recorded = (records.reference_chosen_logp[row], records.reference_rejected_logp[row])
        assert recorded == reference[records.pair_id[row]]
