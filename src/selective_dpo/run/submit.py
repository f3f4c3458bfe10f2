"""A run as Slurm jobs: prepare, an array of scorers, the rest; each begins when the one before succeeded.

Slurm does the waiting, the retrying and the counting. This file writes its scripts (`slurm.sh.j2`), hands
them over, and asks it what became of them.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from selective_dpo.config import LaunchConfig, Recipe, SlurmConfig
from selective_dpo.config.trainer_options import accumulation
from selective_dpo.distributed.launch import MAX_CHECKPOINT_SECONDS
from selective_dpo.errors import ConfigError, SlurmError
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import Run, scorer_job
from selective_dpo.storage.artifacts import is_complete, read_json, write_atomic, write_json

FOLDER, JOBS = "slurm", "jobs.json"
_PLAIN = "--multi_gpu --mixed_precision no --dynamo_backend no"
"""Of several nodes without a configuration: accelerate takes the one GPU of a node for the only one."""
_NO_SSH = "--deepspeed_multinode_launcher standard"
"""Else DeepSpeed starts the processes of all nodes from the first, through `pdsh`."""


class Script(NamedTuple):
    """One job's script."""

    what: str
    """"prepare", "score" or "run"."""
    text: str
    scorers: tuple[str, ...] = ()
    """Of an array: one a task."""


def write_scripts(run: Run, command: Sequence[str]) -> list[Script]:
    """The scripts of what is still to do, written into the run's folder.

    `command` is the recipe and its overrides, as on the command line.

    Raises:
        ConfigError: the recipe has no `launch.slurm`; an update would have other pairs on so many processes.
    """
    config = run.recipe.launch.slurm
    if config is None:
        raise ConfigError("submit needs launch.slurm in the recipe, such as `slurm: {time: '12:00:00'}`")
    _require_same_updates(run.recipe, _processes(run.recipe.launch, config))
    missing = missing_scorers(run)
    scripts = [_script(run, config, "prepare", command)]
    scripts += [_script(run, config, "score", command, missing)] if missing else []
    scripts += [_script(run, config, "run", command)]
    folder = run.folder.root / FOLDER
    for script in scripts:
        write_atomic(folder / f"{script.what}.sh", script.text)
    return scripts


def submit(run: Run, command: Sequence[str]) -> dict[str, str]:
    """Hand the scripts to Slurm, each after the one before; returns job ids by what they do.

    Raises:
        ConfigError: jobs of this run are still queued or running.
        SlurmError: there is no `sbatch`, or it refuses.
    """
    if waiting := {what: state for what, state in job_states(run.folder).items() if state in _ALIVE}:
        named = ", ".join(f"{what} {state.lower()}" for what, state in waiting.items())
        raise ConfigError(
            f"{run.folder.root} is submitted already ({named}): wait, or `selective-dpo cancel` it"
        )
    jobs: dict[str, str] = {}
    for script in write_scripts(run, command):
        words = ["sbatch", "--parsable"]
        if jobs:
            words += [f"--dependency=afterok:{list(jobs.values())[-1]}", "--kill-on-invalid-dep=yes"]
        if script.scorers:
            words.append(f"--array=0-{len(script.scorers) - 1}")
        said = _call([*words, str(run.folder.root / FOLDER / f"{script.what}.sh")])
        jobs[script.what] = said.split(";")[0].strip()
        write_json(run.folder.root / FOLDER / JOBS, jobs)
    return jobs


def cancel(folder: RunDirectory) -> list[str]:
    """Cancel the run's jobs that are queued or running; returns what they do.

    Raises:
        ConfigError: it was never submitted.
        SlurmError: there is no `scancel`, or it refuses.
    """
    jobs = _jobs(folder)
    if not jobs:
        raise ConfigError(f"{folder.root} was not submitted: there is no {FOLDER}/{JOBS}")
    alive = [what for what, state in job_states(folder).items() if state in _ALIVE]
    if alive:
        _call(["scancel", *(jobs[what] for what in alive)])
    return alive


_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUE_HOLD")


def job_states(folder: RunDirectory) -> dict[str, str]:
    """What Slurm says of each submitted job, "unknown" where it has forgotten it; {} without jobs or Slurm.

    Of an array the most alive task counts, then one that failed. `squeue` knows what is queued, runs or ended
    a few minutes ago, `sacct`, where there is one, what was before.
    """
    jobs = _jobs(folder)
    if not jobs or not shutil.which("squeue"):
        return {}
    numbers = ",".join(jobs.values())
    states: dict[str, list[str]] = {what: [] for what in jobs}
    queued = _lines(
        ["squeue", "--noheader", "--array", "--states=all", "--format=%F|%T", f"--jobs={numbers}"]
    )
    done = _lines(["sacct", "--noheader", "-X", "-P", "--format=JobID,State", f"--jobs={numbers}"])
    for line in [*queued, *done]:
        job, _, state = line.partition("|")
        for what, number in jobs.items():
            if job.split("_")[0] == number and state:
                states[what].append(state.split()[0])
    order = (*_ALIVE, "FAILED", "TIMEOUT", "CANCELLED", "COMPLETED")
    rank = {state: place for place, state in enumerate(order)}
    return {
        what: min(found, key=lambda state: rank.get(state, len(order))) if found else "unknown"
        for what, found in states.items()
    }


def status_text(folder: RunDirectory) -> str:
    """What the run's folder holds, and what its jobs do."""
    root = folder.root
    scored = sorted(path.name for path in (root / "scores").glob("*") if (path / "manifest.json").is_file())
    controls = sorted(path.parent.name for path in (root / "controls").glob("*/policy/manifest.json"))
    done = {
        "pairs": (folder.pairs / "manifest.json").is_file(),
        "reference": (folder.reference / "manifest.json").is_file(),
        "curriculum": (root / "curriculum.json").is_file(),
        "policy": (folder.policy / "manifest.json").is_file(),
        "evaluation": (folder.evaluation / "manifest.json").is_file(),
        "report": folder.report.is_file(),
    }
    lines = [f"{root}: {', '.join(name for name, is_there in done.items() if is_there) or 'nothing yet'}"]
    lines += [f"scorers: {len(scored)} ({', '.join(scored)})"] if scored else []
    lines += [f"controls: {', '.join(controls)}"] if controls else []
    under_way = sorted(path.name for path in (root / "checkpoints").glob("*") if path.is_dir())
    lines += [f"under way, with checkpoints: {', '.join(under_way)}"] if under_way else []
    jobs, states = _jobs(folder), job_states(folder)
    lines += [
        f"job {number} ({what}): {states.get(what, 'unknown').lower()}" for what, number in jobs.items()
    ]
    return "\n".join(lines)


def missing_scorers(run: Run) -> tuple[str, ...]:
    """Scorers that an array can train: none with one-step, which is one pass, or an imported difficulty."""
    if run.recipe.curriculum or run.recipe.score.protocol == "one-step":
        return ()
    if not (run.folder.reference / "manifest.json").is_file():
        return tuple(scorer.name for scorer in run.scorer_runs)
    jobs = [scorer_job(run, scorer) for scorer in run.scorer_runs]
    return tuple(job.run.name for job in jobs if not is_complete(job.folder, key=job.key))


def _processes(launch: LaunchConfig, config: SlurmConfig) -> int:
    """Data-parallel processes of the last job's trainings."""
    if config.nodes == 1 and (launch.workers > 1 or not config.gpus):
        return launch.processes
    return config.nodes * config.gpus


def _require_same_updates(recipe: Recipe, processes: int) -> None:
    """Refuse a last job whose updates would not have the pairs that `plan` says."""
    if processes == recipe.launch.processes:
        return
    trainings = {"train": recipe.train.trainer}
    if recipe.score.protocol == "certified":  # whose last scorers the last job trains
        trainings["score"] = recipe.score.trainer
    for block, settings in trainings.items():
        if accumulation(settings, processes) is None:
            raise ConfigError(
                f"the last job trains with {processes} processes (slurm.nodes x slurm.gpus), and "
                f"launch.processes is {recipe.launch.processes}: set {block}.trainer.pairs_per_update, so "
                "that an update has as many pairs with both"
            )


def _script(
    run: Run, config: SlurmConfig, what: str, command: Sequence[str], scorers: tuple[str, ...] = ()
) -> Script:
    recipe, is_last = run.recipe, what == "run"
    nodes, processes = (config.nodes if is_last else 1), _processes(recipe.launch, config)
    words = [sys.executable, "-m", "selective_dpo", what, *command]
    if is_last and nodes == 1 and processes != recipe.launch.processes:
        words.append(f"--launch.processes={processes}")
    own = f"--config_file {shlex.quote(config.accelerate)} {_NO_SSH}" if config.accelerate else _PLAIN
    launch = (
        f"exec {shlex.quote(sys.executable)} -m accelerate.commands.launch {own} --num_machines {nodes} "
        f"--num_processes {processes} --machine_rank $SLURM_NODEID --main_process_ip $RENDEZVOUS "
        f"--main_process_port $RENDEZVOUS_PORT {shlex.join(words[1:])}"
    )
    root = run.folder.root.absolute()
    named = {"partition": config.partition, "account": config.account, "time": config.time}
    text = _template().render(
        name=recipe.name,
        what=what,
        logs=root / FOLDER,
        nodes=nodes,
        gpus=config.gpus if is_last else min(config.gpus, recipe.launch.processes),
        options=[f"--{name}={value}" for name, value in named.items() if value] + list(config.options),
        setup=config.setup,
        folder=str(Path.cwd()),
        checkpoints=str(root / "checkpoints"),
        scorers=scorers,
        command=shlex.join(words),
        launch=launch,
        patience=MAX_CHECKPOINT_SECONDS,
    )
    return Script(what, text, scorers)


def _template() -> jinja2.Template:
    text = resources.files("selective_dpo.run").joinpath("slurm.sh.j2").read_text("utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.from_string(text)


def _jobs(folder: RunDirectory) -> Mapping[str, str]:
    path = folder.root / FOLDER / JOBS
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return {what: str(number) for what, number in found.items()}


def _call(words: Sequence[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        raise SlurmError(
            f"there is no {words[0]} here: run this where Slurm is; `submit --dry-run` writes the scripts"
        ) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SlurmError(f"{words[0]} refused: {said[-1] if said else done.returncode}")
    return done.stdout


def _lines(words: Sequence[str]) -> list[str]:
    """What a command prints; nothing where it is not there or fails (a job that Slurm has forgotten)."""
    if not shutil.which(words[0]):
        return []
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout.split("\n") if not done.returncode else []
