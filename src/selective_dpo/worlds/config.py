"""What an embedded world is made of, as one frozen type. The defaults are those that were found to work."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from selective_dpo.config import Block, Count, Fraction
from selective_dpo.worlds.tasks import OPERATIONS

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class TasksConfig(Block):
    """What is asked."""

    operations: tuple[str, ...] = tuple(OPERATIONS)
    """Operations that prompts ask for, equally often; the last two by default are beyond the model."""
    lengths: tuple[Count, ...] = (3, 4, 5, 6)
    """Numbers of operands, equally often."""

    @model_validator(mode="after")
    def _known_operations(self) -> Self:
        unknown = sorted(set(self.operations) - set(OPERATIONS))
        if unknown or not self.operations:
            raise ValueError(f"operations must be some of {list(OPERATIONS)}, not {unknown}")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError("lengths must be at least 2: an operand alone has no halves")
        return self


class SFTConfig(Block):
    """The model, and how it learns from demonstrations."""

    hidden_size: Count = 64
    """Width of the residual stream."""
    layers: Count = 3
    """Transformer blocks."""
    heads: Count = 4
    """Attention heads, each with its own keys and values."""
    feed_forward_size: Count = 168
    """Width inside the feed-forward blocks."""
    rope_theta: Positive = 1000.0
    """Base of the rotary position embedding."""
    initializer_range: Positive = 0.08
    """Standard deviation of the first weights. With transformers' 0.02, made for wider models, some seeds
    have not learned all five easy operations by the last step."""
    hasty_share: Share = 0.45
    """Share of demonstrations by hasty writers, who overwrite 1 or 2 symbols of the right answer with
    random letters and never change its length."""
    steps: Count = 1000
    """Updates."""
    batch_size: Count = 64
    """Demonstrations per update; each is drawn anew and seen once."""
    learning_rate: Positive = 4e-3
    """AdamW's highest learning rate."""
    final_learning_rate: Fraction = 0.1
    """Where the cosine ends, as a share of the highest."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Updates of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's averaging of gradients and squared gradients."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""


class PairsConfig(Block):
    """Preference pairs."""

    prompts: Count = 3000
    """Prompts with two answers each, for training; identical answers make no pair."""
    temperature: Positive = 1.0
    """Of the sampled answers."""
    annotator_temperature: Positive = 1.2
    """P(a is preferred to b) = sigmoid((reward of a - reward of b) / this): Bradley-Terry noise."""
    test_pair_prompts: Count = 400
    """Prompts for held-out pairs, made and labelled as the training pairs are."""
    test_prompts: Count = 600
    """Prompts kept for judging answers; disjoint from those of all pairs."""
    max_answer_tokens: Count = 10
    """An answer is cut after so many tokens; right ones have at most the longest length plus <eos>."""


class WorldConfig(Block):
    """Everything but the seed that decides a world."""

    tasks: TasksConfig = TasksConfig()
    """What is asked."""
    sft: SFTConfig = SFTConfig()
    """The starting policy."""
    pairs: PairsConfig = PairsConfig()
    """What it is trained on next."""
