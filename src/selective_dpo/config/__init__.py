"""The recipe: what a run is, as frozen types. Unknown keys are errors; each field says what it means."""

from selective_dpo.config.base import Block, Count, Fraction, Settings
from selective_dpo.config.data import NAMED_TEMPLATES, DataConfig, ModelConfig, SourceConfig
from selective_dpo.config.recipe import (
    TRAINING_SEED,
    EvaluateConfig,
    GenerationConfig,
    LaunchConfig,
    Recipe,
    TrainConfig,
)
from selective_dpo.config.selection import DEFAULT_TARGET, PROTOCOLS, Protocol, ScoreConfig, SelectConfig

__all__ = [
    "DEFAULT_TARGET",
    "NAMED_TEMPLATES",
    "PROTOCOLS",
    "TRAINING_SEED",
    "Block",
    "Count",
    "DataConfig",
    "EvaluateConfig",
    "Fraction",
    "GenerationConfig",
    "LaunchConfig",
    "ModelConfig",
    "Protocol",
    "Recipe",
    "ScoreConfig",
    "SelectConfig",
    "Settings",
    "SourceConfig",
    "TrainConfig",
]
