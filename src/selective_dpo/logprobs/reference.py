"""The reference's log-probabilities: computed once from the starting policy, used by everything after.

They are computed before any trainer wraps, adapts or moves the model, and keyed by pair, so that all
scorers, their evaluations and the final training share one table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from numpy.typing import NDArray
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.distributed.processes import publish_from_main, this_process
from selective_dpo.errors import ModelError, RecordsError, name_some
from selective_dpo.identity import positions_of
from selective_dpo.logprobs.compute import PairLogps, pair_logps
from selective_dpo.logprobs.memory import TokenBudget
from selective_dpo.logprobs.nonfinite import quarantined_pair, read_quarantine, require_few, write_quarantine
from selective_dpo.logprobs.rows import ROWS_AT_ONCE, TOKEN_COLUMNS
from selective_dpo.models import spread_frozen

FILE = "logps.parquet"

TRIED = 4
"""Pairs whose log-probs are tried before those of all."""

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
    spread: bool = False,
) -> None:
    """Compute the reference's log-probs of all pairs and publish them (see `publish_logps`).

    `model` is the starting policy as loaded; it is given TRL's fused head, and moved to this process's
    device or, with `spread`, divided among the processes.

    Raises:
        ModelError: as `require_embedded` and `require_finite_start`.
        RecordsError: as `publish_logps`.
    """
    add_fused_lm_head(model)
    model = spread_frozen(model.requires_grad_(False)) if spread else model.to(this_process().device)
    require_embedded(model, tokens)
    require_finite_start(model, tokens, pad_token_id=pad_token_id, autocast_dtype=autocast_dtype)
    logps = pair_logps(
        model,
        tokens,
        tokens_per_batch=tokens_per_batch,
        pad_token_id=pad_token_id,
        autocast_dtype=autocast_dtype,
        what="reference",
    )
    publish_logps(folder, key=key, logps=logps, tokens=tokens)


def publish_logps(folder: Path, *, key: str, logps: PairLogps, tokens: Dataset) -> None:
    """Publish the reference's log-probs of `tokens` as float32.

    Pairs whose log-probs are not finite are set aside (see `nonfinite`): without a reference they have no
    loss, so nothing is trained on them or measured of them.

    Raises:
        RecordsError: more than 1% of the pairs are not finite.
    """
    quarantined = _not_finite(logps, tokens)
    require_few(
        quarantined,
        len(tokens),
        what="the log-probability under the starting model",
        remedy="check its weights, or use bfloat16 or float32 instead of float16",
    )
    table = pa.table(
        {
            "pair_id": logps.pair_ids,
            "chosen": logps.chosen_P.astype(np.float32),
            "rejected": logps.rejected_P.astype(np.float32),
        }
    )
    with publish_from_main(folder, kind="reference", key=key) as partial:
        pq.write_table(table.filter(_is_finite(logps)), partial / FILE)
        write_quarantine(partial, quarantined, pairs=len(tokens))


def require_embedded(model: Any, tokens: Dataset) -> None:
    """Raise `ModelError` where the model has no row for a token of the pairs, which are named."""
    rows, beyond = model.get_input_embeddings().weight.shape[0], dict[str, None]()
    for table in tokens.with_format("arrow").iter(ROWS_AT_ONCE):
        for name in TOKEN_COLUMNS:
            ids = table[name].combine_chunks()
            at = pc.list_parent_indices(ids).filter(pc.greater_equal(ids.flatten(), rows))
            beyond |= dict.fromkeys(table["pair_id"].take(at.unique()).to_pylist())
    if beyond:
        named = name_some(list(beyond))
        raise ModelError(
            f"{len(beyond):,} pair(s) hold tokens beyond the {rows:,} that the model embeds ({named}): use "
            "the tokenizer the model was trained with (model.tokenizer), or leave these out (data.exclude)"
        )


def require_finite_start(
    model: Any, tokens: Dataset, *, pad_token_id: int, autocast_dtype: torch.dtype | None = None
) -> None:
    """Try the first few pairs under the starting policy, before the time of all of them is spent.

    Raises:
        ModelError: none of them has finite log-probabilities.
    """
    first = tokens.select(range(min(TRIED, len(tokens))))
    logps = pair_logps(
        model,
        first,
        tokens_per_batch=1,
        pad_token_id=pad_token_id,
        autocast_dtype=autocast_dtype,
        what="first pairs",
    )
    if not _is_finite(logps).any():
        raise ModelError(
            f"the starting model gives none of the first {len(first)} pairs a finite log-probability: check "
            "its weights for NaN, or use bfloat16 or float32 instead of float16"
        )


def _is_finite(logps: PairLogps) -> NDArray[np.bool_]:
    return np.isfinite(logps.chosen_P) & np.isfinite(logps.rejected_P)


def _not_finite(logps: PairLogps, tokens: Dataset) -> list[dict[str, Any]]:
    found = []
    for row in np.flatnonzero(~_is_finite(logps)).tolist():
        sides = {"chosen": logps.chosen_P[row], "rejected": logps.rejected_P[row]}
        values = [name for name, value in sides.items() if not np.isfinite(value)]
        entry = quarantined_pair(logps.pair_ids[row], tokens[row]["prompt_id"])
        found.append({**entry, "not_finite": [{"values": values}]})
    return sorted(found, key=lambda entry: str(entry["pair_id"]))


def load_reference(folder: Path) -> PairLogps:
    """Read a published reference table; it lacks the pairs that were set aside."""
    table = pq.read_table(folder / FILE)
    return PairLogps(
        table["pair_id"].to_pylist(),
        table["chosen"].to_numpy().astype(np.float64),
        table["rejected"].to_numpy().astype(np.float64),
    )


def require_finite_reference(folder: Path) -> None:
    """Refuse to train without pairs that were selected before the reference in `folder` was computed.

    Raises:
        RecordsError: some were set aside; they are named.
    """
    if aside := read_quarantine([folder]):
        raise RecordsError(
            f"the log-probability of {len(aside):,} selected pairs under the starting model is not finite: "
            f"{name_some(aside)}; leave them out with data.exclude"
        )


def without_quarantined(tokens: Dataset, folder: Path) -> Dataset:
    """`tokens` without the pairs that were set aside when the reference in `folder` was computed."""
    return tokens.select(finite_rows(tokens, folder))


def finite_rows(tokens: Dataset, folder: Path) -> NDArray[np.int64]:
    """The rows of `tokens` that were not set aside when the reference in `folder` was computed."""
    return np.flatnonzero(~np.isin(tokens["pair_id"][:], sorted(read_quarantine([folder]))))


def with_reference(tokens: Dataset, reference: PairLogps, rows: NDArray[np.int64] | None = None) -> Dataset:
    """Those `rows` of `tokens` (None: all), with the two columns TRL reads, joined by `pair_id`.

    The tokens are not copied, so that a table mapped from disk stays there.

    Raises:
        IdentityError: a pair has no reference log-probs, or an id stands twice.
        ValueError: `tokens` is a selection of a data set; give `rows` instead.
    """
    rows = np.arange(len(tokens)) if rows is None else rows
    table, names = tokens.data, tokens["pair_id"][:]
    if table["pair_id"].to_pylist() != names:
        raise ValueError("with_reference wants a whole data set, and rows")
    ids = [names[row] for row in rows.tolist()]
    at = positions_of(ids, reference.pair_ids, what="reference log-probs")
    for name, found_P in ((CHOSEN_COLUMN, reference.chosen_P), (REJECTED_COLUMN, reference.rejected_P)):
        values_P = np.full(len(tokens), np.nan)  # of the other rows, which are not selected
        values_P[rows] = found_P[at]
        table = table.append_column(name, pa.array(values_P))
    return Dataset(table, fingerprint=generate_random_fingerprint()).select(rows)
