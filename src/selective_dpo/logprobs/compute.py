"""Sequence log-probabilities of preference pairs under a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from selective_dpo.distributed.processes import combine_by_position, on_any_process, this_process
from selective_dpo.distributed.progress import Progress
from selective_dpo.distributed.signals import REMEDY
from selective_dpo.errors import Interrupted
from selective_dpo.logprobs.memory import TokenBudget, bounded_batches, budget_for, run_within_memory
from selective_dpo.logprobs.packing_support import PathName, RowCollator, plan_rows
from selective_dpo.logprobs.rows import forward_logps, log_probs_only
from selective_dpo.models import is_sharded


class MeasurementStopped(Interrupted):
    """SIGTERM was noted by somebody who may first write down what there is."""


class PairLogps(NamedTuple):
    """Log-probabilities of chosen and rejected, summed over their tokens, in nats."""

    pair_ids: list[str]
    chosen_P: NDArray[np.float64]
    rejected_P: NDArray[np.float64]


def pair_logps(
    model: Any,
    tokens: Dataset,
    *,
    tokens_per_batch: TokenBudget,
    pad_token_id: int,
    autocast_dtype: torch.dtype | None,
    what: str,
    path: PathName = "auto",
    stop: Callable[[], bool] = lambda: False,
) -> PairLogps:
    """Log-probabilities of every pair of `tokens`, without gradients, in evaluation mode.

    The batches are divided among all processes of a distributed run, and every process returns
    the whole result; `model` may be sharded, since then all of them run the same number of batches.

    Args:
        tokens_per_batch: Tokens that are computed at a time, padding included; halved where memory
            runs out. `auto`: as many as free memory allows.
        path: `shared` computes prompt, chosen and rejected in one row, `padded` in a row for each
            completion; `auto` takes shared rows where the model's attention can, and says which.
        stop: asked before each batch; if it says yes on any process, all of them stop.

    Raises:
        IdentityError: a pair was not computed exactly once over all processes.
        ModelError: not even a single pair fits into memory.
        MeasurementStopped: `stop` said so.
    """
    process = this_process()
    ids = list(tokens["pair_id"])
    values_P2 = np.zeros((len(ids), 2))
    done_P = np.zeros(len(ids), dtype=np.bool_)
    device = next(model.parameters()).device
    with (
        _evaluating(model),
        log_probs_only(model),
        torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None),
        Progress(len(ids), what) as progress,
    ):
        plan = plan_rows(model, tokens, pad_token_id, path)
        collate = RowCollator(model, pad_token_id=pad_token_id, kind=plan.kind)
        budget = budget_for(model, tokens_per_batch)
        batches = bounded_batches(plan.lengths_P, budget, rows_per_pair=plan.rows_per_pair)

        def stop_if_asked() -> None:
            # Those that share a model's weights wait for each other in each batch, so they stop together.
            if on_any_process(stop()) if sharded else stop():
                raise MeasurementStopped(f"interrupted by SIGTERM while measuring {what}: {REMEDY}")

        def logps_of(rows: NDArray[np.int64]) -> torch.Tensor:
            stop_if_asked()
            return forward_logps(model, collate(tokens[rows]).to(device))

        def run(rows: NDArray[np.int64]) -> None:
            values_P2[rows] = logps_of(rows).double().cpu().numpy()
            done_P[rows] = True
            # Of the others it is only known that they have as much to do.
            progress.advance(len(rows) * process.num_processes)

        sharded = process.num_processes > 1 and is_sharded(model)
        mine = batches[process.process_index :: process.num_processes]
        stopped: MeasurementStopped | None = None
        try:
            run_within_memory(
                run, mine, plan.lengths_P, budget, rows_per_pair=plan.rows_per_pair, recover=not sharded
            )
            if sharded and len(mine) * process.num_processes < len(batches):
                # The others run one batch more, and need this process's share of the weights for it.
                logps_of(batches[-1])
        except MeasurementStopped as error:
            stopped = error
        if on_any_process(stopped is not None):
            raise stopped or MeasurementStopped(f"another process was interrupted by SIGTERM: {REMEDY}")
    values_P2 = combine_by_position(values_P2, done_P, ids, what=what)
    return PairLogps(ids, values_P2[:, 0], values_P2[:, 1])


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off and no gradients inside; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
