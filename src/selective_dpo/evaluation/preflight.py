"""What is wrong with an evaluation, found before anything is trained for it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from selective_dpo.config import EvaluateConfig, GenerationConfig
from selective_dpo.config.base import file_name
from selective_dpo.core.results import REFERENCE, SELECTED, repeat_name
from selective_dpo.errors import ConfigError, DataError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_evaluation(config: EvaluateConfig, *, has_test: bool) -> None:
    """Check what the `evaluate` block asks for; `has_test` says whether there are held-out pairs.

    Raises:
        ConfigError: a control's name cannot be used, there is nothing to answer, or an option has no effect.
        DataError: the file of prompts is not there.
    """
    check_arm_names(policy_names(config))
    generation = config.generation
    if generation.prompts == 0:
        if generation.source:
            raise ConfigError(
                "evaluate.generation.source has no effect without evaluate.generation.prompts above 0"
            )
        return
    check_generation(generation)
    if generation.source and not Path(generation.source).is_file():
        raise DataError(f"evaluate.generation.source: no file {generation.source}")
    if not generation.source and not has_test:
        raise ConfigError(
            "evaluate.generation.prompts is above 0, but there are no prompts: give data.test or "
            "evaluate.generation.source"
        )


def policy_names(config: EvaluateConfig) -> list[str]:
    """Of all that is trained: the run's own arm, its repeats with other seeds, the controls."""
    return [SELECTED, *map(repeat_name, config.training_seeds), *config.controls]


def check_arm_names(names: Iterable[str]) -> None:
    """Raise `ConfigError` where an arm's name is no file name, stands twice or is the starting model's."""
    taken = {REFERENCE}
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"evaluate.controls: {name!r} cannot be a name; use letters, digits, '.', '_' and '-'"
            )
        try:
            file_name(name)
        except ValueError as error:
            raise ConfigError(f"evaluate.controls: {error}") from None
        if name in taken:
            raise ConfigError(f"evaluate.controls: the name {name!r} is taken; choose another")
        taken.add(name)


def check_generation(config: GenerationConfig) -> None:
    """Raise `ConfigError` where greedy decoding leaves an option without effect."""
    if config.temperature > 0.0:
        return
    if config.samples > 1:
        raise ConfigError("generation.samples above 1 has no effect at temperature 0: all would be the same")
    if config.top_p < 1.0:
        raise ConfigError("generation.top_p has no effect at temperature 0; leave it out")
