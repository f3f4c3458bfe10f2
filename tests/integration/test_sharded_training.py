"""Weights that are spread over two processes for real: scorers and policy come out whole, as without."""

from __future__ import annotations

import importlib.util
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from selective_dpo.config.load import make_recipe
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.logprobs.reference import load_reference
from selective_dpo.storage.artifacts import read_json, verify_folder
from tests.fixtures.fork_server import ForkServer
from tests.fixtures.models import LORA, TRAINER, recipe_file, tiny_model_folder, tiny_pairs_file, tiny_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
FSDP2 = {
    "fsdp": "full_shard",
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}
ZERO: dict[str, Any] = {
    # Not stage3_gather_16bit_weights_on_model_save, which is off by default.
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": "auto"},
    **dict.fromkeys(
        (
            "train_micro_batch_size_per_gpu",
            "train_batch_size",
            "gradient_accumulation_steps",
            "gradient_clipping",
        ),
        "auto",
    ),
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed (of the dev extra) is not installed"
)


def run_of(
    server: ForkServer,
    folder: Path,
    model: Path,
    trainer: dict[str, Any],
    *,
    sharding: str = "",
    dtype: str = "float32",
    launcher: dict[str, str] | None = None,
    lora: dict[str, Any] | None = None,
    score: dict[str, Any] | None = None,
    spread: int = 0,
) -> Path:
    """`selective-dpo evaluate` on two processes: two scorers that are kept, a policy, held-out pairs.

    `launcher` are the environment variables of `accelerate launch`; `sharding` is accelerate's name of what
    must have happened, `spread` the passes before the trainings that divide the weights, too.
    """
    settings = {**TRAINER, "per_device_train_batch_size": 2, **trainer}
    stage = {"lora": lora, "trainer": settings}
    test = tiny_pairs_file(folder / "test.jsonl", 6, seed=5)
    recipe = tiny_recipe(
        folder,
        model={"path": str(model), "dtype": dtype},
        data={"test": [{"path": str(test)}]},
        score={"evaluations": 1, "keep_scorers": True, **stage},
        train=stage,
        launch={"processes": 2, "checkpoint_steps": 1},
    )
    if score:
        recipe = make_recipe({**recipe.model_dump(mode="json", exclude_unset=True), "score": score})
    environment = dict(launcher or {})
    if "deepspeed" in trainer:
        environment["DS_ACCELERATOR"] = "cpu"
    path = recipe_file(recipe, folder / "recipe.yaml")
    ended = server.run_ranks(2, "-m", "tests.fixtures.sharding", "evaluate", path, environment=environment)
    assert [each.code for each in ended] == [0, 0], ended
    for each in ended:
        assert (f"sharding: {sharding}" in each.errors) if sharding else ("sharding:" not in each.errors)
    assert "log-probs: one row a pair" in ended[0].errors  # tried at the model, wrapped as it is
    shares = re.findall(r"weights: (\d+)% of them on each of 2 processes", ended[0].errors)
    assert len(shares) == spread and all(50 <= int(share) < 60 for share in shares)
    run = folder / "runs" / "tiny"
    verify_folder(run / "policy")
    assert read_json(run / "policy" / "order.json")["matches"] is True
    assert not (run / "checkpoints").exists()
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".bin")]
    return run


def trained(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of each model that a run has kept."""
    folders = {"policy": run / "policy", **{path.parent.name: path for path in run.glob("scores/*/scorer")}}
    assert sorted(folders) == ["policy", "seed41-fold0", "seed41-fold1"]
    return {name: weights_in(folder) for name, folder in folders.items()}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Of a whole model, or of an adapter."""
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Path, server: ForkServer) -> Path:
    """The run in plain data parallel."""
    return run_of(server, tmp_path_factory.mktemp("plain"), model, {})


ZERO_2 = {**ZERO, "zero_optimization": {"stage": 2}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "sharding", "spread"),
    [
        pytest.param({"deepspeed": ZERO_2}, "DEEPSPEED", 0, id="zero2", marks=needs_deepspeed),
        pytest.param(FSDP2, "FSDP", 2, id="fsdp2-sharded-state-dict"),
        pytest.param(
            {"deepspeed": ZERO}, "DEEPSPEED", 2, id="zero3-without-gathering", marks=needs_deepspeed
        ),
    ],
)
def test_sharded_trainings_publish_whole_weights(
    trainer: dict[str, Any],
    sharding: str,
    spread: int,
    plain: Path,
    model: Path,
    tmp_path: Path,
    server: ForkServer,
) -> None:
    run = run_of(server, tmp_path, model, trainer, sharding=sharding, spread=spread)
    start, expected, found = load_file(model / "model.safetensors"), trained(plain), trained(run)
    for name, weights in found.items():
        assert weights.keys() == start.keys()
        for each, weight in weights.items():
            assert weight.dtype == torch.float32 and weight.shape == start[each].shape
            # Sums over processes round otherwise, and Adam makes a step of whatever sign is left.
            torch.testing.assert_close(weight, expected[name][each], rtol=0, atol=1e-5)
        assert max(float((weights[each] - start[each]).abs().max()) for each in start) > 1e-2
    losses = []
    for each in (plain, run):
        arms = {arm["name"]: arm for arm in read_json(each / "evaluation" / "results.json")["arms"]}
        losses.append([arms[name]["held_out"]["loss"]["value"] for name in ("reference", "selected")])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_a_sharded_bfloat16_policy_is_saved_in_bfloat16(
    plain: Path, model: Path, tmp_path: Path, server: ForkServer
) -> None:
    """FSDP's mixed precision holds float32 weights. Here it is the launcher that asks for it, and for models
    that the first process alone loads: which is for the trainings, and not for the reference."""
    launcher = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    run = run_of(
        server,
        tmp_path,
        model,
        {"bf16": True},
        sharding="FSDP",
        dtype="bfloat16",
        launcher=launcher,
        spread=2,
    )
    for weights in trained(run).values():
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert read_json(run / "policy" / "config.json")["dtype"] == "bfloat16"
    expected, found = (load_reference(each / "reference") for each in (plain, run))
    assert found.pair_ids == expected.pair_ids
    # Up to 20 tokens of some 5 nats each, of which bfloat16 keeps two or three digits.
    np.testing.assert_allclose(found.chosen_P, expected.chosen_P, atol=0.5)


@pytest.fixture(scope="module")
def plain_adapters(tmp_path_factory: pytest.TempPathFactory, model: Path, server: ForkServer) -> Path:
    """The run with adapters in plain data parallel."""
    return run_of(server, tmp_path_factory.mktemp("adapters"), model, {}, lora=LORA)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "sharding"),
    [
        pytest.param(FSDP2, "FSDP", id="fsdp2"),
        pytest.param({"deepspeed": ZERO}, "DEEPSPEED", id="zero3", marks=needs_deepspeed),
    ],
)
def test_sharded_adapters_are_those_of_data_parallel(
    trainer: dict[str, Any],
    sharding: str,
    plain_adapters: Path,
    model: Path,
    tmp_path: Path,
    server: ForkServer,
) -> None:
    run = run_of(server, tmp_path, model, trainer, sharding=sharding, lora=LORA, spread=2)
    expected, found = trained(plain_adapters), trained(run)
    for name, weights in found.items():
        assert weights.keys() == expected[name].keys() and weights
        for each, weight in weights.items():
            torch.testing.assert_close(weight, expected[name][each], rtol=0, atol=1e-5)
    losses = [
        [arm["held_out"]["loss"]["value"] for arm in read_json(each / "evaluation" / "results.json")["arms"]]
        for each in (plain_adapters, run)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_passes_of_one_step_divide_frozen_weights(
    lora: dict[str, Any] | None, model: Path, tmp_path: Path, server: ForkServer
) -> None:
    """The records are those of data parallel, and so are the order and the policy."""
    runs = []
    for name, trainer, sharding in (("plain", {}, ""), ("sharded", FSDP2, "FSDP")):
        folder = tmp_path / name
        folder.mkdir()
        passes = {"beta": 0.1, "bf16": False} | ({"fsdp": True} if sharding and lora else {})
        score = {"protocol": "one-step", "lora": lora, "trainer": passes}
        spread = 3 if sharding and lora else 0
        runs.append(
            run_of(server, folder, model, trainer, sharding=sharding, lora=lora, score=score, spread=spread)
        )
    plain, sharded = (Curriculum.load(run) for run in runs)
    np.testing.assert_allclose(sharded.difficulty_P, plain.difficulty_P, atol=1e-6)
    assert sharded.order == plain.order
    references = [load_reference(run / "reference") for run in runs]
    assert references[0].pair_ids == references[1].pair_ids
    np.testing.assert_allclose(references[1].chosen_P, references[0].chosen_P, atol=1e-5)
    for each, weight in weights_in(runs[1] / "policy").items():
        torch.testing.assert_close(weight, weights_in(runs[0] / "policy")[each], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "strike"),
    [
        pytest.param(FSDP2, signal.SIGTERM, id="fsdp2-stopped"),
        pytest.param(FSDP2, signal.SIGKILL, id="fsdp2-killed"),
        pytest.param({"deepspeed": ZERO_2}, signal.SIGTERM, id="zero2-stopped", marks=needs_deepspeed),
        pytest.param({"deepspeed": ZERO}, signal.SIGKILL, id="zero3-killed", marks=needs_deepspeed),
    ],
)
def test_a_sharded_training_that_was_stopped_goes_on_to_the_same_end(
    trainer: dict[str, Any], strike: signal.Signals, model: Path, tmp_path: Path, server: ForkServer
) -> None:
    """A signal to both processes; the same command again ends with the same weights and order."""
    environment = {"DS_ACCELERATOR": "cpu"} if "deepspeed" in trainer else {}
    ends = {}
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        folder.mkdir()
        recipe = tiny_recipe(
            folder,
            model={"path": str(model)},
            score={"protocol": "custom", "evaluations": 1},
            train={"lora": None, "trainer": {**TRAINER, "num_train_epochs": 40, **trainer}},
            launch={"processes": 2, "checkpoint_steps": 20},
        )
        command = ("-m", "tests.fixtures.sharding", "train", recipe_file(recipe, folder / "recipe.yaml"))
        run = folder / "runs" / "tiny"
        if name == "stopped":
            ranks = server.start_ranks(2, *command, environment=environment)
            until = time.monotonic() + 120
            while not _has_checkpoint(run) and time.monotonic() < until:
                time.sleep(0.02)
            for rank in ranks:
                rank.send_signal(strike)
            code = 75 if strike == signal.SIGTERM else -signal.SIGKILL
            assert [rank.wait() for rank in ranks] == [code, code]
            assert not (run / "policy").exists()
        ended = server.run_ranks(2, *command, environment=environment)
        assert [each.code for each in ended] == [0, 0], ended
        ends[name] = run / "policy"
    whole, stopped = (read_json(ends[name] / "order.json") for name in ends)
    assert stopped["matches"] is True and stopped["consumed_digest"] == whole["consumed_digest"]
    for each, weight in weights_in(ends["stopped"]).items():
        torch.testing.assert_close(weight, weights_in(ends["whole"])[each], rtol=0, atol=1e-5)


def _has_checkpoint(run: Path) -> bool:
    """Whether the training of the policy, after the scorers', has made one."""
    return (run / "curriculum.json").is_file() and any((run / "checkpoints").glob("*/step-*"))
