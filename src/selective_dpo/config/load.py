"""Recipes in and out: YAML to the typed recipe, overrides from the command line, the resolved config.

Paths: a relative `path`, `tokenizer`, `chat_template`, `reward_model`, `source` or `curriculum` in a recipe
means the one beside the recipe if there is one, whatever folder the command is started in; else it is left as
it is, a hub name or a path from the current folder. What comes from the command line is always left as typed.
"""

from __future__ import annotations

import copy
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from selective_dpo.config import NAMED_TEMPLATES, Recipe
from selective_dpo.config.messages import explain, kind_at, show
from selective_dpo.errors import ConfigError

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


# ----------------------------------------------------------------------------------------------------
# YAML text to plain JSON values, with limits: a recipe that would take forever is refused instead.


MOST_BYTES = 256 * 1024
"""Of a recipe's file. PyYAML reads some 100 KB/s."""

MOST_VALUES = 10_000
"""Values in a recipe. A few anchors that name each other would make billions of them."""

MOST_LEVELS = 32
"""Of blocks and lists in each other."""

MOST_CHARACTERS = 4096
"""Of one text: the longest path there is."""

_MOST_KEY_CHARACTERS = 100

_MOST_DIGITS = 40

_MOST_MERGED = 100

_LARGEST_WHOLE = 2**63 - 1


def read_text(file: Path) -> str:
    """The text of a recipe's file.

    Raises:
        ConfigError: it is absent, cannot be read, is too large, or is not UTF-8 (with the line).
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {file}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {file}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL byte, or half of a character, in the name
        raise ConfigError(f"cannot read the recipe {str(file)!r}: {error}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{file} has more than {MOST_BYTES // 1024} KB, which no recipe needs; is it one?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file} is not UTF-8 text (line {line}); save it as UTF-8") from error


def parse_yaml(text: str, where: str) -> Any:
    """What YAML text holds, anchors and all; `where` is what a message calls the text.

    Raises:
        ConfigError: it is not YAML (with the line), or holds a key twice.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{where}: {len(text):,} characters are more than a recipe can hold")
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
    except RecursionError as error:
        raise ConfigError(f"{where} is not YAML: blocks or lists stand too deep in each other") from error
    except Exception as error:
        # An explicit tag (`!!int x`) or a wild escape ends in whatever Python's own conversions raise.
        problem = " ".join(str(error).split())
        raise ConfigError(f"{where} is not YAML: a value cannot be read ({problem})") from error


def plain_copy(value: Any, key: str = "") -> Any:
    """A copy of a value without shared parts (YAML anchors make them), of JSON values only.

    Raises:
        ConfigError: it holds what a recipe cannot: another kind of value, a number that is not finite or does
            not fit, a text with control characters; or more than a recipe can.
    """
    return _Copier().copied(value, key, ())


def join(key: str, name: object) -> str:
    """The dotted key of `name` in the block at `key`."""
    return f"{key}.{name}" if key else str(name)


def word_for(value: object) -> str:
    """What kind of value it is, in words."""
    words = {"NoneType": "nothing", "str": "text", "list": "a list"}
    return words.get(type(value).__name__, f"a {type(value).__name__}")


def fault_of_text(text: str) -> str:
    """Why a text can stand in no recipe; empty if it can."""
    if len(text) > MOST_CHARACTERS:
        return f"has {len(text):,} characters; {MOST_CHARACTERS:,} are the most"
    # Control characters have no place in a path or an option; half of a character has no bytes at all.
    bad = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs")), None)
    return "" if bad is None else f"holds the character U+{ord(bad):04X}, which is not text; remove it"


class _Copier:
    """Copies and counts."""

    def __init__(self) -> None:
        self._values = 0

    def copied(self, value: Any, key: str, above: tuple[int, ...]) -> Any:
        self._values += 1
        if id(value) in above:
            raise ConfigError("the recipe holds itself through a YAML anchor")
        if len(above) > MOST_LEVELS:
            raise ConfigError(f"{key[:80]}: more than {MOST_LEVELS} blocks or lists stand in each other")
        if self._values > MOST_VALUES:
            raise ConfigError(f"the recipe holds more than {MOST_VALUES:,} values; are its anchors meant?")
        if isinstance(value, Mapping):
            inside = (*above, id(value))
            return {
                _key(name, key): self.copied(item, join(key, name), inside) for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            inside = (*above, id(value))
            return [self.copied(item, join(key, index), inside) for index, item in enumerate(value)]
        return _scalar(value, key)


def _scalar(value: Any, key: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}, but must be a finite number")
    if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
        raise ConfigError(f"{key} is a whole number of more than 64 bits, which nothing here can be")
    if isinstance(value, str) and (fault := fault_of_text(value)):
        raise ConfigError(f"{key} {fault}")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ConfigError(
        f"{key} is {word_for(value)} ({_as_text(value)}), which a recipe has no use for; put it in quotes"
    )


def _as_text(value: object) -> str:
    return str(value) if isinstance(value, bool) else show(value).strip('"')


def _key(name: Any, block: str) -> str:
    if not isinstance(name, str):
        raise ConfigError(f"{join(block, _as_text(name))}: keys must be text; put it in quotes")
    if len(name) > _MOST_KEY_CHARACTERS or fault_of_text(name):
        raise ConfigError(f"{join(block, _as_text(name))}: no key looks like this")
    return name


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `6e-6` is a number and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                problem = f"key {key_node.value[:_MOST_KEY_CHARACTERS]!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Merges (`<<: [*a, *a]`) of merges double with every level, before anything is there to count.
        for key_node, value_node in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            if (
                is_merge
                and isinstance(value_node, yaml.SequenceNode)
                and len(value_node.value) > _MOST_MERGED
            ):
                raise _too_much_merged(node)
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise _too_much_merged(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # Python reads hexadecimal and base-60 numbers of any length, the latter in quadratic time.
        if len(node.value) > _MOST_DIGITS:
            problem = f"a whole number of {len(node.value):,} digits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(super().construct_yaml_int(node))


_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _RecipeLoader.construct_yaml_int)

# PyYAML wants a dot and a signed exponent in a float, so `6e-6` would be text, and a learning rate with it.
# At each place only one branch can go on: no text makes the search try again and again.
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _too_much_merged(node: yaml.MappingNode) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, "too many blocks are merged", node.start_mark)
