"""A plan's arithmetic: batches, padded tokens, FLOPs and bytes, against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.config import ModelConfig
from selective_dpo.data.store import PairsSummary
from selective_dpo.errors import ConfigError
from selective_dpo.logprobs.packing_support import RowLayout as RowPath
from selective_dpo.logprobs.padded import PartLengths
from selective_dpo.run.planning.architecture import (
    Architecture,
    adapter_parameters,
    architecture_of,
    build_on_meta,
)
from selective_dpo.run.planning.batches import (
    Epoch,
    Work,
    epoch_batches,
    expected_longest,
    optimizer_steps,
    random_work,
    sequential_work,
)
from selective_dpo.run.planning.costs import (
    forward_flops,
    generation_memory,
    inference_memory,
    saved_bytes,
    training_flops,
    training_memory,
)
from selective_dpo.run.planning.device import measured_rate, this_device
from selective_dpo.run.planning.forwarding import Forwarding
from selective_dpo.run.planning.inputs import KeptPairs
from selective_dpo.run.planning.settings import training_settings
from selective_dpo.run.planning.words import readable, readable_bytes, readable_time
from tests.fixtures.models import LORA, tiny_model_folder

# 100 parameters of which 20 are looked up only; 2 layers, attention 4 wide.
SIZES = Architecture(100, 20, 2, 8, 4, 2, 2, 10)
PATHS: tuple[Literal["padded"], Literal["shared"]] = ("padded", "shared")
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=7)


def lengths(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def settings(dtype: str = "float32", **given: Any) -> Any:
    model = ModelConfig.model_validate({"path": "m", "dtype": dtype})
    return training_settings({"per_device_train_batch_size": 1, **given}, model)


@given(values=LENGTHS, size=st.integers(1, 7))
def test_expected_longest_is_the_mean_over_all_subsets(values: list[int], size: int) -> None:
    size = min(size, len(values))
    subsets = [max(subset) for subset in itertools.combinations(values, size)]
    assert math.isclose(expected_longest(lengths(*values), size), sum(subsets) / len(subsets))


def test_one_process_ends_with_a_smaller_batch_and_several_fill_it() -> None:
    assert epoch_batches(10, 4, 1) == Epoch(2, 2)
    assert epoch_batches(8, 4, 1) == Epoch(2, 0)
    # 3 batches for 2 processes: 2 rounds, 4 batches, all full.
    assert epoch_batches(10, 4, 2) == Epoch(4, 0)


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
    found = optimizer_steps(
        pairs, pairs_per_batch=batch, accumulation=accumulation, processes=processes, epochs=epochs
    )
    assert found == steps


def test_work_in_a_known_order() -> None:
    # Batches (5, 3) and (7): 2 pairs are 4 rows of 5, 1 pair is 2 rows of 7.
    assert sequential_work(lengths(5, 3, 7), 2, 1) == Work(4 * 5 + 2 * 7, 4 * 25 + 2 * 49)
    # Two processes: (5, 3), (7, 5 again).
    assert sequential_work(lengths(5, 3, 7), 2, 2) == Work(4 * 5 + 4 * 7, 4 * 25 + 4 * 49)


def test_work_in_a_random_order_is_the_mean_over_orders() -> None:
    values = (5, 3, 7)
    every = [sequential_work(lengths(*order), 2, 1) for order in itertools.permutations(values)]
    found = random_work(lengths(*values), 3, 2, 1)
    assert math.isclose(found.tokens, sum(work.tokens for work in every) / 6)
    assert math.isclose(found.squares, sum(work.squares for work in every) / 6)


def test_work_of_a_random_half_is_the_mean_over_halves() -> None:
    values = (5, 3, 7, 2)
    every = [sequential_work(lengths(*order), 2, 1) for order in itertools.permutations(values, 2)]
    assert math.isclose(random_work(lengths(*values), 2, 2, 1).tokens, sum(w.tokens for w in every) / 12)


def test_work_within_a_token_budget() -> None:
    # Padded: 28 tokens have room for 2 pairs as long as the longest (4 x 7 = 28): (7, 5), then (3).
    # Shared, without the completions' last tokens: rows of 3 + 3 + 3, 1 + 3 + 3 and 1 + 1 + 1 tokens; 28
    # tokens have room for 3 of the longest (3 x 9 = 27).
    summary = PairsSummary(3, 3, 1, {"kept": 3}, {}, 3, 0, 0, 0, 0, 0, "", "")
    parts = PartLengths(lengths(1, 1, 3), lengths(4, 2, 4), lengths(4, 2, 4))
    pairs = KeptPairs(summary, ["a", "b", "c"], ["p"] * 3, parts)
    padded, shared = (Forwarding(RowPath(name, ""), None) for name in PATHS)
    assert padded.work(pairs, 28) == Work(4 * 7 + 2 * 3, 4 * 49 + 2 * 9)
    assert shared.work(pairs, 28) == Work(3 * 9, 3 * 81)
    assert shared.work(pairs.rows(np.array([1])), 28) == Work(3, 9)
    # On a GPU the 9 become 16.
    assert shared._replace(device="cuda").work(pairs, 28) == Work(3 * 16, 3 * 256)
    assert pairs.longest_row(1) == 9
    assert pairs.longest_row(2) == 7


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
    flat = inference_memory(
        SIZES, adapter=0, dtype="float32", compute_dtype="float32", eager=False, rows=2, longest=10
    )
    eager = inference_memory(
        SIZES, adapter=0, dtype="float32", compute_dtype="float32", eager=True, rows=2, longest=10
    )
    # Written-out attention: 5 bytes x 2 heads x 2 rows x 10 x 10.
    assert eager.activations - flat.activations == 5 * 2 * 2 * 100
    answers = generation_memory(SIZES, adapter=0, dtype="bfloat16", rows=3, longest=10)
    # Keys and values of 2 layers, 2 wide, 2 bytes; logits of 10 words in float32.
    assert answers.total == 200 + 2 * 2 * 3 * 10 * 2 * 2 + 3 * 10 * 4
    assert saved_bytes(SIZES, adapter=5, dtype="bfloat16") == 20
    assert saved_bytes(SIZES, adapter=0, dtype="bfloat16") == 200


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


def test_the_rate_is_measured_on_this_machine() -> None:
    device = this_device()
    assert device.number >= 1
    assert device.memory > 0
    assert 1e8 < measured_rate(device, "float32") < 1e18


def test_quantities_read_well() -> None:
    assert readable(1234, "FLOP") == "1.23 kFLOP"
    assert readable(5.5e19, "") == "55 E"
    assert readable(None, "FLOP") == "unknown"
    assert readable_bytes(3 * 2**30) == "3 GiB"
    assert readable_bytes(512) == "0.5 KiB"
    assert readable_time(90) == "90 s"
    assert readable_time(7200) == "2 h"
    assert readable_time(0.25) == "0.25 s"
