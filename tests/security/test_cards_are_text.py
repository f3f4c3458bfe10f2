"""Model cards: what a recipe names cannot become markup, a link or a heading of the card."""

from __future__ import annotations

import re

import pytest
import yaml

from selective_dpo.config import Recipe
from selective_dpo.training.card import code_block, code_span, model_card
from selective_dpo.training.selective_trainer import ConsumedOrder

ATTACKS = [
    "`</code><script>alert(1)</script>`",
    "x` [click](javascript:alert(1)) `y",
    "``` \n# A heading\n<img src=x onerror=alert(1)>",
    "a\n---\nlicense: mit\n---\n# Other card",
    "``double`` ```triple``` ````four````",
    "\u202emoc.live",
    "`",
    " ",
]


def spans(markdown: str) -> list[str]:
    """The code spans of one line, by CommonMark's rule: a run of ticks up to the next run of that length."""
    found, rest = [], markdown
    while opening := re.search("`+", rest):
        ticks, after = opening.group(), rest[opening.end() :]
        closing = re.search(f"(?<!`){ticks}(?!`)", after)
        assert closing is not None, "a span without an end"
        found.append(after[: closing.start()])
        rest = after[closing.end() :]
    return found


@pytest.mark.parametrize("text", [*ATTACKS, "plain", "a/b-c.jsonl"])
def test_a_span_holds_the_whole_text_and_nothing_stands_outside(text: str) -> None:
    markdown = code_span(text)
    (content,) = spans(markdown)
    shown = "".join(each if each.isprintable() else "\ufffd" for each in text)
    assert content.strip() == shown.strip()
    assert "\n" not in markdown and "\u202e" not in markdown


@pytest.mark.parametrize("text", ATTACKS)
def test_no_line_ends_a_block_early(text: str) -> None:
    first, *inside, last = code_block(text, "json").split("\n")
    fence = first.removesuffix("json")
    assert last == fence and set(fence) == {"`"} and len(fence) >= 3
    assert "\n".join(inside) == text
    assert not [line for line in inside if line.strip().startswith(fence)]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_card_made_of_attacks_keeps_its_shape(attack: str) -> None:
    # With another slash it would be a path, which is no base model. And not through `make_recipe`, which
    # refuses line breaks in a path before they come here.
    base = f"org/{attack.replace('/', '|')}"
    recipe = Recipe.model_validate(
        {
            "name": "a-run",
            "model": {"path": base},
            "data": {"train": [{"path": f"data/{attack}", "split": attack}]},
            "train": {"trainer": {"run_name": attack}},
        }
    )
    facts = {
        "pairs": 2,
        "seeds": [41],
        "evaluations": [1],
        "provenance": {"inputs": [attack], attack: attack},
    }
    order = ConsumedOrder(1, 1, 0, "d", "d")
    card = model_card(recipe, label="easiest 50%, easy to hard", facts=facts, order=order, key="k")
    _, header, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert set(yaml.safe_load(header)) == {"base_model", "library_name", "tags", "pipeline_tag"}
    assert yaml.safe_load(header)["base_model"] == base
    # Outside of code there is only what this package wrote.
    outside, fence = [], ""
    for line in body.split("\n"):
        ticks = re.match("`{3,}", line)
        if fence:
            fence = "" if line == fence else fence
        elif ticks and "`" not in line[ticks.end() :]:
            fence = ticks.group()
        else:
            outside.append(line)
    assert fence == ""
    headings = [line for line in outside if line.startswith("#")]
    assert headings == ["# a-run", "## Training", "## Provenance"]
    prose = "\n".join(outside)
    for span in spans(prose):
        prose = prose.replace(span, "")
    assert not re.search(r"<|javascript|alert", prose)
