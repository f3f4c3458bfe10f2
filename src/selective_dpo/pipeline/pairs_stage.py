"""The first stage: sources become prepared pairs, once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selective_dpo.artifacts import is_complete
from selective_dpo.config import SourceConfig
from selective_dpo.data.prepare import pairs_key, prepare_pairs
from selective_dpo.data.store import prompt_keys
from selective_dpo.engine.processes import this_process, wait_for_everyone
from selective_dpo.progress import Progress

if TYPE_CHECKING:
    from selective_dpo.pipeline.stages import Run


def ensure_prepared(run: Run, sources: Sequence[SourceConfig], folder: Path, *, exclude: Path | None) -> None:
    """Read, check and tokenize `sources` into `folder`, unless that was done with the same inputs.

    `exclude` is the folder of the training pairs when held-out ones are prepared: a prompt in both
    would not be held out. The main process works, the others wait.
    """
    excluded = prompt_keys(exclude) if exclude is not None else frozenset()
    data, tokenizer = run.recipe.data, run.tokenizer
    if exclude is not None:
        # A limit on the training rows is not one on the held-out ones.
        data = data.model_copy(update={"max_pairs": 0})
    key = pairs_key(sources, data, tokenizer, exclude_prompts=excluded)
    if is_complete(folder, key=key):
        return
    wait_for_everyone()
    if this_process().is_main_process:
        with Progress(0, folder.name, unit="rows") as progress:
            summary = prepare_pairs(
                sources,
                data,
                tokenizer,
                folder,
                key=key,
                exclude_prompts=excluded,
                progress=progress.advance,
            )
        run.tell(f"{folder.name}: {summary.describe()}")
    wait_for_everyone()
