"""`submit` on a real Slurm: two nodes on loopback, brought up by slurm_on_loopback.sh.

Needs Debian's slurm-wlm and munge, and root; CI installs them where it can.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selective_dpo.cli import main
from selective_dpo.config.load import dump_config, make_recipe
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.submit import job_states
from selective_dpo.storage.artifacts import read_json
from tests.fixtures.models import recipe_file, tiny_pairs_file, tiny_recipe

absent = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(bool(absent), reason=f"Slurm is not installed here: {', '.join(absent)} missing"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm of the tests' own needs root"),
]
SCRIPT = Path(__file__).with_name("slurm_on_loopback.sh")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("cluster")
    started = subprocess.run(
        [str(SCRIPT), "start", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if started.returncode:
        pytest.skip(f"Slurm does not come up here: {started.stderr.strip()[-300:]}")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before
    subprocess.run([str(SCRIPT), "stop", str(folder)], check=False)


def until(what: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, subprocess.run(
            ["squeue", "--states=all"], capture_output=True, text=True, check=False
        ).stdout
        time.sleep(0.3)


def is_over(run: RunDirectory) -> bool:
    return not {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING"} & set(job_states(run).values())


def recipe_in(folder: Path, *, epochs: int = 1, **slurm: object) -> tuple[str, RunDirectory]:
    recipe = tiny_recipe(
        folder,
        score={"evaluations": 1},
        launch={"slurm": {"gpus": 0, "time": "10", "options": ["--mem=500M"], **slurm}},
        data={
            "train": [{"path": str(tiny_pairs_file(folder / "pairs.jsonl", 24))}],
            "max_length": 64,
            "max_prompt_length": 32,
        },
    )
    contents = dump_config(recipe)
    trainer = contents["train"]["trainer"]
    del trainer["gradient_accumulation_steps"]
    trainer |= {"num_train_epochs": epochs, "per_device_train_batch_size": 2, "pairs_per_update": 4}
    return str(recipe_file(make_recipe(contents), folder / "recipe.yaml")), RunDirectory(
        folder / "runs" / "tiny"
    )


def test_a_failed_task_keeps_the_others_and_submitting_again_ends_with_a_policy(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    breaks = f'if [ -e {broken} ] && [ "$SLURM_ARRAY_TASK_ID" = 1 ]; then exit 1; fi'
    recipe, run = recipe_in(tmp_path, setup=[breaks])
    assert main(["submit", recipe]) == 0
    assert main(["submit", recipe]) == 2  # they wait or run
    until(lambda: is_over(run))
    assert job_states(run)["score"] == "FAILED" and job_states(run)["run"] == "CANCELLED"
    assert (run.root / "scores" / "seed41-fold0" / "manifest.json").is_file()
    assert not (run.policy / "manifest.json").is_file()

    broken.unlink()
    assert main(["submit", recipe]) == 0
    until(lambda: is_over(run))
    assert set(job_states(run).values()) == {"COMPLETED"}
    assert read_json(run.policy / "order.json")["matches"] is True
    assert main(["verify", str(run.root)]) == 0


@pytest.mark.parametrize("slurm", [{}, {"nodes": 2, "gpus": 1}], ids=["one node", "two nodes"])
def test_a_job_that_is_warned_is_requeued_and_finishes_in_the_same_order(
    tmp_path: Path, slurm: dict[str, int]
) -> None:
    recipe, run = recipe_in(tmp_path, epochs=150, **slurm)
    assert main(["submit", recipe]) == 0
    number = read_json(run.root / "slurm" / "jobs.json")["run"]
    log = run.root / "slurm" / f"run-{number}.log"
    until(lambda: log.is_file() and "training: " in log.read_text())
    time.sleep(4)  # in the middle of it
    # As Slurm does `--signal=B:TERM@300` before the time is up: to the batch shell alone.
    subprocess.run(["scancel", "--signal=TERM", "--batch", number], check=True)
    until(lambda: job_states(run)["run"] not in ("RUNNING", "COMPLETING"))
    assert job_states(run)["run"] == "PENDING", log.read_text()
    assert "interrupted by SIGTERM at step" in log.read_text()
    # Slurm holds a requeued job for two minutes. An administrator may shorten that, as is done here; but a
    # node refuses a job that comes back in the second in which it ended.
    time.sleep(3)
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], check=True)
    until(lambda: is_over(run))
    assert job_states(run)["run"] == "COMPLETED", log.read_text()
    assert read_json(run.policy / "order.json")["matches"] is True
    assert read_json(run.policy / "cost.json")["processes"] == slurm.get("nodes", 1)
    assert not list((run.root / "checkpoints").glob("again-*"))


def test_queued_jobs_can_be_cancelled(tmp_path: Path) -> None:
    recipe, run = recipe_in(tmp_path, setup=["sleep 30"])
    assert main(["submit", recipe]) == 0
    assert main(["cancel", str(run.root)]) == 0
    until(lambda: is_over(run), seconds=60)
    assert set(job_states(run).values()) == {"CANCELLED"}
