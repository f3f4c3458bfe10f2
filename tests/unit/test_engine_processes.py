from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from selective_dpo.distributed import processes
from selective_dpo.distributed.processes import combine_by_position, publish_from_main, this_process
from selective_dpo.errors import IdentityError
from selective_dpo.storage.artifacts import verify_folder

IDS = ["a", "b", "c"]


def be_process(monkeypatch: pytest.MonkeyPatch, index: int, others: list[NDArray[Any]]) -> None:
    """Make this process number `index` of two; the other one contributes `others`, in the order asked for."""
    group = SimpleNamespace(
        num_processes=2,
        process_index=index,
        is_main_process=index == 0,
        device=torch.device("cpu"),
        wait_for_everyone=lambda: None,
    )
    rest = iter(others)
    monkeypatch.setattr(processes, "this_process", lambda: group)
    monkeypatch.setattr(processes, "reduce", lambda tensor, how: tensor + torch.from_numpy(next(rest)))


def test_alone_there_is_one_process_and_it_is_the_main_one() -> None:
    assert this_process().num_processes == 1 and this_process().is_main_process


def test_rows_of_two_processes_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, done = np.array([[1.0, 2.0], [0.0, 0.0], [5.0, 6.0]]), np.array([True, False, True])
    be_process(monkeypatch, 0, [np.array([0, 1, 0]), np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])])
    assert combine_by_position(mine, done, IDS, what="x").tolist() == [[1, 2], [3, 4], [5, 6]]


def test_a_row_of_no_process_is_named() -> None:
    with pytest.raises(IdentityError, match=r"^held-out: 1 pairs not computed exactly once: b$"):
        combine_by_position(np.zeros((3, 2)), np.array([True, False, True]), IDS, what="held-out")


def test_a_row_of_two_processes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    be_process(monkeypatch, 1, [np.array([1, 1, 0]), np.zeros((3, 1))])
    with pytest.raises(IdentityError, match=r"1 pairs not computed exactly once: a$"):
        combine_by_position(np.zeros((3, 1)), np.array([True, False, True]), IDS, what="x")


def test_only_the_main_process_publishes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_process(monkeypatch, 1, [])
    with publish_from_main(tmp_path / "out", kind="test", key="k") as folder:
        (folder / "file").write_text("by another process")
    assert not folder.exists() and list(tmp_path.iterdir()) == []
    be_process(monkeypatch, 0, [])
    with publish_from_main(tmp_path / "out", kind="test", key="k") as folder:
        (folder / "file").write_text("by the main process")
    assert verify_folder(tmp_path / "out").key == "k"
    assert (tmp_path / "out" / "file").read_text() == "by the main process"
