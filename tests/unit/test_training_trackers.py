"""Trackers: which are asked for, that they are installed, and where their files stay."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.integrations import integration_utils

from selective_dpo.config.trainer_options import check_dpo_options
from selective_dpo.errors import ConfigError
from selective_dpo.training.train import tracker_names, training_folder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ()),
        ({"report_to": None}, ()),
        ({"report_to": "none"}, ()),
        ({"report_to": []}, ()),
        ({"report_to": ["none"]}, ()),
        ({"report_to": "mlflow"}, ("mlflow",)),
        ({"report_to": ["trackio", "wandb"]}, ("trackio", "wandb")),
    ],
)
def test_trackers_asked_for(given: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert tracker_names(given) == expected


@pytest.mark.parametrize("given", ["all", ["all"]])
def test_all_is_what_is_installed(monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    monkeypatch.setattr(
        integration_utils, "get_available_reporting_integrations", lambda: ["mlflow", "tensorboard"]
    )
    assert tracker_names({"report_to": given}) == ("mlflow", "tensorboard")


def test_a_trackers_files_stay(tmp_path: Path) -> None:
    tracking = tmp_path / "tracking" / "selected"
    with training_folder({"report_to": "tensorboard"}, tracking) as folder:
        assert folder == tracking
        folder.mkdir(parents=True)
        (folder / "events").touch()
    assert (tracking / "events").is_file()


def test_an_empty_folder_of_a_tracker_that_writes_elsewhere_goes(tmp_path: Path) -> None:
    tracking = tmp_path / "tracking" / "selected"
    with training_folder({"report_to": "mlflow"}, tracking) as folder:
        folder.mkdir(parents=True)
    assert not (tmp_path / "tracking").exists()


@pytest.mark.parametrize("settings", [{}, {"report_to": "none"}])
def test_without_trackers_the_folder_is_deleted(tmp_path: Path, settings: dict[str, Any]) -> None:
    with training_folder(settings, tmp_path / "tracking") as folder:
        (folder / "something").touch()
    assert not folder.exists() and not (tmp_path / "tracking").exists()


def test_each_training_is_a_wandb_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: finished.append("run")))
    for _ in range(2):
        with training_folder({"report_to": ["wandb"]}, tmp_path / "tracking"):
            pass
    assert finished == ["run", "run"]
    with training_folder({"report_to": "mlflow"}, tmp_path / "tracking"):
        pass
    assert len(finished) == 2


@pytest.mark.parametrize("stage", ["score", "train"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("wandb", "report_to: wandb is not installed"),
        (["tensorboard", "mlflow"], "report_to: mlflow is not installed"),
        ("trackoi", "\"trackoi\" is not a tracker that transformers knows; did you mean 'trackio'?"),
    ],
)
def test_trackers_that_are_not_there_are_refused(
    monkeypatch: pytest.MonkeyPatch, stage: Any, given: Any, expected: str
) -> None:
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ConfigError) as caught:
        check_dpo_options({"report_to": given}, f"{stage}.trainer", stage)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["all", "none", None, [], "wandb", ["trackio", "mlflow", "tensorboard"]])
def test_installed_trackers_pass(monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    installed = ["mlflow", "tensorboard", "trackio", "wandb"]
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: installed)
    check_dpo_options({"report_to": given}, "train.trainer", "train")
