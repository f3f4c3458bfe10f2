"""The recipe's `score` and `select` blocks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from selective_dpo.config.base import Block, Count, Fraction, Seed, Settings, TokenBudget
from selective_dpo.core.aggregation import CRITERIA


class Protocol(NamedTuple):
    """How much is measured."""

    seeds: tuple[int, ...]
    evaluations: int


PROTOCOLS = {
    "paper": Protocol((41, 42, 43), 5),
    "fast": Protocol((41,), 2),
    "certified": Protocol((41, 42, 43, 44, 45, 46), 2),
    "custom": Protocol((41, 42, 43), 5),
}
"""What a protocol means where the recipe gives no seeds or evaluations of its own."""
DEFAULT_TARGET = 0.95


class ScoreConfig(Block):
    """Difficulty: held-out loss from cross-fitted scorers, DPO's own or the one that `trainer` names."""

    protocol: Literal["paper", "fast", "certified", "custom"] = "paper"
    """`paper`: seeds 41, 42, 43 and five evaluations; `fast`: seed 41, measured in the middle and at the
    end; `certified`: seeds are added, two at least, until the selected set is predicted to be stable;
    `custom`: as `seeds` and `evaluations` say. docs/protocols.md has what each costs and keeps."""
    seeds: tuple[Seed, ...] = PROTOCOLS["paper"].seeds
    """One random half split and two scorers for each; those of the protocol where none are given. For
    `certified` (41 to 46) they are used one after the other, and not all of them if fewer do."""
    evaluations: Count = PROTOCOLS["paper"].evaluations
    """Held-out evaluations per scorer, evenly spaced, the last one at the end of training; the protocol's
    number where none is given."""
    target_overlap: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """`certified` stops at this predicted overlap of the selected set with that of a fresh repetition;
    0.95 when none is given."""
    lora: Settings | None = Field(
        default_factory=lambda: {
            "r": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": "all-linear",
        }
    )
    """PEFT `LoraConfig` keys; null: full fine-tuning."""
    trainer: Settings = Field(default_factory=dict)
    """TRL `DPOConfig` keys for the scorers' training. Their loss is the difficulty, so `loss_type` must be
    one that each pair has for itself: not `aot`, `aot_unpaired` or `sft`."""
    tokens_per_batch: TokenBudget = "auto"
    """Padded tokens in one forward pass of the reference and of an evaluation, per process; `auto`: the power
    of two that free memory allows, at most 4,096 on a CPU and 65,536 on a GPU."""
    keep_scorers: bool = False
    """Publish each scorer's adapter or weights beside its records."""

    @model_validator(mode="before")
    @classmethod
    def _what_the_protocol_means(cls, given: Any) -> Any:
        protocol = given.get("protocol") if isinstance(given, dict) else None
        if not isinstance(protocol, str) or protocol not in PROTOCOLS:
            return given  # a list, say, is for the validation of the field to name
        return {**PROTOCOLS[protocol]._asdict(), **given}

    @model_validator(mode="after")
    def _protocol_is_what_it_says(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError("seeds must be distinct, and at least one")
        means = PROTOCOLS[self.protocol]
        if self.protocol in ("paper", "fast") and (self.seeds, self.evaluations) != means:
            raise ValueError(
                f"protocol '{self.protocol}' is seeds {list(means.seeds)} with {means.evaluations} "
                "evaluations; say 'custom' for your own"
            )
        if self.protocol == "certified" and len(self.seeds) < 2:
            raise ValueError("protocol 'certified' needs at least two seeds to compare")
        if self.protocol != "certified" and self.target_overlap is not None:
            raise ValueError("target_overlap works only with protocol 'certified'")
        return self


def _known_criterion(name: str) -> str:
    if name not in CRITERIA:
        raise ValueError(f"no criterion is called {name!r}; use {', '.join(CRITERIA)}")
    return name


CriterionName = Annotated[
    str,
    AfterValidator(_known_criterion),
    Field(json_schema_extra=lambda schema: schema.update(enum=list(CRITERIA))),
]


class SelectConfig(Block):
    """Which pairs are kept, and in which order they are trained on."""

    aggregate: CriterionName = "mean"
    """How a pair's records become its difficulty: mean or median of all losses, mean over seeds of
    the last evaluation's, or mean over all evaluations of the pair's rank, scaled to (0, 1]."""
    rule: Literal["easiest", "hardest", "random", "below", "band", "all"] = "easiest"
    """`easiest`, `hardest`, `random`: by `fraction` or `count`; `below`: difficulty at or below
    `threshold`; `band`: quantiles `band[0]` to `band[1]`; `all`: every scored pair."""
    fraction: Fraction | None = None
    """Share of the scored pairs that is kept; 0.5 when `rule` needs a size and none is given."""
    count: Count | None = None
    """Number of pairs kept, instead of `fraction`."""
    threshold: float | None = None
    """Largest difficulty kept by `below`; with DPO's own loss in nats, and ln 2 = 0.693 is chance."""
    band: tuple[float, float] | None = None
    """Lower and upper quantile kept by `band`, within [0, 1]."""
    order: Literal["easy-to-hard", "hard-to-easy", "shuffled"] = "easy-to-hard"
    """The order of training."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Decides `random` and `shuffled`; 0 when one of them is used and none is given."""
    allow_partial: bool = False
    """Accept pairs with fewer records than the protocol makes; the curriculum says so."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        sized = self.rule in ("easiest", "hardest", "random")
        problems = [
            (self.fraction is not None and not sized, f"fraction has no effect with rule '{self.rule}'"),
            (self.count is not None and not sized, f"count has no effect with rule '{self.rule}'"),
            (self.fraction is not None and self.count is not None, "give fraction or count, not both"),
            (self.threshold is not None and self.rule != "below", "threshold works only with rule 'below'"),
            (self.threshold is None and self.rule == "below", "rule 'below' needs a threshold"),
            (self.band is not None and self.rule != "band", "band works only with rule 'band'"),
            (self.band is None and self.rule == "band", "rule 'band' needs a band"),
            (
                self.band is not None and not 0.0 <= self.band[0] < self.band[1] <= 1.0,
                "band must be two rising quantiles within [0, 1]",
            ),
            (
                self.seed is not None and self.rule != "random" and self.order != "shuffled",
                "seed has no effect without rule 'random' or order 'shuffled'",
            ),
        ]
        for is_wrong, message in problems:
            if is_wrong:
                raise ValueError(message)
        return self
