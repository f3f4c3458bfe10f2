"""Which results of a run are there already, made from the same inputs. Asking changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from selective_dpo.errors import ArtifactError
from selective_dpo.run.keys import (
    Run,
    curriculum_key,
    evaluation_key,
    has_curriculum,
    imported_inputs,
    prepared_key,
    record_digests,
    reference_key,
    scorer_job,
    training_job,
    trainings,
)
from selective_dpo.storage.artifacts import MANIFEST, is_complete

P = ParamSpec("P")


def has_results(run: Run) -> bool:
    """Whether anything at all is published in the run's folder."""
    return (run.folder.pairs / MANIFEST).is_file()


def complete_results(run: Run) -> frozenset[Path]:
    """The folders (for a curriculum, the one that holds it) that the run would use as they are.

    A result whose inputs would be made again is not among them, even if it came out the same.

    Raises:
        ModelError, DataError: tokenizer or data cannot be had, so their digests are not known.
    """
    found: set[Path] = set()
    if not _has_pairs(run, found):
        return frozenset(found)
    inputs = _curriculum_inputs(run, found)
    if inputs is None:
        return frozenset(found)
    built = {
        name: folder
        for name, (select, folder) in run.arms.items()
        if has_curriculum(folder, curriculum_key(inputs, select))
    }
    found |= set(built.values())
    # Where difficulty is imported, the reference comes after the curricula: it is that of the selected pairs.
    if run.recipe.curriculum and (len(built) < len(run.arms) or not _has_references(run, found)):
        return frozenset(found)
    planned = trainings(run)
    jobs = [training_job(run, name) for name, training in planned.items() if training.curriculum in found]
    if sum(_note(found, job.folder, lambda key: key, job.key) for job in jobs) == len(planned):
        _note(found, run.folder.evaluation, evaluation_key, run)
    return frozenset(found)


def _curriculum_inputs(run: Run, found: set[Path]) -> dict[str, str] | None:
    """What the curricula are made from; None while it is not complete."""
    if run.outside is not None:
        return imported_inputs(run, run.outside.digest)
    if not _has_references(run, found):
        return None
    jobs = [scorer_job(run, scorer) for scorer in run.scorer_runs]
    complete = [job for job in jobs if is_complete(job.folder, key=job.key)]
    found |= {job.folder for job in complete}
    return record_digests(complete) if len(complete) == len(jobs) else None


def _has_pairs(run: Run, found: set[Path]) -> bool:
    data, folder = run.recipe.data, run.folder
    if not _note(found, folder.pairs, prepared_key, run, data.train, exclude=None):
        return False
    return not data.test or _note(
        found, folder.test_pairs, prepared_key, run, data.test, exclude=folder.pairs
    )


def _has_references(run: Run, found: set[Path]) -> bool:
    folder = run.folder
    complete = _note(found, folder.reference, reference_key, run, folder.pairs)
    if run.recipe.data.test:
        complete &= _note(found, folder.test_reference, reference_key, run, folder.test_pairs)
    return complete


def _note(found: set[Path], folder: Path, key: Callable[P, str], *args: P.args, **kwargs: P.kwargs) -> bool:
    """Add `folder` to `found` if it is complete; its key is worked out only where there is a manifest."""
    try:
        complete = (folder / MANIFEST).is_file() and is_complete(folder, key=key(*args, **kwargs))
    except ArtifactError:
        return False
    if complete:
        found.add(folder)
    return complete
