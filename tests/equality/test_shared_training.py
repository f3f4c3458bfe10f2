"""Training in shared rows, dealt by length, makes the updates of TRL's plain training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trl import DPOTrainer

from selective_dpo.errors import ConfigError
from selective_dpo.logprobs import packing_support
from selective_dpo.logprobs.rows import forward_fields
from selective_dpo.losses import LOSSES
from selective_dpo.storage.artifacts import read_json
from selective_dpo.training import batching
from selective_dpo.training.batching import PAIRS, PairCollator, weigh_equally
from selective_dpo.training.trainer import PairTrainer, has_reference
from tests.fixtures.families import FAMILIES, tiny_family
from tests.fixtures.fork_server import ForkServer
from tests.fixtures.models import tiny_model_folder
from tests.fixtures.processes import make_trainer, trained_weights
from tests.fixtures.tokenizers import byte_tokenizer
from tests.fixtures.training import curriculum_of, dpo_config, text_rows

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

VOCABULARY = 270
"""The byte tokenizer's, rounded up."""
RELATIVE = 1e-4
"""Of gradients and updates, in float32."""
LENGTHS = [(1, 1, 1), (1, 7, 3), (5, 1, 9), (5, 9, 1), (6, 6, 6), (2, 40, 4), (30, 3, 25), (20, 12, 15)]
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
BLOCKS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGGED = ("loss", "grad_norm", "logps/chosen", "logps/rejected", *BLOCKS)
BY_BATCH = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens")
"""Of TRL's figures these are means over the tokens of a batch, so they depend on who is in it."""


class PlainTrainer(DPOTrainer):
    """TRL's own training, on rows that need no tokenizing."""

    def _prepare_dataset(self, dataset: Any, *others: Any) -> Any:
        return dataset


def model_of(family: str, *, seed: int, **changes: Any) -> Any:
    return tiny_family(family, seed=seed, vocab_size=VOCABULARY, **changes)


def pairs(count: int, *, cached: bool = True, seed: int = 0) -> Dataset:
    """Ragged pairs of tokens, with made-up reference log-probs where `cached`."""
    draw = random.Random(seed)

    def text(length: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(length)]

    rows = []
    for number in range(count):
        prompt, chosen, rejected = LENGTHS[number % len(LENGTHS)]
        row = {
            "pair_id": f"pair{number}",
            "prompt_ids": text(prompt),
            "chosen_ids": text(chosen),
            "rejected_ids": text(rejected),
        }
        if cached:
            row |= {
                "ref_chosen_logps": -5.0 * chosen - draw.random(),
                "ref_rejected_logps": -5.0 * rejected - draw.random(),
            }
        rows.append(row)
    return Dataset.from_list(rows)


def trainer_of(
    kind: type[PlainTrainer],
    folder: Path,
    data: Dataset,
    *,
    family: str = "qwen2",
    lora: bool = False,
    ref_model: Any = None,
    eval_dataset: Dataset | None = None,
    extra: dict[str, Any] | None = None,
    model: Any = None,
    **settings: Any,
) -> Any:
    """Plain gradient descent, so that weights move as far as gradients say."""
    settings = {"learning_rate": 1e-2, "optim": "sgd", "beta": 0.05, "max_grad_norm": 0.0, **settings}
    args = dpo_config(folder, lr_scheduler_type="constant", **settings)
    model = model or model_of(family, seed=1)
    torch.manual_seed(3)  # of the adapter
    precompute = has_reference(data) and kind is PlainTrainer
    if precompute:
        ref_model = model_of(family, seed=2)  # never called: the columns are the reference
    trainer = kind(
        model,
        ref_model if not (lora and precompute) else None,
        args=args,
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=byte_tokenizer(bos=False),
        peft_config=LoraConfig(**LORA) if lora else None,
        **(extra or {}),
    )
    if precompute:
        trainer.precompute_ref_logps = True
    return trainer


def update_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Trains; how far each trained weight has moved."""
    before = {name: weight.detach().clone() for name, weight in trained(trainer)}
    trainer.train()
    return {name: weight.detach() - before[name] for name, weight in trained(trainer)}


def trained(trainer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad)


def assert_same_update(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == plain.keys()
    both = [torch.cat([each[name].flatten() for name in ours]) for each in (ours, plain)]
    assert both[1].norm() > 0
    assert float((both[0] - both[1]).norm() / both[1].norm()) < RELATIVE


def logs(trainer: Any, names: tuple[str, ...] = LOGGED) -> list[list[float]]:
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs in each pass that shared rows were really computed in."""
    counted: list[int] = []

    def counting(model: Any, rows: Any) -> Any:
        counted.extend(len(group.input_ids) for group in rows.groups if group.parts is not None)
        return forward_fields(model, rows)

    monkeypatch.setattr(batching, "forward_fields", counting)
    return counted


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_update_and_its_log_equal_trls(
    family: str, lora: bool, tmp_path: Path, forwards: list[int]
) -> None:
    settings: dict[str, Any] = {"family": family, "lora": lora, "per_device_train_batch_size": 8}
    plain = trainer_of(PlainTrainer, tmp_path / "plain", pairs(8), **settings)
    ours = trainer_of(PairTrainer, tmp_path / "ours", pairs(8), **settings)
    assert_same_update(update_of(ours), update_of(plain))
    assert forwards == [8]
    # One batch an update: every figure that TRL logs is the same, those of single tokens included.
    names = (*LOGGED, *BY_BATCH)
    np.testing.assert_allclose(logs(ours, names), logs(plain, names), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["plain", "checkpointing", "reentrant checkpointing"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_accumulated_updates_equal_trls(
    settings: dict[str, Any], lora: bool, tmp_path: Path, forwards: list[int]
) -> None:
    every = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "lora": lora, **settings}
    plain = trainer_of(PlainTrainer, tmp_path / "plain", pairs(16), **every)
    ours = trainer_of(PairTrainer, tmp_path / "ours", pairs(16), **every)
    assert_same_update(update_of(ours), update_of(plain))
    assert ours.state.global_step == 2 and forwards == 8 * [2]
    np.testing.assert_allclose(logs(ours), logs(plain), rtol=1e-5, atol=1e-5)


def test_a_batch_in_several_passes_equals_one(
    tmp_path: Path, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a CPU takes batches of very different lengths; here another pass is worth one token of padding.
    monkeypatch.setattr(packing_support, "WORTH_A_PASS", 0)
    plain = trainer_of(PlainTrainer, tmp_path / "plain", pairs(8), per_device_train_batch_size=8)
    ours = trainer_of(PairTrainer, tmp_path / "ours", pairs(8), per_device_train_batch_size=8)
    assert_same_update(update_of(ours), update_of(plain))
    # Rows of 56, 45, 44, 16, 13, 13, 9 and 1 tokens: two are equally long.
    assert forwards == [1, 1, 1, 1, 2, 1, 1]
    names = (*LOGGED, *BY_BATCH)
    np.testing.assert_allclose(logs(ours, names), logs(plain, names), rtol=1e-5, atol=1e-5)


def test_an_uneven_last_update_is_the_mean_over_its_pairs(tmp_path: Path) -> None:
    # 13 pairs in updates of 2 x 4: the last one has 4 + 1. TRL in one batch of 5 is their mean.
    every: dict[str, Any] = {"learning_rate": 1e-3}
    ours = trainer_of(
        PairTrainer,
        tmp_path / "ours",
        pairs(13),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **every,
    )
    plain = trainer_of(PlainTrainer, tmp_path / "plain", pairs(13), per_device_train_batch_size=8, **every)
    assert_same_update(update_of(ours), update_of(plain))
    np.testing.assert_allclose(logs(ours), logs(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_live_reference_goes_through_shared_rows_too(
    lora: bool, tmp_path: Path, forwards: list[int]
) -> None:
    data = pairs(8, cached=False)
    every: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "lora": lora}
    found = []
    for kind in (PairTrainer, PlainTrainer):
        reference = None if lora else model_of("qwen2", seed=2)
        trainer = trainer_of(kind, tmp_path / kind.__name__, data, ref_model=reference, **every)
        found.append((update_of(trainer), logs(trainer)))
        assert not trainer.precompute_ref_logps
    assert forwards == 8 * [4]  # four batches, policy and reference
    assert_same_update(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (["sigmoid", "sft"], {"loss_weights": [1.0, 0.3]}),
        ("sigmoid", {"f_divergence_type": "js_divergence"}),
        ("sigmoid", {"use_weighting": True}),
    ],
)
def test_joined_and_changed_losses_equal_trls(
    loss: Any, settings: dict[str, Any], tmp_path: Path, forwards: list[int]
) -> None:
    every = {
        "loss_type": loss,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        **settings,
    }
    plain = trainer_of(PlainTrainer, tmp_path / "plain", pairs(8), **every)
    ours = trainer_of(PairTrainer, tmp_path / "ours", pairs(8), **every)
    assert_same_update(update_of(ours), update_of(plain))
    assert forwards == [4, 4]
    np.testing.assert_allclose(logs(ours), logs(plain), rtol=1e-5, atol=1e-5)


def test_length_desensitisation_with_a_live_reference_equals_trls(
    tmp_path: Path, forwards: list[int]
) -> None:
    data = pairs(8, cached=False)
    found = []
    for kind in (PairTrainer, PlainTrainer):
        reference = model_of("qwen2", seed=2)
        trainer = trainer_of(
            kind,
            tmp_path / kind.__name__,
            data,
            ref_model=reference,
            ld_alpha=0.3,
            per_device_train_batch_size=8,
        )
        found.append((update_of(trainer), logs(trainer)))
    assert forwards == [8, 8]
    assert_same_update(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_evaluation_in_shared_rows_equals_trls(tmp_path: Path, forwards: list[int]) -> None:
    found = []
    for kind in (PairTrainer, PlainTrainer):
        trainer = trainer_of(
            kind,
            tmp_path / kind.__name__,
            pairs(4),
            eval_dataset=pairs(7, seed=5),
            per_device_eval_batch_size=3,
        )
        measured = trainer.evaluate()
        found.append([measured[f"eval_{name}"] for name in ("loss", *BLOCKS, *BY_BATCH)])
    assert forwards == [3, 3, 1]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_completions_cut_at_the_end_equal_trls(tmp_path: Path, forwards: list[int]) -> None:
    every: dict[str, Any] = {"max_length": 33, "per_device_train_batch_size": 8}
    plain = trainer_of(PlainTrainer, tmp_path / "plain", pairs(8), **every)
    ours = trainer_of(PairTrainer, tmp_path / "ours", pairs(8), **every)
    assert_same_update(update_of(ours), update_of(plain))
    assert forwards == [8]


@pytest.mark.filterwarnings("ignore:.*keep_end.*")
def test_rows_cut_at_the_beginning_have_no_common_prompt_and_stay_padded(
    tmp_path: Path, forwards: list[int]
) -> None:
    every: dict[str, Any] = {
        "max_length": 20,
        "truncation_mode": "keep_end",
        "per_device_train_batch_size": 8,
    }
    plain = trainer_of(PlainTrainer, tmp_path / "plain", pairs(8), **every)
    ours = trainer_of(PairTrainer, tmp_path / "ours", pairs(8), **every)
    assert_same_update(update_of(ours), update_of(plain))
    assert forwards == []


def test_what_rules_shared_rows_out_is_said(
    tmp_path: Path, forwards: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    packing_support.say_once.cache_clear()
    # A window of 20 tokens cuts the longest pair, of 55.
    windowed = {"model": model_of("mistral", seed=1, sliding_window=20)}
    trainer_of(PairTrainer, tmp_path / "window", pairs(8), **windowed, max_steps=1).train()
    assert "attention is limited to 20 tokens" in capsys.readouterr().err
    trainer_of(PairTrainer, tmp_path / "padded", pairs(8), extra={"path": "padded"}, max_steps=1).train()
    dropping = {"lora": True, "disable_dropout": False, "max_steps": 1}
    trainer = trainer_of(PairTrainer, tmp_path / "dropout", pairs(8), **dropping)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    dropout = torch.nn.Dropout(0.1)
    trainer.model.add_module("some_dropout", dropout)
    trainer.train()
    assert "dropout is on" in capsys.readouterr().err
    assert forwards == []
    asked = trainer_of(PairTrainer, tmp_path / "asked", pairs(8), extra={"path": "shared"}, max_steps=1)
    asked.model.add_module("some_dropout", dropout)
    with pytest.raises(ConfigError, match=r"dropout is on.*leave path out"):
        asked.train()
    windowed = {"model": model_of("mistral", seed=1, sliding_window=20), "extra": {"path": "shared"}}
    asked = trainer_of(PairTrainer, tmp_path / "asked", pairs(8), **windowed, max_steps=1)
    with pytest.raises(ConfigError, match=r"limited to 20 tokens.*leave path out"):
        asked.train()


@pytest.mark.parametrize("disabled", [True, False])
def test_attention_dropout_is_disabled_with_the_rest_or_rules_shared_rows_out(
    disabled: bool, tmp_path: Path, forwards: list[int]
) -> None:
    # Half of all attention is dropped, if any; without, training is that of a model that knows no dropout.
    every: dict[str, Any] = {"per_device_train_batch_size": 8, "disable_dropout": disabled}
    model = model_of("qwen2", seed=1, attention_dropout=0.5)
    dropping = trainer_of(PairTrainer, tmp_path / "dropping", pairs(8), model=model, **every)
    plain = trainer_of(PlainTrainer, tmp_path / "plain", pairs(8), **every)
    updates = [update_of(trainer) for trainer in (dropping, plain)]
    if disabled:
        assert_same_update(*updates)
        assert forwards == [8]
        assert model.config.attention_dropout == 0.5  # what is saved is the model that came
    else:
        with pytest.raises(AssertionError):
            assert_same_update(*updates)
        assert forwards == []


def test_dropout_is_disabled_in_the_reference_too(tmp_path: Path) -> None:
    reference = model_of("qwen2", seed=2, attention_dropout=0.5).train()
    found = []
    for each in (reference, model_of("qwen2", seed=2)):
        data = pairs(8, cached=False)
        trainer = trainer_of(PairTrainer, tmp_path, data, ref_model=each, per_device_train_batch_size=8)
        trainer.train()
        found.append(logs(trainer))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_batch_with_blank_pairs_is_that_of_its_own(loss: str, tmp_path: Path) -> None:
    # As on the second of two processes: its batch of 3 has the update's last pair and 2 repeated ones.
    settings: dict[str, Any] = {"loss_type": loss, "label_smoothing": 0.1}
    trainer = trainer_of(PairTrainer, tmp_path, pairs(4), **settings)
    collator = PairCollator(128, "keep_start", has_tokens=True)
    batch, alone = (collator([pairs(8)[row] for row in rows])[PAIRS] for rows in ((7, 0, 1), (7,)))
    trainer.model.train()
    (batch,) = weigh_equally([batch], first=0, pairs=4, batch_size=3, processes=2, process=1)
    with torch.no_grad():
        own, weighed = (float(trainer.compute_loss(trainer.model, {PAIRS: each})) for each in (alone, batch))
    # The step divides by two processes, and in the update's mean each of its 4 pairs counts a quarter.
    assert weighed / 2 == pytest.approx(own / 4, rel=1e-4, abs=1e-5)


def test_attention_that_a_cpu_cannot_train_is_refused(tmp_path: Path) -> None:
    model = model_of("qwen2", seed=1, attention="flex_attention")
    with pytest.raises(ConfigError, match=r"flex_attention cannot be trained on a CPU: use sdpa"):
        trainer_of(PairTrainer, tmp_path, pairs(2), model=model)


@pytest.mark.slow
def test_two_processes_that_share_rows_train_as_one_with_padded_rows(
    tmp_path: Path, server: ForkServer
) -> None:
    # 13 pairs, updates of 8: two processes deal rounds of 2 + 2, and the last update blanks three pairs.
    rows = text_rows(13)
    tiny_model_folder(tmp_path / "model")
    curriculum_of(rows, [float(place) for place in range(13)], rule="all").save(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    every = {
        "lora": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "num_train_epochs": 2,
        "activation_checkpointing": True,
        "loss_type": ["sigmoid", "sppo_hard"],
        "loss_weights": [1.0, 0.01],
    }
    two = {**every, "path": "shared", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ended = server.run_ranks(2, "-m", "tests.fixtures.processes", tmp_path, json.dumps(two))
    assert [each.code for each in ended] == [0, 0], ended
    # Several rows a batch on the one side, and on the other all pairs of an update in one.
    one = make_trainer(tmp_path, {**every, "path": "padded", "per_device_train_batch_size": 8})
    before = {name: weight.clone() for name, weight in trained_weights(one).items()}
    one.train()
    after, found = trained_weights(one), load_file(tmp_path / "trained.safetensors")
    moved = [{name: weights[name] - before[name] for name in before} for weights in (found, after)]
    assert_same_update(*moved)
    facts = read_json(tmp_path / "order.json")
    assert facts["matches"] and facts["consumed"] == 26 and facts["repeated_to_fill"] == 2 * 3
    assert facts["consumed_digest"] == one.consumed_order.consumed_digest
    logged = [entry for entry in facts["log_history"] if "loss" in entry]
    # Updates of pairs 0 ... 7 and 8 ... 12.
    assert [entry["difficulty"] for entry in logged] == pytest.approx([3.5, 10.0] * 2)
    expected = [entry for entry in one.state.log_history if "loss" in entry]
    for name in LOGGED:
        assert [entry[name] for entry in logged] == pytest.approx(
            [entry[name] for entry in expected], rel=1e-4, abs=1e-5
        ), name
