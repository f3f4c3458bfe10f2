"""Tokens and keys of the environment, or of a recipe, are in no file of a run and in nothing it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selective_dpo.cli import main
from tests.fixtures.models import recipe_file, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "HF_TOKEN": "hf_SecretSecretSecretSecretSecret01",
    "HUGGING_FACE_HUB_TOKEN": "hf_SecretSecretSecretSecretSecret02",
    "WANDB_API_KEY": "0123456789abcdefsecretwandbkey0123456789",
    "TRACKIO_SERVER_TOKEN": "trackio-secret-token-03",
    "COMET_API_KEY": "comet-secret-key-04",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-secret-password-05",
    "NEPTUNE_API_TOKEN": "neptune-secret-token-06",
    "AWS_SECRET_ACCESS_KEY": "aws/secret+access/key+07",
    "SSH_AUTH_SOCK": "/tmp/ssh-secret-08/agent",
    "SLURM_JOB_USER": "secret-user-name-09",
}


def found_in(root: Path, secrets: list[str]) -> list[str]:
    """Files that hold a secret, as UTF-8 or UTF-16, in their bytes or their name."""
    wanted = [secret.encode(code) for secret in secrets for code in ("utf-8", "utf-16-le")]
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [str(path) for path in files if any(each in path.read_bytes() + bytes(path) for each in wanted)]


@pytest.mark.slow
@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_no_byte_of_a_run_holds_a_secret(tmp_path: Path, report_to: str) -> None:
    if report_to == "tensorboard":
        pytest.importorskip("tensorboard")
    trainer = {"report_to": report_to}
    recipe = tiny_recipe(
        tmp_path,
        score={"evaluations": 1, "trainer": trainer},
        train={"trainer": trainer},
        launch={"checkpoint_steps": 1},
    )
    path = recipe_file(recipe, tmp_path / "recipe.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "selective_dpo", "run", str(path)],
        env={**os.environ, **SECRETS},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    secrets = list(SECRETS.values())
    assert found_in(tmp_path / "runs", secrets) == []
    assert not [secret for secret in secrets if secret in done.stdout + done.stderr]
    if report_to == "tensorboard":
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


@pytest.mark.parametrize("key", ["token", "use_auth_token", "hf_token", "api_key", "wandb_api_key"])
@pytest.mark.parametrize("block", ["train", "train.trainer", "train.lora", "model", "launch", "evaluate"])
def test_no_other_key_takes_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], block: str, key: str
) -> None:
    secret = SECRETS["HF_TOKEN"]
    path = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    capsys.readouterr()
    assert main(["run", str(path), f"--{block}.{key}", secret]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert secret not in printed.err + printed.out
    assert not (tmp_path / "runs").exists()
