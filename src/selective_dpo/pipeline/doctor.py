"""`doctor`: checks of the environment and of a recipe before any work is done. Nothing is written.

What it refuses of model, settings and machine, a run refuses before its first result (`require_sound`). Of
many data it sees the beginning only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from selective_dpo.config import Recipe
from selective_dpo.engine.models import load_tokenizer
from selective_dpo.errors import SelectiveDPOError
from selective_dpo.evaluation.preflight import check_evaluation, policy_names
from selective_dpo.pipeline.checks import environment
from selective_dpo.pipeline.checks import model as models
from selective_dpo.pipeline.checks.check import Check, ok, refused
from selective_dpo.pipeline.checks.data import (
    FEW_ROWS,
    check_curriculum,
    check_pairs,
    check_source,
    check_template,
)
from selective_dpo.pipeline.planning.architecture import build_on_meta
from selective_dpo.pipeline.planning.device import Device, this_device
from selective_dpo.pipeline.planning.disk import disk_need
from selective_dpo.pipeline.planning.pricing import Models, models_of
from selective_dpo.pipeline.stages import Run

Found = TypeVar("Found")
P = ParamSpec("P")


def diagnose(recipe: Recipe | None = None) -> Iterator[Check]:
    """Check the environment and, where there is one, all that `recipe` names; one answer at a time.

    A check that needs what another did not find is left out: the first fault is the one to mend. Only
    configurations, tokenizers, first rows and the weights of a local model that fits into memory are loaded,
    and nothing from anywhere that the recipe does not name.
    """
    device = this_device()
    yield environment.check_python()
    yield from environment.check_packages()
    yield environment.check_device(device)
    yield environment.check_hub()
    if recipe is None:
        return
    sound = True
    for check in _checks(recipe, device):
        sound = sound and check.status != "FAIL"
        yield check
    sizes = _sizes(recipe)
    yield environment.check_disk(recipe, disk_need(recipe, sizes))
    if sizes is not None:
        yield models.check_memory(recipe, sizes, device)
    yield from _diagnose_data(recipe, sizes, device, sound=sound)


def require_sound(run: Run) -> None:
    """Refuse what `doctor` refuses of everything but the data: they are looked at when they are prepared.

    Of a run that has begun the disk is not looked at: it holds some of what it needs.

    Raises:
        SelectiveDPOError: the first check that fails.
    """
    recipe = run.recipe
    checks = list(_checks(recipe, this_device()))
    if not run.folder.is_claimed:
        checks.append(environment.check_disk(recipe, disk_need(recipe, _sizes(recipe))))
    for check in checks:
        if check.status == "FAIL":
            raise check.error()


def _checks(recipe: Recipe, device: Device) -> Iterator[Check]:
    """What `doctor` and a run look at alike."""
    yield environment.check_launch(recipe, device)
    yield environment.check_precision(recipe, device)
    yield from environment.check_optional_packages(recipe)
    for block in _trained_blocks(recipe):
        yield _guarded(f"{block}.trainer", models.check_trainer, recipe, block)
    yield _guarded("evaluate", _check_evaluation, recipe)
    yield _guarded("judge", models.check_judge, recipe)
    model, problem = _attempt("model", lambda: build_on_meta(recipe.model))
    if model is not None:
        yield _guarded("model", models.check_weights, recipe, model)
        yield models.check_positions(recipe, model)
        for block in _trained_blocks(recipe):
            yield _guarded(f"{block}.lora", models.check_adapter, recipe, block)
    elif problem is not None:
        yield problem
    tokenizer, problem = _attempt("tokenizer", lambda: load_tokenizer(recipe.model))
    if problem is not None:
        yield problem
    elif model is not None:
        yield models.check_tokenizer(tokenizer, model)


def _diagnose_data(recipe: Recipe, sizes: Models | None, device: Device, *, sound: bool) -> Iterator[Check]:
    sources = [check_source(source) for source in (*recipe.data.train, *recipe.data.test)]
    yield from (source.check for source in sources)
    sound = sound and all(source.check.status != "FAIL" for source in sources)
    pairs = [pair for source in sources for pair in source.pairs]
    if recipe.curriculum:
        trained = [pair for source in sources[: len(recipe.data.train)] for pair in source.pairs]
        check = _guarded("curriculum", check_curriculum, recipe.curriculum, trained)
        sound = sound and check.status != "FAIL"
        yield check
    tokenizer, problem = _attempt("tokenizer", lambda: load_tokenizer(recipe.model))
    if problem is not None or not pairs:
        return
    embedded = None if sizes is None else sizes.sizes.vocabulary
    try:
        for check in check_template(recipe, tokenizer, pairs, embedded):
            sound = sound and check.status != "FAIL"
            yield check
    except SelectiveDPOError as error:
        yield refused("template", error)
        return
    if sound and sizes is not None:
        yield _guarded("forward pass", models.check_forward, recipe, tokenizer, pairs, sizes.sizes, device)
    if sound and sum(source.rows for source in sources) <= FEW_ROWS:
        yield _guarded("pairs", check_pairs, recipe)


def _trained_blocks(recipe: Recipe) -> tuple[str, ...]:
    return ("train",) if recipe.curriculum else ("score", "train")


def _check_evaluation(recipe: Recipe) -> Check:
    check_evaluation(recipe.evaluate, has_test=bool(recipe.data.test))
    arms = ", ".join(policy_names(recipe.evaluate))
    return ok("evaluate", f"arms {arms}; {recipe.evaluate.generation.prompts:,} prompts to answer")


def _sizes(recipe: Recipe) -> Models | None:
    try:
        return models_of(recipe)
    except SelectiveDPOError:  # `check_adapter` and `build_on_meta` say so
        return None


def _guarded(name: str, check: Callable[P, Check], *args: P.args, **kwargs: P.kwargs) -> Check:
    """The check's answer; an error that the user has to mend is one."""
    try:
        return check(*args, **kwargs)
    except SelectiveDPOError as error:
        return refused(name, error)


def _attempt(name: str, make: Callable[[], Found]) -> tuple[Found | None, Check | None]:
    try:
        return make(), None
    except SelectiveDPOError as error:
        return None, refused(name, error)
