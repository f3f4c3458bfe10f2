"""The recipe's `model` and `data` blocks."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from selective_dpo.config.base import Block, Count, Fraction, PathText

NAMED_TEMPLATES = ("chatml", "gemma-system", "zephyr")
"""Chat templates that come with this package."""


class ModelConfig(Block):
    """The starting (SFT) policy. It is also the reference."""

    path: PathText
    """Hub name or local folder of the weights: safetensors, not quantized, no adapter (merge it first)."""
    revision: str = "main"
    """Branch, tag or commit; hub models only."""
    tokenizer: PathText = ""
    """Hub name or local folder of the tokenizer; empty: the model's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the weights are loaded as, and a policy's are saved as. Mixed precision is `trainer.bf16` of each
    stage."""
    master_weights: bool = True
    """Full fine-tuning holds the weights in float32 and computes in mixed precision (DeepSpeed has a float32
    copy). `false`: pure `dtype`, in which an update is lost wherever it is smaller than rounding; in
    bfloat16 at the usual rates, that is nearly everywhere."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """transformers' `attn_implementation`."""
    chat_template: PathText = ""
    """`chatml`, `gemma-system`, `zephyr` (that of mistral-7b-sft-beta, after a beginning of sequence), or the
    path of a Jinja file; empty: the tokenizer's own. It serves scoring, training and generation, and is saved
    with the policy."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you have read that code."""

    @model_validator(mode="after")
    def _master_weights_have_an_effect(self) -> Self:
        if self.dtype == "float32" and not self.master_weights:
            raise ValueError("master_weights: false has no effect with dtype float32: leave it out")
        return self


class SourceConfig(Block):
    """One place that preference pairs come from."""

    path: PathText
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
    """`drop` a pair that is too long, with its reason; or `truncate` it as TRL 0.11.4 did, if prompt plus
    longer completion has more than `max_length` tokens: the prompt keeps its last `max_prompt_length`. If
    that is not enough, each completion keeps its first `max_length - max_prompt_length`, however short the
    prompt is: with 1,024 and 512, 100 + 1,000 and 300 tokens become 100 + 512 and 300."""
    empty_system_message: bool = False
    """Put an empty system message before conversations that have none. As in the alignment handbook, the
    chat template's text must mention `system` or `<|im_start|>`; refused where it does not."""
    max_boundary_mismatch: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Refuse the data when the prompt's tokens are not a prefix of prompt plus completion in more
    than this share of the pairs."""
    max_pairs: Annotated[int, Field(ge=0)] = 0
    """Use only this many rows of the mixture, drawn with `seed`; 0: all."""
    seed: int = 0
    """Decides which rows a `fraction` or `max_pairs` keeps."""
    exclude: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")], ...] = ()
    """Ids of pairs to leave out, of `train` or `test`, such as those that a training named because their
    loss is not finite. An id that no row has is refused."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length: the completion needs room")
        return self
