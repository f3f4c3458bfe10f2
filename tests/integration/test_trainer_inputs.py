"""What `SelectiveDPOTrainer` takes: arguments in TRL's order, rows as scoring takes them, processors."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ProcessorMixin, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from trl import DPOTrainer

from selective_dpo import SelectiveDPOTrainer, build_curriculum, score_difficulty
from selective_dpo.errors import ConfigError
from tests.fixtures.models import LORA, TRAINER
from tests.fixtures.tokenizers import VOCABULARY_SIZE, byte_tokenizer
from tests.fixtures.training import (
    InputSpy,
    chat_rows,
    curriculum_of,
    dpo_config,
    load_model,
    text_rows,
    tokens_of,
)

PAIRS = 6
EASE = [0.3, 0.6, 0.1, 0.5, 0.2, 0.4]
"""Row i's difficulty: the order of ease is 2, 4, 0, 5, 3, 1."""


class TextProcessor(ProcessorMixin):
    """What is left of a vision-language model's processor where there are no images: batches of one text."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        return self.tokenizer([text])


def vision_language_model() -> Any:
    """A tiny random Qwen2.5-VL."""
    text = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def ultrafeedback_rows() -> list[dict[str, Any]]:
    """Text prompts, and whole conversations that begin with them."""
    prompts = [{"prompt": row["prompt"]} for row in text_rows(PAIRS)]
    return [whole | prompt for whole, prompt in zip(chat_rows(PAIRS, implicit=True), prompts, strict=True)]


@pytest.mark.parametrize("path", ["auto", "shared", "padded"])
def test_text_pairs_with_a_vision_language_models_processor(tmp_path: Path, path: Any) -> None:
    rows = text_rows(PAIRS)
    trainer = SelectiveDPOTrainer(
        vision_language_model(),
        args=dpo_config(tmp_path, per_device_train_batch_size=3),
        train_dataset=Dataset.from_list(rows),
        processing_class=TextProcessor(byte_tokenizer(bos=False)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        curriculum=curriculum_of(rows, EASE),
        path=path,
    )
    spy = InputSpy(trainer)
    trainer.train()
    tokens = tokens_of(rows)
    assert spy.pairs(tokens) == [tokens["pair_id"][row] for row in (2, 4, 0)]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("shape", ["text prompt", "prompt given twice"])
def test_what_is_scored_is_trained_on(model_folder: Path, tmp_path: Path, shape: str) -> None:
    rows = ultrafeedback_rows()
    if shape == "prompt given twice":  # as messages, and again at the beginning of both conversations
        rows = [{**row, "prompt": row["chosen"][:-1]} for row in rows]
    data = Dataset.from_list(rows)
    records = score_difficulty(
        model_folder,
        data,
        output_dir=tmp_path / "scoring",
        score={
            "protocol": "custom",
            "seeds": [1],
            "evaluations": 1,
            "min_fold_prompts": 1,
            "lora": LORA,
            "trainer": TRAINER,
        },
        data={"max_length": 64, "max_prompt_length": 32},
        dtype="float32",
    )
    curriculum = build_curriculum(records, {"rule": "all"})
    trainer = SelectiveDPOTrainer(
        load_model(model_folder),
        args=dpo_config(tmp_path / "out"),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        processing_class=byte_tokenizer(bos=False),
        curriculum=curriculum,
    )
    spy = InputSpy(trainer)
    trainer.train()
    # The pairs of the same texts with messages as prompts, which is one id and one sequence of tokens each.
    assert spy.pairs(tokens_of(chat_rows(PAIRS))) == curriculum.order
    assert trainer.evaluate()["eval_loss"] < 0.6931


def test_arguments_have_trls_order(model_folder: Path, tmp_path: Path) -> None:
    names = list(inspect.signature(DPOTrainer.__init__).parameters)
    assert names[1:9] == list(inspect.signature(SelectiveDPOTrainer.__init__).parameters)[1:9]
    rows = text_rows(PAIRS)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    trainer = SelectiveDPOTrainer(
        load_model(model_folder),
        None,
        dpo_config(tmp_path),
        None,
        Dataset.from_list(rows),
        None,
        byte_tokenizer(bos=False),
        None,
        [],
        (optimizer, None),
        None,
        LoraConfig(task_type="CAUSAL_LM", **LORA),
        curriculum=curriculum_of(rows, EASE),
    )
    assert trainer.optimizer is optimizer
    assert trainer.model.peft_config["default"].r == LORA["r"]
    assert len(names) == 1 + 12


@pytest.mark.parametrize("given", ["runs/mine", Path("runs/mine"), None, {"order": []}])
def test_a_curriculum_of_another_type_is_refused_with_what_to_pass(model_folder: Path, given: Any) -> None:
    expected = (
        rf"curriculum is a {type(given).__name__}: pass a Curriculum, .*Curriculum\.load\(FOLDER\) reads it$"
    )
    with pytest.raises(ConfigError, match=expected):
        SelectiveDPOTrainer(
            "no such model", train_dataset=Dataset.from_list(text_rows(PAIRS)), curriculum=given
        )


@pytest.mark.parametrize("path", ["pad", "packed", "", None])
def test_a_misspelt_path_is_refused(model_folder: Path, tmp_path: Path, path: Any) -> None:
    rows = text_rows(PAIRS)
    with pytest.raises(ConfigError, match=rf"^path={path!r} is none of auto, shared, padded$"):
        SelectiveDPOTrainer(
            str(model_folder),
            train_dataset=Dataset.from_list(rows),
            curriculum=curriculum_of(rows, EASE),
            path=path,
        )


def test_no_settings_are_right_on_a_cpu(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = text_rows(PAIRS)
    trainer = SelectiveDPOTrainer(
        str(model_folder), train_dataset=Dataset.from_list(rows), curriculum=curriculum_of(rows, EASE)
    )
    if not torch.accelerator.is_available():
        assert trainer.args.use_cpu and not trainer.args.bf16
        assert trainer.accelerator.mixed_precision == "no"
    trainer.train()
    assert trainer.consumed_order.matches
