"""The arms of a study, spelled out: a recipe's `study` block as controls and training seeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from selective_dpo.config.schema import DEFAULT_FRACTION, Recipe, SelectConfig
from selective_dpo.errors import ConfigError


def with_arms(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys as given, with `evaluate.controls` and `evaluate.training_seeds` for its `study`.

    Arms and their names:

    - `easiest-30` for each of the fractions, in the run's own order and by its criterion;
    - the order's name, `by-CRITERION`, `from-NAME`, `balanced-length` and `less-length` for the others, as
      large as the run's own selection;
    - `random-30`, shuffled, for each size among them and the run's own, unless that is all pairs.

    An arm that would be the run's own selection, or a control that is there, is left out.

    Raises:
        ConfigError: the run's own selection is not the easiest share; training seeds stand in both blocks; or
            a name is taken by another control.
    """
    given = recipe.model_dump(mode="json", exclude_unset=True)
    study = recipe.study
    given.pop("study", None)
    if study.is_empty:
        return given
    own, evaluate = recipe.select, recipe.evaluate
    if own.rule != "easiest" or own.count is not None:
        raise ConfigError(
            "study varies the easiest share: give select.rule easiest and select.fraction, not "
            f"{'select.count' if own.count is not None else own.rule}"
        )
    if study.training_seeds and evaluate.training_seeds:
        raise ConfigError("training_seeds stand in study and in evaluate: leave one out")
    fraction = DEFAULT_FRACTION if own.fraction is None else own.fraction
    own = own.model_copy(update={"fraction": fraction})
    arms = {_sized("easiest", each): own.model_copy(update={"fraction": each}) for each in study.fractions}
    arms |= {each: own.model_copy(update={"order": each, "seed": None}) for each in study.orders}
    arms |= {_named("by", each): own.model_copy(update={"aggregate": each}) for each in study.criteria}
    measured = {"aggregate": "mean", "allow_partial": False}
    arms |= {
        _named("from", Path(each).name): own.model_copy(update={**measured, "source": each})
        for each in study.sources
    }
    arms |= {"balanced-" + "-".join(by): own.model_copy(update={"balance": by}) for by in study.balance}
    arms |= {f"less-{each}": own.model_copy(update={"residual": each}) for each in study.residual}
    arms |= {
        _sized("random", each): SelectConfig(rule="random", fraction=each, order="shuffled")
        for each in sorted({fraction, *study.fractions})
        if each < 1.0
    }
    there = [own, *evaluate.controls.values()]
    new = {name: select for name, select in arms.items() if select not in there}
    if taken := [name for name in new if name in evaluate.controls]:
        raise ConfigError(f"study makes an arm {taken[0]!r}, and evaluate.controls has another: rename that")
    block = given.setdefault("evaluate", {})
    controls = {name: select.model_dump(mode="json", exclude_defaults=True) for name, select in new.items()}
    block["controls"] = {**block.get("controls", {}), **controls}
    if study.training_seeds:
        block["training_seeds"] = list(study.training_seeds)
    return given


def _sized(rule: str, fraction: float) -> str:
    return f"{rule}-{100 * fraction:g}"


def _named(what: str, name: str) -> str:
    """A name of a folder: whatever else is in `name` becomes a dash."""
    return f"{what}-{re.sub('[^A-Za-z0-9._-]+', '-', name)}"
