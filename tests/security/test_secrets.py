"""Tokens and keys of the environment, or of a recipe, are in no file of a run and in nothing it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from selective_dpo.cli import main
from tests.fixtures.finished import SECRETS
from tests.fixtures.models import recipe_file, tiny_recipe


def found_in(root: Path, secrets: list[str]) -> list[str]:
    """Files that hold a secret, as UTF-8 or UTF-16, in their bytes or their name."""
    wanted = [secret.encode(code) for secret in secrets for code in ("utf-8", "utf-16-le")]
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [str(path) for path in files if any(each in path.read_bytes() + bytes(path) for each in wanted)]


@pytest.mark.slow
def test_no_byte_of_a_run_holds_a_secret(finished_demo: Path, demo_output: str) -> None:
    secrets = list(SECRETS.values())
    assert found_in(finished_demo, secrets) == []
    assert not [secret for secret in secrets if secret in demo_output]


def test_no_byte_of_a_tracker_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    trainer = {"report_to": "tensorboard"}
    recipe = tiny_recipe(
        tmp_path, score={"evaluations": 1}, train={"trainer": trainer}, launch={"checkpoint_steps": 1}
    )
    assert main(["train", str(recipe_file(recipe, tmp_path / "recipe.yaml"))]) == 0
    secrets = list(SECRETS.values())
    assert found_in(tmp_path / "runs", secrets) == []
    printed = capfd.readouterr()
    assert not [secret for secret in secrets if secret in printed.out + printed.err]
    assert list((tmp_path / "runs" / "tiny" / "tracking").rglob("events.*"))


@pytest.mark.parametrize("block", ["score", "train"])
@pytest.mark.parametrize("given", ["file", "option"])
def test_a_token_in_a_recipe_is_refused_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], block: str, given: str
) -> None:
    secret = SECRETS["HF_TOKEN"]
    recipe = tiny_recipe(tmp_path, **({block: {"trainer": {"hub_token": secret}}} if given == "file" else {}))
    option = [f"--{block}.trainer.hub_token", secret] if given == "option" else []
    capsys.readouterr()
    assert main(["run", str(recipe_file(recipe, tmp_path / "recipe.yaml")), *option]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert f"{block}.trainer.hub_token cannot be set" in line
    assert "HF_TOKEN" in line, "the remedy"
    assert secret not in line + printed.out
    assert not (tmp_path / "runs").exists()


def test_no_other_key_takes_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = SECRETS["HF_TOKEN"]
    path = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    for block in ("train", "train.trainer", "train.lora", "model", "launch", "evaluate"):
        for key in ("token", "use_auth_token", "hf_token", "api_key", "wandb_api_key"):
            capsys.readouterr()
            assert main(["run", str(path), f"--{block}.{key}", secret]) == 2, (block, key)
            printed = capsys.readouterr()
            assert len(printed.err.splitlines()) == 1
            assert secret not in printed.err + printed.out
    assert not (tmp_path / "runs").exists()
