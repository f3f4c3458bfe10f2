"""What must be as it was when a run is gone on with: the content of its inputs, and how it is spread.

The recipe itself is compared field by field (`RunDirectory.require_unchanged`); here is what a recipe only
names, or does not hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from selective_dpo.artifacts import file_digest, read_json, write_json
from selective_dpo.data.sources import source_digest, source_label
from selective_dpo.data.templates import template_digest
from selective_dpo.data.tokenize import tokenizer_digest
from selective_dpo.engine.processes import this_process
from selective_dpo.errors import ConfigError, RunChangedError, name_some

if TYPE_CHECKING:
    from selective_dpo.pipeline.stages import Run

INPUTS = "inputs.json"
JUDGE = "judge"
"""What the judge is called there, before its name."""
_SHOWN = 12
"""Digits of a digest in a message."""


class Trained(Protocol):
    """A training's job."""

    @property
    def folder(self) -> Path:
        """Where its result is."""
        ...


def input_digests(run: Run) -> dict[str, str]:
    """SHA-256 of the content that the recipe names, by the key that names it."""
    recipe = run.recipe
    evaluate, prompts = recipe.evaluate, recipe.evaluate.generation.source
    has_judge = evaluate.judge != "none"
    sources = {"data.train": recipe.data.train, "data.test": recipe.data.test}
    return {
        f"model {recipe.model.path}": run.model_digest,
        f"tokenizer {recipe.model.tokenizer or recipe.model.path}": tokenizer_digest(run.tokenizer),
        f"chat template {recipe.model.chat_template or 'of the tokenizer'}": template_digest(run.tokenizer),
        **{
            f"{key}.{number} {source_label(source)}": source_digest(source)
            for key, listed in sources.items()
            for number, source in enumerate(listed)
        },
        **({f"curriculum {recipe.curriculum}": run.outside.digest} if run.outside else {}),
        **({f"{JUDGE} {evaluate.reward_model or evaluate.judge}": run.judge_digest} if has_judge else {}),
        **({f"evaluate.generation.source {prompts}": file_digest(Path(prompts))} if prompts else {}),
    }


def require_same_inputs(run: Run, inputs: Mapping[str, str]) -> None:
    """Refuse to go on with inputs of another content than the run began with.

    Names of inputs are the recipe's affair; a moved file is no other content.

    Raises:
        RunChangedError: each changed input is named, with its digest before and now.
    """
    path = run.folder.root / INPUTS
    if run.fresh or not path.is_file():
        return
    # By what they are for; where they lie may differ.
    before = {name.split()[0]: digest for name, digest in read_json(path).items()}
    changes = [
        f"{name}: SHA-256 {before[kind][:_SHOWN]} -> {digest[:_SHOWN]}"
        for name, digest in inputs.items()
        if (kind := name.split()[0]) in before and before[kind] != digest
    ]
    if changes:
        raise RunChangedError(
            f"{run.folder.root} was made from other inputs ({name_some(changes, limit=8)}): put them back, "
            "give this run another name, or pass --fresh to redo the stages that the change touches"
        )


def remember_inputs(run: Run, inputs: Mapping[str, str]) -> None:
    """Write down what the run is made from; the main process does."""
    path = run.folder.root / INPUTS
    if this_process().is_main_process and (not path.is_file() or read_json(path) != inputs):
        write_json(path, inputs)


def require_same_processes(complete: Iterable[Trained]) -> None:
    """Refuse to train beside the results of these complete jobs by another number of processes.

    The same settings on more processes are more pairs in an update: the results would not be of one kind.

    Raises:
        ConfigError: the numbers are named.
    """
    now = this_process().num_processes
    for job in complete:
        then = read_json(job.folder / "cost.json")["processes"]
        if then != now:
            raise ConfigError(
                f"{job.folder} was trained by {then} process(es), and now there are {now}, which with the "
                "same settings makes another number of pairs in an update: start as many as before, or set "
                "per_device_train_batch_size or gradient_accumulation_steps to match and pass --fresh"
            )
