"""One line for each mistake in a recipe: the dotted key, what was given, what is allowed, what was meant.

What is allowed is read from JSON Schemas: that of the recipe's types, and those that pydantic makes of the
annotations of other libraries' settings. So one renderer serves both.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Schema = dict[str, Any]
"""A JSON Schema without references; empty: it allows anything, or nothing is known."""

_MAX_SHOWN = 60

_SECRET = re.compile(r"(^|_)(token|secret|password|credentials?|auth|api_?key)(_|$)", re.IGNORECASE)
"""What keys are called that hold secrets."""

_KINDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
"""JSON Schema's type -> what the value has to be."""

_LIMITS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}
"""JSON Schema's limit -> its name in a message."""


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The most telling of pydantic's complaints about a `model`, on one line, and how many are left."""
    schema = inlined(model.model_json_schema())
    complaints: dict[tuple[int | str, ...], ErrorDetails] = {}
    for one in error.errors(include_url=False):
        complaints.setdefault(_place(one, schema), one)
    # An unknown key goes first: it is often the misspelt form of one that pydantic reports as missing.
    ordered = sorted(complaints.items(), key=lambda item: item[1]["type"] != "extra_forbidden")
    more = f" (and {len(ordered) - 1} more to mend)" if len(ordered) > 1 else ""
    return _explain_one(*ordered[0], schema) + more


def misfit(key: str, given: object, node: Schema) -> str:
    """The line for a value that `node`, the schema of its place, does not allow."""
    if isinstance(given, str) and "pattern" in node and "description" in node:
        return f"{key} is {show(given)}, but must fit its meaning: {_meaning(node)}"
    options = options_of(node)
    allowed = " or ".join(dict.fromkeys(_allowed(option, given) for option in options))
    hint = ""
    if isinstance(given, str):
        hint = did_you_mean(given, [name for option in options for name in _choices(option)])
    elif isinstance(given, bool | int | float) and any(option.get("type") == "string" for option in options):
        is_bool = isinstance(given, bool)
        reason = "YAML reads a bare yes, no, on or off as true or false, so " if is_bool else ""
        hint = f"; {reason}put it in quotes"
    return f"{key} is {show(given)}, but must be {allowed}{hint}"


def show(value: object) -> str:
    """A value as a short JSON text on one line."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # such as a number of too many digits
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def one_line(error: object) -> str:
    """The message of an error or warning on one line."""
    return " ".join(str(error).split())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or nothing if none is close."""
    spelling = {item.lower().replace("-", "_"): item for item in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), spelling, n=1, cutoff=0.6)
    return f"; did you mean {spelling[close[0]]!r}?" if close else ""


def inlined(schema: Schema) -> Schema:
    """A JSON Schema with each reference replaced by what it refers to."""
    definitions = schema.get("$defs", {})

    def copied(node: Any) -> Any:
        if isinstance(node, list):
            return [copied(item) for item in node]
        if not isinstance(node, dict):
            return node
        target = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
        return {
            name: copied(item) for name, item in {**target, **node}.items() if name not in ("$ref", "$defs")
        }

    return dict(copied(schema))


def options_of(node: Schema) -> list[Schema]:
    """The kinds of value that a place can have: one, but for a union."""
    return [one for option in node["anyOf"] for one in options_of(option)] if "anyOf" in node else [node]


def node_at(schema: Schema, path: Sequence[int | str]) -> Schema:
    """The schema of the value at `path`; empty where it describes none."""
    for step in path:
        schema = next((child for option in options_of(schema) if (child := _child(option, step))), {})
    return schema


def dotted_keys(schema: Schema, prefix: str = "") -> list[str]:
    """Every key of a block and of the blocks in it, such as `select.fraction`."""
    keys: list[str] = []
    for name, node in schema.get("properties", {}).items():
        keys += [prefix + name, *dotted_keys(node, f"{prefix}{name}.")]
    return keys


def _child(option: Schema, step: int | str) -> Schema:
    if option.get("type") == "array":
        # The entries of a pair, such as `select.band`, have one type.
        child = option.get("prefixItems", [option.get("items")])[0] if str(step).isdecimal() else None
    else:
        child = option.get("properties", {}).get(step, option.get("additionalProperties"))
    return child if isinstance(child, dict) else {}


def _place(complaint: ErrorDetails, schema: Schema) -> tuple[int | str, ...]:
    """Where the value stands. pydantic adds the names of a union's members, which are no keys."""
    path = complaint["loc"]
    if complaint["type"] == "extra_forbidden":
        return path
    return next(path[:end] for end in range(len(path), -1, -1) if node_at(schema, path[:end]))


def _explain_one(path: Sequence[int | str], complaint: ErrorDetails, schema: Schema) -> str:
    key = ".".join(str(step) for step in path) or "the recipe"
    node = node_at(schema, path)
    if complaint["type"] == "extra_forbidden":
        return _unknown_key(key, complaint["input"], node_at(schema, path[:-1]), schema)
    if complaint["type"] == "missing":
        return f"{key} is missing: {_meaning(node)}" if "description" in node else f"{key} is missing"
    if complaint["type"] == "value_error":
        problem = complaint["ctx"]["error"]
        return f"{key}: {problem}" if path else str(problem)
    return misfit(key, complaint["input"], node)


def _unknown_key(key: str, given: object, block: Schema, schema: Schema) -> str:
    parent, _, leaf = key.rpartition(".")
    known = [name for option in options_of(block) for name in option.get("properties", {})]
    elsewhere = [place for place in dotted_keys(schema) if place.rpartition(".")[2] == leaf]
    hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(leaf, known)
    if "quant" in leaf or leaf.startswith("load_in_"):
        hint = "; weights in 4 bits are model.quantization: 4bit"
    elif not hint and "trainer" in known:
        hint = f"; TRL's DPOConfig keys go below {parent}.trainer"
    # An unknown key may be meant for a secret, and what is printed ends in logs.
    is_secret = isinstance(given, str) and _SECRET.search(leaf)
    value = "; secrets belong into the environment (HF_TOKEN ...)" if is_secret else f" (given {show(given)})"
    place = f"known in {parent}" if parent else "known"
    return f"{key}: unknown key{value}{hint} ({place}: {', '.join(known)})"


def _allowed(option: Schema, given: object) -> str:
    choices, kind = _choices(option), option.get("type", "")
    if choices:
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if "properties" in option:
        return f"a block with keys of {', '.join(option['properties'])}"
    if kind == "object":
        value = option.get("additionalProperties")
        return f"a mapping of keys to {_allowed(value, None) if isinstance(value, dict) else 'values'}"
    if kind == "array":
        least, most = option.get("minItems", 0), option.get("maxItems")
        return f"a list of {most}" if most == least else f"a list of at least {least}" if least else "a list"
    if kind == "string" and option.get("minLength"):
        return "text that is not empty"
    if kind == "string" and "pattern" in option:
        return f"text like {option.get('examples', [option['pattern']])[0]}"
    limits = " and ".join(f"{word} {option[limit]:g}" for limit, word in _LIMITS.items() if limit in option)
    numbers = {"integer": int, "number": int | float}
    fits = kind in numbers and isinstance(given, numbers[kind]) and not isinstance(given, bool)
    return limits if limits and fits else f"{_KINDS.get(kind, 'another value')} {limits}".rstrip()


def _choices(option: Schema) -> list[str]:
    values = option.get("enum", [option["const"]] if "const" in option else [])
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def _meaning(node: Schema) -> str:
    return " ".join(node.get("description", "").split()).rstrip(".").replace("`", "")
