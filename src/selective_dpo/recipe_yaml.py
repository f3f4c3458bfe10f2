"""YAML text to plain JSON values, with limits: a recipe that would take forever is refused instead."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from selective_dpo.errors import ConfigError
from selective_dpo.recipe_errors import show

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
