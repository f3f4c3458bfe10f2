"""Records files in the scorers' format, of any number of pairs, with losses that agree as real ones do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.curriculum.records import SCHEMA

SEEDS = (41, 42, 43)
EVALUATIONS = 5
FOLDS = (0, 1)
BYTES_PER_PAIR = 2800
"""On disk: 15 records, the curriculum, and two exports of it."""
_PAIRS_PER_PROMPT = 4 / 3
_HEX = np.array([f"{byte:02x}" for byte in range(256)], dtype="S2")


def write_files(folder: Path, pairs: int) -> list[Path]:
    """Write one `records.parquet` for each seed and fold below `folder`, and return their paths.

    Losses are log(1 + exp(-margin)), margins normal: a part that all seeds share, one of the seed, one of
    the evaluation, so that seeds correlate by about 0.97 and evaluations of a seed by 0.99. A pair's rows
    stand in random order, another one in each file.
    """
    generator = np.random.default_rng(0)
    pair_ids = _hex_ids(pairs, generator)
    prompt_P = generator.integers(max(2, round(pairs / _PAIRS_PER_PROMPT)), size=pairs)
    prompt_ids = _hex_ids(int(prompt_P.max()) + 1, generator)
    shared_P = generator.normal(0.3, 1.0, size=pairs)
    paths = []
    for seed in SEEDS:
        fold_P = generator.integers(2, size=len(prompt_ids))[prompt_P]
        margin_P = shared_P + generator.normal(0.0, 0.18, size=pairs)
        for fold in FOLDS:
            rows = generator.permutation(np.flatnonzero(fold_P == fold))
            path = folder / f"seed{seed}-fold{fold}" / "records.parquet"
            path.parent.mkdir()
            ids = (_text(pair_ids[rows]), _text(prompt_ids[prompt_P[rows]]))
            with pq.ParquetWriter(path, SCHEMA) as writer:
                for evaluation in range(1, EVALUATIONS + 1):
                    margins = margin_P[rows] + generator.normal(0.0, 0.1, size=len(rows))
                    writer.write_table(_records(ids, seed, fold, evaluation, margins, generator))
            paths.append(path)
    return paths


def _hex_ids(count: int, generator: np.random.Generator) -> NDArray[np.bytes_]:
    return _HEX[generator.integers(256, size=(count, 16))].view("S32").reshape(-1)


def _text(ids: NDArray[np.bytes_]) -> pa.Array:
    return pa.array(ids, type=pa.binary()).cast(pa.string())


def _records(
    ids: tuple[pa.Array, pa.Array],
    seed: int,
    fold: int,
    evaluation: int,
    margin_R: NDArray[np.float64],
    generator: np.random.Generator,
) -> pa.Table:
    rows = len(margin_R)
    reference_chosen, reference_rejected, policy_rejected = generator.normal(-300.0, 80.0, size=(3, rows))
    columns = [
        *ids,
        *(np.full(rows, value) for value in (seed, fold, evaluation, 100 * evaluation)),
        # beta = 0.01: the margin is beta times the difference of the log-ratios.
        margin_R / 0.01 + policy_rejected - reference_rejected + reference_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        margin_R,
        np.logaddexp(0.0, -margin_R),
    ]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=SCHEMA)
