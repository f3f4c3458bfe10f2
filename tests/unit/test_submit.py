"""`submit`: the scripts that Slurm gets, and what is asked of it; our own commands stand in for Slurm's."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from selective_dpo.cli import main, verb_parser
from selective_dpo.config import LaunchConfig, ScoreConfig, SlurmConfig
from selective_dpo.config.load import dump_config, make_recipe
from selective_dpo.difficulty.protocols import planned_runs
from selective_dpo.distributed.signals import AGAIN
from selective_dpo.errors import ConfigError
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.run import open_run
from selective_dpo.run.submit import job_states, write_scripts
from selective_dpo.storage.artifacts import read_json
from selective_dpo.storage.locks import holding, run_lock
from tests.fixtures.models import recipe_file, tiny_recipe

QUIET = {"say": lambda line: None}


def recipe_with(
    tmp: Path, slurm: dict | None, *, pairs_per_update: int | None = None, **blocks: dict
) -> Path:
    launch = {**blocks.pop("launch", {}), **({} if slurm is None else {"slurm": slurm})}
    recipe = dump_config(tiny_recipe(tmp, launch=launch, **blocks))
    if pairs_per_update is not None:
        trainer = recipe["train"]["trainer"]
        del trainer["gradient_accumulation_steps"]
        trainer |= {"per_device_train_batch_size": 1, "pairs_per_update": pairs_per_update}
    return recipe_file(make_recipe(recipe), tmp / "my recipe.yaml")


def scripts_of(path: Path) -> dict[str, str]:
    assert main(["submit", str(path), "--dry-run"]) == 0
    folder = path.parent / "runs" / "tiny" / "slurm"
    return {file.stem: file.read_text() for file in folder.glob("*.sh")}


def test_each_script_is_shell_and_says_what_slurm_needs(tmp_path: Path) -> None:
    slurm = {"partition": "gpu", "account": "me", "time": "12:00:00", "gpus": 8, "options": ["--mem=64G"]}
    slurm["setup"] = ["module load cuda"]
    scripts = scripts_of(recipe_with(tmp_path, slurm, score={"evaluations": 1}, pairs_per_update=8))
    assert set(scripts) == {"prepare", "score", "run"}
    for what, text in scripts.items():
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        for line in (
            "--partition=gpu",
            "--account=me",
            "--time=12:00:00",
            "--mem=64G",
            "--requeue",
            "--signal=B:TERM@300",
            f"--job-name=tiny-{what}",
        ):
            assert f"#SBATCH {line}\n" in text, (what, line)
        assert "\nmodule load cuda\n" in text and AGAIN in text
    assert "--gpus-per-node=8" in scripts["run"]
    assert "--gpus-per-node=1" in scripts["score"] and "--gpus-per-node=1" in scripts["prepare"]
    assert "scorers=(seed41-fold0 seed41-fold1)" in scripts["score"]
    assert "'/" in scripts["run"] and "my recipe.yaml'" in scripts["run"]  # quoted for the shell


def test_several_nodes_meet_on_the_first(tmp_path: Path) -> None:
    text = scripts_of(recipe_with(tmp_path, {"gpus": 4, "nodes": 2}, pairs_per_update=16))["run"]
    assert "#SBATCH --nodes=2\n" in text
    # Without --multi_gpu, accelerate takes the one GPU of a node for the only one.
    assert (
        "launch --multi_gpu --mixed_precision no --dynamo_backend no --num_machines 2 --num_processes 8 "
        "--machine_rank $SLURM_NODEID --main_process_ip $RENDEZVOUS --main_process_port $RENDEZVOUS_PORT -m"
        in text
    )
    assert 'export RENDEZVOUS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' in text
    assert "srun bash -c 'exec " in text
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=" in text and "kill -TERM $child" not in text

    (tmp_path / "b").mkdir()
    slurm = {"gpus": 4, "nodes": 2, "accelerate": "fsdp2.yaml"}
    text = scripts_of(recipe_with(tmp_path / "b", slurm, pairs_per_update=16))["run"]
    own = "launch --config_file fsdp2.yaml --deepspeed_multinode_launcher standard --num_machines 2"
    assert own in text and "--multi_gpu" not in text


def test_one_node_trains_on_all_its_gpus_and_a_scorer_on_its_own(tmp_path: Path) -> None:
    scripts = scripts_of(recipe_with(tmp_path, {"gpus": 8}, launch={"processes": 2}, pairs_per_update=16))
    assert "--gpus-per-node=2" in scripts["prepare"] and "--gpus-per-node=2" in scripts["score"]
    assert "--gpus-per-node=8" in scripts["run"] and "--launch.processes=8 &" in scripts["run"]
    assert "--launch.processes" not in scripts["prepare"] + scripts["score"]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (None, "trains with 8 processes .* launch.processes is 1: set train.trainer.pairs_per_update"),
        (12, "pairs_per_update 12 is no multiple of 1 pairs on each of 8"),
    ],
)
def test_an_update_of_the_last_job_has_the_pairs_that_plan_says(
    tmp_path: Path, pairs: int | None, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(recipe_with(tmp_path, {"gpus": 8}, pairs_per_update=pairs)), "--dry-run"]) == 2
    assert re.search(expected, capsys.readouterr().err)


def test_one_step_needs_no_array_and_certified_begins_with_two_seeds(tmp_path: Path) -> None:
    one_step = {"protocol": "one-step", "trainer": {"beta": 0.1, "bf16": False}}
    (tmp_path / "a").mkdir()
    recipe = tiny_recipe(tmp_path / "a").model_dump(mode="json")
    recipe["score"] = one_step
    recipe["launch"]["slurm"] = {"gpus": 0}
    run = open_run(make_recipe(recipe), **QUIET)
    assert [script.what for script in write_scripts(run, ["r"])] == ["prepare", "run"]
    recipe["score"] = {"protocol": "certified", "lora": None, "trainer": {"bf16": False}}
    run = open_run(make_recipe(recipe), **QUIET)
    (_, score, _) = write_scripts(run, ["r"])
    assert score.scorers == ("seed41-fold0", "seed41-fold1", "seed42-fold0", "seed42-fold1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"nodes": 2, "gpus": 0}, "needs slurm.gpus"),
        ({"accelerate": "x.yaml"}, "has no effect with one node"),
    ],
)
def test_what_would_be_ignored_is_refused(given: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SlurmConfig(**given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"processes": 4, "slurm": {"gpus": 2}}, "launch.processes 4 needs slurm.gpus"),
        ({"workers": 4, "slurm": {"gpus": 4, "nodes": 2}}, "leave it out with slurm.nodes above 1"),
    ],
)
def test_a_job_has_the_gpus_that_its_processes_need(given: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        LaunchConfig(**given)


def test_without_the_block_or_without_slurm_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", str(recipe_with(tmp_path, None))]) == 2
    assert "submit needs launch.slurm" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    assert main(["submit", str(recipe_with(tmp_path / "b", {"gpus": 0}))]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["cancel", str(tmp_path / "empty")]) == 2
    assert "was not submitted" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out.strip().endswith("nothing yet")


SBATCH = """\
#!/bin/bash
# Runs the script at once, each task of an array after the other, unless a job before it failed.
echo "$@" >> "$FAKE/asked"
id=$(( $(cat "$FAKE/count" 2> /dev/null || echo 0) + 1 )); echo $id > "$FAKE/count"; echo $id
for word in "$@"; do
  case $word in --array=*) last=${word##*-};; --dependency=*) needs=${word##*:};; esac
done
[ -n "$needs" ] && [ -e "$FAKE/failed-$needs" ] && { touch "$FAKE/failed-$id"; exit 0; }
for task in $(seq 0 ${last:-0}); do
  SLURM_JOB_ID=$id SLURM_ARRAY_TASK_ID=$task bash "${@: -1}" >> "$FAKE/log" 2>&1 || touch "$FAKE/failed-$id"
done
"""
SQUEUE = '#!/bin/bash\ncat "$FAKE/queue" 2> /dev/null\n'
SCANCEL = '#!/bin/bash\necho "scancel $@" >> "$FAKE/asked"\n'
SCONTROL = '#!/bin/bash\necho "scontrol $@" >> "$FAKE/asked"\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with commands that stand in for Slurm's, first on PATH."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in (
        ("sleep", "#!/bin/bash\n"),
        ("sbatch", SBATCH),
        ("squeue", SQUEUE),
        ("scancel", SCANCEL),
        ("scontrol", SCONTROL),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    return folder


@pytest.mark.slow
def test_the_chain_comes_to_a_policy_and_a_failed_task_keeps_the_others(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    breaks = f'if [ -e {broken} ] && [ "$SLURM_ARRAY_TASK_ID" = 1 ]; then exit 1; fi'
    slurm_block = {"gpus": 2, "setup": [breaks]}  # a process for a scorer, two for the training
    recipe = recipe_with(tmp_path, slurm_block, score={"evaluations": 1}, pairs_per_update=4)
    run = RunDirectory(tmp_path / "runs" / "tiny")
    broken.touch()
    assert main(["submit", str(recipe)]) == 0
    assert (run.root / "scores" / "seed41-fold0" / "manifest.json").is_file()
    assert not (run.policy / "manifest.json").is_file(), "the run must not start after a failed task"

    broken.unlink()
    (slurm / "asked").unlink()
    assert main(["submit", str(recipe)]) == 0
    asked = (slurm / "asked").read_text().splitlines()
    assert "--array=0-0" in asked[1]  # only what is missing
    assert "--dependency=afterok:" in asked[2] and "--kill-on-invalid-dep=yes" in asked[2]
    assert (run.policy / "manifest.json").is_file()
    by = [
        read_json(folder / "cost.json")["processes"]
        for folder in (run.root / "scores" / "seed41-fold0", run.policy)
    ]
    assert by == [1, 2]
    capsys.readouterr()
    assert main(["status", str(run.root)]) == 0
    out = capsys.readouterr().out
    assert "curriculum, policy, evaluation" in out and "scorers: 2" in out


def test_jobs_that_wait_are_shown_cancelled_and_not_submitted_twice(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with(tmp_path, {"gpus": 0})
    folder = RunDirectory(tmp_path / "runs" / "tiny")
    (folder.root / "slurm").mkdir(parents=True)
    (folder.root / "slurm" / "jobs.json").write_text('{"prepare": "7", "score": "8", "run": "9"}')
    (slurm / "queue").write_text("7|COMPLETED\n8|COMPLETED\n8|RUNNING\n9|PENDING\n")
    assert job_states(folder) == {"prepare": "COMPLETED", "score": "RUNNING", "run": "PENDING"}
    assert main(["submit", str(recipe)]) == 2
    assert "is submitted already (score running, run pending)" in capsys.readouterr().err
    assert main(["cancel", str(folder.root)]) == 0
    assert capsys.readouterr().out == "cancelled: score, run\n"
    assert (slurm / "asked").read_text() == "scancel 8 9\n"


def test_a_command_that_asks_to_be_repeated_is_requeued_whatever_its_exit_code(
    tmp_path: Path, slurm: Path
) -> None:
    text = scripts_of(recipe_with(tmp_path, {"gpus": 0}))["prepare"]
    (command,) = [line for line in text.splitlines() if line.endswith(" &")]
    for replaced, code, requeued in (
        ('bash -c "exit 75" &', 75, True),
        ('bash -c "mkdir -p $(dirname $SELECTIVE_DPO_AGAIN); touch $SELECTIVE_DPO_AGAIN; exit 1" &', 1, True),
        ('bash -c "exit 1" &', 1, False),
        ("true &", 0, False),
    ):
        (slurm / "asked").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash"],
            input=text.replace(command, replaced),
            text=True,
            env={**os.environ, "SLURM_JOB_ID": "5"},
        )
        assert done.returncode == code
        assert (slurm / "asked").exists() is requeued
        if requeued:
            assert (slurm / "asked").read_text() == "scontrol requeue 5\n"


def test_folders_without_slurm_have_no_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert job_states(RunDirectory(tmp_path)) == {}
    with pytest.raises(ConfigError):
        write_scripts(open_run(tiny_recipe(tmp_path), **QUIET), ["r"])


def test_the_examples_for_other_schedulers_have_commands_that_there_are() -> None:
    """SkyPilot's task and Kubernetes' indexed Job: they are YAML, and their commands are parsed."""
    folder = Path(__file__).parents[2] / "docs" / "cluster"
    sky = yaml.safe_load((folder / "skypilot.yaml").read_text())
    job = yaml.safe_load((folder / "kubernetes.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == 6
    lines = [*sky["run"].splitlines(), *container["args"][0].splitlines()]
    commands = [line.split("selective-dpo ", 1)[1] for line in lines if "selective-dpo " in line]
    assert len(commands) == 2
    for command in commands:
        verb, *words = shlex.split(command)
        keys = [word for word in words if word.startswith(("--output_dir", "--launch."))]
        own = [word for place, word in enumerate(words) if word not in keys and words[place - 1] not in keys]
        assert verb_parser(verb).parse_args(own).verb == verb
    names = container["args"][0].split("(")[1].split(")")[0].split()
    planned = planned_runs(ScoreConfig(protocol="paper"))
    assert names == [scorer.name for scorer in planned] and len(names) == job["spec"]["completions"]


def test_wait_goes_on_when_the_other_command_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with(tmp_path, None)
    root = tmp_path / "runs" / "tiny"
    root.mkdir(parents=True)
    held, is_done = threading.Event(), threading.Event()

    def hold() -> None:
        with holding(run_lock(root), what="the run"):
            held.set()
            is_done.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(30)
    assert main(["prepare", str(recipe)]) == 2
    assert "in use" in capsys.readouterr().err

    def instead_of_sleeping(seconds: float) -> None:
        is_done.set()
        other.join()

    monkeypatch.setattr("selective_dpo.cli.time", SimpleNamespace(sleep=instead_of_sleeping))
    assert main(["prepare", str(recipe), "--wait"]) == 0
    out = capsys.readouterr().out
    assert "waiting: " in out and (root / "reference" / "manifest.json").is_file()
