"""Other libraries' chatter, off: what this package has to say is one line per stage."""

from __future__ import annotations

import logging
import os
import warnings

_LIBRARIES = r"(accelerate|datasets|huggingface_hub|peft|torch|transformers|trl)(\..*)?$"


def quieten_libraries() -> None:
    """Silence progress bars, notices and telemetry of the libraries underneath; errors still show.

    Called by the command line and by worker processes, never on import: a program that uses this
    package as a library keeps its own settings.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed sets its logger's level itself, when transformers imports it, and writes to standard output.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # What they will change in their next versions is for this package to follow, not for its users.
    warnings.filterwarnings("ignore", category=FutureWarning, module=_LIBRARIES)
    from datasets.utils import logging as datasets_logging
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets_logging.set_verbosity_error()
    disable_progress_bar()
    for name in ("trl", "peft", "accelerate", "torch.distributed", "tensorboard"):
        logging.getLogger(name).setLevel(logging.ERROR)
