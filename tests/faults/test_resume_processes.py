"""Interrupting and resuming trainings on two processes, and with another number of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from selective_dpo.cli.main import main
from tests.fixtures.fork_server import REPOSITORY
from tests.fixtures.resuming import SETTINGS, resuming_recipe

EXIT_CODE = 75
SCORER = "seed41-fold0"


def start(recipe: Path, *options: str) -> subprocess.Popen[str]:
    """The command in a session of its own, so that all its processes can be killed at once."""
    command = [sys.executable, "-m", "selective_dpo", "score", str(recipe), "--only", SCORER, *options]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(started: subprocess.Popen[str], code: int) -> str:
    output, _ = started.communicate(timeout=120)
    assert started.returncode == code, output
    return output


def wait_for_step(started: subprocess.Popen[str], checkpoints: Path, step: int) -> None:
    until = time.monotonic() + 90
    while not [path for path in checkpoints.glob("step-*") if int(path.name[5:]) >= step]:
        if started.poll() is not None or time.monotonic() > until:
            pytest.fail(f"step {step} was never reached: {started.communicate(timeout=60)[0]}")
        time.sleep(0.02)


def kill_all(started: subprocess.Popen[str]) -> None:
    parent = psutil.Process(started.pid)
    for process in [*parent.children(recursive=True), parent]:
        process.kill()
    started.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.fault(row=8, trials=1)
@pytest.mark.fault(row=2, trials=1)
@pytest.mark.fault(row=1, trials=1)
def test_two_processes_are_interrupted_killed_resumed_and_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 1, 2 and 8, on two CPU processes. A scorer with random order over four epochs: SIGTERM to the
    command in the second epoch gives a checkpoint and exit code 75; the repeated command is killed later;
    the next one comes to the records of an undisturbed run, byte for byte. In between, the command on one
    process is refused with both numbers, and so it is beside what two processes have trained."""
    # 12 pairs, 2 in an update: 6 updates an epoch, 24 in all.
    trainer = {"num_train_epochs": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    launch = {"processes": 2, "checkpoint_steps": 1}
    recipe = resuming_recipe(tmp_path, launch=launch, score={"trainer": {**SETTINGS, **trainer}})
    run = tmp_path / "runs" / "tiny"
    records, checkpoints = run / "scores" / SCORER / "records.parquet", run / "checkpoints" / SCORER
    finish(start(recipe), 0)
    undisturbed = records.read_bytes()
    shutil.rmtree(run)

    started = start(recipe)
    wait_for_step(started, checkpoints, 8)
    os.kill(started.pid, signal.SIGTERM)
    output = finish(started, EXIT_CODE)
    assert "selective-dpo: seed41-fold0: interrupted by SIGTERM at step" in output
    assert output.strip().splitlines()[-1].endswith("interrupted by SIGTERM: run the same command to go on")
    sealed = sorted(path.name for path in checkpoints.glob("step-*"))
    reached = int(sealed[-1][5:])
    assert 8 <= reached < 24 and sealed[0] == f"step-{reached - 1:06d}"

    alone = ["score", str(recipe), "--launch.processes", "1"]
    assert main([*alone, "--only", SCORER]) == 2
    refusal = capsys.readouterr().err
    assert "was made by 2 process(es), 2 pairs an update" in refusal
    assert "now there are 1 process(es), 1 pairs an update" in refusal
    assert sorted(path.name for path in checkpoints.glob("step-*")) == sealed

    started = start(recipe)
    wait_for_step(started, checkpoints, reached + 3)
    kill_all(started)
    assert not records.exists()
    assert "going on from" in finish(start(recipe), 0)
    assert records.read_bytes() == undisturbed
    assert not (run / "checkpoints").exists()

    assert main([*alone, "--only", SCORER]) == 0  # nothing is left to train
    assert main(alone) == 2
    assert "trained by 2 process(es), and now there are 1" in capsys.readouterr().err
