"""What is wrong with a recipe, in one line: the dotted key, what was given, what is allowed or was meant."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_GIVEN_CHARACTERS = 60

_SECRET = re.compile(r"(^|_)(token|secret|password|credentials?|auth|api_?key)(_|$)", re.IGNORECASE)
"""What keys are called that hold secrets."""

_ALLOWED = {
    "string_type": "text; put it in quotes",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
}
"""pydantic's type of error -> what the value has to be."""

_LIMITS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}
"""JSON Schema's word for a limit -> ours."""


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The most telling of pydantic's complaints about a `model`, on one line, and how many are left."""
    # An unknown key goes first: it is often the misspelt form of one that pydantic reports as missing.
    complaints = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    others = len(complaints) - 1
    more = f" (and {others} more to mend)" if others else ""
    return _explain_one(complaints[0], model) + more


def show(value: object) -> str:
    """A value as a short JSON text on one line."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # a key that JSON has not, digits beyond count, no end
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _GIVEN_CHARACTERS else text[:_GIVEN_CHARACTERS] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or nothing if none is close."""
    spelling = {item.lower().replace("-", "_"): item for item in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), spelling, n=1, cutoff=0.6)
    return f"; did you mean {spelling[close[0]]!r}?" if close else ""


def kind_at(model: type[BaseModel], path: Sequence[int | str]) -> Any:
    """The type of the value that stands at `path` in a `model`; None where the model has no such place."""
    kind: Any = model
    for step in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(step))
            kind = _without_none(field.annotation) if field else None
        elif get_origin(kind) in (tuple, dict) and kind:
            # tuple[X, ...] holds X at each index, dict[str, X] at each key; band's two entries are alike.
            arguments = get_args(kind)
            kind = _without_none(arguments[1] if get_origin(kind) is dict else arguments[0])
        else:
            return None
    return kind


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a `model` and of the blocks in it, such as `select.fraction`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        kind = _without_none(field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += dotted_keys(kind, f"{prefix}{name}.")
    return keys


def _explain_one(complaint: ErrorDetails, model: type[BaseModel]) -> str:
    path, kind, given = complaint["loc"], complaint["type"], complaint["input"]
    key = ".".join(str(step) for step in path) or "the recipe"
    context = complaint.get("ctx", {})
    block = kind_at(model, path[:-1])
    if kind == "extra_forbidden":
        return _unknown_key(key, given, block, model)
    if kind == "missing":
        meaning = _meaning(block, path[-1])
        return f"{key} is missing: {meaning}" if meaning else f"{key} is missing"
    if kind == "value_error":
        return f"{key}: {context['error']}" if path else str(context["error"])
    if kind == "invalid_key":
        return f"{key}: keys must be text; put it in quotes"
    if kind == "literal_error":
        choices = get_args(kind_at(model, path))
        hint = did_you_mean(given, choices) if isinstance(given, str) else ""
        return f"{key} is {show(given)}, but must be {context['expected']}{hint}"
    return f"{key} is {show(given)}, but must {_must(complaint, block, kind_at(model, path))}"


def _given(key: str, value: object) -> str:
    # An unknown key may be meant for a secret, and what is printed ends in logs.
    is_secret = isinstance(value, str) and _SECRET.search(key.rsplit(".", maxsplit=1)[-1])
    return "; secrets belong into the environment (HF_TOKEN ...)" if is_secret else f" (given {show(value)})"


def _unknown_key(key: str, given: object, block: Any, model: type[BaseModel]) -> str:
    parent, _, leaf = key.rpartition(".")
    known = list(block.model_fields)
    elsewhere = [place for place in dotted_keys(model) if place.rpartition(".")[2] == leaf]
    hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(leaf, known)
    if "quant" in leaf or leaf.startswith("load_in_"):
        hint = "; quantization is not supported yet"
    elif not hint and "trainer" in known:
        hint = f"; TRL's DPOConfig keys go below {parent}.trainer"
    place = f"known in {parent}" if parent else "known"
    return f"{key}: unknown key{_given(key, given)}{hint} ({place}: {', '.join(known)})"


def _must(complaint: ErrorDetails, block: Any, kind: Any) -> str:
    type_of_error, path = complaint["type"], complaint["loc"]
    if type_of_error in _ALLOWED:
        return f"be {_ALLOWED[type_of_error]}"
    if type_of_error == "model_type" and kind is not None:
        return f"be a block with keys of {', '.join(kind.model_fields)}"
    if type_of_error == "string_pattern_mismatch":
        return f"fit its meaning: {_meaning(block, path[-1])}"
    if type_of_error == "too_short":
        return f"be a list of at least {complaint['ctx']['min_length']}"
    if type_of_error == "too_long":
        return f"be a list of at most {complaint['ctx']['max_length']}"
    return f"be {_range(block, path[-1]) or complaint['msg'].removeprefix('Input should be ')}"


def _range(block: Any, name: int | str) -> str:
    # Both ends of a number's range, not only the one that was overstepped.
    if not (isinstance(block, type) and issubclass(block, BaseModel)):
        return ""
    schema = block.model_json_schema()["properties"].get(str(name), {})
    for option in schema.get("anyOf", [schema]):
        limits = [f"{word} {option[limit]:g}" for limit, word in _LIMITS.items() if limit in option]
        if limits:
            return " and ".join(limits)
    return ""


def _meaning(block: Any, name: int | str) -> str:
    if not (isinstance(block, type) and issubclass(block, BaseModel)) or str(name) not in block.model_fields:
        return ""
    return " ".join((block.model_fields[str(name)].description or "").split()).rstrip(".").replace("`", "")


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(option for option in get_args(annotation) if option is not type(None))
    return annotation
