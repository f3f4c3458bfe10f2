"""`doctor`: checks of the environment and of a recipe before any work is done. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from selective_dpo.config import Recipe
from selective_dpo.engine.models import load_tokenizer
from selective_dpo.errors import SelectiveDPOError
from selective_dpo.evaluation.preflight import check_evaluation, policy_names
from selective_dpo.pipeline.checks import environment
from selective_dpo.pipeline.checks import model as models
from selective_dpo.pipeline.checks.check import Check, fail, ok
from selective_dpo.pipeline.checks.data import check_source, check_template
from selective_dpo.pipeline.planning.architecture import build_on_meta
from selective_dpo.pipeline.planning.device import Device, this_device
from selective_dpo.pipeline.planning.disk import disk_need
from selective_dpo.pipeline.planning.pricing import Models, models_of

Found = TypeVar("Found")
P = ParamSpec("P")


def diagnose(recipe: Recipe | None = None) -> Iterator[Check]:
    """Check the environment and, where there is one, all that `recipe` names; one answer at a time.

    A check that needs what another did not find is left out: the first fault is the one to mend. Only
    configurations, tokenizers and first rows are loaded, and nothing from anywhere that the recipe does
    not name.
    """
    device = this_device()
    yield environment.check_python()
    yield from environment.check_packages()
    yield environment.check_device(device)
    yield environment.check_hub()
    if recipe is not None:
        yield from _diagnose_recipe(recipe, device)


def _diagnose_recipe(recipe: Recipe, device: Device) -> Iterator[Check]:
    yield environment.check_launch(recipe, device)
    yield environment.check_precision(recipe, device)
    yield from environment.check_optional_packages(recipe)
    for block in ("score", "train"):
        yield _guarded(f"{block}.trainer", models.check_trainer, recipe, block)
    yield _guarded("evaluate", _check_evaluation, recipe)
    yield _guarded("judge", models.check_judge, recipe)
    model, problem = _attempt("model", lambda: build_on_meta(recipe.model))
    if problem is not None:
        yield problem
    else:
        yield from _diagnose_model(recipe, model, device)
    yield environment.check_disk(recipe, disk_need(recipe, _sizes(recipe)))
    yield from _diagnose_data(recipe, model)


def _diagnose_model(recipe: Recipe, model: Any, device: Device) -> Iterator[Check]:
    yield models.check_weights(recipe, model)
    yield models.check_positions(recipe, model)
    for block in ("score", "train"):
        yield _guarded(f"{block}.lora", models.check_adapter, recipe, block)
    sizes = _sizes(recipe)
    if sizes is not None:
        yield models.check_memory(recipe, sizes, device)


def _diagnose_data(recipe: Recipe, model: Any) -> Iterator[Check]:
    pairs = []
    for source in (*recipe.data.train, *recipe.data.test):
        first = check_source(source)
        yield first.check
        pairs += list(first.pairs)
    tokenizer, problem = _attempt("tokenizer", lambda: load_tokenizer(recipe.model))
    if problem is not None:
        yield problem
        return
    if model is not None:
        yield models.check_tokenizer(tokenizer, model)
    if pairs:
        embedded = None if model is None else models.embedded_tokens(model)
        try:
            yield from check_template(recipe, tokenizer, pairs, embedded)
        except SelectiveDPOError as error:
            yield fail("template", str(error))


def _check_evaluation(recipe: Recipe) -> Check:
    check_evaluation(recipe.evaluate, has_test=bool(recipe.data.test))
    arms = ", ".join(policy_names(recipe.evaluate))
    return ok("evaluate", f"arms {arms}; {recipe.evaluate.generation.prompts:,} prompts to answer")


def _sizes(recipe: Recipe) -> Models | None:
    try:
        return models_of(recipe)
    except SelectiveDPOError:  # `check_adapter` and `build_on_meta` have said so
        return None


def _guarded(name: str, check: Callable[P, Check], *args: P.args, **kwargs: P.kwargs) -> Check:
    """The check's answer; an error that the user has to mend is one."""
    try:
        return check(*args, **kwargs)
    except SelectiveDPOError as error:
        return fail(name, str(error))


def _attempt(name: str, make: Callable[[], Found]) -> tuple[Found | None, Check | None]:
    try:
        return make(), None
    except SelectiveDPOError as error:
        return None, fail(name, str(error))
