"""Interrupting and resuming trainings on two processes, and with another number of them."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from selective_dpo.cli import main
from tests.fixtures.fork_server import Forked, ForkServer
from tests.fixtures.resuming import SETTINGS, resuming_recipe

EXIT_CODE = 75
SCORER = "seed41-fold0"


def finished(ranks: list[Forked]) -> str:
    """What both processes wrote, when they have ended well."""
    written = ["".join(each.communicate()) for each in ranks]
    assert [each.returncode for each in ranks] == [0, 0], written
    return "\n".join(written)


def wait_for_step(started: list[Forked], checkpoints: Path, step: int) -> None:
    until = time.monotonic() + 90
    while not [path for path in checkpoints.glob("step-*") if int(path.name[5:]) >= step]:
        if any(each.poll() is not None for each in started) or time.monotonic() > until:
            pytest.fail(f"step {step} was never reached: {[each.communicate(60) for each in started]}")
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.fault(row=8)
@pytest.mark.fault(row=2)
@pytest.mark.fault(row=1)
def test_two_processes_are_interrupted_killed_resumed_and_not_mixed(
    tmp_path: Path, server: ForkServer, capsys: pytest.CaptureFixture[str]
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
    command = ("score", recipe, "--only", SCORER)
    finished(server.start_ranks(2, *command))
    undisturbed = records.read_bytes()
    shutil.rmtree(run)

    # One process of the user's, which has PyTorch's launcher start two: the signal has to reach all of them.
    started = server.start(*command)
    wait_for_step([started], checkpoints, 8)
    started.send_signal(signal.SIGTERM)
    output = "".join(started.communicate())
    assert started.returncode == EXIT_CODE, output
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

    ranks = server.start_ranks(2, *command)
    wait_for_step(ranks, checkpoints, reached + 3)
    for each in ranks:
        each.kill()
        each.wait()
    assert not records.exists()
    assert "going on from" in finished(server.start_ranks(2, *command))
    assert records.read_bytes() == undisturbed
    assert not (run / "checkpoints").exists()

    assert main([*alone, "--only", SCORER]) == 0  # nothing is left to train
    assert main(alone) == 2
    assert "trained by 2 process(es), and now there are 1" in capsys.readouterr().err
