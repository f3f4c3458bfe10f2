from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.logprobs.compute import pair_logps
from selective_dpo.logprobs.rows import make_rows, part_lengths
from tests.fixtures.by_hand import sequence_logp
from tests.fixtures.models import tiny_model_folder
from tests.fixtures.tokenizers import END_ID, PAD_ID

ROWS = [
    {"pair_id": "a", "prompt_ids": [5], "chosen_ids": [7, 8, END_ID], "rejected_ids": [END_ID]},
    {"pair_id": "b", "prompt_ids": [5, 6, 7, 8], "chosen_ids": [9], "rejected_ids": [PAD_ID, END_ID]},
    {"pair_id": "c", "prompt_ids": [65, 66], "chosen_ids": [67] * 20, "rejected_ids": [68, 69, END_ID]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), "llama")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def measure(model: Any, **changes: Any) -> Any:
    settings = {"tokens_per_batch": 1000, "pad_token_id": PAD_ID, "autocast_dtype": None, "what": "test"}
    return pair_logps(model, Dataset.from_list(ROWS), **{**settings, **changes})


def test_a_batch_holds_chosen_then_rejected_and_labels_completions_only() -> None:
    rows = {name: [row[name] for row in ROWS[:2]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    batch = make_rows(rows, "masked", PAD_ID)
    pad = PAD_ID
    assert batch.input_ids.tolist() == [
        [5, 7, 8, pad, pad],
        [5, 6, 7, 8, pad],
        [5, pad, pad, pad, pad],
        [5, 6, 7, 8, pad],
    ]
    # A padding token inside a completion is one of its tokens.
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
    ]
    assert batch.labels_N.tolist() == [7, 8, END_ID, 9, END_ID, pad, END_ID]


def test_lengths_are_those_of_the_longer_side() -> None:
    assert part_lengths(Dataset.from_list(ROWS)).padded_P.tolist() == [1 + 3, 4 + 2, 2 + 20]


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 1000])
def test_log_probs_equal_those_of_single_sequences(folder: Path, tokens_per_batch: int) -> None:
    model = load(folder)
    add_fused_lm_head(model)
    found = measure(model, tokens_per_batch=tokens_per_batch)
    assert found.pair_ids == ["a", "b", "c"]
    truth = load(folder).double()
    for side, column in (("chosen_ids", found.chosen_P), ("rejected_ids", found.rejected_P)):
        wanted = [sequence_logp(truth, row["prompt_ids"], row[side]) for row in ROWS]
        np.testing.assert_allclose(column, wanted, rtol=3e-7, atol=1e-5)


def test_the_models_mode_and_gradients_are_left_as_they_were(folder: Path) -> None:
    model = load(folder)
    add_fused_lm_head(model)
    for is_training in (True, False):
        model.train(is_training)
        measure(model)
        assert model.training is is_training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_measuring_draws_no_random_numbers(folder: Path) -> None:
    model = load(folder)
    add_fused_lm_head(model)
    before = torch.random.get_rng_state()
    measure(model.train())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_mode_is_restored_after_an_error(folder: Path) -> None:
    model = load(folder).train()
    unknown = [{"pair_id": "a", "prompt_ids": [5], "chosen_ids": [10**6, 1], "rejected_ids": [1]}]
    with pytest.raises(IndexError):
        pair_logps(
            model,
            Dataset.from_list(unknown),
            tokens_per_batch=10,
            pad_token_id=PAD_ID,
            autocast_dtype=None,
            what="test",
        )
    assert model.training


def test_autocast_runs_the_forward_in_the_lower_precision(folder: Path) -> None:
    model = load(folder)
    add_fused_lm_head(model)
    full, low = measure(model), measure(model, autocast_dtype=torch.bfloat16)
    # bfloat16 has 8 bits of mantissa: close, and not the same.
    np.testing.assert_allclose(low.chosen_P, full.chosen_P, rtol=0.05)
    assert (low.chosen_P != full.chosen_P).any()
