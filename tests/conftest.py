"""Settings for every test: one thread for tiny models, no network, quiet libraries."""

from __future__ import annotations

import os

# Before torch and the hub's client are imported: both read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
