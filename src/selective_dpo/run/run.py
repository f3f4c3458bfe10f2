"""The commands of a run as plain functions: each brings the run up to its stage (see `run.stages`).

Each has the run to itself meanwhile, and raises `BusyError` where another process is at work on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selective_dpo.config import Recipe
from selective_dpo.config.load import make_recipe
from selective_dpo.config.trainer_options import check_recipe_options
from selective_dpo.curriculum.records import Records
from selective_dpo.curriculum.table import Curriculum, require_dataset
from selective_dpo.difficulty.protocols import planned_runs
from selective_dpo.difficulty.scorer import collect_records
from selective_dpo.distributed.launch import processes_of_passes, relaunch, relaunch_each, under_a_launcher
from selective_dpo.distributed.processes import leave_group, this_process, wait_for_everyone
from selective_dpo.errors import ConfigError, name_some
from selective_dpo.evaluation.evaluate import check_evaluation
from selective_dpo.report.page import closing, write_report
from selective_dpo.report.study import STUDY, study_findings, study_text
from selective_dpo.run.doctor import require_sound
from selective_dpo.run.folder import RunDirectory, alone
from selective_dpo.run.hub import push_policy
from selective_dpo.run.keys import Run
from selective_dpo.run.stages import bring_up, build_curricula, complete, scorer_results
from selective_dpo.run.submit import missing_scorers
from selective_dpo.storage.artifacts import replacing, write_json
from selective_dpo.training.arguments import PURE

if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)


def open_run(recipe: Recipe, *, fresh: bool = False, say: Callable[[str], object] = print) -> Run:
    """The run that `recipe` names; nothing is written yet.

    With `fresh`, a recipe that differs from the one the folder was made with is accepted: stages whose
    inputs did not change are kept, the others are made again. Before the first result is made, all that
    `doctor` refuses is refused (see `require_sound`).

    Raises:
        ConfigError: settings that TRL, transformers or PEFT would refuse or ignore; an evaluation that
            cannot be done.
        RunChangedError: the folder belongs to another recipe, and not `fresh`.
    """
    check_recipe_options(recipe)
    check_evaluation(recipe.evaluate, has_test=bool(recipe.data.test))
    if not recipe.model.master_weights and this_process().is_main_process:
        logger.warning("WARNING: %s (model.master_weights)", PURE.format(dtype=recipe.model.dtype))
    run = Run(recipe, RunDirectory.of(recipe), say, fresh, check=require_sound)
    if not fresh:
        run.folder.require_same_recipe(recipe)
    wait_for_everyone()
    return run


def prepare(run: Run) -> None:
    """Pairs and, where anything needs it, the starting model's log-probabilities."""
    with alone(run.folder.root):
        is_measured = not run.recipe.curriculum and run.recipe.score.protocol != "one-step"
        bring_up(run, "reference" if is_measured else "pairs")


def score(run: Run, *, only: tuple[str, ...] = ()) -> None:
    """Measure the difficulty of every pair; what is already measured is kept.

    With `only`, the scorers of that name, beside other commands that measure others.

    Raises:
        ConfigError: `only` names a scorer that the protocol does not have, or there are none.
    """
    if run.recipe.curriculum:
        raise ConfigError(
            f"nothing to score: the difficulty comes from {run.recipe.curriculum}; use `run`, or leave the "
            "recipe's curriculum out"
        )
    planned = {scorer.name: scorer for scorer in planned_runs(run.recipe.score)}
    if unknown := sorted(set(only) - set(planned)):
        raise ConfigError(f"no scorer named {name_some(unknown)}; this recipe has {', '.join(planned)}")
    with alone(run.folder.root, but_for_scorers=bool(only)):
        if only:
            bring_up(run, "reference")
            complete(run, scorer_results(run, [planned[name] for name in planned if name in only]))
        else:
            bring_up(run, "scores")


def curriculum(run: Run) -> Curriculum:
    """Difficulty, agreement, selection and order.

    With `select.allow_partial` from the records that are there; else missing scorers are run first.
    """
    with alone(run.folder.root):
        if run.recipe.select.allow_partial:
            build_curricula(run)
        else:
            bring_up(run, "curriculum")
        return Curriculum.load(run.folder.curriculum)


def train(run: Run) -> Path:
    """The policy trained along the curriculum; returns its folder."""
    with alone(run.folder.root):
        bring_up(run, "policy")
        push(run)
    return run.folder.policy


def evaluate(run: Run) -> Path:
    """Held-out pairs and sampled answers of every arm; returns the evaluation's folder."""
    with alone(run.folder.root):
        bring_up(run, "evaluation")
    return run.folder.evaluation


def report(run: Run) -> Path:
    """Write `report.html` from whatever stages are complete; a curriculum is the least.

    It only reads the stages, so it may be written while another command works on later ones.
    """
    path = run.folder.report
    if this_process().is_main_process:
        path = write_report(run.folder.root)
        run.tell(f"report: {path}")
    return path


def run_all(run: Run) -> Path:
    """All stages; returns the report's path."""
    with alone(run.folder.root):
        bring_up(run, "evaluation")
        path = report(run)
        if this_process().is_main_process:
            run.tell("\n" + "\n".join(closing(run.folder.root)))
        push(run)  # last: the hub may fail, and everything else is there then
    return path


def study(run: Run) -> Path:
    """All stages, then what the arms came to beside their random controls (see `report.study`).

    Raises:
        ConfigError: the recipe has no arms beside its own.
    """
    if len(run.arms) == 1:
        raise ConfigError("nothing to study: give the recipe a study block, or evaluate.controls")
    path = run_all(run)
    if this_process().is_main_process:
        found = study_findings(run.folder.root)
        write_json(run.folder.root / STUDY, found.as_json())
        run.tell("\n" + study_text(found))
        run.tell(f"  {run.folder.root / STUDY}")
    return path


def push(run: Run) -> None:
    """Send the finished policy to the hub, where the recipe asks for it and it was not done yet."""
    if run.recipe.train.hub_id and this_process().is_main_process:
        config = run.recipe.train
        if push_policy(run.folder, config.hub_id, private=config.hub_private):
            run.tell(f"policy: pushed to {config.hub_id}")


def run_verb(
    verb: str, recipe: Recipe, *, fresh: bool, only: tuple[str, ...], command_line: Sequence[str]
) -> int:
    """What `selective-dpo VERB RECIPE` does; returns the exit code.

    With `launch.processes` above 1 the same command is started again in so many processes, after the
    pairs are prepared here: what a user can mend shows before anything is launched. With `launch.workers`
    above 1 the passes that no scorer trains come first, on the GPUs of all workers; then, with several
    processes each, the scorers.
    """
    run = open_run(recipe, fresh=fresh)
    launch = recipe.launch
    passes = processes_of_passes(launch.workers, launch.processes)
    if passes > 1 and not under_a_launcher():
        with alone(run.folder.root, but_for_scorers=bool(only)):
            bring_up(run, "pairs")
        if verb == "prepare":
            return relaunch(command_line, processes=passes)
        if verb != "report" and not only and launch.workers > 1:
            # What `--fresh` accepts was accepted when the run was opened.
            words = [word for word in command_line[1:] if word not in ("--fresh", "--allow-partial")]
            if code := _run_passes(run, words, passes) or _score_in_groups(run, words):
                return code
        if launch.processes > 1:
            return relaunch(command_line, processes=launch.processes)
    actions: dict[str, Callable[[], object]] = {
        "prepare": lambda: prepare(run),
        "score": lambda: score(run, only=only),
        "curriculum": lambda: curriculum(run),
        "train": lambda: train(run),
        "evaluate": lambda: evaluate(run),
        "report": lambda: report(run),
        "run": lambda: run_all(run),
        "study": lambda: study(run),
    }
    actions[verb]()
    leave_group()
    return 0


def _run_passes(run: Run, words: Sequence[str], processes: int) -> int:
    """The reference's pass, and with one-step all of scoring, unless they are done; the exit code."""
    if run.recipe.curriculum or run.recipe.score.check:  # whose scorers are trained by one process each
        return 0
    verb, results = "prepare", [run.folder.reference]
    if run.recipe.score.protocol == "one-step":
        verb, results = "score", [run.folder.scores(each) for each in run.scorer_runs]
    if all((folder / "manifest.json").is_file() for folder in results):
        return 0
    return relaunch([verb, *words], processes=processes)


def _score_in_groups(run: Run, words: Sequence[str]) -> int:
    """`score --only` each scorer that is missing, `launch.workers` of them at a time; the exit code.

    `words` are the recipe and options.
    """
    names, launch = missing_scorers(run), run.recipe.launch
    if launch.processes == 1 or len(names) < 2:
        return 0
    commands = [["score", *words, "--only", name] for name in names]
    groups = min(launch.workers, len(names))
    return relaunch_each(commands, processes=launch.processes, groups=groups)


def score_difficulty(
    model: str | Path,
    pairs: str | Path | Dataset,
    *,
    output_dir: str | Path,
    score: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    workers: int = 1,
) -> Records:
    """Held-out losses of preference pairs for a model: the records a curriculum is built from.

    Args:
        model: Hub name or folder of the starting (SFT) policy.
        pairs: A file, a `datasets` folder, or a `datasets.Dataset` of preference pairs.
        output_dir: The run folder; what is already measured there is not measured again.
        score, data: Recipe keys of these blocks, such as `{"protocol": "fast", "trainer": {...}}`.
        dtype: What the weights are loaded as.
        workers: Scorers trained at a time.

    Raises:
        SelectiveDPOError: anything that the caller has to mend.
    """
    folder = Path(output_dir)
    with alone(folder):
        recipe = make_recipe(
            {
                "name": folder.name,
                "output_dir": str(folder.parent),
                "model": {"path": str(model), "dtype": dtype},
                "data": {**(data or {}), "train": [{"path": str(_on_disk(pairs, folder))}]},
                "score": dict(score or {}),
                "launch": {"workers": workers},
            }
        )
        run = open_run(recipe, say=lambda line: None)
        bring_up(run, "scores")
        return collect_records([run.folder.scores(scorer) for scorer in run.scorer_runs])


def _on_disk(pairs: str | Path | Dataset, folder: Path) -> str | Path:
    if isinstance(pairs, str | Path):
        return pairs
    require_dataset(pairs)
    path = folder / "input.parquet"
    with replacing(path) as partial:
        pairs.to_parquet(str(partial))
    return path
