"""Ids from content, and joins that refuse to guess."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selective_dpo.errors import IdentityError
from selective_dpo.identity import (
    Text,
    canonical_text,
    ids_digest,
    pair_id,
    positions_of,
    prompt_id,
    require_same,
    require_unique,
)

USER = [{"role": "user", "content": "hi"}]
YES: Text = [{"role": "assistant", "content": "yes"}]
NO: Text = [{"role": "assistant", "content": "no"}]


def test_ids_are_the_first_half_of_sha_256_over_the_canonical_content() -> None:
    # Messages are spelled with sorted keys, and everything in ASCII without spaces.
    assert prompt_id("é") == hashlib.sha256(b'"\\u00e9"').hexdigest()[:32]
    assert prompt_id(USER) == hashlib.sha256(b'[{"content":"hi","role":"user"}]').hexdigest()[:32]
    assert pair_id("q", "a", "b") == hashlib.sha256(b'["q","a","b"]').hexdigest()[:32]


def test_only_what_the_model_sees_counts() -> None:
    noted = [{"content": "hi", "role": "user", "name": "Ann", "id": 7}]
    assert canonical_text(noted) == [{"role": "user", "content": "hi"}]
    assert pair_id(noted, YES, NO) == pair_id(USER, YES, NO)


def test_different_content_has_different_ids() -> None:
    ids = {
        pair_id("q", "a", "b"),
        pair_id("q", "b", "a"),  # relabelled
        pair_id("qa", "", "b"),  # the same letters, cut elsewhere
        pair_id(USER, YES, NO),
        pair_id("hi", "yes", "no"),
        pair_id("q", "a", "\ud800"),
        pair_id("q", "a", "b "),
    }
    assert len(ids) == 7
    assert all(len(item) == 32 and set(item) <= set("0123456789abcdef") for item in ids)


def test_text_that_looks_like_messages_is_text() -> None:
    assert prompt_id('[{"content":"hi","role":"user"}]') != prompt_id(USER)


def test_the_digest_of_ids_is_of_their_order() -> None:
    assert ids_digest(["a", "b"]) == hashlib.sha256(b"a\nb\n").hexdigest()
    assert ids_digest(["b", "a"]) != ids_digest(["a", "b"]) != ids_digest(["ab"])
    assert ids_digest([]) == hashlib.sha256(b"").hexdigest()


def test_positions_are_found_by_id() -> None:
    positions = positions_of(["c", "a"], ["a", "b", "c"], what="a join")
    assert positions.tolist() == [2, 0]
    assert positions.dtype == np.int64
    assert positions_of([], ["a"], what="a join").tolist() == []


@given(st.data())
def test_a_join_undoes_any_shuffle(data: st.DataObject) -> None:
    available = data.draw(st.lists(st.text(max_size=3), unique=True))
    wanted = data.draw(st.permutations(available))
    assert [available[place] for place in positions_of(wanted, available, what="x")] == list(wanted)


def test_a_missing_id_is_named() -> None:
    with pytest.raises(IdentityError, match=r"^losses: 2 of 3 ids are missing: x, y$"):
        positions_of(["x", "a", "y"], ["a", "b"], what="losses")


@pytest.mark.parametrize(
    ("wanted", "available", "which"),
    [(["a", "a"], ["a"], "wanted ids"), (["a"], ["a", "b", "b", "b"], "available ids")],
)
def test_an_id_that_stands_twice_on_either_side_is_refused(
    wanted: list[str], available: list[str], which: str
) -> None:
    with pytest.raises(IdentityError, match=rf"^join: {which}: 1 ids stand more than once: [ab]$"):
        positions_of(wanted, available, what="join")


def test_repeated_ids_are_named_once_each() -> None:
    require_unique(["a", "b"], what="rows")
    with pytest.raises(IdentityError, match=r"^rows: 2 ids stand more than once: b, a$"):
        require_unique(["a", "b", "b", "a", "a"], what="rows")


def test_the_same_ids_in_another_order_are_the_same() -> None:
    require_same(["a", "b"], ["b", "a"], what="pairs")


def test_what_differs_is_named_on_both_sides() -> None:
    with pytest.raises(IdentityError, match=r"^pairs: 2 ids missing \(a, c\), 0 not asked for \(none\)$"):
        require_same(["a", "b", "c"], ["b"], what="pairs")
    with pytest.raises(IdentityError, match=r"^pairs: 0 ids missing \(none\), 1 not asked for \(c\)$"):
        require_same(["a", "b"], ["b", "c", "a"], what="pairs")
    with pytest.raises(IdentityError, match="more than once"):
        require_same(["a"], ["a", "a"], what="pairs")
