from __future__ import annotations

from pathlib import Path

import numpy as np

from selective_dpo.curriculum.records import Records, write_records
from selective_dpo.difficulty.scorer import RECORDS, collect_records


def write(folder: Path, rows: list[tuple[str, int, int]]) -> Path:
    """A scorer's records of (pair, seed, evaluation), with a loss that tells them apart."""
    pairs, seeds, evaluations = zip(*rows, strict=True)
    numbers = np.arange(len(rows), dtype=np.float64) + 100 * seeds[0]
    folder.mkdir()
    records = Records(
        pair_id=np.array(pairs),
        prompt_id=np.array([f"prompt of {pair}" for pair in pairs]),
        seed=np.array(seeds),
        fold=np.zeros(len(rows), dtype=np.int64),
        evaluation=np.array(evaluations),
        step=10 * np.array(evaluations),
        policy_chosen_logp=numbers,
        policy_rejected_logp=numbers,
        reference_chosen_logp=numbers,
        reference_rejected_logp=numbers,
        margin=numbers,
        loss=numbers,
    )
    write_records(records, folder / RECORDS)
    return folder


def test_records_of_all_scorers_are_sorted_by_pair_seed_and_evaluation(tmp_path: Path) -> None:
    later = write(tmp_path / "later", [("b", 2, 1), ("a", 2, 1), ("b", 2, 2), ("a", 2, 2)])
    sooner = write(tmp_path / "sooner", [("a", 1, 2), ("a", 1, 1)])
    records = collect_records([later, sooner])
    keys = zip(records.pair_id.tolist(), records.seed.tolist(), records.evaluation.tolist(), strict=True)
    assert list(keys) == [("a", 1, 1), ("a", 1, 2), ("a", 2, 1), ("a", 2, 2), ("b", 2, 1), ("b", 2, 2)]
    # Every column moved with its row: 100 * seed + the place in its file.
    assert records.loss.tolist() == [101, 100, 201, 203, 200, 202]
    assert records.step.tolist() == [10, 20, 10, 20, 10, 20]
    assert records.prompt_id.tolist() == [f"prompt of {pair}" for pair in records.pair_id]
