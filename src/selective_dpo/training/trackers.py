"""Experiment trackers (`report_to`): which ones a training has, and where their local files stay."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from selective_dpo.config import Settings


def tracker_names(settings: Settings) -> tuple[str, ...]:
    """The trackers that the trainer settings ask for; "all" is every one that is installed."""
    given = settings.get("report_to") or "none"
    names = (given,) if isinstance(given, str) else tuple(given)
    if "all" in names:
        from transformers.integrations import integration_utils

        return tuple(integration_utils.get_available_reporting_integrations())  # type: ignore[no-untyped-call]
    return tuple(name for name in names if name != "none")


@contextlib.contextmanager
def training_folder(settings: Settings, tracking: Path | None) -> Iterator[Path]:
    """The trainer's own folder: `tracking` where a tracker may write to it, else one that is deleted.

    Afterwards a W&B run is closed: its next training in this process is another run.
    """
    names = tracker_names(settings)
    if names and tracking is not None:
        yield tracking
        with contextlib.suppress(OSError):  # only if it is there and empty: most trackers write elsewhere
            tracking.rmdir()
            tracking.parent.rmdir()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    # The only one of the usual trackers that transformers leaves open.
    if "wandb" in names and "wandb" in sys.modules:
        sys.modules["wandb"].finish()
