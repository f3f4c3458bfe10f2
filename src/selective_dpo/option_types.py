"""Whether a recipe's value has the type that a library's option is annotated with."""

from __future__ import annotations

import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from selective_dpo.recipe_errors import did_you_mean

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping of keys to values",
    type(None): "null",
}


def fits(value: object, kind: Any) -> bool:
    """Whether `value`, of JSON types, can stand where `kind` is annotated.

    Stricter than Python: `true` is no number. Wider in two ways: a whole number is a number, and a list
    is a tuple. Where an enumeration is one of several types, text must be one of its values.
    """
    options = _options_of(kind)
    choices = _choices(options)
    if isinstance(value, str) and choices:
        return value in choices or any(value.startswith(prefix) for prefix in _open_choices(choices))
    return any(_fits_one(value, option) for option in options)


def phrase(kind: Any, value: object) -> str:
    """What `kind` allows, in words, with a hint at what was meant by `value`."""
    options = _options_of(kind)
    choices = _choices(options)
    words = [_WORDS.get(get_origin(option) or option, "") for option in options]
    if choices:
        words = ["one of " + ", ".join(sorted(choices)), *(word for word in words if word != "text")]
    listed = " or ".join(dict.fromkeys(word for word in words if word)) or "what only Python code can give"
    if isinstance(value, str):
        return listed + did_you_mean(value, choices)
    if isinstance(value, bool) and (choices or str in options):
        return f"{listed}; YAML reads a bare yes, no, on or off as true or false, so put it in quotes"
    return listed


def one_line(error: object) -> str:
    """The message of an error or warning on one line."""
    return " ".join(str(error).split())


def _options_of(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _choices(options: tuple[Any, ...]) -> list[str]:
    """The texts that are allowed, where only certain ones are."""
    choices: list[str] = []
    for option in options:
        if isinstance(option, type) and issubclass(option, Enum):
            choices += [str(member.value) for member in option]
        elif get_origin(option) is Literal:
            choices += [value for value in get_args(option) if isinstance(value, str)]
    return choices


def _open_choices(choices: list[str]) -> list[str]:
    # PEFT writes "pissa_niter_[number of iters]" for any text that starts so.
    return [choice[: choice.index("[")] for choice in choices if "[" in choice]


def _fits_one(value: object, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    container, inner = get_origin(kind) or kind, get_args(kind)
    if container is Literal:
        return value in inner
    if container is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if container is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if container in (list, tuple):
        return isinstance(value, list | tuple) and all(
            not inner or fits(item, inner[min(index, len(inner) - 1)]) for index, item in enumerate(value)
        )
    return isinstance(container, type) and isinstance(value, container)
