"""Workers of several processes each: commands side by side, each in a group with devices of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from selective_dpo.cli import main
from selective_dpo.config.load import make_recipe
from selective_dpo.distributed import launch
from selective_dpo.distributed.launch import relaunch_each
from selective_dpo.errors import ConfigError, Interrupted
from selective_dpo.run import doctor
from selective_dpo.run import run as verbs
from selective_dpo.run.costs import Device
from tests.fixtures.models import recipe_file, tiny_recipe

# In place of a launcher: leaves its devices in a file named by its last argument, and waits there for others.
COMMAND = """
import os, pathlib, sys, time
name = sys.argv[-1]
pathlib.Path(name).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
if name.startswith("stop"):
    time.sleep(60)
deadline = time.time() + 20
while name in ("a", "b") and not (pathlib.Path("a").exists() and pathlib.Path("b").exists()):
    assert time.time() < deadline, "they are not at work at the same time"
    time.sleep(0.01)
sys.exit({"bad": 3}.get(name, 0))
"""


@pytest.fixture(autouse=True)
def _eight_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch, "launch_command", lambda processes: [sys.executable, "-S", "-c", COMMAND])


def test_each_group_has_gpus_of_its_own_and_a_failure_stops_no_other(tmp_path: Path) -> None:
    assert relaunch_each([["a"], ["b"], ["bad"], ["c"]], processes=2, groups=2) == 3
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(found) == ["a", "b", "bad", "c"]
    assert {found["a"], found["b"]} == {"0,1", "2,3"} and set(found.values()) == {"0,1", "2,3"}


def test_gpus_are_those_that_the_command_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert relaunch_each([["a"], ["b"]], processes=1, groups=2) == 0
    assert sorted(Path(name).read_text() for name in ("a", "b")) == ["4", "5"]
    with pytest.raises(ConfigError, match=r"3 x launch\.processes 2 need 6 GPUs, and there are 4"):
        relaunch_each([["c"]], processes=2, groups=3)


def test_sigterm_is_passed_on_and_no_further_command_is_begun(tmp_path: Path) -> None:
    def strike() -> None:
        while len(list(tmp_path.glob("stop*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    striking = threading.Thread(target=strike)
    striking.start()
    with pytest.raises(Interrupted):
        relaunch_each([["stop 1"], ["stop 2"], ["c"]], processes=1, groups=2)
    striking.join()
    assert not (tmp_path / "c").exists()


def test_a_run_makes_its_scorers_in_groups_and_then_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, score={"seeds": [41, 42]}, launch={"workers": 4, "processes": 2})
    said: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        verbs, "relaunch", lambda words, *, processes: said.append((words[0], processes)) or 0
    )
    monkeypatch.setattr(
        verbs,
        "relaunch_each",
        lambda commands, *, processes, groups: said.append((commands, processes, groups)) or 0,
    )
    monkeypatch.setattr(verbs, "require_sound", lambda *_, **__: None)
    path = str(recipe_file(recipe, tmp_path / "r.yaml"))
    assert main(["run", path, "--fresh", "--select.fraction", "0.6"]) == 0
    words = ["score", path, "--select.fraction", "0.6", "--only"]
    scorers = [f"seed{seed}-fold{fold}" for seed in (41, 42) for fold in (0, 1)]
    assert said == [("prepare", 8), ([[*words, name] for name in scorers], 2, 4), ("run", 2)]
    said.clear()
    assert main(["score", path, "--only", "seed41-fold0", "--select.fraction", "0.6"]) == 0
    assert said == [("score", 2)]


@pytest.mark.parametrize(
    ("verb", "workers", "score", "expected"),
    [
        ("run", 4, {"protocol": "one-step"}, [("score", 4), "run"]),
        ("run", 4, {"protocol": "one-step", "check": 8}, ["run"]),
        ("run", 16, {"protocol": "fast"}, [("prepare", 8), "run"]),
        ("prepare", 4, {"protocol": "fast"}, [("prepare", 4)]),
        ("run", 1, {"protocol": "one-step"}, ["run"]),
    ],
)
def test_passes_that_no_scorer_trains_have_the_gpus_of_all_workers(
    verb: str,
    workers: int,
    score: dict[str, Any],
    expected: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[object] = []
    monkeypatch.setattr(
        verbs, "relaunch", lambda words, *, processes: said.append((words[0], processes)) or 0
    )
    monkeypatch.setattr(verbs, "run_all", lambda run: said.append("run"))
    monkeypatch.setattr(verbs, "require_sound", lambda *_, **__: None)
    given = tiny_recipe(tmp_path).model_dump(mode="json", exclude_unset=True)
    recipe = make_recipe({**given, "score": score, "launch": {"workers": workers}})
    assert main([verb, str(recipe_file(recipe, tmp_path / "r.yaml"))]) == 0
    assert said == expected


def test_doctor_counts_the_gpus_of_all_groups(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, launch={"workers": 4, "processes": 2})
    check = doctor.check_launch(recipe, Device("cuda", "GPU", 8, 1 << 36))
    assert (check.status, check.found) == ("ok", "4 scorers at a time of 2 processes each on 8 GPU(s)")
    check = doctor.check_launch(recipe, Device("cuda", "GPU", 4, 1 << 36))
    assert (check.status, check.remedy) == ("FAIL", "lower launch.workers to 2")
