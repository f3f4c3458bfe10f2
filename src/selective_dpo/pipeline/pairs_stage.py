"""The first stage: sources become prepared pairs, once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selective_dpo.artifacts import is_complete
from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data.prepare import pairs_key, prepare_pairs
from selective_dpo.data.store import prompt_keys
from selective_dpo.engine.processes import making, this_process, wait_for_everyone
from selective_dpo.progress import Progress

if TYPE_CHECKING:
    from selective_dpo.pipeline.stages import Run


def ensure_prepared(run: Run, sources: Sequence[SourceConfig], folder: Path, *, exclude: Path | None) -> None:
    """Read, check and tokenize `sources` into `folder`, unless that was done with the same inputs.

    `exclude` is the folder of the training pairs when held-out ones are prepared: a prompt in both
    would not be held out. The main process works, the others wait.
    """
    key = prepared_key(run, sources, exclude=exclude)
    if is_complete(folder, key=key):
        return
    if exclude is None:  # the training pairs are a run's first result
        run.check(run)
    with making(folder):
        if not is_complete(folder, key=key):
            wait_for_everyone()
            _prepare(run, sources, folder, key=key, exclude=exclude)
            wait_for_everyone()


def _prepare(
    run: Run, sources: Sequence[SourceConfig], folder: Path, *, key: str, exclude: Path | None
) -> None:
    if not this_process().is_main_process:
        return
    with Progress(0, folder.name, unit="rows") as progress:
        summary = prepare_pairs(
            sources,
            _limits(run, exclude),
            run.tokenizer,
            folder,
            key=key,
            exclude_prompts=_excluded(exclude),
            progress=progress.advance,
        )
    run.tell(f"{folder.name}: {summary.describe()}")


def prepared_key(run: Run, sources: Sequence[SourceConfig], *, exclude: Path | None) -> str:
    """The key that `ensure_prepared` publishes under. It reads the sources' bytes and writes nothing."""
    return pairs_key(sources, _limits(run, exclude), run.tokenizer, exclude_prompts=_excluded(exclude))


def _limits(run: Run, exclude: Path | None) -> DataConfig:
    # A limit on the number of training rows is not one on the held-out ones.
    data = run.recipe.data
    return data if exclude is None else data.model_copy(update={"max_pairs": 0})


def _excluded(exclude: Path | None) -> frozenset[str]:
    return frozenset() if exclude is None else prompt_keys(exclude)
