"""Each mistake in a recipe ends in one line: key, what was given, what is allowed, what was meant."""

from __future__ import annotations

from typing import Any

import pytest

from selective_dpo.config import Recipe
from selective_dpo.config.load import make_recipe
from selective_dpo.config.messages import did_you_mean, dotted_keys, inlined, node_at, show
from selective_dpo.errors import ConfigError

MINIMAL: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "x"}]}}
RULES = "one of easiest, hardest, random, below, band, all"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"select": {"fractoin": 0.7}},
            "select.fractoin: unknown key (given 0.7); did you mean 'fraction'? (known in select: aggr",
        ),
        (
            {"fraction": 0.7},
            "fraction: unknown key (given 0.7); did you mean 'select.fraction'? (known: name,",
        ),
        ({"scroe": {}}, "scroe: unknown key (given {}); did you mean 'score'?"),
        (
            {"train": {"learning_rate": 1e-6}},
            "train.learning_rate: unknown key (given 1e-06); TRL's DPOConfig keys go below train.trainer",
        ),
        ({"select": {"fraction": 1.7}}, "select.fraction is 1.7, but must be above 0 and at most 1"),
        ({"select": {"fraction": "most"}}, 'select.fraction is "most", but must be a number'),
        ({"select": {"rule": "eesiest"}}, f'select.rule is "eesiest", but must be {RULES}; did you mean'),
        ({"select": {"rule": 5}}, f"select.rule is 5, but must be {RULES}"),
        ({"select": {"rule": "below"}}, "select: rule 'below' needs a threshold"),
        ({"select": 5}, "select is 5, but must be a block with keys of aggregate, rule, fraction,"),
        ({"select": {"rule": "band", "band": [0.5]}}, "select.band.1 is missing"),
        (
            {"select": {"rule": "band", "band": [0, 0.5, 1]}},
            "select.band is [0, 0.5, 1], but must be a list of 2",
        ),
        ({"select": {"allow_partial": "perhaps"}}, 'select.allow_partial is "perhaps", but must be true or'),
        ({"score": {"seeds": 5}}, "score.seeds is 5, but must be a list"),
        ({"score": {"seeds": [1, "a"]}}, 'score.seeds.1 is "a", but must be a whole number'),
        ({"score": {"seeds": [1, 1]}}, "score: seeds must be distinct, and at least one"),
        ({"score": {"lora": 16}}, "score.lora is 16, but must be a mapping of keys to values"),
        (
            {"score": {"protocol": "paper", "evaluations": 2}},
            "score: protocol 'paper' is seeds [41, 42, 43] with 5 evaluations",
        ),
        ({"launch": {"workers": 0}}, "launch.workers is 0, but must be at least 1"),
        ({"launch": {"workers": 1.5}}, "launch.workers is 1.5, but must be a whole number"),
        ({"model": {"path": 7}}, "model.path is 7, but must be text; put it in quotes"),
        ({"model": {}}, "model.path is missing: Hub name or local folder of the weights"),
        ({"model": None}, "model is null, but must be a block with keys of path, revision,"),
        ({"data": {"train": "x.jsonl"}}, 'data.train is "x.jsonl", but must be a list'),
        ({"data": {"train": []}}, "data.train is [], but must be a list of at least 1"),
        (
            {"data": {"train": [{"pth": "x"}]}},
            "data.train.0.pth: unknown key (given \"x\"); did you mean 'path'?",
        ),
        (
            {"data": {"train": [{"path": "x", "fraction": 0}]}},
            "data.train.0.fraction is 0, but must be above 0",
        ),
        (
            {"evaluate": {"controls": {"other": {"rul": "random"}}}},
            "evaluate.controls.other.rul: unknown key (given \"random\"); did you mean 'rule'?",
        ),
        (
            {"select": {"aggregate": 5}},
            "select.aggregate is 5, but must be one of mean, final, median, rank-mean or text like my_mod",
        ),
        (
            {"select": {"aggregate": "mean", "criterion": "final"}},
            "select: criterion and aggregate are two names of one key: leave one out",
        ),
        (
            {"score": {"tokens_per_batch": "x"}},
            'score.tokens_per_batch is "x", but must be a whole number at least 1 or auto',
        ),
        (
            {"data": {"train": [{"path": "x", "columns": {"prompt": 1}}]}},
            "data.train.0.columns.prompt is 1, but must be text that is not empty; put it in quotes",
        ),
        (
            {"data": {"train": [{"path": "x", "columns": ["prompt"]}]}},
            'data.train.0.columns is ["prompt"], but must be a mapping of keys to text that is not empty',
        ),
        (
            {"data": {"train": [{"path": "x"}], "exclude": ["q"]}},
            'data.exclude.0 is "q", but must be text like ^[0-9a-f]{32}$',
        ),
        ({"name": "a/b"}, 'name is "a/b", but must fit its meaning: Name of the run\'s folder'),
        ({"name": "a", "x": "y" * 99}, 'x: unknown key (given "' + "y" * 59 + "...)"),
    ],
)
def test_a_mistake_is_one_line(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_recipe({**MINIMAL, **change})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(expected)


def test_a_misspelt_key_goes_first_and_other_mistakes_are_counted() -> None:
    # Wrong: score.evaluations (type), select.rule (choice), launch.wokers (unknown).
    wrong = {"score": {"evaluations": "x"}, "select": {"rule": "x"}, "launch": {"wokers": 2}}
    with pytest.raises(ConfigError, match=r"^launch\.wokers: unknown key .* \(and 2 more to mend\)$"):
        make_recipe({**MINIMAL, **wrong})


def test_did_you_mean_is_silent_when_nothing_is_close() -> None:
    assert did_you_mean("fractoin", ["rule", "fraction"]) == "; did you mean 'fraction'?"
    assert did_you_mean("Easy-To-Hard", ["easy_to_hard"]) == "; did you mean 'easy_to_hard'?"
    assert did_you_mean("zzz", ["rule", "fraction"]) == ""


def test_values_are_shown_short_and_on_one_line() -> None:
    assert show(None) == "null"
    assert show("a\nb") == '"a\\nb"'
    assert len(show("x" * 500)) == 63


def test_every_recipe_key_has_a_place_and_a_meaning() -> None:
    schema = inlined(Recipe.model_json_schema())
    keys = dotted_keys(schema)
    assert {"name", "select.fraction", "evaluate.generation.prompts"} <= set(keys)
    assert all(node_at(schema, key.split(".")).get("description") for key in keys)
    assert node_at(schema, ["data", "train", 0, "path"])["type"] == "string"
    assert node_at(schema, ["nothing", "here"]) == {}
