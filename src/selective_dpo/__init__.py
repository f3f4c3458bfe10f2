"""Difficulty of preference pairs for a given model, and DPO on the ones it can learn from.

The public names below are imported on first use, so that `import selective_dpo` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from selective_dpo.config import Recipe, ScoreConfig, SelectConfig
    from selective_dpo.curriculum.build import build_curriculum
    from selective_dpo.curriculum.import_ import import_curriculum
    from selective_dpo.curriculum.table import Curriculum
    from selective_dpo.run.issues import find_issues
    from selective_dpo.run.run import score_difficulty
    from selective_dpo.training.difficulty_callback import DifficultyCallback
    from selective_dpo.training.selective_trainer import SelectiveDPOTrainer

_HOMES = {
    "Curriculum": "selective_dpo.curriculum.table",
    "DifficultyCallback": "selective_dpo.training.difficulty_callback",
    "Recipe": "selective_dpo.config",
    "ScoreConfig": "selective_dpo.config",
    "SelectConfig": "selective_dpo.config",
    "SelectiveDPOTrainer": "selective_dpo.training.selective_trainer",
    "build_curriculum": "selective_dpo.curriculum.build",
    "find_issues": "selective_dpo.run.issues",
    "import_curriculum": "selective_dpo.curriculum.import_",
    "score_difficulty": "selective_dpo.run.run",
}

__all__ = [
    "Curriculum",
    "DifficultyCallback",
    "Recipe",
    "ScoreConfig",
    "SelectConfig",
    "SelectiveDPOTrainer",
    "__version__",
    "build_curriculum",
    "find_issues",
    "import_curriculum",
    "score_difficulty",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'selective_dpo' has no attribute {name!r}")
