"""The recipe: what a run is, as frozen types. Unknown keys are errors; each field says what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Settings = dict[str, Any]
"""Keyword arguments of another library's configuration, checked against that library when used."""


class Block(BaseModel):
    """Base of all recipe blocks."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class ModelConfig(Block):
    """The starting (SFT) policy. It is also the reference."""

    path: str
    """Hub name or local folder of the weights."""
    revision: str = "main"
    """Branch, tag or commit; hub models only."""
    tokenizer: str = ""
    """Hub name or local folder of the tokenizer; empty: the model's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the weights are loaded as. Mixed precision is `trainer.bf16` of each stage."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """transformers' `attn_implementation`."""
    chat_template: str = ""
    """`chatml`, `gemma-system`, or the path of a Jinja file; empty: the tokenizer's own."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you have read that code."""


class SourceConfig(Block):
    """One place that preference pairs come from."""

    path: str
    """A .jsonl, .json, .csv or .parquet file (also .gz), a `datasets` folder, or a hub name."""
    split: str = ""
    """Split of a hub name or of a saved `DatasetDict`; needed exactly there."""
    subset: str = ""
    """Configuration name of a hub data set."""
    revision: str = ""
    """Branch, tag or commit of a hub data set."""
    fraction: Fraction = 1.0
    """Share of its rows that is used: a random one, drawn with `data.seed`."""


class DataConfig(Block):
    """Preference pairs and how they become tokens."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Pairs to score, select from and train on; several sources make a mixture."""
    test: tuple[SourceConfig, ...] = ()
    """Pairs kept apart for the evaluation of the trained policy."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest prompt plus completion, in tokens."""
    max_prompt_length: Count = 512
    """Longest prompt, in tokens."""
    overlong: Literal["drop", "truncate"] = "drop"
    """`drop` a pair that is too long, with its reason; or `truncate`: keep the prompt's last
    `max_prompt_length` tokens, then cut the end of the completions."""
    empty_system_message: bool = False
    """Put an empty system message before conversations that have none, where the template takes one."""
    max_boundary_mismatch: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Refuse the data when the prompt's tokens are not a prefix of prompt plus completion in more
    than this share of the pairs."""
    max_pairs: Annotated[int, Field(ge=0)] = 0
    """Use only this many rows of the mixture, drawn with `seed`; 0: all."""
    seed: int = 0
    """Decides which rows a `fraction` or `max_pairs` keeps."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length: the completion needs room")
        return self


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
    """Difficulty: held-out DPO loss from cross-fitted scorers."""

    protocol: Literal["paper", "fast", "certified", "custom"] = "paper"
    """`paper`: seeds 41, 42, 43 and five evaluations; `fast`: seed 41, measured in the middle and at the
    end; `certified`: seeds are added, two at least, until the selected set is predicted to be stable;
    `custom`: as `seeds` and `evaluations` say. docs/protocols.md has what each costs and keeps."""
    seeds: tuple[int, ...] = PROTOCOLS["paper"].seeds
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
    """TRL `DPOConfig` keys for the scorers' training."""
    tokens_per_batch: Count = 16_384
    """Padded tokens in one forward pass of an evaluation, per process."""
    keep_scorers: bool = False
    """Publish each scorer's adapter or weights beside its records."""

    @model_validator(mode="before")
    @classmethod
    def _what_the_protocol_means(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("protocol") not in PROTOCOLS:
            return given
        return {**PROTOCOLS[given["protocol"]]._asdict(), **given}

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


class SelectConfig(Block):
    """Which pairs are kept, and in which order they are trained on."""

    aggregate: Literal["mean", "final", "median", "rank-mean"] = "mean"
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
    """Largest difficulty kept by `below` (nats; ln 2 = 0.693 is chance)."""
    band: tuple[float, float] | None = None
    """Lower and upper quantile kept by `band`, within [0, 1]."""
    order: Literal["easy-to-hard", "hard-to-easy", "shuffled"] = "easy-to-hard"
    """The order of training."""
    seed: int | None = None
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


class TrainConfig(Block):
    """DPO on the curriculum, from the starting policy."""

    lora: Settings | None = None
    """PEFT `LoraConfig` keys; null: full fine-tuning."""
    trainer: Settings = Field(default_factory=dict)
    """TRL `DPOConfig` keys."""
    hub_id: str = ""
    """Hub repository that the finished policy is pushed to; empty: none."""
    hub_private: bool = True
    """Whether a repository created for `hub_id` is private."""


class GenerationConfig(Block):
    """Sampled answers of the policy and of its starting model."""

    prompts: Annotated[int, Field(ge=0)] = 0
    """Number of prompts answered; 0: no generation."""
    source: str = ""
    """JSON Lines of `{"prompt": text or messages}` to answer; empty: the prompts of `data.test`."""
    samples: Count = 1
    """Answers per prompt and model."""
    max_new_tokens: Count = 512
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """0: greedy."""
    top_p: Fraction = 1.0
    """Nucleus sampling; 1: off."""
    batch_size: Count = 64
    """Answers generated at once."""
    seed: int = 0
    """Of the sampling."""


class EvaluateConfig(Block):
    """What the trained policy is measured by."""

    generation: GenerationConfig = GenerationConfig()
    """Sampling from the policy and the starting model."""
    judge: Literal["none", "reward-model", "embedded-world"] = "none"
    """Who compares the answers: nobody, a sequence classifier, or the embedded world's gold reward."""
    reward_model: str = ""
    """Hub name or folder of the sequence classifier for judge `reward-model`."""
    controls: dict[str, SelectConfig] = Field(default_factory=dict)
    """Other selections to train on the same way and evaluate beside the run's own, by name."""
    tokens_per_batch: Count = 16_384
    """Padded tokens in one forward pass over held-out pairs, per process."""

    @model_validator(mode="after")
    def _judge_has_something_to_judge(self) -> Self:
        if self.judge != "none" and self.generation.prompts == 0:
            raise ValueError(f"judge '{self.judge}' needs generation.prompts above 0")
        if (self.judge == "reward-model") != bool(self.reward_model):
            raise ValueError("judge 'reward-model' and reward_model go together")
        return self


class LaunchConfig(Block):
    """How the work is spread."""

    workers: Count = 1
    """Scorers (and control arms) trained at the same time on this machine, a process each."""
    processes: Count = 1
    """Data-parallel processes of each training, started through `accelerate launch`."""

    @model_validator(mode="after")
    def _one_kind_of_spreading(self) -> Self:
        if self.workers > 1 and self.processes > 1:
            raise ValueError("workers and processes cannot both be above 1: they would share the devices")
        return self


class Recipe(Block):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name of the run's folder below `output_dir`: letters, digits, `.`, `_` and `-`."""
    output_dir: str = "runs"
    """Where run folders are made."""
    model: ModelConfig
    """The starting policy."""
    data: DataConfig
    """Preference pairs."""
    score: ScoreConfig = ScoreConfig()
    """Difficulty scoring."""
    select: SelectConfig = SelectConfig()
    """Selection and order."""
    train: TrainConfig = TrainConfig()
    """Training on the curriculum."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation of the policy."""
    launch: LaunchConfig = LaunchConfig()
    """Spreading the work."""
