"""Row 11 of the fault matrix on several processes: one line with the remedy, and the checkpoint is kept."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from selective_dpo.cli import main
from tests.fixtures import scarce
from tests.fixtures.fork_server import ForkServer
from tests.fixtures.models import TRAINER, recipe_file, tiny_recipe

PAIRS, LONG, MOST = 22, 20, 120
"""One pair's two rows have 46 tokens and more, the others' at most 19 each: a pass with the long pair holds
more than 120 rows times tokens, and the others do not."""


def pairs_file(path: Path) -> None:
    """Pairs with a prompt each, one of them much longer than the others."""
    draw = random.Random(3)
    rows = []
    for number in range(PAIRS):
        least, most = (20, 20) if number == LONG else (1, 5)
        chosen, rejected = (
            f"{sign}{number}{''.join(draw.choices('abcdefgh', k=draw.randint(least, most)))}" for sign in "+-"
        )
        rows.append({"prompt": f"{number}?", "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.mark.fault(row=11)
@pytest.mark.slow
def test_one_of_two_processes_out_of_memory_is_one_line_and_the_checkpoint_is_kept(
    tmp_path: Path, server: ForkServer
) -> None:
    """The second process runs out of memory in the last update: the line says what to change, nothing
    is published, and the checkpoint of the update before stays."""
    pairs_file(tmp_path / "pairs.jsonl")
    settings = {**TRAINER, "per_device_train_batch_size": 4, "num_train_epochs": 1}
    recipe = tiny_recipe(
        tmp_path,
        score={"evaluations": 1},
        select={"rule": "all", "order": "shuffled", "seed": 3},
        train={"lora": None, "trainer": {**settings, "gradient_accumulation_steps": 1}},
        launch={"checkpoint_steps": 1},
    )
    path = str(recipe_file(recipe, tmp_path / "recipe.yaml"))
    assert main(["curriculum", path]) == 0
    memory = {scarce.SETTINGS: json.dumps({"rank": 1, "most": MOST})}
    ended = server.run_ranks(2, "-m", scarce.MODULE, "train", path, environment=memory)
    assert ended[1].code == 2 and ended[0].code != 0
    (line,) = [line for line in ended[1].errors.splitlines() if "error: selected: out of memory" in line]
    assert "which cannot be split (2 processes exchange gradients in it)" in line
    assert (
        "lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor" in line
    )
    run = tmp_path / "runs" / "tiny"
    assert not (run / "policy").exists()
    assert list((run / "checkpoints" / "selected").glob("step-*/manifest.json"))
