"""Where a result came from, and the card that a policy carries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from selective_dpo.config import Recipe
from selective_dpo.config.load import dump_config, make_recipe
from selective_dpo.run.keys import git_state, provenance
from selective_dpo.storage.digests import canonical_json, digest
from selective_dpo.training.card import model_card
from selective_dpo.training.selective_trainer import ConsumedOrder

RECIPE = make_recipe(
    {
        "name": "a-run",
        "model": {"path": "org/model"},
        "data": {"train": [{"path": "org/pairs", "split": "train"}, {"path": "more.jsonl"}]},
        "train": {"trainer": {"learning_rate": 6e-6}},
    }
)
FACTS = {"pairs": 6000, "seeds": [41, 42], "evaluations": [1, 2], "provenance": {"git": "abc123"}}


def card(recipe: Recipe = RECIPE, *, consumed: str = "d1") -> str:
    order = ConsumedOrder(3000, 3000, 0, expected_digest="d1", consumed_digest=consumed)
    return model_card(recipe, label="easiest 50%, easy to hard", facts=FACTS, order=order, key="thekey")


def test_provenance_names_versions_inputs_and_the_recipe() -> None:
    found = provenance(RECIPE, inputs={"model": "d"})
    assert found["inputs"] == {"model": "d"}
    assert found["recipe_sha256"] == digest(dump_config(RECIPE))
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["versions"]["transformers"] == transformers.__version__
    assert set(found["hardware"]) == {"machine", "cpus", "gpus"}
    assert found["trust_remote_code"] is False
    canonical_json(found)  # JSON values only


def test_provenance_keeps_the_environment_and_the_command_to_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(sys, "argv", ["/home/ann/bin/selective-dpo", "run", "/home/ann/recipe.yaml"])
    found = provenance(RECIPE, inputs={})
    text = canonical_json(found)
    assert "hf_secret" not in text
    assert "/home/ann" not in text


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def test_the_commit_and_whether_there_are_changes(repository: Path) -> None:
    assert git_state() is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    assert git_state() is None  # no commit yet
    (repository / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert git_state() == commit
    (repository / "untracked").touch()
    assert git_state() == commit
    (repository / "file").write_text("b")
    assert git_state() == commit + "+changes"


def test_no_git_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() is None


def test_the_card_says_what_the_policy_is_and_was_made_from() -> None:
    text = card()
    header, body = text.removeprefix("---\n").split("---\n", maxsplit=1)
    assert yaml.safe_load(header) == {
        "base_model": "org/model",
        "library_name": "transformers",
        "tags": ["selective-dpo", "dpo", "trl"],
        "pipeline_tag": "text-generation",
    }
    words = " ".join(body.split())
    assert "3,000 of 6,000 scored preference pairs: easiest 50%, easy to hard" in words
    assert "seeds [41, 42], evaluations [1, 2]" in words
    assert "- `org/pairs` `train`\n" in body
    assert "- `more.jsonl`\n" in body
    assert "learning_rate: 6.0e-06" in body
    assert "Rows consumed: 3,000" in body
    assert '"git": "abc123"' in body
    assert "`d1`, which equals the curriculum's. Key of all inputs: `thekey`" in words


def test_the_card_tells_of_another_order_and_of_an_adapter() -> None:
    assert "which DIFFERS FROM the curriculum's" in " ".join(card(consumed="d2").split())
    adapter = make_recipe({**dump_config(RECIPE), "train": {"lora": {"r": 8}}})
    assert "library_name: peft\n" in card(adapter)


def test_the_card_holds_no_path_of_the_machine(tmp_path: Path) -> None:
    """Local files by their names; a model in the hub's cache by its name on the hub."""
    model, pairs = tmp_path / "my-sft", tmp_path / "pairs.jsonl"
    model.mkdir()
    pairs.touch()
    raw = {
        **dump_config(RECIPE),
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(pairs)}, {"path": "org/pairs", "split": "train"}]},
        "train": {"trainer": {"deepspeed": str(tmp_path / "zero.json")}},
    }
    facts = {**FACTS, "provenance": {"git": "abc123", "command": ["selective-dpo", "run", str(pairs)]}}
    order = ConsumedOrder(3000, 3000, 0, expected_digest="d1", consumed_digest="d1")
    text = model_card(make_recipe(raw), label="x", facts=facts, order=order, key="k")
    assert str(tmp_path) not in text and "command" not in text and "base_model" not in text
    assert "`./my-sft` trained with DPO" in text and "- `./pairs.jsonl`\n" in text
    assert "- `org/pairs` `train`\n" in text and "deepspeed: ./zero.json\n" in text

    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    text = card(make_recipe({**raw, "model": {"path": str(snapshot)}}))
    assert "base_model: org/model\n" in text and str(tmp_path) not in text
    text = card(make_recipe({**raw, "model": {"path": "org/model", "revision": "v2"}}))
    assert "base_model: org/model\n" in text and "`org/model` (revision `v2`) trained" in text
