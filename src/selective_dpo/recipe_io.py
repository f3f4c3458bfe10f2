"""Recipes in and out: YAML to the typed recipe, overrides from the command line, the resolved config.

Paths: a relative `path`, `tokenizer`, `chat_template`, `reward_model`, `source` or `curriculum` in a recipe
means the one beside the recipe if there is one, whatever folder the command is started in; else it is left as
it is, a hub name or a path from the current folder. What comes from the command line is always left as typed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ValidationError

from selective_dpo.config import NAMED_TEMPLATES, Recipe
from selective_dpo.errors import ConfigError
from selective_dpo.recipe_errors import explain, kind_at, show
from selective_dpo.recipe_yaml import (
    MOST_LEVELS,
    fault_of_text,
    join,
    parse_yaml,
    plain_copy,
    read_text,
    word_for,
)

_ABSENT = "(absent)"


def load_recipe(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read the recipe file `path`, then apply `overrides`: pairs of a dotted key and its value as text.

    Values of overrides are read as YAML (`0.6`, `[41, 42]`, `{r: 8}`), but stay text where the recipe
    takes text. A list's entries are reached by their index: `data.train.0.split`.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or not YAML (with the line), holds a key
            twice; or a key or value is not one that a recipe can have. One line, with the remedy.
    """
    file = Path(path)
    raw = parse_yaml(read_text(file), str(file))
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds {word_for(raw)}, not a recipe's keys; see recipes/local-small.yaml")
    try:
        return make_recipe(raw, overrides, folder=file.resolve().parent)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error.__cause__


def make_recipe(
    raw: Mapping[str, Any], overrides: Sequence[tuple[str, str]] = (), *, folder: Path | None = None
) -> Recipe:
    """The recipe that a mapping describes; `folder` is what its relative paths are looked for in.

    Raises:
        ConfigError: as `load_recipe`.
    """
    values = plain_copy(raw)
    if folder is not None:
        _resolve_paths(values, folder)
    for key, text in overrides:
        _override(values, key, text)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, Recipe)) from error


def dump_config(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe, defaults included, as JSON values: what `config.json` holds."""
    return recipe.model_dump(mode="json")


def diff_config(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """How two dumped recipes differ, a line a field, such as `select.fraction: 0.5 -> 0.6`."""
    return _differences(old, new, "")


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, with each key's meaning; editors complete and check with it."""
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "selective-dpo recipe",
    }


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    evaluate = values.get("evaluate")
    places: list[tuple[Any, str]] = [
        (values, "curriculum"),
        (values.get("model"), "path"),
        (values.get("model"), "tokenizer"),
        (values.get("model"), "chat_template"),
        (evaluate, "reward_model"),
        (evaluate.get("generation") if isinstance(evaluate, dict) else None, "source"),
    ]
    data = values.get("data")
    for name in ("train", "test"):
        sources = data.get(name) if isinstance(data, dict) else None
        places += [(source, "path") for source in sources] if isinstance(sources, list) else []
    # Nothing is validated yet: what is not a block of text values is left for the validation to name.
    for block, name in places:
        if isinstance(block, dict) and isinstance(block.get(name), str):
            block[name] = _resolved(block[name], folder)


def _resolved(text: str, folder: Path) -> str:
    if not text or text in NAMED_TEMPLATES:
        return text
    try:
        if text.startswith("~"):
            return str(Path(text).expanduser())
        beside = folder / text
        return str(beside.resolve()) if not Path(text).is_absolute() and beside.exists() else text
    except (OSError, RuntimeError):
        return text  # no path at all, such as one of a user who is not known: the validation says so


def _override(values: dict[str, Any], key: str, text: str) -> None:
    steps = key.split(".")
    if not all(steps) or len(steps) > MOST_LEVELS or fault_of_text(key):
        raise ConfigError(f"--{show(key)[1:-1]}: not a dotted key such as select.fraction")
    node: Any = values
    for depth, step in enumerate(steps[:-1]):
        node = _step_into(node, step, steps[:depth], key)
    kind = kind_at(Recipe, steps)
    is_text = kind is str or get_origin(kind) is Literal
    value = plain_copy(text if is_text else parse_yaml(text, f"--{key}"), key)
    if isinstance(node, list):
        node[_index(node, steps[-1], key)] = value
    else:
        node[steps[-1]] = value


def _step_into(node: Any, step: str, above: list[str], key: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, step, key)]
    else:
        if step not in node:
            node[step] = _default_settings(above, step)
        elif node[step] is None:
            node[step] = {}
        child = node[step]
    if not isinstance(child, dict | list):
        raise ConfigError(f"--{key}: {'.'.join([*above, step])} is {show(child)}, which has no keys below it")
    return child


def _default_settings(above: list[str], step: str) -> dict[str, Any]:
    # `--score.lora.r 8` changes one of the default LoRA settings; it does not throw away the others.
    block = kind_at(Recipe, above)
    if isinstance(block, type) and issubclass(block, BaseModel) and step in block.model_fields:
        default = block.model_fields[step].get_default(call_default_factory=True, validated_data={})
        if isinstance(default, dict):
            return copy.deepcopy(default)
    return {}


def _index(items: list[Any], step: str, key: str) -> int:
    if not (step.isdecimal() and len(step) < 10 and int(step) < len(items)):
        raise ConfigError(f"--{key}: {step!r} is not an index of a list of {len(items)} (they count from 0)")
    return int(step)


def _differences(old: Any, new: Any, key: str) -> list[str]:
    fields: list[tuple[object, Any, Any]] | None = None
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = dict.fromkeys([*old, *new])
        fields = [(name, old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in names]
    elif isinstance(old, list) and isinstance(new, list) and _holds_blocks([*old, *new]):
        entries = enumerate(zip_longest(old, new, fillvalue=_ABSENT))
        fields = [(index, before, after) for index, (before, after) in entries]
    if fields is not None:
        return [line for name, one, other in fields for line in _differences(one, other, join(key, name))]
    before, after = (value if value is _ABSENT else json.dumps(value) for value in (old, new))
    return [f"{key}: {before} -> {after}"] if before != after else []


def _holds_blocks(items: Sequence[Any]) -> bool:
    return any(isinstance(item, Mapping) for item in items)
