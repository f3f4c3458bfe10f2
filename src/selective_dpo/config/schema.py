"""A recipe's blocks as frozen types, from the field types at the top to `Recipe` at the end.

Unknown keys are errors, and so is a key that would have no effect. The docstring under a field is its text in
docs/recipe.md and in recipe.schema.json, which `tools/recipe_reference.py` writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from selective_dpo.criteria import CRITERIA
from selective_dpo.losses import OPTIONS

_MAX_NAME_BYTES, _MAX_PATH_CHARACTERS = 255, 4096


def _path_or_name(text: str) -> str:
    # Refused here, where the key's name is known, before a function asks the disk for it.
    try:
        names = text.encode("utf-8").split(b"/")
        Path(text).expanduser()
    except UnicodeEncodeError:
        raise ValueError("is no path or name: it holds half of a character") from None
    except RuntimeError:
        raise ValueError("begins with ~ and the name of a user who has no home folder here") from None
    if "\0" in text:
        raise ValueError("is no path or name: it holds a NUL character")
    if len(text) > _MAX_PATH_CHARACTERS or max(map(len, names)) > _MAX_NAME_BYTES:
        raise ValueError(f"is no path or name: it is longer than {_MAX_NAME_BYTES} bytes between two slashes")
    return text


_RESERVED = {"con", "prn", "aux", "nul"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)
}
"""Names that Windows keeps for devices."""


def file_name(text: str) -> str:
    """Return `text`; raise `ValueError` if some operating system cannot use it as a folder's name."""
    if text.split(".")[0].lower() in _RESERVED or text.endswith("."):
        raise ValueError(f"{text!r} cannot name a folder on every system; choose another")
    return text


Fraction = Annotated[float, Field(gt=0.0, le=1.0)]

Count = Annotated[int, Field(ge=1)]

Text = Annotated[str, Field(min_length=1)]

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""A seed that NumPy, torch and Python all take."""

PathText = Annotated[str, AfterValidator(_path_or_name)]
"""A path or a hub name."""

_DOTTED = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$"

DottedName = Annotated[str, Field(pattern=_DOTTED, examples=["my_module:my_function"])]
"""A function or class of the user's own: the module that holds it, and its name there."""

HubKernel = Annotated[str, Field(pattern=r"^kernels-community/[\w.\-]+(@[\w.\-]+)?(:[\w.\-]+)?$")]
"""A kernel that transformers downloads. Code of others on the hub it would run only if told to."""

TokenBudget = Count | Literal["auto"]
"""Tokens that a forward pass computes at a time; `auto`: as free memory allows."""

Settings = dict[str, Any]
"""Settings of another library's configuration class; `trainer_options` checks them."""


class Block(BaseModel):
    """Base of all recipe blocks."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


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
    quantization: Literal["", "4bit"] = ""
    """`4bit`: the frozen weights under adapters are held in 4 bits (NF4 with double quantization, by
    bitsandbytes on a GPU: QLoRA), for scoring, training and evaluation alike. Needs `lora` in both stages.
    TRL holds the adapters in bfloat16 then."""
    attention: (
        Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | HubKernel
    ) = "sdpa"
    """transformers' `attn_implementation`, or a kernel of the hub, such as `kernels-community/flash-attn2`,
    which the package `kernels` downloads. Flash attention of either kind takes no mask, and so no shared
    rows."""
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
    columns: dict[Text, Text] = {}
    """Renames columns before a row is read: our name of a column -> its name in this source, such as
    `{prompt: instruction, chosen: answer_a, rejected: answer_b}`. Columns that are not named keep their
    names."""
    adapter: str = ""
    """What makes a pair of a row: `chat` reads texts as a user's and an assistant's messages;
    `my_module:my_function`, or a name given with `@adapter`, is your own. Empty: the known shapes."""


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
            raise ValueError(
                "max_prompt_length must be below max_length: or nothing is left for the completion"
            )
        return self


class Protocol(NamedTuple):
    """How much is measured."""

    seeds: tuple[int, ...]
    evaluations: int


PROTOCOLS = {
    "one-step": Protocol((41,), 1),
    "paper": Protocol((41, 42, 43), 5),
    "fast": Protocol((41,), 2),
    "certified": Protocol((41, 42, 43, 44, 45, 46), 2),
    "custom": Protocol((41, 42, 43), 5),
}
"""What a protocol means where the recipe gives no seeds or evaluations of its own."""

DEFAULT_TARGET = 0.95


class ScoreConfig(Block):
    """Difficulty: held-out loss from cross-fitted scorers, DPO's own or the one that `trainer` names."""

    protocol: Literal["one-step", "paper", "fast", "certified", "custom"] = "one-step"
    """`one-step`: one gradient pass and one step for each of eight folds, no scorer is trained; `paper`:
    seeds 41, 42, 43 and five evaluations; `fast`: seed 41, measured in the middle and at the end;
    `certified`: seeds are added, two at least, until the selected set is stable enough; `custom`: as `seeds`
    and `evaluations` say. docs/protocols.md has what each costs and keeps."""
    seeds: tuple[Seed, ...] = PROTOCOLS["one-step"].seeds
    """One random half split and two scorers for each; those of the protocol where none are given. For
    `certified` (41 to 46) they are used one after the other, and not all of them if fewer do."""
    evaluations: Count = PROTOCOLS["one-step"].evaluations
    """Held-out evaluations per scorer, evenly spaced, the last one at the end of training; the protocol's
    number where none is given."""
    splits: Count = 1
    """How often `one-step` is repeated with other folds, which shows how well the splits agree."""
    target_overlap: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """`certified` stops where the lower end of the 95% interval of the selected set's overlap with that of a
    fresh repetition reaches this; 0.95 when none is given."""
    min_fold_prompts: Count = 5
    """Fewest prompts in a fold, so that a scorer has something to learn from and something to measure. Data
    whose folds have fewer are refused, as are those where one prompt has most of the pairs."""
    lora: Settings | None = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}
    """PEFT `LoraConfig` keys; null: full fine-tuning."""
    trainer: Settings = {}
    """TRL `DPOConfig` keys for the scorers' training. Their loss is the difficulty, so `loss_type` must be
    one that each pair has for itself: not `aot`, `aot_unpaired` or `sft`. `one-step` reads the loss, the
    precision, what saves memory and, with an adapter, `fsdp`, which divides the frozen weights."""
    tokens_per_batch: TokenBudget = "auto"
    """Padded tokens in one forward pass of the reference and of an evaluation, per process; `auto`: the power
    of two that free memory allows, at most 4,096 on a CPU and 65,536 on a GPU."""
    gradient_pairs: Annotated[int, Field(ge=0)] = 0
    """`one-step` takes the gradient of so many pairs, drawn at random; 0: of all."""
    check: Annotated[int, Field(ge=0)] = 0
    """Beside `one-step`: train one pair of scorers, as `fast` does, on so many pairs drawn at random, and say
    how far they agree; `trainer` then takes the keys of their training, too. 0: do not; 2,000 is enough."""
    keep_scorers: bool = False
    """Publish each scorer's adapter or weights beside its records."""

    @model_validator(mode="before")
    @classmethod
    def _what_the_protocol_means(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not given.keys() & {"protocol", "splits"}:
            return given  # the fields' own defaults
        protocol = given.get("protocol", "one-step")
        if not isinstance(protocol, str) or protocol not in PROTOCOLS:
            return given  # a list, say, is for the validation of the field to name
        means = PROTOCOLS[protocol]._asdict()
        if protocol == "one-step" and isinstance(splits := given.get("splits", 1), int):
            means["seeds"] = tuple(range(means["seeds"][0], means["seeds"][0] + splits))
        return {**means, **given}

    def _one_step_is_what_it_says(self) -> None:
        first = PROTOCOLS["one-step"].seeds[0]
        if self.seeds != tuple(range(first, first + self.splits)) or self.evaluations != 1:
            raise ValueError(
                "protocol 'one-step', the default, measures each pair once a split: give splits and leave "
                "seeds and evaluations out, or name the protocol that trains scorers, such as 'custom'"
            )
        if self.min_fold_prompts != type(self).model_fields["min_fold_prompts"].default:
            raise ValueError(
                "min_fold_prompts has no effect with protocol 'one-step', the default: leave it out"
            )
        if (self.lora or {}).get("init_lora_weights", True) not in (True, "gaussian"):
            raise ValueError(
                "protocol 'one-step' needs an adapter that starts as none: leave init_lora_weights out"
            )

    @model_validator(mode="after")
    def _protocol_is_what_it_says(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError("seeds must be distinct, and at least one")
        means = PROTOCOLS[self.protocol]
        if self.protocol == "one-step":
            self._one_step_is_what_it_says()
        else:
            for name in ("splits", "gradient_pairs", "check"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} works only with protocol 'one-step'")
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


ONE_STEP_OPTIONS = OPTIONS | {
    *("beta", "loss_type", "loss_weights", "bf16", "fp16", "per_device_train_batch_size"),
    *("activation_checkpointing", "gradient_checkpointing"),
}
"""What `score.trainer` may say where no scorer is trained: the loss, the precision and the memory."""


def _criterion_name(name: str) -> str:
    if name not in CRITERIA and not re.fullmatch(_DOTTED, name):
        raise ValueError(
            f"no criterion is called {name!r}; use {', '.join(CRITERIA)}, or my_module:my_function"
        )
    return name


def _describe_criteria(schema: dict[str, Any]) -> None:
    # The registered names are looked up when the schema is made, so that a user's own are among them.
    del schema["type"]
    schema["anyOf"] = [{"enum": list(CRITERIA), "type": "string"}, TypeAdapter(DottedName).json_schema()]


CriterionName = Annotated[str, AfterValidator(_criterion_name), Field(json_schema_extra=_describe_criteria)]
"""A name in `CRITERIA`, or a `DottedName`."""


_SECOND_NAMES = {"criterion": "aggregate", "from": "source"}
"""Keys of `select` that are another name of one. `from` cannot be a name in Python."""


def _add_second_names(schema: dict[str, Any]) -> None:
    for second, name in _SECOND_NAMES.items():
        described = {"description": f"Another name of `{name}`; give one of them."}
        schema["properties"][second] = {**schema["properties"][name], **described}


Order = Literal["easy-to-hard", "hard-to-easy", "shuffled"]


Flag = Literal[
    "suspected_flip", "tie", "too_hard", "contradicting", "length_driven", "truncated", "degenerate"
]
"""What can be wrong with a pair; docs/issues.md says when each is raised."""

FLAGS: tuple[Flag, ...] = get_args(Flag)

Action = Literal["drop", "flip", "sft", "down-weight"]


class IssuesConfig(Block):
    """Where pairs are flagged, by `selective-dpo issues` and for `select.action`."""

    suspected_flip: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.65
    """`p_wrong` from which on a label is a `suspected_flip`."""
    tie: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.05
    """Largest distance of `p_wrong` from one half of a `tie`. Between that and `suspected_flip` a pair is
    `too_hard`."""
    similar_prompts: Fraction = 0.8
    """Share of common words from which on the prompts of two pairs with the same answers are taken for one
    (`contradicting`)."""
    repetition: Annotated[float, Field(gt=1.0)] = 4.0
    """How many times shorter compression makes 1,000 bytes of a `degenerate` answer, at least."""

    @model_validator(mode="after")
    def _thresholds_rise(self) -> Self:
        if 0.5 + self.tie >= self.suspected_flip:
            raise ValueError("suspected_flip must be above 0.5 + tie")
        return self


DEFAULT_FRACTION = 0.5
"""The share kept where a rule needs a size and none is given: the paper's."""


class SelectConfig(Block):
    """Which pairs are kept, and in which order they are trained on."""

    model_config = ConfigDict(json_schema_extra=_add_second_names)

    aggregate: CriterionName = "mean"
    """How a pair's records become its difficulty: mean or median of all losses, mean over seeds of
    the last evaluation's, or mean over all evaluations of the pair's rank, scaled to (0, 1]. Or a function of
    your own as `my_module:my_function`."""
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
    order: Order = "easy-to-hard"
    """The order of training."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Decides `random` and `shuffled`; 0 when one of them is used and none is given."""
    allow_partial: bool = False
    """Accept pairs with fewer records than the protocol makes; the curriculum says so."""
    action: dict[Flag, Action] = {}
    """What becomes of flagged pairs (docs/issues.md), such as `{suspected_flip: flip, degenerate: drop}`; of
    a pair with several of these flags, by the first one here. `drop`: not selected. `flip`: chosen and
    rejected change places before difficulties are compared. `sft`: not selected, and its chosen answer goes
    to `sft.jsonl`. `down-weight`: weighs 1 - `p_wrong` in training, if it is selected. `rule` chooses among
    the pairs that are left."""
    balance: tuple[Literal["length", "source", "score"], ...] = ()
    """Take the share within strata instead of over all pairs: fifths of the length difference (chosen minus
    rejected), the data's sources, fifths of the score difference, or several of them crossed. With rule
    `easiest` or `hardest`."""
    residual: Literal["", "length"] = ""
    """`length`: select by what is left of difficulty when its monotone dependence on the length difference is
    taken out."""
    quota: dict[Text, Fraction] = {}
    """Least share of the selected pairs that is of a source, by the source's name in the pairs' table."""
    source: PathText = ""
    """Of a control: take the difficulty from here instead, such as from a run of a weaker model on the same
    pairs; what it may be is said at `curriculum`, which does this for the run's own selection."""

    def identity(self) -> dict[str, Any]:
        """JSON values for keys and facts: without the path of `source`, for which its content stands.

        Keys that came later are left out where they have no effect, so that older curricula keep their key.
        """
        later = {name for name in ("action", "balance", "residual", "quota") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude={"source", *later})

    @property
    def about_records(self) -> list[str]:
        """The keys given that say how records are read: they have no effect on an imported difficulty."""
        default = {"aggregate": "mean", "allow_partial": False, "action": {}}
        return [name for name, value in default.items() if getattr(self, name) != value]

    @model_validator(mode="before")
    @classmethod
    def _second_names(cls, given: Any) -> Any:
        # `config.json`, the facts of a curriculum and its key say the first ones, and stay as they are.
        if not isinstance(given, dict):
            return given
        for second, name in _SECOND_NAMES.items():
            if second in given and name in given:
                raise ValueError(f"{second} and {name} are two names of one key: leave one out")
        return {_SECOND_NAMES.get(key, key): value for key, value in given.items()}

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
            (
                bool(self.balance or self.quota) and self.rule not in ("easiest", "hardest"),
                f"balance and quota have no effect with rule '{self.rule}'",
            ),
            (bool(self.balance and self.quota), "give balance or quota, not both"),
            (
                bool(self.residual) and self.rule in ("random", "below"),
                f"residual has no effect with rule '{self.rule}'",
            ),
            (len(set(self.balance)) < len(self.balance), "balance names one thing twice"),
            (sum(self.quota.values()) > 1.0, "the quotas are above 1 together"),
            (
                bool(self.source and self.about_records),
                f"{', '.join(self.about_records)} has no effect beside from, whose difficulty is one number "
                "a pair",
            ),
        ]
        for is_wrong, message in problems:
            if is_wrong:
                raise ValueError(message)
        return self


TRAINING_SEED = 42
"""Of a policy's training, unless `train.trainer` has a `seed`."""


class TrainConfig(Block):
    """DPO on the curriculum, from the starting policy."""

    lora: Settings | None = None
    """PEFT `LoraConfig` keys; null: full fine-tuning."""
    trainer: Settings = {}
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


class LanguageJudgeConfig(Block):
    """A language model that compares answers: judges `endpoint` and `local-model`."""

    model: PathText
    """The server's name of the model, or a hub name or folder."""
    base_url: str = ""
    """Of an OpenAI-compatible server, such as `http://127.0.0.1:8000/v1`; for judge `endpoint`. The key is
    read from the environment variable OPENAI_API_KEY."""
    template: PathText = ""
    """A file with the judge's prompt, with {prompt}, {answer_a} and {answer_b}; empty: this package's own."""
    labels: tuple[str, str] = ("A", "B")
    """What the model is to write where the first, or the second answer is better."""
    threads: Count = 8
    """Questions asked at a time."""
    cache: PathText = ""
    """A folder that keeps each verdict under a digest of the question; empty: none. The key is not in it."""
    price: Annotated[float, Field(ge=0.0)] = 0.0
    """Of a million tokens read, in any currency; 0: free."""
    max_cost: Annotated[float, Field(gt=0.0)] | None = None
    """No further questions are asked where they would cost more, in the same currency."""


BenchmarkName = Literal["alpaca-eval", "arena-hard", "mt-bench"]


class BenchmarkConfig(Block):
    """Answers to a benchmark's questions, for its official program to judge."""

    source: PathText
    """A checkout of the official repository, or its question file."""
    max_new_tokens: Count | None = None
    """Longest answer, in tokens; null: 2048 for `alpaca-eval`, 4096 for `arena-hard`, 1024 for `mt-bench`."""
    temperature: Annotated[float, Field(ge=0.0)] | None = None
    """Null: 0.7 for `alpaca-eval`, 0 (greedy) for `arena-hard`. `mt-bench` has one for each category."""


class GuardConfig(Block):
    """Tasks of lm-evaluation-harness (extra `guard`), on the starting model and on every arm."""

    tasks: tuple[Text, ...] = Field(min_length=1)
    """Names of the harness's tasks, or of those in `include_path`."""
    include_path: PathText = ""
    """A folder of tasks of your own, as the harness's YAML files."""
    allow_code: bool = False
    """Let tasks in `include_path` run code of their own; else they are refused."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null: as the task says."""
    limit: Annotated[int, Field(ge=0)] = 0
    """Only so many documents of each task; 0: all."""
    batch_size: Count = 8
    """Requests at once."""
    chat: bool = False
    """Ask through the chat template."""


class EvaluateConfig(Block):
    """What the trained policy is measured by."""

    generation: GenerationConfig = GenerationConfig()
    """Sampling from the policy and the starting model."""
    judge: (
        Literal["none", "reward-model", "endpoint", "local-model", "embedded-world", "constraints"]
        | DottedName
    ) = "none"
    """Who compares the answers: `none`, `reward-model` (a sequence classifier), a language model behind an
    OpenAI-compatible `endpoint` or in this process (`local-model`), `embedded-world` or `constraints` (the
    gold reward of the demo's worlds), or `my_module:MyJudge`, a class of your own (docs/extending.md)."""
    language_judge: LanguageJudgeConfig | None = None
    """The model of the judges `endpoint` and `local-model`."""
    reward_model: PathText = ""
    """Hub name or folder of the sequence classifier for judge `reward-model`."""
    benchmarks: dict[BenchmarkName, BenchmarkConfig] = {}
    """Answer the questions of `alpaca-eval`, `arena-hard` or `mt-bench`, and write the answers as their
    official programs read them (docs/evaluation.md)."""
    text: PathText = ""
    """Other text, whose perplexity says what a training cost: a .txt file of paragraphs, or rows with a
    column `text`. Empty: the held-out pairs' prompts, or those that are answered."""
    guard: GuardConfig | None = None
    """Tasks that say what a training cost (docs/evaluation.md); null: none."""
    controls: dict[str, SelectConfig] = {}
    """Other selections to train on the same way and evaluate beside the run's own, by name."""
    training_seeds: tuple[Seed, ...] = ()
    """Train on the run's own selection again with each of these seeds, and show how far the results lie
    apart. A seed decides an adapter's first weights and dropout; the order stays the curriculum's."""
    tokens_per_batch: TokenBudget = "auto"
    """Padded tokens in one forward pass over held-out pairs, per process; `auto` as in `score`."""

    @model_validator(mode="after")
    def _mt_bench_has_temperatures(self) -> Self:
        if "mt-bench" in self.benchmarks and self.benchmarks["mt-bench"].temperature is not None:
            raise ValueError(
                "benchmarks.mt-bench.temperature has no effect: the benchmark has one for each category"
            )
        return self

    @model_validator(mode="after")
    def _judge_has_something_to_judge(self) -> Self:
        if self.judge != "none" and self.generation.prompts == 0:
            raise ValueError(f"judge '{self.judge}' needs generation.prompts above 0")
        if (self.judge == "reward-model") != bool(self.reward_model):
            raise ValueError("judge 'reward-model' and reward_model go together")
        options = self.language_judge
        if (self.judge in ("endpoint", "local-model")) != (options is not None):
            raise ValueError("judges 'endpoint' and 'local-model' go together with language_judge")
        if options is not None:
            if (self.judge == "endpoint") != bool(options.base_url):
                raise ValueError("judge 'endpoint' and language_judge.base_url go together")
            of_server = {"threads", "price", "max_cost"} & options.model_fields_set
            if self.judge == "local-model" and of_server:
                raise ValueError(f"language_judge.{min(of_server)} has no effect with judge 'local-model'")
            if options.max_cost is not None and not options.price:
                raise ValueError("language_judge.max_cost needs a price")
        return self


class StudyConfig(Block):
    """Arms around the run's own selection, each trained and evaluated as it is: they become
    `evaluate.controls` and `evaluate.training_seeds`. For each of their sizes there is a random control."""

    fractions: tuple[Fraction, ...] = ()
    """The easiest pairs, at each of these shares."""
    orders: tuple[Order, ...] = ()
    """The run's own selection, in each of these orders."""
    criteria: tuple[CriterionName, ...] = ()
    """As many of the easiest pairs by each of these criteria, as `select.aggregate` names them."""
    sources: tuple[PathText, ...] = ()
    """As many of the easiest pairs by the difficulty that each of these holds, such as a weaker model's run;
    see `select.source`."""
    balance: tuple[tuple[Literal["length", "source", "score"], ...], ...] = ()
    """As many of the easiest pairs within these strata, as `select.balance` names them."""
    residual: tuple[Literal["length"], ...] = ()
    """As many of the easiest pairs with this taken out of difficulty; see `select.residual`."""
    training_seeds: tuple[Seed, ...] = ()
    """See `evaluate.training_seeds`."""

    @property
    def is_empty(self) -> bool:
        """Whether it names no arm."""
        return not any(getattr(self, name) for name in type(self).model_fields)

    @model_validator(mode="after")
    def _each_arm_is_another(self) -> Self:
        given = {name: getattr(self, name) for name in type(self).model_fields}
        if twice := [name for name, values in given.items() if len(set(values)) < len(values)]:
            raise ValueError(f"{twice[0]} holds one value twice")
        return self


class SlurmConfig(Block):
    """What `selective-dpo submit` asks Slurm for."""

    partition: str = ""
    """Empty: the cluster's own choice."""
    account: str = ""
    """Whose time it is."""
    time: str = "24:00:00"
    """Longest time of each job; what needs longer is requeued and goes on from its checkpoints."""
    gpus: Annotated[int, Field(ge=0)] = 1
    """GPUs of a node for the training, a process each; a scorer gets `launch.processes` of them."""
    nodes: Count = 1
    """Nodes for the training; processes of several start through `accelerate launch`."""
    accelerate: PathText = ""
    """A configuration of accelerate for several nodes, such as FSDP's."""
    setup: tuple[Text, ...] = ()
    """Lines of shell before the command, such as `module load cuda`."""
    options: tuple[Text, ...] = ()
    """Further options of sbatch, such as `--mem=64G`."""

    @model_validator(mode="after")
    def _nodes_have_gpus(self) -> Self:
        if self.nodes > 1 and not self.gpus:
            raise ValueError(
                "slurm.nodes above 1 needs slurm.gpus: so many processes are started on each node"
            )
        if self.accelerate and self.nodes == 1:
            raise ValueError("slurm.accelerate has no effect with one node")
        return self


class LaunchConfig(Block):
    """How the work is spread."""

    workers: Count = 1
    """Scorers (and control arms) trained at the same time on this machine, a process each. With `processes`
    above 1 it is scorers only, so many processes each: 4 workers of 2 processes take 8 GPUs."""
    processes: Count = 1
    """Data-parallel processes of each training, started through `accelerate launch`."""
    checkpoint_minutes: Annotated[float, Field(ge=0.0)] = 10.0
    """Minutes between two checkpoints of a training; more where writing them would take over 5% of its time;
    0: none by time. A killed training goes on from its newest whole one. With any checkpoints, one is made on
    SIGTERM and one at a training's end, too."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between two checkpoints; 0: by time only."""
    slurm: SlurmConfig | None = None
    """For `selective-dpo submit` (docs/cluster.md)."""

    @model_validator(mode="after")
    def _slurm_has_gpus_for_them(self) -> Self:
        if self.slurm is None:
            return self
        if 0 < self.slurm.gpus < self.processes:
            raise ValueError(f"launch.processes {self.processes} needs slurm.gpus of as many or more")
        if self.slurm.nodes > 1 and self.workers > 1:
            raise ValueError("launch.workers shares out one machine: leave it out with slurm.nodes above 1")
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
    issues: IssuesConfig = IssuesConfig()
    """Where pairs are flagged."""
    select: SelectConfig = SelectConfig()
    """Selection and order."""
    train: TrainConfig = TrainConfig()
    """Training on the curriculum."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation of the policy."""
    study: StudyConfig = StudyConfig()
    """Further arms, such as a sweep over fractions; for `selective-dpo study`."""
    launch: LaunchConfig = LaunchConfig()
    """Spreading the work."""

    @model_validator(mode="after")
    def _own_difficulty_is_curriculum(self) -> Self:
        if self.select.source:
            raise ValueError(
                "select.from is for evaluate.controls; the run's own difficulty comes from elsewhere by "
                f"curriculum: {self.select.source}"
            )
        return self

    @model_validator(mode="after")
    def _quantized_weights_are_frozen(self) -> Self:
        blocks = {"score": None if self.curriculum else self.score, "train": self.train}
        full = [name for name, block in blocks.items() if block is not None and block.lora is None]
        if self.model.quantization and full:
            raise ValueError(
                f"model.quantization: {self.model.quantization} holds frozen weights, and {full[0]}.lora is "
                "null: all weights would be trained; give lora there, or leave quantization out"
            )
        return self

    @model_validator(mode="after")
    def _certified_selects_by_difficulty_alone(self) -> Self:
        beside = [name for name in ("action", "balance", "residual", "quota") if getattr(self.select, name)]
        if beside and self.score.protocol == "certified" and not self.curriculum:
            raise ValueError(
                f"select.{beside[0]} selects otherwise than what protocol certified certifies: give "
                "score.protocol one-step, fast or paper"
            )
        return self

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
