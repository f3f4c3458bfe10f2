"""Row 11 of the fault matrix: memory runs out in training, on the longest pairs or in the middle of it.

Allocations fail in the model's forward pass, or deep in its backward pass, when part of the gradient is
there already. One test takes memory away from a process for real.
"""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig

from selective_dpo import SelectiveDPOTrainer
from selective_dpo.cli import main
from selective_dpo.errors import ModelError
from selective_dpo.training import train as train_module
from selective_dpo.training.batching import PairBatch, PairRow, split_batch
from tests.fixtures import little_memory
from tests.fixtures.fork_server import ForkServer
from tests.fixtures.models import LORA, recipe_file, tiny_recipe
from tests.fixtures.processes import trained_weights
from tests.fixtures.scarce import Phase, Scarce
from tests.fixtures.tokenizers import byte_tokenizer
from tests.fixtures.training import curriculum_of, dpo_config, load_model

PAIRS, BATCH, ACCUMULATED = 14, 4, 2
TOLERANCE = 1e-5


def ragged_rows(count: int, seed: int = 5) -> list[dict[str, Any]]:
    """Distinct pairs of 10 to 70 tokens."""
    draw = random.Random(seed)
    letters = "abcdefgh"

    def text(most: int) -> str:
        return "".join(draw.choice(letters) for _ in range(draw.randint(1, most)))

    return [
        {"prompt": f"{n}{text(20)}?", "chosen": f"+{n}{text(40)}", "rejected": f"-{n}{text(40)}"}
        for n in range(count)
    ]


def trainer_for(
    model: Any, folder: Path, *, path: Any = "auto", lora: bool = False, rows: Any = None, **settings: Any
) -> SelectiveDPOTrainer:
    """Two epochs of 14 pairs, 4 in a batch and 8 in an update: the last update of an epoch has 6."""
    own = rows or ragged_rows(PAIRS)
    return SelectiveDPOTrainer(
        model,
        args=dpo_config(
            folder / "out",
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATED,
            num_train_epochs=2,
            **{"learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.0, **settings},
        ),
        train_dataset=Dataset.from_list(own),
        processing_class=byte_tokenizer(bos=False),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM") if lora else None,
        curriculum=curriculum_of(own, [0.05 * place for place in range(len(own))], rule="all"),
        path=path,
    )


def equal_trainings(one: SelectiveDPOTrainer, other: SelectiveDPOTrainer) -> None:
    assert one.consumed_order == other.consumed_order and one.consumed_order.matches
    assert one.state.global_step == other.state.global_step == 4
    expected = trained_weights(other)
    for name, weight in trained_weights(one).items():
        assert (weight - expected[name]).abs().max() <= TOLERANCE * max(
            1.0, float(expected[name].abs().max())
        ), name
    for entry, wanted in zip(one.state.log_history, other.state.log_history, strict=True):
        for name in (
            "loss",
            "difficulty",
            "grad_norm",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
        ):
            if name in wanted:
                assert entry[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
        if "num_tokens" in wanted:
            assert entry["num_tokens"] <= wanted["num_tokens"]


@pytest.mark.fault(row=11)
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("path", ["auto", "padded"])
@pytest.mark.parametrize("lora", [False, True])
def test_smaller_passes_make_the_same_updates(
    model_folder: Path,
    tmp_path: Path,
    phase: Phase,
    path: str,
    lora: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    undisturbed = trainer_for(load_model(model_folder), tmp_path, path=path, lora=lora)
    roomy = Scarce(undisturbed.accelerator.unwrap_model(undisturbed.model), 10**9, phase)
    undisturbed.train()
    assert roomy.failures == 0

    trainer = trainer_for(load_model(model_folder), tmp_path, path=path, lora=lora)
    scarce = Scarce(trainer.accelerator.unwrap_model(trainer.model), roomy.largest // 3, phase)
    with caplog.at_level(logging.WARNING, "selective_dpo"):
        trainer.train()
    assert scarce.failures and scarce.largest <= roomy.largest // 3
    equal_trainings(trainer, undisturbed)
    said = [record for record in caplog.records if "out of memory" in record.message]
    assert len(said) == scarce.failures <= 3
    assert "its pairs and their weights stay the same" in said[0].message


@pytest.mark.fault(row=11)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_running_out_in_the_middle_of_an_update_neither_loses_nor_doubles_a_gradient(
    model_folder: Path, tmp_path: Path, phase: Phase
) -> None:
    # The longest pair comes last in its update, when the first batch's gradient is there.
    rows = ragged_rows(PAIRS)
    rows[7] = {**rows[7], "rejected": "-" + 60 * "h"}
    settings: dict[str, Any] = {"rows": rows, "path": "padded"}
    undisturbed = trainer_for(load_model(model_folder), tmp_path, **settings)
    undisturbed.train()
    trainer = trainer_for(load_model(model_folder), tmp_path, **settings)
    batches: list[int] = []
    step = trainer._memory.step
    trainer._memory.step = lambda batch, run: (batches.append(len(batch.pairs)), step(batch, run))[1]  # type: ignore[method-assign]
    lengths = sorted(len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) for row in rows)
    scarce = Scarce(trainer.model, 2 * BATCH * (lengths[-2] + 2), phase)
    trainer.train()
    assert scarce.failures == 1 and batches == [4, 4, 4, 2] * 2
    equal_trainings(trainer, undisturbed)


@pytest.mark.fault(row=11)
def test_adamw_and_clipping_agree_too(model_folder: Path, tmp_path: Path) -> None:
    settings = {"optim": "adamw_torch", "max_grad_norm": 0.5, "learning_rate": 1e-3, "adam_epsilon": 1e-3}
    undisturbed = trainer_for(load_model(model_folder), tmp_path, **settings)
    undisturbed.train()
    trainer = trainer_for(load_model(model_folder), tmp_path, **settings)
    scarce = Scarce(trainer.model, 150, "backward")
    trainer.train()
    assert scarce.failures
    equal_trainings(trainer, undisturbed)


@pytest.mark.fault(row=11)
def test_a_single_pair_that_does_not_fit_is_an_error_with_remedies(
    model_folder: Path, tmp_path: Path
) -> None:
    trainer = trainer_for(load_model(model_folder), tmp_path)
    scarce = Scarce(trainer.model, 20, "forward")
    with pytest.raises(
        ModelError, match=r"1 pair\(s\) of up to \d+ tokens, and there is no smaller one: lower data"
    ) as error:
        trainer.train()
    assert "activation_checkpointing" in str(error.value) and "Tried to allocate" in str(error.value)
    assert scarce.failures <= 4 and trainer.state.global_step == 0


@pytest.mark.fault(row=11)
def test_losses_that_compare_pairs_with_their_batch_are_not_parted(
    model_folder: Path, tmp_path: Path
) -> None:
    trainer = trainer_for(load_model(model_folder), tmp_path, loss_type="aot")
    Scarce(trainer.model, 150, "forward")
    with pytest.raises(
        ModelError, match=r"4 pair\(s\).*lower per_device_train_batch_size and raise gradient_acc"
    ):
        trainer.train()


@pytest.mark.fault(row=11)
def test_other_errors_are_not_taken_for_it(model_folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(load_model(model_folder), tmp_path)

    def fail(*args: Any) -> None:
        raise RuntimeError("the sky falls")

    trainer.model.get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="the sky falls"):
        trainer.train()


# --- the parts of a batch --------------------------------------------------------------------------


def batch_of(lengths: list[tuple[int, int]]) -> PairBatch:
    """Pair p has lengths[p] = (chosen, rejected) tokens, one of them prompt."""
    return PairBatch(
        [
            PairRow({"pair_id": str(100 + place)}, ([1], (chosen - 1) * [2], (rejected - 1) * [3]))
            for place, (chosen, rejected) in enumerate(lengths)
        ]
    )


def test_parts_are_of_similar_length_within_the_limit_and_hold_each_pair_once() -> None:
    batch = batch_of([(3, 4), (9, 2), (3, 3), (4, 4)])
    # 18 tokens: the longest pair, of 2 x 9, is alone; then 18 // (2 * 4) = 2 pairs of 4, and one of 3.
    parts = split_batch(batch, 18)
    assert [part.ids for part in parts] == [["101"], ["100", "103"], ["102"]]
    assert [part.padded_tokens for part in parts] == [2 * 9, 4 * 4, 2 * 3]
    assert [part.weight for part in parts] == [0.25, 0.5, 0.25]
    assert split_batch(batch, None) == [batch] and split_batch(batch, 72)[0] is batch
    assert len(split_batch(batch, 71)) > 1


def test_what_is_not_text_is_not_split() -> None:
    batch = PairBatch([PairRow({"images": []}, None)] * 3)
    assert split_batch(batch, 1) == [batch]


# --- the command line, and for real ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault(row=11)
def test_the_train_stage_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(tmp_path, score={"evaluations": 1}, select={"rule": "all"})
    path = recipe_file(recipe, tmp_path / "recipe.yaml")
    assert main(["curriculum", str(path)]) == 0
    load, scarce = train_module.load_policy, []

    def load_scarce(config: Any) -> Any:
        model = load(config)
        scarce.append(Scarce(model, 100, "backward"))
        return model

    monkeypatch.setattr(train_module, "load_policy", load_scarce)
    with caplog.at_level(logging.WARNING, "selective_dpo"):
        assert main(["train", str(path)]) == 0
    order = json.loads((tmp_path / "runs" / "tiny" / "policy" / "order.json").read_text("utf-8"))
    assert order["matches"] and order["consumed"] == 24
    assert scarce[0].failures and caplog.text.count("out of memory") == scarce[0].failures


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads and limits memory as Linux does")
@pytest.mark.fault(row=11)
def test_a_process_that_is_really_refused_memory_makes_the_same_update(
    tmp_path: Path, server: ForkServer
) -> None:
    def trained(limit: int) -> tuple[dict[str, Any], str]:
        started = server.start("-m", little_memory.MODULE, tmp_path / "facts.json", str(limit))
        _, errors = started.communicate()
        assert started.returncode == 0, errors[-3000:]
        return json.loads((tmp_path / "facts.json").read_text("utf-8")), errors

    whole, _ = trained(0)
    assert whole["most"] is None and whole["used"] > 50 << 20
    limited, said = trained(int(0.6 * whole["used"]))
    assert limited["most"] is not None and "out of memory" in said
    assert limited["used"] < 0.61 * whole["used"]
    assert limited["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    gap = max(abs(a - b) for a, b in zip(limited["weights"], whole["weights"], strict=True))
    assert gap < TOLERANCE
