"""Tables of tokens that are mapped from disk: they take no memory, and a run comes out the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from safetensors.torch import load_file

from selective_dpo.data import store
from selective_dpo.data.store import KIND, PAIRS_SCHEMA, SUMMARY, TOKENS, TOKENS_SCHEMA, load_tokens
from selective_dpo.difficulty.scorer import collect_records
from selective_dpo.logprobs.compute import PairLogps
from selective_dpo.logprobs.reference import with_reference
from selective_dpo.run.keys import Run
from selective_dpo.run.run import open_run, train
from selective_dpo.storage.artifacts import publish_folder, write_json
from tests.fixtures.models import tiny_model_folder, tiny_pairs_file, tiny_recipe

ROWS, LENGTH = 5_000, 400


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tables are mapped, from a cache of this test's own."""
    monkeypatch.setattr(store, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published pairs of 8 MB of token ids."""
    found = tmp_path_factory.mktemp("published") / "pairs"
    names = [f"pair {row}" for row in range(ROWS)]
    ids = pa.array(
        np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH).tolist(), pa.list_(pa.int32())
    )
    one = pa.array([[row] for row in range(ROWS)], pa.list_(pa.int32()))
    tokens = pa.table([names, names, ids, one, one], schema=TOKENS_SCHEMA)
    with publish_folder(found, kind=KIND, key="") as partial:
        with store.open_writer(partial) as writer:
            writer.write(PAIRS_SCHEMA.empty_table(), tokens)
        write_json(partial / SUMMARY, {"prompt_tokens": ROWS * LENGTH, "completion_tokens": 2 * ROWS})
    assert (found / TOKENS).is_file()
    return found


def bytes_of(make: Callable[[], Dataset]) -> tuple[Dataset, int]:
    """What is made, and the memory of Arrow's that it holds."""
    before = pa.total_allocated_bytes()
    made = make()
    return made, pa.total_allocated_bytes() - before


def test_a_mapped_table_and_its_reference_take_no_memory(
    folder: Path, mapped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, used = bytes_of(lambda: load_tokens(folder))
    assert used < ROWS * LENGTH
    reference = PairLogps(tokens["pair_id"][:], np.arange(float(ROWS)), -np.arange(float(ROWS)))
    rows = np.arange(ROWS)[::-2]
    halved, used = bytes_of(lambda: with_reference(tokens, reference, rows))
    assert used < ROWS * LENGTH
    assert halved["ref_chosen_logps"][:] == rows.tolist()
    assert halved[1]["prompt_ids"] == list(range((ROWS - 3) * LENGTH, (ROWS - 2) * LENGTH))
    with pytest.raises(ValueError, match="wants a whole data set"):
        with_reference(halved, reference)
    monkeypatch.setattr(store, "MAX_BYTES_IN_MEMORY", 4 * ROWS * (LENGTH + 2))
    held, used = bytes_of(lambda: load_tokens(folder))
    assert used > 4 * ROWS * LENGTH
    assert held.data.equals(tokens.data) and held._fingerprint == tokens._fingerprint


@pytest.mark.slow
def test_a_run_on_mapped_tokens_is_the_same(
    tmp_path: Path, mapped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model_folder(tmp_path / "model")
    tiny_pairs_file(tmp_path / "pairs.jsonl", 20)

    def trained(name: str) -> Run:
        run = open_run(tiny_recipe(tmp_path, name=name, train={"lora": None}), say=lambda line: None)
        train(run)
        return run

    found = trained("mapped")
    monkeypatch.setattr(store, "MAX_BYTES_IN_MEMORY", 2**30)
    expected = trained("held")
    records = [
        collect_records([run.folder.scores(each) for each in run.scorer_runs]) for run in (found, expected)
    ]
    np.testing.assert_array_equal(records[0].pair_id, records[1].pair_id)
    np.testing.assert_array_equal(records[0].loss, records[1].loss)
    weights = [load_file(run.folder.policy / "model.safetensors") for run in (found, expected)]
    assert all(bool((weight == weights[1][name]).all()) for name, weight in weights[0].items())
    assert list((tmp_path / "cache").rglob("*.arrow"))
