"""Checkpoints on disk, and what a training gathers in them."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from selective_dpo.config.trainer_options import DECIDED
from selective_dpo.difficulty.held_out import HeldOutEvaluations, Measurement
from selective_dpo.errors import ConfigError
from selective_dpo.logprobs.compute import PairLogps
from selective_dpo.storage.artifacts import publish_folder, write_json
from selective_dpo.training import checkpointing as module
from selective_dpo.training.checkpointing import (
    KIND,
    PROGRESS,
    TRAINER,
    CheckpointPlan,
    Checkpoints,
    checkpoints_in,
    discard_checkpoints,
    disk_reason,
    keep_only,
    newest_checkpoint,
    train_resumably,
    write_checkpoint,
)
from selective_dpo.training.selective_trainer import OrderLog

ORDER = ["a", "b", "c", "d", "e"]


@pytest.fixture
def plan(tmp_path: Path) -> CheckpointPlan:
    return CheckpointPlan(tmp_path / "checkpoints" / "selected", "key of the policy", minutes=10.0, steps=0)


def checkpoint_at(plan: CheckpointPlan, step: int) -> Path:
    place = plan.place(step)
    with publish_folder(place, kind=KIND, key=plan.key) as partial:
        (partial / TRAINER / f"checkpoint-{step}").mkdir(parents=True)
        write_json(partial / PROGRESS, {"step": step})
    return place


# --- which one is gone on from -------------------------------------------------------------------------


def test_the_newest_by_number_not_by_time(plan: CheckpointPlan) -> None:
    newest = checkpoint_at(plan, 1_000_000)  # more digits than the others
    checkpoint_at(plan, 999_999)
    checkpoint_at(plan, 9)
    (plan.folder / "step-else").mkdir()
    assert newest_checkpoint(plan) == (newest, [])


def test_none_is_none(plan: CheckpointPlan) -> None:
    assert newest_checkpoint(plan) == (None, [])


def test_another_job_or_library_version_is_another_training(
    plan: CheckpointPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_at(plan, 3)
    found, (reason,) = newest_checkpoint(plan._replace(job="another key"))
    assert found is None and "other settings, inputs or library versions" in reason
    monkeypatch.setattr(module, "version", lambda name: "0.0")
    assert newest_checkpoint(plan)[0] is None


def test_how_often_checkpoints_are_made_is_no_part_of_what_they_are(plan: CheckpointPlan) -> None:
    place = checkpoint_at(plan, 3)
    assert newest_checkpoint(plan._replace(minutes=1.0, steps=7)) == (place, [])


def test_another_layout_is_refused_with_both(plan: CheckpointPlan) -> None:
    args = SimpleNamespace(per_device_train_batch_size=8, gradient_accumulation_steps=8, output_dir="")
    place = checkpoint_at(plan, 3)
    now = "1 process(es), 64 pairs an update, NO"
    checkpoints = Checkpoints(SimpleNamespace(args=args), plan, [], lambda: False)
    with publish_folder(place, kind=KIND, key=plan.key) as partial:
        write_json(partial / PROGRESS, {"step": 3, "steps": 9, "layout": now})
    assert checkpoints.find() == place
    with publish_folder(place, kind=KIND, key=plan.key) as partial:
        write_json(partial / PROGRESS, {"layout": "8 process(es), 128 pairs an update, MULTI_GPU"})
    with pytest.raises(ConfigError, match=r"8 process\(es\), 128 pairs .* 1 process\(es\), 64 p") as caught:
        checkpoints.find()
    assert f"delete {plan.folder} to begin this training anew" in str(caught.value)


def test_only_the_ones_to_keep_are_kept(plan: CheckpointPlan) -> None:
    places = [checkpoint_at(plan, step) for step in (1, 2, 3)]
    (plan.folder / ".partial-step-000004-0123abcd").mkdir()
    (plan.folder / "else").mkdir()
    keep_only(plan.folder, places[1:])
    assert checkpoints_in(plan.folder) == places[1:]
    assert sorted(path.name for path in plan.folder.iterdir()) == ["else", "step-000002", "step-000003"]


def test_discarding_leaves_other_trainings(plan: CheckpointPlan) -> None:
    checkpoint_at(plan, 1)
    other = plan._replace(folder=plan.folder.parent / "control")
    checkpoint_at(other, 1)
    discard_checkpoints(plan.folder)
    assert not plan.folder.exists() and newest_checkpoint(other)[0] is not None
    discard_checkpoints(other.folder)
    assert not plan.folder.parent.exists()
    discard_checkpoints(other.folder)  # nothing is there


# --- writing -------------------------------------------------------------------------------------------


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "is the disk full"),
        (RuntimeError("basic_ios::clear: iostream error"), "is the disk full"),
    ],
)
def test_what_the_disk_refuses_leaves_nothing(plan: CheckpointPlan, error: Exception, words: str) -> None:
    before = checkpoint_at(plan, 1)

    def write(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise error

    assert words in write_checkpoint(plan.place(2), key=plan.key, write=write)
    assert list(plan.folder.iterdir()) == [before]


def test_other_errors_are_not_taken_for_the_disk(plan: CheckpointPlan) -> None:
    assert disk_reason(RuntimeError("CUDA error")) == disk_reason(ValueError("disk")) == ""

    def write(folder: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_checkpoint(plan.place(2), key=plan.key, write=write)
    assert checkpoints_in(plan.folder) == []


def test_a_disk_that_fails_while_publishing_leaves_nothing(
    plan: CheckpointPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def refuse(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", refuse)
    assert write_checkpoint(plan.place(2), key=plan.key, write=lambda folder: None) == FULL.strerror
    assert not plan.folder.exists() or list(plan.folder.iterdir()) == []


# --- what is gathered ----------------------------------------------------------------------------------


@pytest.mark.parametrize("consumed", [0, 2, 5, 7, 10])
def test_the_order_consumed_goes_on(tmp_path: Path, consumed: int) -> None:
    rows = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    whole, first, second = OrderLog(ORDER), OrderLog(ORDER), OrderLog(ORDER)
    for start in range(0, 10, 5):
        whole.add(rows[start : start + 5])
    for start in range(0, consumed, 5):
        first.add(rows[start : min(start + 5, consumed)])
    first.write_state(tmp_path)
    second.add([3])  # it is replaced
    second.read_state(tmp_path)
    rest = rows[consumed:]
    while rest:
        left = 5 - (10 - len(rest)) % 5
        # The loader fills an epoch's last batch with rows from its beginning, which are no part of it.
        second.add([*rest[:left], 0])
        rest = rest[left:]
    result = second.result()
    assert result._replace(repeated_to_fill=0) == whole.result()
    assert result.matches and result.consumed == 10


def test_repeated_rows_are_remembered(tmp_path: Path) -> None:
    log = OrderLog(ORDER)
    log.add([0, 1, 2, 3])
    log.add([4, 0, 1, 2])
    log.write_state(tmp_path)
    again = OrderLog(ORDER)
    again.read_state(tmp_path)
    assert again.result() == log.result() and again.result().repeated_to_fill == 3


@pytest.mark.parametrize("count", [0, 1, 3])
def test_measurements_come_back_bit_for_bit(tmp_path: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    before = HeldOutEvaluations(5, lambda: None)  # type: ignore[arg-type, return-value]
    before.measurements = [
        Measurement(number, 7 * number, PairLogps(["x", "y"], *generator.normal(size=(2, 2))))
        for number in range(1, count + 1)
    ]
    before.write_state(tmp_path)
    after = HeldOutEvaluations(5, lambda: None)  # type: ignore[arg-type, return-value]
    after.measurements = [Measurement(9, 9, PairLogps([], np.zeros(0), np.zeros(0)))]
    after.read_state(tmp_path)
    assert len(after.measurements) == count
    for one, other in zip(before.measurements, after.measurements, strict=True):
        assert (one.evaluation, one.step, one.logps.pair_ids) == (
            other.evaluation,
            other.step,
            other.logps.pair_ids,
        )
        assert np.array_equal(one.logps.chosen_P, other.logps.chosen_P)
        assert np.array_equal(one.logps.rejected_P, other.logps.rejected_P)


# --- whether there are any -----------------------------------------------------------------------------


@pytest.mark.parametrize("minutes_and_steps", [None, (0.0, 0)])
def test_without_minutes_and_steps_there_are_none(
    plan: CheckpointPlan, minutes_and_steps: tuple[float, int] | None
) -> None:
    calls: list[dict[str, Any]] = []
    trainer = SimpleNamespace(train=lambda **others: calls.append(others))
    given = minutes_and_steps and plan._replace(minutes=minutes_and_steps[0], steps=minutes_and_steps[1])
    assert train_resumably(trainer, given or None) == 0.0
    assert calls == [{}]


def test_checkpoints_that_take_long_to_write_are_made_less_often(
    plan: CheckpointPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    state = SimpleNamespace(global_step=3, max_steps=9, epoch=0.5)
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "output_dir": str(tmp_path)}
    trainer = SimpleNamespace(
        args=SimpleNamespace(**args),
        state=state,
        accelerator=SimpleNamespace(gather=lambda tensor: tensor),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        _metrics={"train": {}},
        _tr_loss=torch.zeros(()),
        _total_train_tokens=0,
        _total_loss_scalar=0.0,
        _globalstep_last_logged=0,
    )
    checkpoints = Checkpoints(trainer, plan, [], lambda: False)

    def is_due_at(seconds: float) -> bool:
        nonlocal now
        now = seconds
        return checkpoints._is_due(state)

    def write_for_two_minutes() -> None:
        nonlocal now
        now += 120

    assert not is_due_at(599) and is_due_at(600)
    checkpoints.save(write_for_two_minutes)
    # It ended at 720. 120 seconds are 5% of 2,400, which is more than the plan's 600.
    assert not is_due_at(720 + 2399) and is_due_at(720 + 2400)
    checkpoints.save(lambda: None)
    assert not is_due_at(3120 + 599) and is_due_at(3120 + 600)


def test_an_order_that_cannot_be_found_again_is_refused(plan: CheckpointPlan) -> None:
    loading = SimpleNamespace(use_seedable_sampler=False)
    args = SimpleNamespace(train_sampling_strategy="random", accelerator_config=loading)
    with pytest.raises(ConfigError, match="use_seedable_sampler=False"):
        train_resumably(SimpleNamespace(args=args), plan)


def test_options_of_transformers_own_checkpoints_point_to_ours() -> None:
    for name in ("save_strategy", "save_steps", "resume_from_checkpoint", "ignore_data_skip"):
        assert DECIDED[name].startswith("launch.checkpoint_minutes decides")
