"""The other blocks, and the recipe that holds them all."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from selective_dpo.config.base import Block, Count, Fraction, PathText, Seed, Settings, TokenBudget, file_name
from selective_dpo.config.data import DataConfig, ModelConfig
from selective_dpo.config.selection import ScoreConfig, SelectConfig

TRAINING_SEED = 42
"""Of a policy's training, unless `train.trainer` has a `seed`."""


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
    source: PathText = ""
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
    reward_model: PathText = ""
    """Hub name or folder of the sequence classifier for judge `reward-model`."""
    controls: dict[str, SelectConfig] = Field(default_factory=dict)
    """Other selections to train on the same way and evaluate beside the run's own, by name."""
    training_seeds: tuple[Seed, ...] = ()
    """Train on the run's own selection again with each of these seeds, and show how far the results lie
    apart. A seed decides an adapter's first weights and dropout; the order stays the curriculum's."""
    tokens_per_batch: TokenBudget = "auto"
    """Padded tokens in one forward pass over held-out pairs, per process; `auto` as in `score`."""

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
    checkpoint_minutes: Annotated[float, Field(ge=0.0)] = 10.0
    """Minutes between two checkpoints of a training; 0: none by time. A killed training goes on from its
    newest whole one. With any checkpoints, one is made on SIGTERM and one at a training's end, too."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between two checkpoints; 0: by time only."""

    @model_validator(mode="after")
    def _one_kind_of_spreading(self) -> Self:
        if self.workers > 1 and self.processes > 1:
            raise ValueError("workers and processes cannot both be above 1: they would share the devices")
        return self


class Recipe(Block):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"), AfterValidator(file_name)]
    """Name of the run's folder below `output_dir`: letters, digits, `.`, `_` and `-`."""
    output_dir: PathText = "runs"
    """Where run folders are made."""
    model: ModelConfig
    """The starting policy."""
    data: DataConfig
    """Preference pairs."""
    curriculum: PathText = ""
    """Take the difficulty from here instead of scoring: a CSV or Parquet file (also .gz) of `prompt_id` or
    `pair_id` and `learning_order` or `difficulty`, as the original's; a folder of the original's records; or
    another run's folder or `curriculum.parquet`. Empty: it is measured as `score` says."""
    score: ScoreConfig = ScoreConfig()
    """Difficulty scoring. Beside `curriculum` only `tokens_per_batch` has an effect: on the reference."""
    select: SelectConfig = SelectConfig()
    """Selection and order."""
    train: TrainConfig = TrainConfig()
    """Training on the curriculum."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation of the policy."""
    launch: LaunchConfig = LaunchConfig()
    """Spreading the work."""

    @model_validator(mode="after")
    def _curriculum_replaces_scoring(self) -> Self:
        if not self.curriculum:
            return self
        fields = set(ScoreConfig.model_fields) - {"tokens_per_batch"}
        default, given = ScoreConfig(), self.score.model_fields_set & fields
        # A resolved recipe, such as config.json, holds every key of every block.
        if given == fields:
            given = {name for name in fields if getattr(self.score, name) != getattr(default, name)}
        if given:
            first = next(name for name in ScoreConfig.model_fields if name in given)
            raise ValueError(
                f"score.{first} has no effect beside curriculum, which replaces scoring: leave one out"
            )
        controls = {f"evaluate.controls.{name}": select for name, select in self.evaluate.controls.items()}
        for where, select in {"select": self.select, **controls}.items():
            if select.about_records:
                raise ValueError(
                    f"{where}.{select.about_records[0]} has no effect on the difficulty of curriculum, "
                    "which is one number a pair: leave it out"
                )
        return self

    @model_validator(mode="after")
    def _master_weights_have_an_effect(self) -> Self:
        trained: list[ScoreConfig | TrainConfig] = [self.train]
        if not self.curriculum:
            trained.append(self.score)
        if not self.model.master_weights and not any(_trains_all_weights(block) for block in trained):
            raise ValueError(
                "model.master_weights: false has no effect: adapters are trained in float32, and DeepSpeed "
                "has a float32 copy; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _training_seeds_change_something(self) -> Self:
        seeds, trainer = self.evaluate.training_seeds, self.train.trainer
        own = trainer.get("seed", TRAINING_SEED)
        if len(set(seeds)) < len(seeds) or own in seeds:
            raise ValueError(f"evaluate.training_seeds must be distinct, and not the training's own, {own}")
        if seeds and self.train.lora is None and trainer.get("disable_dropout", True):
            raise ValueError(
                "evaluate.training_seeds would change nothing: full fine-tuning without dropout, in the "
                "curriculum's order, has nothing random in it; use train.lora, or leave them out"
            )
        if seeds and not self.data.test and not self.evaluate.generation.prompts:
            raise ValueError(
                "evaluate.training_seeds has no effect without data.test or evaluate.generation.prompts"
            )
        return self


def _trains_all_weights(stage: ScoreConfig | TrainConfig) -> bool:
    """Outside of DeepSpeed."""
    return stage.lora is None and not stage.trainer.get("deepspeed")
