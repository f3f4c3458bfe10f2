"""Rows of every known shape become the pair they mean, or the reason why not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selective_dpo import identity
from selective_dpo.data.adapters import DropReason, Pair, parse_row


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def parsed(raw: dict[str, Any]) -> Pair:
    pair = parse_row(raw)
    assert isinstance(pair, Pair), pair
    return pair


SKY = [user("Colour of the sky?")]


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": SKY, "chosen": [assistant("Blue")], "rejected": [assistant("Green")]},
        {"chosen": [*SKY, assistant("Blue")], "rejected": [*SKY, assistant("Green")]},
        {
            "prompt": "Colour of the sky?",
            "chosen": [*SKY, assistant("Blue")],
            "rejected": [*SKY, assistant("Green")],
        },
        {"prompt": "Colour of the sky?", "chosen": [assistant("Blue")], "rejected": [assistant("Green")]},
        {"prompt": SKY, "chosen": [*SKY, assistant("Blue")], "rejected": [*SKY, assistant("Green")]},
    ],
    ids=["explicit", "implicit", "ultrafeedback", "text prompt and answers", "prompt given twice"],
)
def test_every_chat_shape_gives_the_same_pair(raw: dict[str, Any]) -> None:
    pair = parsed(raw)
    assert (pair.prompt, pair.chosen, pair.rejected) == (SKY, [assistant("Blue")], [assistant("Green")])
    assert pair.is_conversational
    assert pair.pair_id == identity.pair_id(SKY, [assistant("Blue")], [assistant("Green")])
    assert pair.prompt_id == identity.prompt_id(SKY)


def test_the_prompt_is_the_longest_common_prefix_of_messages() -> None:
    shared = [system("Be brief."), user("Hello"), assistant("Hi"), user("Bye")]
    pair = parsed({"chosen": [*shared, assistant("Bye!")], "rejected": [*shared, assistant("No")]})
    assert pair.prompt == shared
    assert pair.chosen == [assistant("Bye!")]


def test_assistant_messages_that_both_share_are_completion() -> None:
    pair = parsed(
        {
            "chosen": [user("q"), assistant("so"), assistant("a")],
            "rejected": [user("q"), assistant("so"), assistant("b")],
        }
    )
    assert pair.prompt == [user("q")]
    assert pair.chosen == [assistant("so"), assistant("a")]


def test_several_turns_of_the_assistant_are_a_completion_whatever_their_number() -> None:
    pair = parsed(
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b"), assistant("c")]}
    )
    assert (pair.chosen, pair.rejected) == ([assistant("a")], [assistant("b"), assistant("c")])
    dialogue = "\n\nHuman: q\n\nAssistant:"
    text = parsed({"chosen": f"{dialogue} a", "rejected": f"{dialogue} b\n\nAssistant: c"})
    assert (text.prompt, text.rejected) == (dialogue, " b\n\nAssistant: c")


def test_white_space_within_a_completion_tells_them_apart() -> None:
    assert parsed({"prompt": "p", "chosen": "a b", "rejected": "a  b"}).chosen == "a b"


def test_columns_for_tools_and_images_that_are_empty_are_no_tools_and_no_images() -> None:
    for column, value in (("tools", None), ("tools", []), ("tools", "[]"), ("images", []), ("image", None)):
        assert parsed({**CHAT, column: value}).chosen == [assistant("a")]


def test_keys_other_than_role_and_content_are_left_out() -> None:
    noted = {**user("q"), "tool_calls": None, "date": "today"}
    pair = parsed({"chosen": [noted, assistant("a")], "rejected": [user("q"), assistant("b")]})
    assert pair.prompt == [user("q")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "completion"),
    [
        # A space belongs to the completion, a line break to the prompt, and no word is split.
        ("The sky is blue", "The sky is black", "The sky is", " blue"),
        ("Q: sky?\nblue", "Q: sky?\ngreen", "Q: sky?\n", "blue"),
        # The last assistant turn that both have, not the last one in either.
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d e",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d f",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            " d e",
        ),
    ],
)
def test_implicit_prompts_of_texts(chosen: str, rejected: str, prompt: str, completion: str) -> None:
    pair = parsed({"chosen": chosen, "rejected": rejected})
    assert (pair.prompt, pair.chosen) == (prompt, completion)
    assert prompt + str(pair.rejected) == rejected
    assert not pair.is_conversational


def test_explicit_text_is_taken_as_it_is() -> None:
    pair = parsed({"prompt": "The sky is", "chosen": " blue", "rejected": " black"})
    assert pair[:3] == ("The sky is", " blue", " black")


def test_own_prompt_id_and_scores_are_used() -> None:
    text = {"prompt": "p", "chosen": "a", "rejected": "b"}
    pair = parsed({**text, "prompt_id": "abc", "score_chosen": 3, "score_rejected": "1.5"})
    assert (pair.prompt_id, pair.score_chosen, pair.score_rejected) == ("abc", 3.0, 1.5)
    ratings = parsed({**text, "chosen_rating": 5.0, "rejected_rating": float("nan")})
    assert (ratings.score_chosen, ratings.score_rejected) == (5.0, None)
    for unusable in ("", None, 7, "\ud800"):
        assert parsed({**text, "prompt_id": unusable}).prompt_id == identity.prompt_id("p")


CHAT = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({}, DropReason.MALFORMED),
        ({"chosen": "a"}, DropReason.MALFORMED),
        ({"chosen": "a", "rejected": None}, DropReason.MALFORMED),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, DropReason.MALFORMED),
        ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, DropReason.MALFORMED),
        ({"chosen": ["a"], "rejected": ["b"]}, DropReason.MALFORMED),
        ({"chosen": [user("q"), {"role": "assistant"}], "rejected": CHAT["rejected"]}, DropReason.MALFORMED),
        ({**CHAT, "prompt": 7}, DropReason.MALFORMED),
        ({**CHAT, "prompt": ["q"]}, DropReason.MALFORMED),
        ({"prompt": "p", "chosen": "\ud83d", "rejected": "b"}, DropReason.MALFORMED),
        ({**CHAT, "tools": "[{}]"}, DropReason.TOOLS),
        ({**CHAT, "tools": [{"type": "function"}]}, DropReason.TOOLS),
        ({**CHAT, "images": [{"path": "sky.png"}]}, DropReason.IMAGES),
        ({**CHAT, "image": b"png"}, DropReason.IMAGES),
        (
            {"chosen": [user("q"), {**assistant("a"), "tool_calls": [{}]}], "rejected": CHAT["rejected"]},
            DropReason.TOOLS,
        ),
        (
            {"chosen": [{"role": "user", "content": [{"type": "image"}]}], "rejected": []},
            DropReason.IMAGES,
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, DropReason.IDENTICAL),
        ({"chosen": CHAT["chosen"], "rejected": CHAT["chosen"]}, DropReason.IDENTICAL),
        ({"prompt": "p", "chosen": " a", "rejected": "a\n"}, DropReason.SAME_BUT_SPACE),
        (
            {"chosen": [user("q"), assistant("a b\n")], "rejected": [user("q"), assistant("a b")]},
            DropReason.SAME_BUT_SPACE,
        ),
        ({"prompt": " \n", "chosen": "a", "rejected": "b"}, DropReason.EMPTY_PROMPT),
        ({"chosen": "one", "rejected": "two"}, DropReason.EMPTY_PROMPT),
        (
            {"chosen": "\n\nHuman: a b\n\nAssistant: c", "rejected": "\n\nHuman: a d\n\nAssistant: c"},
            DropReason.EMPTY_PROMPT,
        ),
        (
            {"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("a")]},
            DropReason.EMPTY_PROMPT,
        ),
        (
            {
                "chosen": [system("s"), user(" "), assistant("a")],
                "rejected": [system("s"), user(" "), assistant("b")],
            },
            DropReason.EMPTY_PROMPT,
        ),
        ({"prompt": "p", "chosen": "  ", "rejected": "b"}, DropReason.EMPTY_COMPLETION),
        (
            {"prompt": [user("q")], "chosen": [], "rejected": [assistant("b")]},
            DropReason.EMPTY_COMPLETION,
        ),
        ({"chosen": [user("q"), assistant("")], "rejected": CHAT["rejected"]}, DropReason.EMPTY_COMPLETION),
        (
            {
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("a"), user("r"), assistant("b")],
            },
            DropReason.OTHERS_TURN,
        ),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: q\n\nAssistant: b\n\nHuman: r",
            },
            DropReason.OTHERS_TURN,
        ),
        (
            {
                "chosen": [user("q"), assistant("a"), user("r"), assistant("x")],
                "rejected": [user("q"), assistant("b"), user("r"), assistant("x")],
            },
            DropReason.OTHERS_TURN,
        ),
        (
            {
                "chosen": [user("q"), system("late"), user("q"), assistant("a")],
                "rejected": [user("q"), system("late"), user("q"), assistant("b")],
            },
            DropReason.ROLES_MISPLACED,
        ),
        (
            {
                "chosen": [{"role": "human", "content": "q"}, assistant("a")],
                "rejected": [{"role": "human", "content": "q"}, assistant("b")],
            },
            DropReason.ROLES_MISPLACED,
        ),
    ],
)
def test_reasons(raw: dict[str, Any], reason: DropReason) -> None:
    assert parse_row(raw) is reason


def test_nul_is_text_like_any_other() -> None:
    assert parsed({"prompt": "p\0", "chosen": "a\0", "rejected": "b"}).prompt == "p\0"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls"]) | st.text(max_size=3), inner, max_size=3
        )
    ),
    max_leaves=8,
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "x"]), "content": st.text(max_size=3)}
    ),
    max_size=4,
)


# The first draw builds a table of all characters, which takes seconds.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "chosen", "rejected", "prompt_id", "score_chosen"]), _JSON | _MESSAGES
    )
)
def test_no_row_raises_and_what_is_kept_is_sound(raw: dict[str, Any]) -> None:
    pair = parse_row(raw)
    if isinstance(pair, Pair):
        assert pair.chosen != pair.rejected
        assert pair.prompt and pair.chosen and pair.rejected
        assert pair.pair_id == identity.pair_id(pair.prompt, pair.chosen, pair.rejected)
