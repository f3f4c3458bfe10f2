"""A whole world in small: its files, what they say, and what they keep from the method."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_dpo.errors import ArtifactError, DataError
from selective_dpo.identity import pair_id
from selective_dpo.storage.artifacts import verify_folder
from selective_dpo.worlds.tasks import gold_reward
from selective_dpo.worlds.world import (
    PairsConfig,
    SFTConfig,
    TasksConfig,
    World,
    WorldConfig,
    build_world,
    exact_shares,
    load_world,
    world_key,
)

SMALL = WorldConfig(
    sft=SFTConfig(hidden_size=16, layers=1, heads=2, feed_forward_size=32, steps=30, batch_size=16),
    pairs=PairsConfig(prompts=60, test_pair_prompts=20, test_prompts=30),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("worlds") / "world", seed=3, config=SMALL)


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_folder_is_published_whole(world: World) -> None:
    manifest = verify_folder(world.folder)
    assert manifest.kind == "world"
    assert manifest.key == world_key(3, SMALL)
    assert {name for name in manifest.files if "/" not in name} == {
        "pairs.jsonl",
        "test_pairs.jsonl",
        "test_prompts.jsonl",
        "truth.parquet",
        "world.json",
    }
    assert AutoModelForCausalLM.from_pretrained(world.model).config.model_type == "qwen2"
    assert AutoTokenizer.from_pretrained(world.model).eos_token == "<eos>"


def test_the_method_sees_texts_only(world: World) -> None:
    for path in (world.pairs, world.test_pairs):
        assert {tuple(row) for row in rows_of(path)} == {("prompt", "chosen", "rejected")}
    assert {tuple(row) for row in rows_of(world.test_prompts)} == {("prompt",)}


def test_no_prompt_stands_in_two_places(world: World) -> None:
    train = [row["prompt"] for row in rows_of(world.pairs)]
    test = [row["prompt"] for row in rows_of(world.test_pairs)]
    judged = [row["prompt"] for row in rows_of(world.test_prompts)]
    assert len(judged) == 30
    assert len(set(train) | set(test) | set(judged)) == len(train) + len(test) + len(judged)


def test_truth_matches_the_texts_by_pair_id(world: World) -> None:
    truth = {row["pair_id"]: row for row in pq.read_table(world.truth).to_pylist()}
    train, test = rows_of(world.pairs), rows_of(world.test_pairs)
    assert len(truth) == len(train) + len(test)
    for split, rows in (("train", train), ("test", test)):
        for row in rows:
            known = truth[pair_id(row["prompt"], row["chosen"], row["rejected"])]
            better = gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"])
            assert known["split"] == split
            assert known["operation"] == row["prompt"].split()[0]
            assert known["reward_chosen"] - known["reward_rejected"] == better
            assert (known["flipped"], known["tie"]) == (better < 0, better == 0)


def test_the_facts_reconcile_with_the_files(world: World) -> None:
    facts = world.facts
    train = facts["pairs"]
    assert train["pairs"] == len(rows_of(world.pairs))
    assert train["pairs"] + sum(train["dropped"].values()) == SMALL.pairs.prompts
    truth = pq.read_table(world.truth).to_pylist()
    flips = [row["flipped"] for row in truth if row["split"] == "train"]
    assert train["flip_share"] == np.mean(flips)
    assert facts["seed"] == 3
    assert WorldConfig.model_validate(facts["config"]) == SMALL
    assert set(facts["seconds"]) == {"sft", "pairs"}
    assert set(facts["sft"]["exact_sampled"]) == {"all", *SMALL.tasks.operations}


def test_the_same_world_is_not_made_again_and_another_replaces_it(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    first = build_world(folder, seed=3, config=SMALL)
    written = (folder / "world.json").stat().st_mtime_ns
    assert build_world(folder, seed=3, config=SMALL) == first
    assert (folder / "world.json").stat().st_mtime_ns == written
    pairs = first.pairs.read_text("utf-8")
    other = build_world(folder, seed=4, config=SMALL)
    assert other.facts["seed"] == 4
    assert other.pairs.read_text("utf-8") != pairs


def test_the_seed_decides_every_text_and_weight(world: World, tmp_path: Path) -> None:
    again = build_world(tmp_path / "again", seed=3, config=SMALL)
    for name in ("pairs.jsonl", "test_pairs.jsonl", "test_prompts.jsonl", "model/model.safetensors"):
        assert (again.folder / name).read_bytes() == (world.folder / name).read_bytes()


def test_a_world_without_pairs_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    # So cold that sampling is greedy: two answers to a prompt are always equal.
    cold = SMALL.pairs.model_copy(update={"temperature": 1e-6})
    with pytest.raises(DataError, match=r"raise pairs\.prompts or temperature"):
        build_world(tmp_path / "world", seed=3, config=SMALL.model_copy(update={"pairs": cold}))
    assert list(tmp_path.iterdir()) == []


def test_an_absent_world_is_said_to_be_absent(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load_world(tmp_path / "nowhere")


def test_exact_shares_by_operation() -> None:
    shares = exact_shares(["copy : a b =", "reverse : a b ="], [[" a b", " b b"], [" b a", " b a"]])
    assert shares == {"all": 0.75, "copy": 0.5, "reverse": 1.0}


@pytest.mark.parametrize("wrong", [{"operations": ("sort",)}, {"operations": ()}, {"lengths": (1, 2)}])
def test_tasks_that_do_not_exist_are_refused(wrong: dict[str, tuple[object, ...]]) -> None:
    with pytest.raises(ValidationError, match="must be"):
        TasksConfig(**wrong)  # type: ignore[arg-type]
