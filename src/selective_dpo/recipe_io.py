"""Recipes in and out: YAML to the typed recipe, overrides from the command line, the resolved config.

Paths: a relative `path`, `tokenizer`, `chat_template`, `reward_model` or `source` in a recipe means the one
beside the recipe if there is one, whatever folder the command is started in; else it is left as it is, a
hub name or a path from the current folder. What comes from the command line is always left as typed.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from selective_dpo.config import Recipe
from selective_dpo.errors import ConfigError
from selective_dpo.recipe_errors import explain, kind_at, show

_BUILT_IN_TEMPLATES = ("chatml", "gemma-system")
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
    raw = _parse_yaml(_read_text(file), str(file))
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds {_word_for(raw)}, not a recipe's keys; see recipes/local-small.yaml")
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
    values = _plain_copy(raw, "")
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


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `6e-6` is a number and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                problem = f"key {key_node.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# PyYAML wants a dot and a signed exponent in a float, so `6e-6` would be text, and a learning rate with it.
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _read_text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {file}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {file}: {error.strerror or error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file} is not UTF-8 text (line {line}); save it as UTF-8") from error


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "not YAML").split())
        raise ConfigError(f"{where}{line}: {problem}") from error
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{where}, line {number}: a character that YAML does not allow") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _plain_copy(value: Any, key: str) -> Any:
    """A copy without shared parts (YAML anchors make them), of JSON values only."""
    try:
        return _copied(value, key)
    except RecursionError as error:
        raise ConfigError("the recipe holds itself through a YAML anchor") from error


def _copied(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{_join(key, name)}: keys must be text; put it in quotes")
        return {name: _copied(item, _join(key, name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item, _join(key, index)) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}, but must be a finite number")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ConfigError(
        f"{key} is {_word_for(value)} ({value}), which a recipe has no use for; put it in quotes"
    )


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    evaluate = values.get("evaluate")
    places: list[tuple[Any, str]] = [
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
    if not text or text in _BUILT_IN_TEMPLATES:
        return text
    if text.startswith("~"):
        return str(Path(text).expanduser())
    beside = folder / text
    return str(beside.resolve()) if not Path(text).is_absolute() and beside.exists() else text


def _override(values: dict[str, Any], key: str, text: str) -> None:
    steps = key.split(".")
    if not all(steps):
        raise ConfigError(f"--{key}: not a dotted key such as select.fraction")
    node: Any = values
    for depth, step in enumerate(steps[:-1]):
        node = _step_into(node, step, steps[:depth], key)
    kind = kind_at(Recipe, steps)
    is_text = kind is str or get_origin(kind) is Literal
    value = text if is_text else _plain_copy(_parse_yaml(text, f"--{key}"), key)
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
    if not step.isdecimal() or int(step) >= len(items):
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
        return [line for name, one, other in fields for line in _differences(one, other, _join(key, name))]
    before, after = (value if value is _ABSENT else json.dumps(value) for value in (old, new))
    return [f"{key}: {before} -> {after}"] if before != after else []


def _holds_blocks(items: Sequence[Any]) -> bool:
    return any(isinstance(item, Mapping) for item in items)


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _word_for(value: object) -> str:
    words = {"NoneType": "nothing", "str": "text", "list": "a list"}
    return words.get(type(value).__name__, f"a {type(value).__name__}")
