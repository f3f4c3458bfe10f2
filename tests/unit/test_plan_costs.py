"""A plan's arithmetic: updates, padded tokens, FLOPs and bytes, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selective_dpo.config import ModelConfig
from selective_dpo.errors import ConfigError
from selective_dpo.run.costs import (
    Architecture,
    Models,
    Work,
    adapter_parameters,
    architecture_of,
    build_on_meta,
    fits,
    forward_flops,
    forward_work,
    job_memory,
    layer_bytes,
    measured_rate,
    optimizer_steps,
    readable,
    readable_bytes,
    readable_time,
    this_device,
    training_flops,
    training_memory,
    training_settings,
    training_work,
)
from tests.fixtures.models import LORA, tiny_model_folder, tiny_recipe

# 100 parameters of which 20 are looked up only; 2 layers, 8 wide, attention 4 wide, 2 heads, 10 words.
SIZES = Architecture(100, 20, 2, 8, 4, 2, 2, 10)


def lengths(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def settings(dtype: str = "float32", **given: Any) -> Any:
    model = ModelConfig.model_validate({"path": "m", "dtype": dtype})
    return training_settings({"per_device_train_batch_size": 1, **given}, model)


@pytest.mark.parametrize(
    ("pairs", "batch", "accumulation", "processes", "epochs", "steps"),
    [
        (10, 4, 1, 1, 1, 3),
        (10, 4, 2, 1, 1, 2),  # batches 4 4 | 2
        (10, 4, 2, 1, 3, 6),  # an epoch's last update does not wait for the next epoch
        (10, 4, 1, 2, 1, 2),
        (10, 4, 8, 1, 1, 1),
        (10, 4, 1, 1, 0.5, 2),  # half of three, upwards
    ],
)
def test_optimizer_steps(
    pairs: int, batch: int, accumulation: int, processes: int, epochs: float, steps: int
) -> None:
    given = settings(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=epochs
    )
    assert optimizer_steps(pairs, given, processes) == steps


def test_work_of_a_training_in_the_given_order() -> None:
    one = settings(per_device_train_batch_size=2)
    # Batches (5, 3) and (7): 2 pairs are 4 rows of 5, 1 pair is 2 rows of 7.
    assert training_work(lengths(5, 3, 7), 2, one) == Work(4 * 5 + 2 * 7, 4 * 25 + 2 * 49)
    # A row a pair.
    assert training_work(lengths(5, 3, 7), 1, one) == Work(2 * 5 + 7, 2 * 25 + 49)
    # Updates of two batches are sorted by length: (9, 6), (5, 2) and (7).
    two = settings(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert training_work(lengths(2, 9, 6, 5, 7), 1, two).tokens == 2 * 9 + 2 * 5 + 7


def test_work_of_a_forward_pass_within_a_token_budget() -> None:
    # 28 tokens hold 2 pairs as long as the longest (4 x 7 = 28): (7, 5), then (3).
    assert forward_work(lengths(3, 7, 5), 2, 28) == Work(4 * 7 + 2 * 3, 4 * 49 + 2 * 9)
    # A row a pair: 4 would fit.
    assert forward_work(lengths(3, 7, 5), 1, 28) == Work(3 * 7, 3 * 49)
    # A pair that exceeds the budget is a batch of its own.
    assert forward_work(lengths(3, 7), 1, 5) == Work(7 + 3, 49 + 9)


def test_forward_flops_count_matrices_and_attention() -> None:
    # 2 x 80 parameters x 10 tokens; 4 x 2 layers x 4 wide x 50.
    assert forward_flops(SIZES, Work(10, 50)) == 1600 + 1600
    # 5 more parameters.
    assert forward_flops(SIZES, Work(10, 50), adapter=5) == 1700 + 1600


def test_training_flops() -> None:
    work = Work(10, 50)
    assert training_flops(SIZES, work, adapter=0, recomputes=False) == 3 * 3200
    assert training_flops(SIZES, work, adapter=0, recomputes=True) == 4 * 3200
    # Base weights forward and for the gradient of their inputs; adapter and attention three times.
    lora = 2 * 1600 + 3 * 100 + 3 * 1600
    assert training_flops(SIZES, work, adapter=5, recomputes=False) == lora
    assert training_flops(SIZES, work, adapter=5, recomputes=True) == lora + 3300


def test_sizes_of_a_real_model_and_adapter(tmp_path: Path) -> None:
    config = ModelConfig(path=str(tiny_model_folder(tmp_path / "model")))
    sizes = architecture_of(build_on_meta(config))
    # Hidden 16, key and value width 8, inner 32: q 16x16+16, k and v 16x8+8, o 16x16, gate, up and down
    # 16x32, two norms; 2 layers, a norm, embedding and head of 260 rows.
    layer = (256 + 16) + 2 * (128 + 8) + 256 + 3 * 512 + 2 * 16
    assert sizes == Architecture(2 * layer + 16 + 2 * 260 * 16, 260 * 16, 2, 16, 16, 8, 2, 260)
    # Rank 4 on the seven matrices of both layers: 4 x (inputs + outputs).
    adapter = 2 * 4 * ((16 + 16) + 2 * (16 + 8) + (16 + 16) + 2 * (16 + 32) + (32 + 16))
    assert adapter_parameters(build_on_meta(config), LORA, "score.lora") == adapter
    assert adapter_parameters(build_on_meta(config), None, "score.lora") == 0
    with pytest.raises(ConfigError, match=r"^score\.lora does not fit the model: Target modules"):
        adapter_parameters(build_on_meta(config), {"target_modules": ["nope"]}, "score.lora")


def test_memory_of_full_fine_tuning() -> None:
    def memory(trained: Any, dtype: str, processes: int = 1) -> Any:
        return training_memory(
            SIZES,
            trained,
            adapter=0,
            dtype=dtype,
            eager=False,
            rows_per_pair=2,
            longest=10,
            processes=processes,
        )

    plain = settings(activation_checkpointing=False)
    # 2 rows x 10 tokens x 8 wide x 17 values x 4 bytes, in 2 layers.
    assert memory(plain, "float32") == (400, 400, 800, 2 * 2 * 10 * 8 * 17 * 4)
    kept = settings(activation_checkpointing=True)
    # One layer, and the input of each.
    assert memory(kept, "float32").activations == 2 * 10 * 8 * 17 * 4 + 2 * 2 * 10 * 8 * 4
    assert memory(settings(optim="adamw_bnb_8bit"), "float32").optimizer == 200
    assert memory(settings("bfloat16", optim="paged_adamw_32bit"), "bfloat16")[:3] == (200, 200, 800)
    # ZeRO-2: a float32 copy, two states; these and gradients divided by 4.
    deepspeed = {"zero_optimization": {"stage": 2}}
    sharded = settings("bfloat16", deepspeed=deepspeed)
    assert memory(sharded, "bfloat16", 4)[:3] == (200, 200 / 4, 100 * (8 + 4) / 4)
    everything = settings("bfloat16", deepspeed={"zero_optimization": {"stage": 3}})
    assert memory(everything, "bfloat16", 4).weights == 200 / 4
    # Outside of DeepSpeed: weights, gradients and two states of 4 bytes, and a copy of 2 to compute with.
    assert memory(settings("bfloat16"), "float32")[:3] == (100 * (4 + 2), 400, 800)
    unread = settings("bfloat16", deepspeed="zero.json")
    assert unread.unread == "the sharding in zero.json"
    assert memory(unread, "bfloat16", 4).weights == 200


def test_memory_with_an_adapter_and_without_training() -> None:
    trained = training_memory(
        SIZES,
        settings("bfloat16"),
        adapter=5,
        dtype="bfloat16",
        eager=True,
        rows_per_pair=1,
        longest=10,
        processes=1,
    )
    # One row of 10 tokens, 8 wide: the inputs of 2 layers, 2 bytes each; one layer's 17 values, and 5 bytes
    # for each of 2 heads' 100 scores.
    assert trained.activations == 2 * 10 * 8 * 2 + 10 * 8 * 17 * 2 + 5 * 2 * 100
    # The adapter is float32: 5 x 4 weights, as many gradients, twice as many states.
    assert trained[:3] == (200 + 20, 20, 40)
    flat, eager = (layer_bytes(SIZES, 2, 10, "float32", eager=eager) for eager in (False, True))
    # Eager attention: 5 bytes x 2 heads x 2 rows x 10 x 10.
    assert (flat, eager - flat) == (17 * 4 * 2 * 10 * 8, 5 * 2 * 2 * 100)


def test_memory_of_each_kind_of_job(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, evaluate={"generation": {"prompts": 3, "batch_size": 3}})
    models = Models(SIZES, scorer_adapter=5, policy_adapter=7, rows_per_pair=1)
    # float32; 512 tokens a batch are 51 rows of 10, one layer at a time.
    forward = 17 * 4 * 51 * 10 * 8
    assert job_memory(recipe, models, "reference", 10) == (400, 0, 0, forward)
    # Keys and values of 2 layers, 2 wide, for 3 rows of 10 tokens; logits of 10 words in float32.
    answers = 2 * 2 * 3 * 10 * 2 * 4 + 3 * 10 * 4
    assert job_memory(recipe, models, "answers", 10) == (400 + 7 * 4, 0, 0, answers)
    # Training keeps both layers of 4 rows; a scorer also measures, which takes more here.
    trained = 2 * 17 * 4 * 4 * 10 * 8
    assert job_memory(recipe, models, "policy", 10) == (428, 28, 56, trained)
    assert job_memory(recipe, models, "scorer", 10) == (420, 20, 40, forward)
    # Without lengths: rows of twice max_length, 64.
    assert job_memory(recipe, models, "policy").activations == 2 * 17 * 4 * 4 * 128 * 8


def test_settings_are_those_that_trl_would_use() -> None:
    found = settings("bfloat16")
    # TRL's own batch is given above; the original's beta and epochs; checkpointing is TRL's default.
    assert (found.accumulation, found.epochs, found.beta, found.recomputes) == (1, 1.0, 0.01, True)
    assert (found.compute_dtype, found.shards) == ("bfloat16", "")
    assert not settings(gradient_checkpointing=False).recomputes
    assert settings(gradient_checkpointing=False, activation_checkpointing=True).recomputes
    assert settings(bf16=True).compute_dtype == "bfloat16"
    assert settings("bfloat16", fp16=True).compute_dtype == "float16"
    assert settings(fsdp="full_shard").shards == "weights"


def test_the_speed_of_the_model_is_measured(tmp_path: Path) -> None:
    config = ModelConfig(path=str(tiny_model_folder(tmp_path / "model")), dtype="float32")
    sizes, device = architecture_of(build_on_meta(config)), this_device()
    assert device.number >= 1 and device.memory > 0
    assert fits(config, sizes, device)
    assert not fits(config, sizes, device._replace(memory=2 * sizes.parameters * 4 - 1))
    assert not fits(config.model_copy(update={"path": "some/model-of-the-hub"}), sizes, device)
    for dtype in ("float32", "bfloat16"):
        assert 1e6 < measured_rate(config, sizes, device, longest=8, compute_dtype=dtype) < 1e18


def test_quantities_read_well() -> None:
    assert readable(1234, "FLOP") == "1.23 kFLOP"
    assert readable(5.5e19, "") == "55 E"
    assert readable(None, "FLOP") == "unknown"
    assert readable_bytes(3 * 2**30) == "3 GiB"
    assert readable_bytes(512) == "0.5 KiB"
    assert readable_time(90) == "90 s"
    assert readable_time(7200) == "2 h"
    assert readable_time(0.25) == "0.25 s"
