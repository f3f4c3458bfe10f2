"""Checkpoints that are not whole, not undamaged or not of this training; and disks that are full."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from selective_dpo.cli import main
from tests.fixtures.fork_server import Moment
from tests.fixtures.interrupted import Killed, killed, killed_runs  # noqa: F401  (fixtures)
from tests.fixtures.results import differences
from tests.fixtures.resuming import STEPS

SEED = 20261122
NEWEST, BEFORE = "step-000004", "step-000002"
TRAINER = "trainer/checkpoint-4"
FILES = (
    f"{TRAINER}/adapter_model.safetensors",
    f"{TRAINER}/optimizer.pt",
    f"{TRAINER}/scheduler.pt",
    f"{TRAINER}/rng_state.pth",
    f"{TRAINER}/trainer_state.json",
    "progress.json",
    f"{TRAINER}/curriculum_order.json",
)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(SEED).randrange(len(content))] ^= 1
    path.write_bytes(content)


def removed(path: Path) -> None:
    path.unlink()


def went_on_from(output: str) -> str:
    lines = [line for line in output.splitlines() if "going on from" in line]
    return Path(lines[-1].split("going on from ")[1].split(",")[0]).name if lines else "the beginning"


# --- row 3: killed while a checkpoint is written ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault(row=3, trials=3)
@pytest.mark.parametrize("trial", range(4))
def test_a_checkpoint_that_was_being_written_is_passed_over(killed: Killed, trial: int) -> None:  # noqa: F811
    """Row 3. SIGKILL at a random file write or flush of the policy's next checkpoint, three times: what was
    written is no checkpoint, the one before is gone on from, and nothing of it is left at the end."""
    generator = random.Random(SEED + trial)
    for attempt in range(3):
        # The next checkpoint is the first thing that the repeated command writes and flushes: step 6's.
        kind, most = (("write", 4), ("flush", 12))[(trial + attempt) % 2]
        outcome = killed.go_on(moment=Moment(kind, generator.randint(1, most)))
        assert outcome.code == -signal.SIGKILL, outcome.output
        assert went_on_from(outcome.output) == NEWEST
        names = (path.name for path in killed.checkpoints.iterdir())
        left = sorted(name for name in names if not name.startswith(".lock-"))
        assert left[-2:] == [BEFORE, NEWEST]
        assert left[:-2] and all(name.startswith(".partial-step-000006-") for name in left[:-2])
    outcome = killed.go_on()
    assert outcome.code == 0, outcome.output
    assert went_on_from(outcome.output) == NEWEST
    assert not differences(killed.run, killed.results)
    assert not (killed.run / "checkpoints").exists()


# --- row 4: damaged checkpoints --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault(row=4)
@pytest.mark.parametrize(("name", "damage"), list(zip(FILES, cycle([truncated, bit_flipped, removed]))))
def test_a_damaged_checkpoint_is_passed_over(
    killed: Killed,  # noqa: F811
    name: str,
    damage: Callable[[Path], None],
) -> None:
    """Row 4. A truncated, bit-flipped or missing file of the newest checkpoint: it is named on standard
    error, the checkpoint before is gone on from, and the end is the same."""
    damage(killed.checkpoints / NEWEST / name)
    outcome = killed.go_on()
    assert outcome.code == 0, outcome.output
    assert f"{NEWEST} passed over: {name} differ(s) from the manifest\n" in outcome.output
    assert went_on_from(outcome.output) == BEFORE
    assert not differences(killed.run, killed.results)


def without_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def with_half_a_manifest(checkpoint: Path) -> None:
    truncated(checkpoint / "manifest.json")


def with_one_file_more(checkpoint: Path) -> None:
    (checkpoint / TRAINER / "training_args.bin").write_bytes(b"anything")


def of_another_training(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "key": "0" * 64}), "utf-8")


def of_another_kind(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "kind": "policy"}), "utf-8")


@pytest.mark.slow
@pytest.mark.fault(row=4)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_manifest, "is not complete: it has no manifest.json"),
        (with_half_a_manifest, "is not a manifest"),
        (with_one_file_more, "training_args.bin differ(s) from the manifest"),
        (of_another_training, "made with other settings, inputs or library versions"),
        (of_another_kind, "made with other settings, inputs or library versions"),
    ],
)
def test_what_is_no_checkpoint_of_this_training_is_passed_over(
    killed: Killed,  # noqa: F811
    change: Callable[[Path], None],
    reason: str,
) -> None:
    """Rows 3 and 4. No manifest, half of one, a file too many, another training's key: passed over with the
    reason on one line, and never read."""
    change(killed.checkpoints / NEWEST)
    outcome = killed.go_on()
    assert outcome.code == 0, outcome.output
    lines = [line for line in outcome.output.splitlines() if "passed over" in line]
    assert len(lines) == 1 and NEWEST in lines[0] and reason in lines[0]
    assert went_on_from(outcome.output) == BEFORE
    assert not differences(killed.run, killed.results)


@pytest.mark.slow
@pytest.mark.fault(row=4)
def test_without_any_whole_checkpoint_a_training_begins_anew(killed: Killed) -> None:  # noqa: F811
    """Row 4. All checkpoints are damaged: each is named, the training begins anew, the end is the same."""
    for name in (BEFORE, NEWEST):
        bit_flipped(killed.checkpoints / name / "progress.json")
    outcome = killed.go_on()
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("passed over") == 2
    assert went_on_from(outcome.output) == "the beginning"
    assert outcome.events["step"] == STEPS[2]
    assert not differences(killed.run, killed.results)


# --- what is in a checkpoint, and how it is read -----------------------------------------------------------


def test_no_pickle_of_objects_is_kept_and_states_are_read_as_weights_only(
    killed: Killed,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers' pickled arguments are not in a checkpoint; whatever is read with `torch.load` is read
    with `weights_only`, which runs no code."""
    assert not list(killed.checkpoints.rglob("training_args.bin"))
    calls: list[dict[str, Any]] = []
    load = torch.load

    def noted(*args: Any, **others: Any) -> Any:
        calls.append({"file": Path(str(args[0])).name, **others})
        return load(*args, **others)

    monkeypatch.setattr(torch, "load", noted)
    assert main(["train", str(killed.recipe)]) == 0
    assert {call["file"] for call in calls} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert all(call["weights_only"] is True for call in calls)
    assert not differences(killed.run, killed.results)


# --- row 5: full disks -----------------------------------------------------------------------------------


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[None]:
    """A file system of its own at `place`, of so many kilobytes."""
    place.mkdir(parents=True, exist_ok=True)
    options = f"size={kilobytes}k,mode=777"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip(f"no small file system can be made here: {made.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def grow(place: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", place], check=True)


def kilobytes_used(place: Path) -> int:
    usage = os.statvfs(place)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize // 1024


@pytest.mark.slow
@pytest.mark.fault(row=5)
@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_disk_that_is_full_at_a_checkpoint_costs_only_the_checkpoint(
    killed: Killed,  # noqa: F811
    tmp_path: Path,
    share: float,
) -> None:
    """Row 5. The checkpoints' disk has room for two of them and a part of the third: one line for each that
    cannot be written, the older ones intact, and the training goes on to the same end."""
    place, kept = killed.checkpoints, tmp_path / "kept"
    shutil.copytree(place, kept)
    with small_disk(place, 100_000):
        for name in (BEFORE, NEWEST):
            shutil.copytree(kept / name, place / name)
        # The two are of one size, to a page or so.
        grow(place, int(kilobytes_used(place) * (1 + share / 2)))
        outcome = killed.go_on(moment=Moment("step", 4))
        assert outcome.code == -signal.SIGKILL, outcome.output
        lines = [line for line in outcome.output.splitlines() if "not written" in line]
        assert len(lines) == 1, outcome.output
        assert "step-000006 not written (" in lines[0]
        assert f"the newest whole one is {NEWEST}; training goes on" in lines[0]
        assert sorted(path.name for path in place.iterdir()) == [BEFORE, NEWEST]
        for name in (BEFORE, NEWEST):
            subprocess.run(["diff", "-r", kept / name, place / name], check=True)
        outcome = killed.go_on()
        assert outcome.code == 0, outcome.output
        assert went_on_from(outcome.output) == NEWEST
    assert not differences(killed.run, killed.results)


@pytest.mark.slow
@pytest.mark.fault(row=5, trials=3)
@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
@pytest.mark.parametrize("trial", range(4))
def test_a_disk_that_is_full_at_any_moment_is_one_line_and_no_loss(killed: Killed, trial: int) -> None:  # noqa: F811
    """Row 5. The run's disk has a random size below what the run needs, and twice a larger one: the command
    ends with 2 and one clear line, or with 0 where only checkpoints did not fit; with room again, the same
    command comes to the same end."""
    config = (killed.run / "config.json").read_bytes()
    shutil.rmtree(killed.run)
    generator = random.Random(SEED + trial)
    sizes = sorted(generator.randint(20, 400) for _ in range(3))
    with small_disk(killed.run.parent, sizes[0]):
        killed.run.mkdir()  # begun already: else so small a disk is refused before anything is written
        (killed.run / "config.json").write_bytes(config)
        for kilobytes in sizes:
            grow(killed.run.parent, kilobytes)
            outcome = killed.go_on()
            assert outcome.code in (0, 2), outcome.output
            assert "Traceback" not in outcome.output
            if outcome.code:
                errors = [line for line in outcome.output.splitlines() if "selective-dpo: error:" in line]
                assert len(errors) == 1, outcome.output
                assert "No space left on device" in errors[0] or "disk full" in errors[0]
        grow(killed.run.parent, 100_000)
        outcome = killed.go_on()
        assert outcome.code == 0, outcome.output
        assert not differences(killed.run, killed.results)
