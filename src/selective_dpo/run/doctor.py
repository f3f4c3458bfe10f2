"""`doctor`: checks of the environment and of a recipe before any work is done. Nothing is written.

A run makes the same checks of model, settings and machine before its first result (`require_sound`). Of many
data only the beginning is read.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers.utils import import_utils

from selective_dpo.config import Recipe, SourceConfig
from selective_dpo.config.schema import BenchmarkName
from selective_dpo.config.trainer_options import under_deepspeed
from selective_dpo.curriculum.import_ import pairs_joined, read_outside
from selective_dpo.data.adapters import KEPT
from selective_dpo.data.prepare import prepare_pairs
from selective_dpo.data.sources import open_source, source_label
from selective_dpo.data.store import load_ids, load_summary, load_tokens
from selective_dpo.distributed.processes import this_process
from selective_dpo.errors import ConfigError, IdentityError, ModelError, SelectiveDPOError
from selective_dpo.evaluation.benchmarks import longest_sequence, question_file, read_questions
from selective_dpo.evaluation.evaluate import check_evaluation, policy_names
from selective_dpo.evaluation.generate import encode_prompt
from selective_dpo.evaluation.judges import judge_for
from selective_dpo.logprobs.packing_support import TAKES_ANY_MASK
from selective_dpo.logprobs.reference import TRIED, require_finite_start
from selective_dpo.logprobs.rows import ROWS_AT_ONCE, TOKEN_COLUMNS
from selective_dpo.models import damaged_weights, load_policy, load_tokenizer, require_quantization
from selective_dpo.run.costs import (
    Device,
    Disk,
    Models,
    adapter_parameters,
    build_on_meta,
    disk_need,
    fits,
    job_kinds,
    job_memory,
    models_of,
    readable_bytes,
    this_device,
)
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import Run, versions
from selective_dpo.run.stages import prepare
from selective_dpo.training.arguments import PURE, dpo_arguments, training_settings
from selective_dpo.training.train import tracker_names

Found = TypeVar("Found")
Given = TypeVar("Given")
P = ParamSpec("P")
Status = Literal["ok", "warn", "FAIL"]

BASE_BYTES = 100 * (1 << 20)
"""Bytes for tables, logs and the report, beside trained weights."""

MAX_MEMORY_SHARE = 0.9
"""Share of the device's memory that an estimate may reach without a warning."""

FIRST_ROWS = 1_000
"""Rows of each source that are prepared. Where no source has more, all are, as a run does it."""


class Check(NamedTuple):
    """What was found, and what to do about it."""

    status: Status
    name: str
    found: str
    remedy: str = ""
    """Empty for `ok`."""
    cause: SelectiveDPOError | None = None
    """The error that a run would end in, where one was met."""

    @property
    def text(self) -> str:
        """Name, finding and remedy."""
        return f"{self.name}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")

    def line(self) -> str:
        """One line of text."""
        line = f"{self.status:<5} {self.text}"
        return " ".join(line.split()) if "\n" in line else line


def diagnose(recipe: Recipe | None = None) -> Iterator[Check]:
    """Check the environment and, where there is one, all that `recipe` names; one answer at a time.

    A check that needs what another did not find is left out: the first fault is the one to mend. Only
    configurations, tokenizers, first rows and the weights of a local model that fits into memory are loaded,
    and nothing from anywhere that the recipe does not name.
    """
    device = this_device()
    yield Check("ok", "packages", ", ".join(f"{name} {version}" for name, version in versions().items()))
    yield check_device(device)
    if recipe is None:
        return
    sizes, checks = _or_none(models_of, recipe), list[Check]()
    for check in chain(_recipe_checks(recipe, sizes, device), _data_checks(recipe, sizes, device, checks)):
        checks.append(check)
        yield check


def require_sound(run: Run) -> None:
    """Refuse what `doctor` refuses of everything but the data: they are looked at when they are prepared.

    Of a run that has begun the disk is not looked at: it holds some of what it needs.

    Raises:
        SelectiveDPOError: the first check that fails.
    """
    checks = list(_checks(run.recipe, this_device()))
    if not run.folder.is_claimed:
        checks.append(check_disk(run.recipe, disk_need(run.recipe, _or_none(models_of, run.recipe))))
    for check in checks:
        if check.status == "FAIL":
            raise check.cause or ConfigError(check.text)


def _recipe_checks(recipe: Recipe, sizes: Models | None, device: Device) -> Iterator[Check]:
    yield _guarded("evaluate", check_arms, recipe)
    yield from _checks(recipe, device)
    yield check_disk(recipe, disk_need(recipe, sizes))
    if sizes is not None:
        yield check_memory(recipe, sizes, device)


def _checks(recipe: Recipe, device: Device) -> Iterator[Check]:
    """What `doctor` and a run check alike."""
    blocks = ("train",) if recipe.curriculum else ("score", "train")
    yield check_launch(recipe, device)
    yield check_updates(recipe, blocks)
    yield check_precision(recipe, device)
    yield from check_optional_packages(recipe)
    for block in blocks:
        yield _guarded(f"{block}.trainer", check_trainer, recipe, block)
    yield _guarded("judge", check_judge, recipe)
    yield _guarded("model", check_weights, recipe)
    model = _or_none(build_on_meta, recipe.model)
    if model is not None:
        yield check_positions(recipe, model)
        for block in blocks:
            yield _guarded(f"{block}.lora", check_adapter, recipe, block)
    yield _guarded("tokenizer", check_tokenizer, recipe, model)
    for name in recipe.evaluate.benchmarks:
        yield _guarded(name, check_benchmark, recipe, name, model)


def _data_checks(
    recipe: Recipe, sizes: Models | None, device: Device, before: Sequence[Check]
) -> Iterator[Check]:
    """What the recipe makes of each source's first rows. `before` grows with each check that was made: what
    takes long is done only where none of them failed."""
    data, tokenizer = recipe.data, _or_none(load_tokenizer, recipe.model)
    if tokenizer is None:
        for source in (*data.train, *data.test):
            yield _guarded(f"data {source_label(source)}", check_source, source)
        return
    with tempfile.TemporaryDirectory() as scratch:
        pairs, test_pairs = Path(scratch) / "data.train", Path(scratch) / "data.test"
        yield from check_rows(recipe, data.train, tokenizer, pairs)
        if data.test:
            yield from check_rows(recipe, data.test, tokenizer, test_pairs)
        if not pairs.is_dir():
            return
        tokens, ids = load_tokens(pairs), load_ids(pairs)
        if recipe.curriculum:
            yield _guarded("curriculum", check_curriculum, recipe.curriculum, ids)
        if sizes is not None:
            yield check_token_ids(tokens, sizes.sizes.vocabulary)
        if all(check.status != "FAIL" for check in before):
            yield _guarded("forward pass", check_forward, recipe, tokenizer, tokens, sizes, device)
        summaries = [load_summary(folder) for folder in (pairs, test_pairs) if folder.is_dir()]
    rows = [sum(counts.values()) for summary in summaries for counts in summary.sources.values()]
    if max(rows) < FIRST_ROWS and all(check.status != "FAIL" for check in before):
        yield _guarded("pairs", check_pairs, recipe)


def check_arms(recipe: Recipe) -> Check:
    """Whether the evaluation can be done.

    Raises:
        ConfigError: as when a run is opened.
    """
    check_evaluation(recipe.evaluate, has_test=bool(recipe.data.test))
    arms = ", ".join(policy_names(recipe.evaluate))
    return Check("ok", "evaluate", f"arms {arms}; {recipe.evaluate.generation.prompts:,} prompts to answer")


def _or_none(make: Callable[[Given], Found], of: Given) -> Found | None:
    """What a later check needs; where it cannot be made, another check says so."""
    try:
        return make(of)
    except SelectiveDPOError:
        return None


def _guarded(name: str, check: Callable[P, Check], *args: P.args, **kwargs: P.kwargs) -> Check:
    """The check's answer; an error that the user has to mend is one, and its text holds the remedy."""
    try:
        return check(*args, **kwargs)
    except SelectiveDPOError as error:
        return Check("FAIL", name, str(error), cause=error)


# --- the machine --------------------------------------------------------------------------------------------


def check_device(device: Device) -> Check:
    """What a run would compute on."""
    if device.kind == "cuda":
        each = readable_bytes(device.memory)
        return Check("ok", "device", f"{device.number} x {device.name}, {each} each")
    found = f"no GPU; {device.name}, {readable_bytes(device.memory)}"
    return Check(
        "warn", "device", found, "fine for models of a few million parameters; larger ones need a GPU"
    )


def check_disk(recipe: Recipe, need: Disk | None) -> Check:
    """Free space where the run folder goes; `need` is None if it is not known."""
    folder = Path(recipe.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Check("FAIL", "disk", f"cannot write below {existing}", "choose another output_dir")
    free = shutil.disk_usage(existing).free
    found = f"{readable_bytes(free)} free at {existing}"
    if need is None:
        remedy = "check that its weights fit"
        return Check("warn", "disk", f"{found}, the model's size is not known", remedy)
    wanted = need.total + BASE_BYTES
    found += f", the run needs about {readable_bytes(wanted)}"
    if need.checkpoints:
        found += f" ({readable_bytes(need.checkpoints)} of it for checkpoints, while it trains)"
    if free < wanted:
        return Check("FAIL", "disk", found, "free some, or choose another output_dir")
    if free < wanted + need.results:  # weights are written beside the old ones before these are removed
        return Check("warn", "disk", found, "a repeated run needs room for its weights twice")
    return Check("ok", "disk", found)


def check_launch(recipe: Recipe, device: Device) -> Check:
    """Processes and workers against the devices."""
    processes, workers, gpus = recipe.launch.processes, recipe.launch.workers, device.number
    found = f"{processes} processes" if processes > 1 else f"{workers} scorer(s) at a time"
    if processes > 1 and workers > 1:
        found = f"{workers} scorers at a time of {processes} processes each"
    if device.kind != "cuda":
        return Check("ok", "launch", found)
    found += f" on {gpus} GPU(s)"
    if processes > gpus:
        return Check("FAIL", "launch", found, f"lower launch.processes to {gpus}")
    if processes > 1 and workers * processes > gpus:
        return Check("FAIL", "launch", found, f"lower launch.workers to {gpus // processes}")
    if processes == workers == 1 < gpus:
        remedy = f"set launch.processes or launch.workers to {gpus}, or CUDA_VISIBLE_DEVICES to one"
        return Check("warn", "launch", f"{found}, over which transformers would split batches", remedy)
    if workers > gpus:
        return Check("warn", "launch", found, "several would share a GPU's memory")
    return Check("ok", "launch", found)


def check_updates(recipe: Recipe, blocks: Sequence[str]) -> Check:
    """How many pairs an update has: those of a process's batch x accumulation x processes."""
    processes, found = recipe.launch.processes, []
    for block in blocks:
        if block == "train" or recipe.score.protocol != "one-step":
            settings = training_settings(getattr(recipe, block).trainer, recipe.model, processes)
            batch, times = settings.pairs_per_batch, settings.accumulation
            pairs = batch * times * processes
            found.append(f"{block} {batch} x {times} x {processes} process(es) = {pairs:,} pairs")
    return Check("ok", "updates", ", ".join(found))


def check_precision(recipe: Recipe, device: Device) -> Check:
    """Whether the device computes in the weights' type, and small updates are kept."""
    name, dtype = "precision", recipe.model.dtype
    if not recipe.model.master_weights:
        return Check("warn", name, PURE.format(dtype=dtype), "leave model.master_weights out")
    if dtype == "bfloat16" and device.kind == "cpu":
        return Check("warn", name, "bfloat16, which is slow on most CPUs", "set model.dtype: float32")
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        remedy = "set model.dtype to float32, and fp16 in trainer"
        return Check("FAIL", name, "this GPU has no bfloat16", remedy)
    return Check("ok", name, dtype)


def check_optional_packages(recipe: Recipe) -> Iterator[Check]:
    """Packages that only some recipes need: optimizers, DeepSpeed, trackers, attention kernels."""
    for block in ("score", "train"):
        settings = getattr(recipe, block).trainer
        optimizer = str(settings.get("optim", ""))
        needs = [(name, f"report_to {name}", "the tracker's package") for name in tracker_names(settings)]
        if any(word in optimizer for word in ("bnb", "8bit", "paged", "ademamix")):
            needs.append(("bitsandbytes", f"optim {optimizer}", "the gpu extra"))
        if settings.get("deepspeed"):
            needs.append(("deepspeed", "deepspeed", "the gpu extra"))
        if settings.get("use_liger_kernel"):
            needs.append(("liger_kernel", "use_liger_kernel", "liger-kernel"))
        for module, option, package in needs:
            name = f"{block}.trainer.{option}"
            if importlib.util.find_spec(module) is not None:
                yield Check("ok", name, f"{module} is installed")
            else:
                remedy = f"install {package}, or change the option"
                yield Check("FAIL", name, f"{module} is not installed", remedy)
    if recipe.model.quantization:
        name = f"model.quantization {recipe.model.quantization}"
        try:
            require_quantization(recipe.model)
            yield Check("ok", name, "bitsandbytes and a GPU")
        except ModelError as error:
            yield Check("FAIL", name, str(error), "leave it out")
    attention = recipe.model.attention
    if has_attention(attention):
        yield Check("ok", "attention", attention)
    else:
        package = "the package kernels" if "/" in attention else "its package"
        remedy = f"install {package}, or set model.attention: sdpa"
        yield Check("FAIL", "attention", f"{attention} is not available here", remedy)


def has_attention(name: str) -> bool:
    """Whether the attention implementation is there. What the model can take shows when it is loaded.

    The package `kernels` downloads kernels of the hub, and stands in for FlashAttention's own packages.
    """
    available: Callable[[], bool] = {
        "flash_attention_2": import_utils.is_flash_attn_2_available,
        "flash_attention_3": import_utils.is_flash_attn_3_available,
        "flex_attention": import_utils.is_torch_flex_attn_available,
    }.get(name, lambda: "/" not in name)
    has_kernels = import_utils.is_kernels_available() and ("/" in name or name.startswith("flash_"))
    return available() or has_kernels


# --- what the recipe names: model, tokenizer, adapters, judge, trainer settings -----------------------------


def check_weights(recipe: Recipe) -> Check:
    """The architecture, and for a local folder that it holds all its weights, in the one format that is read.

    Raises:
        ModelError: weights are missing, of other shapes than the configuration says, or not to be loaded.
    """
    model = build_on_meta(recipe.model)
    size = sum(parameter.numel() for parameter in model.parameters())
    found = f"{type(model).__name__}, {size:,} parameters"
    folder = Path(recipe.model.path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        return Check(
            "FAIL", "model", f"{found}, but no .safetensors in {folder}", "save its weights as safetensors"
        )
    if problem := damaged_weights(folder):
        return Check("FAIL", "model", f"{found}, but {problem}", "copy or download it again")
    if folder.is_dir():
        # Flash attention that is not installed has been named already, and a kernel would be downloaded.
        attention = {} if recipe.model.attention in TAKES_ANY_MASK else {"attention": "eager"}
        load_policy(recipe.model.model_copy(update=attention), device_map="meta")
    return Check("ok", "model", found)


def check_tokenizer(recipe: Recipe, model: Any | None) -> Check:
    """Special tokens, and that the model (None: not known) has a row for each of them.

    Raises:
        ModelError: the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(recipe.model)
    special = {name: getattr(tokenizer, f"{name}_token") for name in ("pad", "bos", "eos")}
    tokens, named = len(tokenizer), ", ".join(f"{name} {token!r}" for name, token in special.items())
    rows = tokens if model is None else int(model.get_input_embeddings().weight.shape[0])
    found = f"{tokens:,} tokens, {named}; the model embeds {'?' if model is None else f'{rows:,}'}"
    outside = [
        token for token in special.values() if token and tokenizer.convert_tokens_to_ids(token) >= rows
    ]
    if outside:
        remedy = "use the tokenizer the model was trained with (model.tokenizer), or resize its embedding"
        return Check("FAIL", "tokenizer", f"{found}, none for {', '.join(outside)}", remedy)
    if tokens > rows:
        return Check("warn", "tokenizer", found, "texts with the tokens beyond that would stop the run")
    if tokenizer.eos_token is None:
        return Check("warn", "tokenizer", found, "without an end-of-sequence token, answers have no end")
    return Check("ok", "tokenizer", found)


def check_positions(recipe: Recipe, model: Any) -> Check:
    """Whether the longest sequence fits into the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = recipe.data.max_length
    generation = recipe.evaluate.generation
    if generation.prompts:
        longest = max(longest, recipe.data.max_prompt_length + generation.max_new_tokens)
    found = f"sequences of up to {longest:,} tokens, the model has {positions or 'no limit of'} positions"
    if positions is not None and longest > positions:
        return Check("FAIL", "length", found, "lower data.max_length or evaluate.generation.max_new_tokens")
    return Check("ok", "length", found)


def check_benchmark(recipe: Recipe, name: BenchmarkName, model: Any) -> Check:
    """Whether the benchmark's questions can be asked, and its longest answers fit; `model` may be None."""
    benchmark, tokenizer = recipe.evaluate.benchmarks[name], load_tokenizer(recipe.model)
    questions = read_questions(name, question_file(name, benchmark.source))
    empty_system_message = recipe.data.empty_system_message
    encode = partial(encode_prompt, tokenizer, empty_system_message=empty_system_message)
    longest = longest_sequence(name, questions, benchmark, encode)
    found = f"{len(questions):,} questions, up to {longest:,} tokens with their answers"
    positions = model and getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and longest > positions:
        remedy = f"lower evaluate.benchmarks.{name}.max_new_tokens"
        return Check("FAIL", name, f"{found}, the model has {positions:,} positions", remedy)
    return Check("ok", name, found)


def check_adapter(recipe: Recipe, block: str) -> Check:
    """Whether the LoRA settings of `block` ("score" or "train") find their modules in the model."""
    lora = getattr(recipe, block).lora
    if lora is None:
        return Check("ok", f"{block}.lora", "none: all weights are trained")
    trained = adapter_parameters(build_on_meta(recipe.model), lora, f"{block}.lora")
    return Check("ok", f"{block}.lora", f"{trained:,} parameters in the adapter")


def check_memory(recipe: Recipe, models: Models, device: Device) -> Check:
    """The plan's largest estimate, at the longest sequences that the recipe allows, against the device."""
    need, name = max((job_memory(recipe, models, kind).total, kind) for kind in job_kinds(recipe))
    found = f"{name} needs about {readable_bytes(need)} of {readable_bytes(device.memory)}"
    if device.memory and need > MAX_MEMORY_SHARE * device.memory:
        remedy = "lower per_device_train_batch_size or tokens_per_batch, use LoRA, or shard over processes"
        return Check("warn", "memory", found, remedy)
    return Check("ok", "memory", found)


def check_trainer(recipe: Recipe, block: str) -> Check:
    """Whether TRL accepts the trainer settings on this machine (mixed precision, for one)."""
    settings = getattr(recipe, block).trainer
    name = f"{block}.trainer"
    if settings.get("deepspeed") or settings.get("fsdp") or under_deepspeed():
        return Check("ok", name, "options are known; sharding is set up by the launched processes")
    with tempfile.TemporaryDirectory() as scratch:
        dpo_arguments(
            settings,
            model=recipe.model,
            max_length=recipe.data.max_length,
            output_dir=Path(scratch),
            seed=0,
            sequential=block == "train",
        )
    return Check("ok", name, "accepted on this machine")


def check_judge(recipe: Recipe) -> Check:
    """Whether the judge can be made; its weights are not loaded."""
    judge, reward_model = judge_for(recipe.evaluate), recipe.evaluate.reward_model
    if reward_model and (problem := damaged_weights(Path(reward_model))):
        return Check("FAIL", "judge", f"reward model {reward_model}: {problem}", "copy or download it again")
    return Check("ok", "judge", "none: no answers are compared" if judge is None else judge.name)


# --- the data -----------------------------------------------------------------------------------------------


def check_source(source: SourceConfig) -> Check:
    """Whether the source is there; its rows are not read.

    Raises:
        SelectiveDPOError: as for a run.
    """
    return Check("ok", f"data {open_source(source).label}", "found; not read without a tokenizer")


def check_rows(
    recipe: Recipe, sources: Sequence[SourceConfig], tokenizer: Any, folder: Path
) -> Iterator[Check]:
    """Prepare the first rows of `sources` in `folder`, as a run does: columns, template, lengths."""
    whole = [source.model_copy(update={"fraction": 1.0}) for source in sources]
    limits = recipe.data.model_copy(update={"max_pairs": 0})
    try:
        summary = prepare_pairs(whole, limits, tokenizer, folder, key="", max_rows=FIRST_ROWS)
    except SelectiveDPOError as error:
        yield Check("FAIL", folder.name, str(error))
        return
    for source, counts in summary.sources.items():
        rows = sum(counts.values())
        named = ", ".join(f"{count:,} {status}" for status, count in counts.items())
        name, found = f"data {source}", f"first {rows:,} rows: {named}"
        if counts[KEPT] < rows / 2:
            remedy = "more than half would be dropped: see model.chat_template and data.max_length"
            yield Check("warn", name, found, remedy)
        else:
            yield Check("ok", name, found)
    found = f"prompt is no token prefix in {summary.boundary_mismatches:,} of {summary.tokenized:,} pairs"
    yield Check("ok", "boundary", found)


def check_token_ids(tokens: Dataset, embedded: int) -> Check:
    """Whether a model of `embedded` rows has one for every token."""
    largest = max(
        pc.max(pc.list_flatten(table[name])).as_py()
        for table in tokens.with_format("arrow").iter(ROWS_AT_ONCE)
        for name in TOKEN_COLUMNS
    )
    found = f"up to {largest:,}, the model embeds {embedded:,} tokens"
    if largest < embedded:
        return Check("ok", "token ids", found)
    remedy = "use the tokenizer the model was trained with (model.tokenizer)"
    return Check("FAIL", "token ids", found, remedy)


def check_pairs(recipe: Recipe) -> Check:
    """Prepare all rows of the sources, as a run does, in a folder that goes again.

    Raises:
        SelectiveDPOError: what a run would refuse, such as fewer pairs than the scorers' evaluations need.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(recipe, RunDirectory(Path(scratch) / "run"), say=lambda line: None)
        prepare(run)
        summary = load_summary(run.folder.pairs)
    found = f"{summary.kept:,} of {summary.rows:,} rows kept, enough for {recipe.score.protocol}"
    return Check("ok", "pairs", found)


def check_curriculum(path: str, ids: pa.Table) -> Check:
    """The difficulties that a recipe imports, and whether the first training pairs have any.

    Raises:
        SelectiveDPOError: as for a run: they cannot be read.
    """
    outside = read_outside(path)
    found = f"{outside.facts['kind']} of {len(outside.ids):,} difficulties by {outside.names}"
    try:
        without = pairs_joined(outside, ids["pair_id"], ids["prompt_id"]).counts["pairs_without_difficulty"]
    except IdentityError as error:  # later rows may have some
        remedy = "a run with no pair joined is refused"
        return Check("warn", "curriculum", f"{found}; of the first rows, {error}", remedy)
    found += f"; {len(ids) - without:,} of the first {len(ids):,} pairs have one"
    return Check("ok", "curriculum", found)


def check_forward(
    recipe: Recipe, tokenizer: Any, tokens: Dataset, sizes: Models | None, device: Device
) -> Check:
    """A forward pass of the first pairs, where the weights are a local folder's and fit into memory.

    Raises:
        ModelError: no pair has finite log-probabilities.
    """
    if sizes is None or not fits(recipe.model, sizes.sizes, device):
        return Check("ok", "forward pass", "not tried with this model; a run tries it before its reference")
    model = load_policy(recipe.model).to(this_process().device)
    require_finite_start(model, tokens, pad_token_id=tokenizer.pad_token_id)
    tried = min(TRIED, len(tokens))
    return Check("ok", "forward pass", f"log-probabilities of {tried} pairs are finite")
