"""Checkpoints with replaced files and manifests rewritten to match: no code that is in them runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from selective_dpo.storage.artifacts import folder_digests
from tests.fixtures.interrupted import Killed, killed, killed_runs  # noqa: F401  (fixtures)

NEWEST, TRAINER = "step-000004", "trainer/checkpoint-4"


class Payload:
    """Makes a file when a reader that runs code unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def rewrite_manifest(checkpoint: Path) -> None:
    """Have the manifest say that all is well."""
    manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    manifest["files"] = folder_digests(checkpoint)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_state_does_not_run(killed: Killed, tmp_path: Path, name: str) -> None:  # noqa: F811
    """A pickle that makes a file when it is read by a reader that runs code: PyTorch refuses to read it, no
    update is made, and nothing is published."""
    proof, checkpoint = tmp_path / "has run", killed.checkpoints / NEWEST
    torch.save({"state": Payload(proof)}, checkpoint / TRAINER / name)
    rewrite_manifest(checkpoint)
    outcome = killed.go_on()
    assert outcome.code not in (0, 75) and "Weights only load failed" in outcome.output
    assert "step" not in outcome.events
    assert not proof.exists() and not (killed.run / "policy").exists()
