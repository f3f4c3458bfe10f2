"""The recipe's types: frozen, closed, with defaults that are the original's protocol."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from selective_dpo.config import (
    Block,
    DataConfig,
    EvaluateConfig,
    GenerationConfig,
    ModelConfig,
    Recipe,
    ScoreConfig,
    SelectConfig,
    SourceConfig,
)

SOURCE = SourceConfig(path="x.jsonl")
RECIPE = Recipe(name="a", model=ModelConfig(path="m"), data=DataConfig(train=(SOURCE,)))


def test_the_defaults_are_one_step_and_the_easiest_half() -> None:
    score, select = RECIPE.score, RECIPE.select
    assert (score.protocol, score.seeds, score.evaluations) == ("one-step", (41,), 1)
    assert score.lora == {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}
    assert (select.aggregate, select.rule, select.order) == ("mean", "easiest", "easy-to-hard")
    assert (RECIPE.data.max_length, RECIPE.data.max_prompt_length) == (1024, 512)
    assert RECIPE.train.lora is None


def test_recipes_do_not_share_what_can_be_changed() -> None:
    first, second = ScoreConfig(), ScoreConfig()
    assert first.lora is not None
    first.lora["r"] = 1
    assert second.lora is not None
    assert second.lora["r"] == 16


@pytest.mark.parametrize("block", [RECIPE, RECIPE.score, RECIPE.select, SOURCE])
def test_blocks_are_frozen(block: Block) -> None:
    name = next(iter(type(block).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(block, name, "other")


def blocks_of(model: type[BaseModel]) -> list[type[BaseModel]]:
    subclasses = model.__subclasses__()
    return [*subclasses, *(below for one in subclasses for below in blocks_of(one))]


@pytest.mark.parametrize("block", blocks_of(Block), ids=lambda block: block.__name__)
def test_every_block_is_closed_and_every_field_says_what_it_means(block: type[BaseModel]) -> None:
    assert block.model_config["extra"] == "forbid"
    assert block.model_config["frozen"]
    assert all(field.description for field in block.model_fields.values())


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (DataConfig, {"train": []}, "at least 1 item"),
        (DataConfig, {"train": [SOURCE], "max_length": 512}, "max_prompt_length must be below max_length"),
        (DataConfig, {"train": [SOURCE], "max_boundary_mismatch": 1.1}, "less than or equal to 1"),
        (SourceConfig, {"path": "x", "fraction": 0.0}, "greater than 0"),
        (SourceConfig, {"path": "x", "fraction": float("nan")}, "finite number"),
        (ScoreConfig, {"protocol": "paper", "seeds": [1, 2]}, "say 'custom' for your own"),
        (ScoreConfig, {"protocol": "fast", "evaluations": 4}, "say 'custom' for your own"),
        (ScoreConfig, {"seeds": [1, 2]}, "or name the protocol that trains scorers, such as 'custom'"),
        (ScoreConfig, {"protocol": "custom", "seeds": []}, "seeds must be distinct, and at least one"),
        (ScoreConfig, {"protocol": "custom", "seeds": [1, 1]}, "seeds must be distinct"),
        (ScoreConfig, {"protocol": "custom", "evaluations": 0}, "greater than or equal to 1"),
        (SelectConfig, {"fraction": 1.7}, "less than or equal to 1"),
        (SelectConfig, {"fraction": 0.5, "count": 3}, "give fraction or count, not both"),
        (
            ModelConfig,
            {"path": "m", "dtype": "float32", "master_weights": False},
            "master_weights: false has no effect with dtype float32",
        ),
        (
            Recipe,
            {
                **RECIPE.model_dump(),
                "model": {"path": "m", "master_weights": False},
                "train": {"trainer": {"deepspeed": "zero2.json"}},
            },
            "model.master_weights: false has no effect: adapters are trained in float32",
        ),
        (SelectConfig, {"rule": "all", "fraction": 0.5}, "fraction has no effect with rule 'all'"),
        (SelectConfig, {"rule": "band", "band": [0, 1], "count": 5}, "count has no effect with rule 'band'"),
        (SelectConfig, {"threshold": 0.7}, "threshold works only with rule 'below'"),
        (SelectConfig, {"rule": "below"}, "rule 'below' needs a threshold"),
        (SelectConfig, {"band": [0.1, 0.5]}, "band works only with rule 'band'"),
        (SelectConfig, {"rule": "band"}, "rule 'band' needs a band"),
        (SelectConfig, {"rule": "band", "band": [0.5, 0.5]}, "two rising quantiles"),
        (SelectConfig, {"rule": "band", "band": [-0.1, 0.5]}, "two rising quantiles"),
        (SelectConfig, {"seed": 1}, "seed has no effect without rule 'random' or order 'shuffled'"),
        (EvaluateConfig, {"judge": "embedded-world"}, "needs generation.prompts above 0"),
        (EvaluateConfig, {"reward_model": "m"}, "judge 'reward-model' and reward_model go together"),
        (
            EvaluateConfig,
            {"judge": "reward-model", "generation": GenerationConfig(prompts=1)},
            "judge 'reward-model' and reward_model go together",
        ),
    ],
)
def test_what_contradicts_itself_or_would_be_ignored_is_refused(
    make: type[Block], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"rule": "random", "fraction": 0.3, "seed": 1},
        {"rule": "hardest", "count": 3, "order": "shuffled", "seed": 1},
        {"rule": "below", "threshold": 0.0},
        {"rule": "band", "band": (0.0, 1.0)},
        {"rule": "all", "order": "hard-to-easy"},
        {"fraction": 1.0},
    ],
)
def test_selections_that_make_sense_are_accepted(values: dict[str, Any]) -> None:
    assert SelectConfig(**values).model_dump(include=set(values)) == values


def test_a_criterion_is_a_registered_name_or_a_function_of_the_users_own() -> None:
    own = SelectConfig.model_validate({"criterion": "my_package.criteria:largest_loss"})
    # Both names of the key make the same selection, and the same curriculum key with it.
    assert own == SelectConfig(aggregate="my_package.criteria:largest_loss")
    assert own.model_dump()["aggregate"] == "my_package.criteria:largest_loss"
    assert "criterion" not in own.model_dump()
    for name in ("worst", ":f", "m:", "m:f:g", "my-module:f", "m.:f", "../m:f"):
        with pytest.raises(ValidationError, match="no criterion is called"):
            SelectConfig(aggregate=name)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "-a", "a" * 101, "ü"])
def test_a_name_is_one_folder_below_output_dir(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        Recipe(name=name, model=RECIPE.model, data=RECIPE.data)


def test_a_dumped_recipe_is_the_same_recipe() -> None:
    assert Recipe.model_validate(RECIPE.model_dump(mode="json")) == RECIPE
