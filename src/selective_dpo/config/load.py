"""Recipes in and out: YAML to the typed recipe, overrides from the command line, the resolved config.

Paths: a relative path in a recipe (the keys of `_PATHS`) means the file beside the recipe if there is one,
whatever the current folder is. Otherwise it stays as it is: a hub name, or a path from the current folder.
What comes from the command line always stays as it is.
"""

from __future__ import annotations

import copy
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from selective_dpo.config.messages import explain, inlined, node_at, one_line, options_of, show
from selective_dpo.config.schema import NAMED_TEMPLATES, Recipe
from selective_dpo.config.study import with_arms
from selective_dpo.errors import ConfigError

MAX_BYTES = 256 * 1024
"""Of a recipe's file. PyYAML reads about 100 KB/s."""

MAX_VALUES = 10_000
"""Values in a recipe, those that YAML's anchors repeat included."""

MAX_DEPTH = 32
"""Blocks and lists inside each other."""

MAX_CHARACTERS = 4096
"""Of one value: the longest path that there is."""

_MAX_KEY_CHARACTERS = 100

_MAX_INTEGER = 2**63 - 1

_PATHS = {
    "curriculum",
    "model.path",
    "model.tokenizer",
    "model.chat_template",
    "data.train.*.path",
    "data.test.*.path",
    "evaluate.reward_model",
    "evaluate.text",
    "launch.slurm.accelerate",
    "evaluate.guard.include_path",
    "evaluate.language_judge.model",
    "evaluate.language_judge.template",
    "evaluate.language_judge.cache",
    "evaluate.generation.source",
    "evaluate.benchmarks.*.source",
    "evaluate.controls.*.from",
    "evaluate.controls.*.source",
    "study.sources.*",
}

_ABSENT = "(absent)"


def load_recipe(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read the recipe file `path`, then apply `overrides`: pairs of a dotted key and its value as text.

    Values of overrides are read as YAML (`0.6`, `[41, 42]`, `{r: 8}`), but stay text where the recipe
    takes text. A list's entries are reached by their index: `data.train.0.split`.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or not YAML (with the line), holds a key
            twice; or a key or value is not one that a recipe can have. One line, with the remedy.
    """
    file = find_recipe(path)
    raw = _parse_yaml(_read_text(file), str(file))
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{file} holds {_kind_of(raw)}, not a recipe's keys; `selective-dpo init` writes one"
        )
    try:
        return make_recipe(raw, overrides, folder=file.resolve().parent)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error.__cause__


SHIPPED = Path(__file__).parents[1] / "recipes"
"""The recipes that come with the package; each can be named without a path."""


def find_recipe(path: str | Path) -> Path:
    """The file at `path`; where there is none, the shipped recipe of this name."""
    file, shipped = Path(path), SHIPPED / f"{path}.yaml"
    is_name = file.name == str(path) and file.suffix != ".yaml"
    return shipped if is_name and not file.exists() and shipped.is_file() else file


def make_recipe(
    raw: Mapping[str, Any], overrides: Sequence[tuple[str, str]] = (), *, folder: Path | None = None
) -> Recipe:
    """The recipe that a mapping describes, the arms of its `study` spelled out as controls.

    `folder` is what its relative paths are looked for in.

    Raises:
        ConfigError: as `load_recipe`.
    """
    values = _checked_copy(raw)
    if folder is not None:
        values = _with_paths(values, folder)
    for key, text in overrides:
        _override(values, key, text)
    try:
        recipe = Recipe.model_validate(values)
        return recipe if recipe.study.is_empty else Recipe.model_validate(with_arms(recipe))
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


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {file}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {file}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL byte, or half of a character, in the name
        raise ConfigError(f"cannot read the recipe {str(file)!r}: {error}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{file} has more than {MAX_BYTES // 1024} KB, which no recipe needs; is it one?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file} is not UTF-8 text (line {line}); save it as UTF-8") from error


def _parse_yaml(text: str, where: str) -> Any:
    """What YAML text holds; `where` is what a message calls the text."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where}: {len(text):,} characters are more than a recipe can hold")
    try:
        return yaml.load(text, _RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{where}{line}: {one_line(error.problem or error.context or 'not YAML')}"
        ) from error
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{where}, line {number}: a character that YAML does not allow") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is not YAML: blocks or lists stand too deep in each other") from error
    except Exception as error:
        # An explicit tag (`!!int x`) or a wild escape ends in whatever Python's own conversions raise.
        raise ConfigError(f"{where} is not YAML: a value cannot be read ({one_line(error)})") from error


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with three exceptions: `6e-6` is a number, a repeated key is an error, and
    anchors or numbers that would take forever are refused before any value is made."""

    def construct_document(self, node: yaml.Node) -> Any:
        _count_values(node, {})
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise _fault(key_node, f"key {key_node.value[:_MAX_KEY_CHARACTERS]!r} stands twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# PyYAML wants a dot and a signed exponent in a float, so `6e-6` would be text, and a learning rate with it.
# At each place only one branch can go on: no text makes the search try again and again.
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """The number of values below a node; a node that several aliases name counts each time."""
    if node in counts:
        if not counts[node]:
            raise _fault(node, "the recipe holds itself through a YAML anchor")
        return counts[node]
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > MAX_CHARACTERS:
            raise _fault(node, f"a value of {len(node.value):,} characters; {MAX_CHARACTERS:,} are the most")
        return 1
    counts[node] = 0
    is_mapping = isinstance(node, yaml.MappingNode)
    inside = [part for pair in node.value for part in pair] if is_mapping else node.value
    counts[node] = 1 + sum(_count_values(part, counts) for part in inside)
    if counts[node] > MAX_VALUES:
        raise _fault(node, f"the recipe holds more than {MAX_VALUES:,} values; are its anchors meant?")
    return counts[node]


def _fault(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _checked_copy(value: Any, key: str = "", depth: int = 0) -> Any:
    """A copy without parts that YAML's anchors share; `ConfigError` if it holds what is no JSON value."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{key[:80]}: more than {MAX_DEPTH} blocks or lists stand in each other")
    if isinstance(value, Mapping):
        return {
            _checked_key(name, key): _checked_copy(item, _join(key, name), depth + 1)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_checked_copy(item, _join(key, index), depth + 1) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}, but must be a finite number")
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise ConfigError(f"{key} is a whole number of more than 64 bits, which nothing here can be")
    if isinstance(value, str) and (fault := _fault_of_text(value)):
        raise ConfigError(f"{key} {fault}")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ConfigError(
        f"{key} is {_kind_of(value)} ({_unquoted(value)}), which a recipe has no use for; put it in quotes"
    )


def _checked_key(name: Any, block: str) -> str:
    if not isinstance(name, str):
        raise ConfigError(f"{_join(block, _unquoted(name))}: keys must be text; put it in quotes")
    if len(name) > _MAX_KEY_CHARACTERS or _fault_of_text(name):
        raise ConfigError(f"{_join(block, _unquoted(name))}: no key looks like this")
    return name


def _fault_of_text(text: str) -> str:
    """Why a text can stand in no recipe; empty if it can."""
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text):,} characters; {MAX_CHARACTERS:,} are the most"
    # Control characters have no place in a path or an option; half of a character has no bytes at all.
    bad = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs")), None)
    return "" if bad is None else f"holds the character U+{ord(bad):04X}, which is not text; remove it"


def _with_paths(value: Any, folder: Path, key: str = "") -> Any:
    """A copy in which the relative paths of files in `folder` are absolute."""
    if isinstance(value, dict):
        return {name: _with_paths(item, folder, _join(key, name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_paths(item, folder, _join(key, "*")) for item in value]
    is_path = isinstance(value, str) and any(fnmatchcase(key, pattern) for pattern in _PATHS)
    return _absolute(value, folder) if is_path else value


def _absolute(text: str, folder: Path) -> str:
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
    if not all(steps) or len(steps) > MAX_DEPTH or _fault_of_text(key):
        raise ConfigError(f"--{show(key)[1:-1]}: not a dotted key such as select.fraction")
    schema = inlined(Recipe.model_json_schema())
    block: Any = values
    for depth, step in enumerate(steps[:-1], start=1):
        if isinstance(block, dict) and block.get(step) is None:
            # `--score.lora.r 8` changes one of the default LoRA settings; it does not throw away the others.
            place = node_at(schema, steps[:depth])
            is_default = step not in block and "properties" not in place
            default = place.get("default") if is_default else None
            block[step] = copy.deepcopy(default) if isinstance(default, dict) else {}
        block = block[_index(block, step, key)]
        if not isinstance(block, dict | list):
            above = ".".join(steps[:depth])
            raise ConfigError(f"--{key}: {above} is {show(block)}, which has no keys below it")
    place = node_at(schema, steps)
    is_text = all(option.get("type") == "string" for option in options_of(place))
    block[_index(block, steps[-1], key)] = _checked_copy(
        text if is_text else _parse_yaml(text, f"--{key}"), key
    )


def _index(block: dict[str, Any] | list[Any], step: str, key: str) -> Any:
    """The step itself in a block, the number of the entry in a list."""
    if isinstance(block, dict):
        return step
    if not (step.isdecimal() and len(step) < 10 and int(step) < len(block)):
        raise ConfigError(f"--{key}: {step!r} is not an index of a list of {len(block)} (they count from 0)")
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


def _kind_of(value: object) -> str:
    names = {"NoneType": "nothing", "str": "text", "list": "a list"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def _unquoted(value: object) -> str:
    return str(value) if isinstance(value, bool) else show(value).strip('"')
