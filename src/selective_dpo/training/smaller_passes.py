"""Out of memory with several processes: all start again from the newest checkpoint, in smaller passes.

A process that fails in a backward pass leaves the others waiting in an all-reduce, with part of its
gradient already in theirs: nothing can be repeated in place, as `micro_batches` does for one process. So the
failed one leaves word beside the checkpoints, and ends; the others end with it.

    RUN/checkpoints/JOB/passes.json     the checkpoints' key, and how many pairs a pass holds from now on

Each restart at least halves what a pass holds, so there is an end to them. The file goes with the checkpoints
when the training's result is published. DeepSpeed's batches cannot be parted: it decides by itself where an
update ends.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NoReturn

from selective_dpo.artifacts import read_json, write_json
from selective_dpo.engine.processes import this_process
from selective_dpo.errors import ArtifactError, ModelError, StartAgainError
from selective_dpo.launch.processes import ask_to_start_again
from selective_dpo.training.checkpoints import CheckpointPlan
from selective_dpo.training.sealing import from_main, in_short

PASSES = "passes.json"

logger = logging.getLogger(__name__)


class SmallerPasses:
    """How large the passes of a training on several processes may be; made by all of them together."""

    def __init__(self, plan: CheckpointPlan) -> None:
        self._plan = plan
        pairs = read_passes(plan) if this_process().is_main_process else None
        self.most_pairs: int | None = from_main(pairs)
        """Pairs that a pass of each process holds at most; None: as they are dealt."""
        if self.most_pairs is not None and this_process().is_main_process:
            logger.warning(
                "memory ran out before: training passes hold at most %s pair(s) (%s); each update's pairs "
                "and their weights stay the same",
                f"{self.most_pairs:,}",
                _place(plan),
            )

    def start_again(self, what: str, *, pairs: int) -> NoReturn:
        """Have the training go on in passes of half of `pairs`, which did not fit. `what` tells of it.

        Raises:
            StartAgainError: always, unless
            ModelError: the disk refuses.
        """
        half = max(1, pairs // 2)
        try:
            # Several may fail at once, each with its own number. Whichever stays is at most half of what
            # could fail, and that is all it takes to come to an end.
            write_json(_place(self._plan), {"key": self._plan.key, "pairs_per_pass": half})
        except OSError as error:
            raise ModelError(
                f"{what}, and {_place(self._plan)} cannot be written ({in_short(error)}): mend that, or "
                "lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor"
            ) from error
        how = f"from the newest checkpoint in passes of {half:,} pair(s)"
        if ask_to_start_again(f"{_place(self._plan)}: not {self.most_pairs or 'all'} pairs"):
            raise StartAgainError(f"{what}: all processes start again, and go on {how}")
        raise StartAgainError(f"{what}: run the same command to go on {how}")


def read_passes(plan: CheckpointPlan) -> int | None:
    """The pairs that a pass of this training may hold; None if nothing readable says so.

    It decides about memory, and about numbers only by rounding, so it has no digest.
    """
    try:
        found = read_json(_place(plan))
    except (ArtifactError, OSError):
        return None
    pairs = found.get("pairs_per_pass")
    fits = found.get("key") == plan.key and type(pairs) is int and pairs >= 1
    return pairs if fits else None


def _place(plan: CheckpointPlan) -> Path:
    return plan.folder / PASSES
