from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from selective_dpo.distributed.workers import run_in_workers
from selective_dpo.errors import ConfigError, RecordsError


class Job:
    """What `work` does, by name: leaves its process id and number of threads in a file, or fails."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder


def work(job: Job) -> None:
    # At the top of the module, as worker processes need it.
    if job.name.startswith("bad"):
        raise RecordsError(f"{job.name} is bad")
    if job.name == "wrong recipe":
        raise ConfigError("the same for all")
    if job.name == "bug":
        raise ZeroDivisionError("not the user's")
    (job.folder / job.name).write_text(f"{os.getpid()} {torch.get_num_threads()}")


def run(names: list[str], folder: Path, *, workers: int) -> list[str]:
    """Run jobs of these names; the names that `done` was told of."""
    finished: list[str] = []
    jobs = [Job(name, folder) for name in names]
    try:
        run_in_workers(
            work, jobs, workers=workers, name=lambda job: job.name, done=lambda job: finished.append(job.name)
        )
    finally:
        assert sorted(finished) == sorted(path.name for path in folder.iterdir())
    return finished


def test_one_worker_is_this_process_and_keeps_the_order(tmp_path: Path) -> None:
    assert run(["b", "a", "c"], tmp_path, workers=1) == ["b", "a", "c"]
    assert {path.read_text().split()[0] for path in tmp_path.iterdir()} == {str(os.getpid())}


def test_a_failure_stops_no_other_job_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match=r"^bad 1: bad 1 is bad \(1 more failed\)$"):
        run(["a", "bad 1", "b", "bad 2", "c"], tmp_path, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize(("bad", "done"), [("bug", ["a"]), ("bad", ["a", "b"])])
def test_one_of_several_processes_that_failed_alone_begins_no_other_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, done: list[str]
) -> None:
    # The others may still wait for it in this job. Records that are missing or not finite all of them see.
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises((RuntimeError, RecordsError), match=bad):
        run(["a", bad, "b"], tmp_path, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == done


def test_a_wrong_configuration_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the same for all$"):
        run(["wrong recipe", "a"], tmp_path, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_that_is_not_the_users_says_which_job_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^bug failed: not the user's$"):
        run(["bug", "a"], tmp_path, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_no_jobs_are_no_work(tmp_path: Path) -> None:
    assert run([], tmp_path, workers=4) == []


@pytest.mark.slow
def test_two_workers_are_processes_of_their_own_that_share_the_cores(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match=r"^bad: bad is bad$"):
        run(["a", "bad", "b", "c"], tmp_path, workers=2)
    texts = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    assert set(texts) == {"a", "b", "c"}
    assert str(os.getpid()) not in {process for process, _ in texts.values()}
    if not torch.cuda.is_available():
        assert {threads for _, threads in texts.values()} == {str(max(1, (os.cpu_count() or 1) // 2))}
