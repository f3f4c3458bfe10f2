"""Row 11 of the fault matrix on several processes: all start again, and go on in smaller passes.

One test runs a whole recipe on two CPU processes, of which one runs out of memory in its longest batch; the
others try the parts: who starts again and who does not, what is written down, how a batch is parted.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from selective_dpo.cli import main
from selective_dpo.curriculum.records import read_records
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.store import load_tokens
from selective_dpo.distributed import launch as processes
from selective_dpo.errors import Interrupted, ModelError, StartAgainError
from selective_dpo.storage.artifacts import read_json
from selective_dpo.training.batching import ROW, WithinMemory, cut_in_pairs, pairs_in
from selective_dpo.training.checkpointing import (
    PASSES,
    CheckpointPlan,
    SmallerPasses,
    find_checkpoint,
    keep_only,
    read_passes,
)
from selective_dpo.training.trainer import PairTrainer
from tests.fixtures import scarce
from tests.fixtures.fork_server import REPOSITORY
from tests.fixtures.models import TRAINER, recipe_file, tiny_recipe

TOLERANCE = 1e-5


# --- for real --------------------------------------------------------------------------------------------

PAIRS, LONG = 22, 7
MOST = 120
"""Rows times tokens of a pass that fit. A row is a prompt and two completions. The long pair's has 46 tokens,
2 + 22 + 22: passes of 3 or 4 pairs with it do not fit, of 1 or 2 they do. The others' have at most 3 + 8 + 8,
and passes of 4 of them fit."""


def pairs_file(path: Path) -> Path:
    """Pairs with a prompt each, one of them much longer than the others."""
    draw = random.Random(3)
    rows = []
    for number in range(PAIRS):
        least, most = (20, 20) if number == LONG else (1, 5)
        chosen, rejected = (
            f"{sign}{number}{''.join(draw.choices('abcdefgh', k=draw.randint(least, most)))}" for sign in "+-"
        )
        rows.append({"prompt": f"{number}?", "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.fault(row=11)
@pytest.mark.slow
def test_two_processes_of_which_one_runs_out_of_memory_come_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two scorers and a policy, two updates an epoch, two epochs. The second process runs out of memory in
    the second update of a scorer, whose batches have 3 pairs, and of the policy, whose batches have 4 and are
    accumulated: both go on from the first update, in passes of one pair and of two. The failed batches hold
    one and two blank pairs."""
    plain = {**TRAINER, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "num_train_epochs": 2}
    pairs_file(tmp_path / "pairs.jsonl")
    recipe = tiny_recipe(
        tmp_path,
        # Of these seeds, one deals the long pair to the first scorer's held-out half, and to the second one's
        # fourth batch; the other makes it the policy's 21st or 22nd pair. Both are checked below.
        score={"seeds": [46], "trainer": {**plain, "per_device_train_batch_size": 3}},
        select={"rule": "all", "order": "shuffled", "seed": 3},
        train={"lora": None, "trainer": {**plain, "per_device_train_batch_size": 4}},
        launch={"checkpoint_steps": 1},
    )
    path = str(recipe_file(recipe, tmp_path / "recipe.yaml"))
    # Half the processes, twice the batches: the same pairs in an update.
    scoring, training = (f"--{stage}.trainer.gradient_accumulation_steps" for stage in ("score", "train"))
    alone = tmp_path / "alone" / "tiny"
    assert main(["train", path, "--output_dir", str(alone.parent), scoring, "2", training, "4"]) == 0
    capfd.readouterr()

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv(scarce.SETTINGS, json.dumps({"rank": 1, "most": MOST}))
    monkeypatch.setattr(processes, "_MODULE", scarce.MODULE)
    assert main(["train", path, "--launch.processes", "2", training, "2"]) == 0
    run = tmp_path / "runs" / "tiny"
    output, errors = capfd.readouterr()

    again = "all processes start again, and go on from the newest checkpoint in passes of"
    assert re.findall(
        r"error: (.*): out of memory in a training pass over (.*) of up to \d+ tokens: (.*)", errors
    ) == [
        ("seed46-fold1", "3 pair(s)", f"{again} 1 pair(s)"),
        ("selected", "4 pair(s)", f"{again} 2 pair(s)"),
    ]
    assert errors.count("starting the 2 processes again") == 2
    # Neither anything that was finished nor the first update is done again.
    assert re.findall(r"going on from \S*/(\S+/\S+), (.*)", errors) == [
        ("seed46-fold1/step-000001", "step 1 of 4"),
        ("selected/step-000001", "step 1 of 4"),
    ]
    assert re.findall(r"training passes hold at most (\d) pair", errors) == ["1", "2"]
    for stage in ("reference:", "seed46-fold0:", "seed46-fold1:", "curriculum:"):
        assert output.count(stage) == 1
    assert Curriculum.load(run).order.index(long_pair(run)) in (20, 21)
    assert not (run / "checkpoints").exists()

    order = read_json(run / "policy" / "order.json")
    assert order["matches"] and order["consumed"] == 2 * PAIRS and order["repeated_to_fill"] == 2 * 2
    assert order["consumed_digest"] == read_json(alone / "policy" / "order.json")["consumed_digest"]
    for scorer in ("seed46-fold0", "seed46-fold1"):
        ours, theirs = (read_records(each / "scores" / scorer / "records.parquet") for each in (run, alone))
        assert (ours.pair_id == theirs.pair_id).all() and (ours.step == theirs.step).all()
        # Sums of up to 160 nats in float32, of four of which a margin is a tenth.
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=0, atol=TOLERANCE)
        assert np.abs(theirs.loss - np.log(2.0)).max() > 1000 * TOLERANCE
    weights, expected, start = (
        load_file(folder / "model.safetensors")
        for folder in (run / "policy", alone / "policy", tmp_path / "model")
    )
    for name, weight in weights.items():
        assert (weight - expected[name]).abs().max() <= TOLERANCE, name
    assert max(float((expected[name] - start[name]).abs().max()) for name in start) > 1000 * TOLERANCE


def long_pair(run: Path) -> str:
    """The long pair's id."""
    tokens = load_tokens(run / "pairs")
    longest = int(np.argmax([len(ids) for ids in tokens["chosen_ids"]]))
    return str(tokens["pair_id"][longest])


# --- who starts again ------------------------------------------------------------------------------------

LAUNCHED = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
number = len(list(folder.glob("run-*")))
(folder / f"run-{number}").write_text(" ".join(sys.argv[2:]))
what = (folder / "script").read_text().split(",")[number]
if "again" in what:
    Path(os.environ["SELECTIVE_DPO_START_AGAIN"]).write_text(what)
if "signal" in what:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
sys.exit(int(what.split()[0]))
"""


def relaunched(folder: Path, monkeypatch: pytest.MonkeyPatch, *script: str) -> tuple[int, int]:
    """Exit code of `relaunch`, and how often it started its processes, which do as `script` says, run by
    run: their exit code, and whether they ask to start again (for that reason) or have SIGTERM sent to the
    command."""
    (folder / "script").write_text(",".join(script))
    command = [sys.executable, "-c", LAUNCHED, str(folder)]
    monkeypatch.setattr(processes, "launch_command", lambda count: (command, {}))
    code = processes.relaunch(["train", "recipe.yaml"], processes=2)
    runs = list(folder.glob("run-*"))
    assert {run.read_text() for run in runs} == {"-m selective_dpo train recipe.yaml"}
    return code, len(runs)


@pytest.mark.fault(row=11)
def test_processes_that_ask_are_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert relaunched(tmp_path, monkeypatch, "1 again: 4", "1 again: 2", "0") == (0, 3)
    assert capfd.readouterr().err == 2 * "selective-dpo: starting the 2 processes again\n"


@pytest.mark.fault(row=11)
def test_after_another_failure_nothing_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert relaunched(tmp_path, monkeypatch, "1") == (1, 1)
    assert capfd.readouterr().err == ""


@pytest.mark.fault(row=11)
def test_who_asks_for_the_same_reason_twice_would_ask_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert relaunched(tmp_path, monkeypatch, "1 again: 4", "1 again: 2", "1 again: 4") == (1, 3)


def test_what_was_asked_is_forgotten_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert relaunched(tmp_path, monkeypatch, "1 again", "3") == (3, 2)


@pytest.mark.fault(row=11)
def test_sigterm_is_passed_on_and_nothing_is_started_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted, match="run the same command to go on"):
        relaunched(tmp_path, monkeypatch, "1 again: 4", "1 again: 2 signal", "0")
    assert len(list(tmp_path.glob("run-*"))) == 2


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that stands for having asked."""
    monkeypatch.setenv("SELECTIVE_DPO_START_AGAIN", str(tmp_path / "again"))
    monkeypatch.setattr(processes, "_LOOKS", 3600.0)  # who looks ends the process that these tests run in
    return tmp_path / "again"


@pytest.mark.fault(row=11)
def test_a_process_that_waits_for_one_that_asked_is_ended(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(processes, "_LAST_WORDS", 0.05)
    monkeypatch.setattr(processes, "_LOOKS", 0.01)
    with processes.ending_with_the_others():
        time.sleep(0.2)
        assert not ended
        assert processes.ask_to_start_again("so") and asked.exists()
        until = time.monotonic() + 10
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
    assert ended


def test_a_process_that_fails_for_want_of_the_other_says_so_in_one_line(asked: Path) -> None:
    with pytest.raises(RuntimeError, match="connection closed"), processes.ending_with_the_others():
        raise RuntimeError("connection closed")
    asked.touch()
    with pytest.raises(StartAgainError, match="another process asked"), processes.ending_with_the_others():
        raise RuntimeError("connection closed")
    with pytest.raises(ModelError, match="its own"), processes.ending_with_the_others():
        raise ModelError("its own")


# --- what is written down --------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> CheckpointPlan:
    return CheckpointPlan(tmp_path / "checkpoints" / "seed41-fold0", "the job's key", minutes=10, steps=0)


def test_the_next_start_reads_half_of_what_did_not_fit(
    plan: CheckpointPlan, caplog: pytest.LogCaptureFixture
) -> None:
    # Somebody else's launcher: the user has to repeat the command.
    passes = SmallerPasses(plan)
    assert passes.most_pairs is None and not caplog.records
    for pairs, half in ((7, 3), (3, 1), (2, 1)):
        with pytest.raises(StartAgainError) as error:
            passes.start_again("no room", pairs=pairs)
        assert str(error.value) == (
            f"no room: run the same command to go on from the newest checkpoint in passes of {half} pair(s)"
        )
        assert error.value.exit_code == 75
        assert SmallerPasses(plan).most_pairs == half
    assert "training passes hold at most 3 pair(s)" in caplog.records[0].getMessage()
    # It is no checkpoint, and not in the way of any.
    assert find_checkpoint(plan) == (None, [])
    keep_only(plan.folder, [])
    assert [path.name for path in plan.folder.iterdir()] == [PASSES]


def test_under_our_own_launcher_the_command_is_not_to_be_repeated(plan: CheckpointPlan, asked: Path) -> None:
    with pytest.raises(StartAgainError, match=r"^no room: all processes start again, and go on from the new"):
        SmallerPasses(plan).start_again("no room", pairs=4)
    first = asked.read_text()
    with pytest.raises(StartAgainError):
        SmallerPasses(plan).start_again("no room", pairs=2)
    # Another reason, since what failed was smaller.
    assert asked.read_text() != first


@pytest.mark.fault(row=11)
def test_two_processes_may_fail_at_once(plan: CheckpointPlan) -> None:
    one, other = SmallerPasses(plan), SmallerPasses(plan)
    for passes, pairs in ((one, 4), (other, 2)):
        with pytest.raises(StartAgainError):
            passes.start_again("no room", pairs=pairs)
    assert read_passes(plan) == 1


@pytest.mark.fault(row=11)
@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"key": KEY}',
        '{"key": KEY, "pairs_per_pass": 0}',
        '{"key": KEY, "pairs_per_pass": true}',
        '{"key": KEY, "pairs_per_pass": "2"}',
        '{"key": KEY, "pairs_per_pass": 2.0}',
        '{"key": "of another training", "pairs_per_pass": 2}',
        '{"pairs_per_pass": 2}',
        "\x00\xff",
    ],
)
def test_what_says_nothing_about_this_training_is_not_read(plan: CheckpointPlan, content: str) -> None:
    plan.folder.mkdir(parents=True)
    (plan.folder / PASSES).write_bytes(content.replace("KEY", json.dumps(plan.key)).encode("latin-1"))
    assert read_passes(plan) is None
    (plan.folder / PASSES).write_text(json.dumps({"key": plan.key, "pairs_per_pass": 2}))
    assert read_passes(plan) == 2
    assert read_passes(plan._replace(job="another key")) is None


@pytest.mark.fault(row=11)
def test_a_disk_that_refuses_leaves_the_remedies(plan: CheckpointPlan, asked: Path) -> None:
    plan.folder.parent.mkdir(parents=True)
    plan.folder.write_text("in the way")
    with pytest.raises(ModelError, match=r"^no room, and .*passes.json cannot be written .*lower per_device"):
        SmallerPasses(plan).start_again("no room", pairs=4)
    assert not asked.exists()


# --- the passes ------------------------------------------------------------------------------------------


def batch_of(lengths: list[int]) -> dict[str, Any]:
    """A batch as TRL collates it: both rows of pair p have lengths[p] tokens, the first one prompt."""
    places = torch.arange(max(lengths))
    mask = torch.stack([(places < length).long() for length in 2 * lengths])
    completion = mask * (places > 0)
    return {
        "input_ids": mask.clone(),
        "attention_mask": mask,
        "completion_mask": completion,
        ROW: torch.arange(len(lengths)),
    }


def test_parts_hold_so_many_pairs_and_each_pair_once() -> None:
    # Another process's batch of 5 gives as many parts of the same sizes, whatever its lengths.
    for lengths, order in (
        ([4, 9, 3, 5, 5], [[1, 3], [4, 0], [2]]),
        ([2, 2, 2, 2, 9], [[4, 0], [1, 2], [3]]),
    ):
        batch = {**batch_of(lengths), "update_weight": 5 / 4, "blank_pairs": 1}
        batch["completion_mask"][[2, 7]] = 0
        parts = cut_in_pairs(batch, 2)
        assert [part[ROW].tolist() for part in parts] == order
        assert [part["update_weight"] for part in parts] == pytest.approx([2 / 4, 2 / 4, 1 / 4])
        assert [part["blank_pairs"] for part in parts] == [int(2 in pairs) for pairs in order]
    assert cut_in_pairs(batch, 5) == [batch] and cut_in_pairs(batch, None) == [batch]
    assert len(cut_in_pairs({**batch, "pixel_values": 0}, 2)) == 1


class Logged:
    """A `LoggedMeans` that keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def within_memory(plan: CheckpointPlan, obstacle: str = "") -> tuple[WithinMemory, list[str]]:
    """On several processes; and what happens to gradients."""
    happened: list[str] = []

    class Keeping:
        def __enter__(self) -> None:
            happened.append("kept")

        def __exit__(self, *_: object) -> None:
            happened.append("let go")

    logged: Any = Logged()
    memory = WithinMemory(
        obstacle=lambda: obstacle, logged=logged, zero_gradients=lambda: None, keep_to_itself=Keeping
    )
    memory.restarts = SmallerPasses(plan)
    return memory, happened


def test_only_the_last_part_of_a_batch_exchanges_its_gradient(plan: CheckpointPlan) -> None:
    with pytest.raises(StartAgainError):
        SmallerPasses(plan).start_again("no room", pairs=4)
    memory, happened = within_memory(plan)
    memory.start_update()

    def run(part: dict[str, Any]) -> torch.Tensor:
        happened.append(f"{pairs_in(part)} pairs")
        return torch.tensor(1.0)

    assert float(memory.step(batch_of([4, 9, 3, 5, 5]), run)) == 3.0
    assert happened == ["kept", "2 pairs", "let go", "kept", "2 pairs", "let go", "1 pairs"]


def out_of_memory(part: dict[str, Any]) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.fault(row=11)
def test_a_pass_that_fails_is_not_tried_again_in_place(plan: CheckpointPlan) -> None:
    memory, _ = within_memory(plan)
    memory.start_update()
    with pytest.raises(
        StartAgainError, match=r"^out of memory in a training pass over 5 pair\(s\) of up to 9 tok"
    ):
        memory.step(batch_of([4, 9, 3, 5, 5]), out_of_memory)
    assert read_passes(plan) == 2


@pytest.mark.fault(row=11)
@pytest.mark.parametrize(
    ("lengths", "obstacle", "message"),
    [
        ([9], "", "1 pair.* there is no smaller one: lower data.max_length"),
        ([9, 9], "DeepSpeed decides", r"2 pair.* \(DeepSpeed decides\): lower per_device_train_batch_size"),
    ],
)
def test_what_no_restart_can_help_is_an_error_with_remedies(
    plan: CheckpointPlan, lengths: list[int], obstacle: str, message: str
) -> None:
    memory, _ = within_memory(plan, obstacle)
    memory.start_update()
    with pytest.raises(ModelError, match=message):
        memory.step(batch_of(lengths), out_of_memory)
    assert read_passes(plan) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"is_deepspeed_enabled": True}, "DeepSpeed decides by itself where an update ends"),
        ({"_means_over_pairs": lambda: False}, "its loss is more than the mean over its pairs"),
        ({"_deals_evenly": lambda: False}, "the processes' batches may differ in size"),
        ({"_memory": SimpleNamespace(restarts=None)}, "several processes would need checkpoints"),
    ],
)
def test_what_is_in_the_way_of_smaller_passes_is_named(changes: dict[str, Any], reason: str) -> None:
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2),
        args=SimpleNamespace(n_gpu=1),
        is_deepspeed_enabled=False,
        _means_over_pairs=lambda: True,
        _deals_evenly=lambda: True,
        _memory=SimpleNamespace(restarts=object()),
    )
    vars(trainer).update(changes)
    assert PairTrainer._obstacle_to_parts(trainer) == reason
