"""The reference's log-probabilities: computed once from the starting policy, used by everything after.

They are computed before any trainer wraps, adapts or moves the model, and keyed by pair, so that all
scorers, their evaluations and the final training share one table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.core.identity import positions_of
from selective_dpo.engine.logprobs import PairLogps, pair_logps
from selective_dpo.engine.memory import TokenBudget
from selective_dpo.engine.processes import publish_from_main, this_process

FILE = "logps.parquet"
CHOSEN_COLUMN = "ref_chosen_logps"
REJECTED_COLUMN = "ref_rejected_logps"
"""The columns that TRL's `DPOTrainer` reads precomputed reference log-probs from."""


def publish_reference(
    folder: Path,
    *,
    key: str,
    model: Any,
    tokens: Dataset,
    tokens_per_batch: TokenBudget,
    pad_token_id: int,
    autocast_dtype: torch.dtype | None,
) -> None:
    """Compute the reference's log-probs of all pairs and publish them as float32.

    `model` is the starting policy as loaded; it is moved to this process's device and given TRL's
    fused head.
    """
    add_fused_lm_head(model)
    model.to(this_process().device)
    logps = pair_logps(
        model,
        tokens,
        tokens_per_batch=tokens_per_batch,
        pad_token_id=pad_token_id,
        autocast_dtype=autocast_dtype,
        what="reference",
    )
    with publish_from_main(folder, kind="reference", key=key) as partial:
        table = pa.table(
            {
                "pair_id": logps.pair_ids,
                "chosen": logps.chosen_P.astype(np.float32),
                "rejected": logps.rejected_P.astype(np.float32),
            }
        )
        pq.write_table(table, partial / FILE)


def load_reference(folder: Path) -> PairLogps:
    """Read a published reference table."""
    table = pq.read_table(folder / FILE)
    return PairLogps(
        table["pair_id"].to_pylist(),
        table["chosen"].to_numpy().astype(np.float64),
        table["rejected"].to_numpy().astype(np.float64),
    )


def with_reference(tokens: Dataset, reference: PairLogps) -> Dataset:
    """`tokens` with the two columns TRL reads, joined by `pair_id`.

    Raises:
        IdentityError: a pair has no reference log-probs, or an id stands twice.
    """
    at = positions_of(list(tokens["pair_id"]), reference.pair_ids, what="reference log-probs")
    table = tokens.with_format("arrow")[:]
    for name, values_P in ((CHOSEN_COLUMN, reference.chosen_P), (REJECTED_COLUMN, reference.rejected_P)):
        table = table.append_column(name, pa.array(values_P[at]))
    return Dataset(table)
