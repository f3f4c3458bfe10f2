"""The stages of a run as values, and how a result is looked up, locked, made and announced."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from selective_dpo.config.load import make_recipe
from selective_dpo.errors import BusyError
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import Run
from selective_dpo.run.stages import Result, complete, stages_of
from selective_dpo.storage.artifacts import publish_folder, read_manifest
from selective_dpo.storage.locks import holding, lock_beside


class Made:
    """A run in a folder, what was made in it, and what it said."""

    def __init__(self, folder: Path) -> None:
        recipe = make_recipe({"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "p.jsonl"}]}})
        self.names: list[str] = []
        self.lines: list[str] = []
        self.run = Run(recipe, RunDirectory(folder), self.lines.append)

    def result(self, name: str, *, key: str = "the key") -> Result:
        folder = self.run.folder.root / name

        def make() -> None:
            self.names.append(name)
            with publish_folder(folder, kind="test", key=key) as partial:
                (partial / "content").write_text(name)

        return Result(name, folder, key, make, lambda: f"{name}: made")


@pytest.mark.parametrize(
    ("given", "stages"),
    [
        ({}, ["pairs", "reference", "scores", "curriculum", "policy", "evaluation"]),
        # Only the pairs that are trained on need a reference.
        (
            {"curriculum": "difficulties.csv"},
            ["pairs", "curriculum", "reference", "policy", "evaluation"],
        ),
    ],
)
def test_the_stages_in_their_order(given: dict[str, str], stages: list[str]) -> None:
    recipe = make_recipe({"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "p"}]}, **given})
    assert list(stages_of(recipe)) == stages


def test_what_is_complete_is_not_made_again(tmp_path: Path) -> None:
    made = Made(tmp_path)
    complete(made.run, [made.result("a")])
    complete(made.run, [made.result("a"), made.result("b")])
    assert made.names == ["a", "b"] and made.lines == ["a: made", "b: made"]


def test_a_result_of_other_inputs_or_damaged_is_made_again(tmp_path: Path) -> None:
    made = Made(tmp_path)
    complete(made.run, [made.result("a", key="before")])
    complete(made.run, [made.result("a", key="now")])
    assert read_manifest(tmp_path / "a").key == "now"
    (tmp_path / "a" / "content").write_text("damaged")
    complete(made.run, [made.result("a", key="now")])
    assert made.names == ["a", "a", "a"] and (tmp_path / "a" / "content").read_text() == "a"


def test_what_somebody_else_is_making_is_refused_before_any_work(tmp_path: Path) -> None:
    made, held, done = Made(tmp_path), threading.Event(), threading.Event()

    def hold() -> None:
        with holding(lock_beside(tmp_path / "a"), what="a"):
            held.set()
            done.wait()

    other = threading.Thread(target=hold)
    other.start()
    try:
        held.wait()
        with pytest.raises(BusyError, match=f"{tmp_path / 'a'} is in use by process"):
            complete(made.run, [made.result("a")])
    finally:
        done.set()
        other.join()
    assert made.names == [] and made.lines == []
