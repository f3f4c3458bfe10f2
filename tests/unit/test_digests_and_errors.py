"""One spelling for equal values, and errors that name what is wrong."""

from __future__ import annotations

import hashlib

import pytest

from selective_dpo import errors
from selective_dpo.errors import SelectiveDPOError, name_some
from selective_dpo.storage.digests import canonical_json, digest


def test_equal_values_have_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5,null]}'
    assert canonical_json({"a": "é", "b": [1, 2.5, None]}) == canonical_json({"b": [1, 2.5, None], "a": "é"})


def test_any_python_text_has_a_spelling_and_other_text_another() -> None:
    assert canonical_json("\ud800") == '"\\ud800"'  # a lone surrogate, which UTF-8 cannot encode
    assert digest("\ud800") != digest("\\ud800")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, -float("inf")]])
def test_what_json_has_no_word_for_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(value)


def test_the_digest_is_sha_256_of_the_spelling() -> None:
    assert digest(["a", 1]) == hashlib.sha256(b'["a",1]').hexdigest()
    assert len(digest(None)) == 64


def test_every_error_of_ours_is_the_users_to_mend() -> None:
    kinds = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert len(kinds) >= 10
    assert all(issubclass(kind, SelectiveDPOError) and kind.__doc__ for kind in kinds)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], ""),
        (["a"], "a"),
        ([1, 2], "1, 2"),
        ("abcde", "a, b, c, d, e"),
        ("abcdefg", "a, b, c, d, e and 2 more"),
    ],
)
def test_some_are_named_and_the_rest_are_counted(items: list[object], expected: str) -> None:
    assert name_some(items) == expected


def test_how_many_are_named_can_be_said() -> None:
    assert name_some(iter(range(2_000)), limit=1) == "0 and 1,999 more"
