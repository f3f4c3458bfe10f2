"""`doctor`: checks of the environment and of a recipe before any work is done. Nothing is written.

A run makes the same checks of model, settings and machine before its first result (`require_sound`). Of many
data only the beginning is read.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import pyarrow as pa
import torch
from datasets import Dataset
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers.utils import import_utils

from selective_dpo.config import Recipe, SourceConfig
from selective_dpo.config.trainer_options import under_deepspeed
from selective_dpo.curriculum.import_ import pairs_joined, read_outside
from selective_dpo.data.adapters import KEPT, DropReason, Pair, parse_row
from selective_dpo.data.readers import Malformed
from selective_dpo.data.sources import open_source, source_label
from selective_dpo.data.store import load_summary
from selective_dpo.data.tokenize import PairTokens, fit_length, tokenize_pairs
from selective_dpo.distributed.processes import this_process
from selective_dpo.errors import ConfigError, IdentityError, SelectiveDPOError
from selective_dpo.evaluation.evaluate import check_evaluation, policy_names
from selective_dpo.evaluation.judges import judge_for
from selective_dpo.logprobs.reference import TRIED, require_finite_start
from selective_dpo.models import damaged_weights, load_policy, load_tokenizer
from selective_dpo.run.costs import (
    BYTES,
    Device,
    Disk,
    Models,
    adapter_parameters,
    build_on_meta,
    disk_need,
    job_kinds,
    job_memory,
    models_of,
    readable,
    readable_bytes,
    this_device,
)
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import Run
from selective_dpo.run.stages import prepare
from selective_dpo.training.arguments import PURE, dpo_arguments
from selective_dpo.training.train import tracker_names

Found = TypeVar("Found")
Given = TypeVar("Given")
P = ParamSpec("P")
Status = Literal["ok", "warn", "FAIL"]

BASE_BYTES = 100 * (1 << 20)
"""Bytes for tables, logs and the report, beside trained weights."""

MAX_MEMORY_SHARE = 0.9
"""Share of the device's memory that an estimate may reach without a warning."""

FIRST_ROWS = 100
"""Rows that are looked at in each source."""

FEW_ROWS = 2_000
"""So many rows are prepared whole. More leave enough updates to scorers with any usual batch size."""


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


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check("ok", name, found)


def warn(name: str, found: str, remedy: str) -> Check:
    """A run would go through; perhaps not as wanted."""
    return Check("warn", name, found, remedy)


def fail(name: str, found: str, remedy: str = "") -> Check:
    """A run would stop here."""
    return Check("FAIL", name, found, remedy)


def diagnose(recipe: Recipe | None = None) -> Iterator[Check]:
    """Check the environment and, where there is one, all that `recipe` names; one answer at a time.

    A check that needs what another did not find is left out: the first fault is the one to mend. Only
    configurations, tokenizers, first rows and the weights of a local model that fits into memory are loaded,
    and nothing from anywhere that the recipe does not name.
    """
    device = this_device()
    yield check_python()
    yield from check_packages()
    yield check_device(device)
    yield check_hub()
    if recipe is None:
        return
    sizes = _or_none(models_of, recipe)
    checks = [_guarded("evaluate", _evaluation, recipe)]
    yield checks[0]
    for check in _checks(recipe, device):
        checks.append(check)
        yield check
    yield check_disk(recipe, disk_need(recipe, sizes))
    if sizes is not None:
        yield check_memory(recipe, sizes, device)
    is_sound = all(check.status != "FAIL" for check in checks)
    yield from _data_checks(recipe, sizes, device, is_sound=is_sound)


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


def _checks(recipe: Recipe, device: Device) -> Iterator[Check]:
    """What `doctor` and a run check alike."""
    blocks = ("train",) if recipe.curriculum else ("score", "train")
    yield check_launch(recipe, device)
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


def _data_checks(recipe: Recipe, sizes: Models | None, device: Device, *, is_sound: bool) -> Iterator[Check]:
    """Each source's first rows, and what the recipe makes of them; the later ones only of what is sound."""
    sources = [check_source(source) for source in (*recipe.data.train, *recipe.data.test)]
    checks = [source.check for source in sources]
    yield from checks
    pairs = [pair for source in sources for pair in source.pairs]
    if recipe.curriculum:
        trained = [pair for source in sources[: len(recipe.data.train)] for pair in source.pairs]
        checks.append(_guarded("curriculum", check_curriculum, recipe.curriculum, trained))
        yield checks[-1]
    tokenizer = _or_none(load_tokenizer, recipe.model)
    if tokenizer is None or not pairs:
        return
    try:
        tokens = tokenize_pairs(pairs, tokenizer, empty_system_message=recipe.data.empty_system_message)
    except SelectiveDPOError as error:
        yield fail("template", str(error))
        return
    for check in check_tokens(recipe, pairs, tokens, None if sizes is None else sizes.sizes.vocabulary):
        checks.append(check)
        yield check
    if not is_sound or any(check.status == "FAIL" for check in checks):
        return
    if sizes is not None:
        size = sizes.sizes.parameters * BYTES[recipe.model.dtype]
        yield _guarded("forward pass", check_forward, recipe, tokenizer, pairs, tokens, size, device)
    if sum(source.rows for source in sources) <= FEW_ROWS:
        yield _guarded("pairs", check_pairs, recipe)


def _evaluation(recipe: Recipe) -> Check:
    # A run checks this when it is opened.
    check_evaluation(recipe.evaluate, has_test=bool(recipe.data.test))
    arms = ", ".join(policy_names(recipe.evaluate))
    return ok("evaluate", f"arms {arms}; {recipe.evaluate.generation.prompts:,} prompts to answer")


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


def check_python() -> Check:
    """The interpreter against what the installed package asks for."""
    found, wanted = platform.python_version(), metadata.metadata("selective-dpo")["Requires-Python"]
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return ok("python", found)
    return fail("python", found, f"use a version {wanted}")


def check_packages() -> Iterator[Check]:
    """Each package that is always needed, against the bounds that this one declares."""
    good = []
    for text in metadata.requires("selective-dpo") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield fail(requirement.name, "not installed", remedy)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            good.append(f"{requirement.name} {found}")
        else:
            yield fail(requirement.name, f"{found}, needed is {requirement.specifier}", remedy)
    yield ok("packages", ", ".join(good))


def check_device(device: Device) -> Check:
    """What a run would compute on."""
    if device.kind == "cuda":
        return ok("device", f"{device.number} x {device.name}, {readable_bytes(device.memory)} each")
    found = f"no GPU; {device.name}, {readable_bytes(device.memory)}"
    return warn("device", found, "fine for models of a few million parameters; larger ones need a GPU")


def check_hub() -> Check:
    """Whether the hub may be asked, and that nothing is reported to it."""
    import huggingface_hub.constants as hub

    telemetry = "off" if os.environ.get("HF_HUB_DISABLE_TELEMETRY") == "1" else "on"
    if hub.HF_HUB_OFFLINE:
        found = f"offline (HF_HUB_OFFLINE), telemetry {telemetry}: models and data of the hub must be cached"
        return ok("hub", found)
    return ok("hub", f"online, telemetry {telemetry}")


def check_disk(recipe: Recipe, need: Disk | None) -> Check:
    """Free space where the run folder goes; `need` is None if it is not known."""
    folder = Path(recipe.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return fail("disk", f"cannot write below {existing}", "choose another output_dir")
    free = shutil.disk_usage(existing).free
    found = f"{readable_bytes(free)} free at {existing}"
    if need is None:
        return warn("disk", f"{found}, the model's size is not known", "check that its weights fit")
    wanted = need.total + BASE_BYTES
    found += f", the run needs about {readable_bytes(wanted)}"
    if need.checkpoints:
        found += f" ({readable_bytes(need.checkpoints)} of it for checkpoints, while it trains)"
    if free < wanted:
        return fail("disk", found, "free some, or choose another output_dir")
    # Weights are written beside the old ones before these are removed.
    twice = free > wanted + need.results
    return (
        ok("disk", found) if twice else warn("disk", found, "a repeated run needs room for its weights twice")
    )


def check_launch(recipe: Recipe, device: Device) -> Check:
    """Processes and workers against the devices."""
    processes, workers = recipe.launch.processes, recipe.launch.workers
    found = f"{processes} processes" if processes > 1 else f"{workers} scorer(s) at a time"
    if device.kind != "cuda":
        return ok("launch", found)
    found += f" on {device.number} GPU(s)"
    if processes > device.number:
        return fail("launch", found, f"lower launch.processes to {device.number}")
    if processes == 1 and workers == 1 and device.number > 1:
        return warn(
            "launch",
            found,
            "transformers would split batches over all GPUs: set launch.processes or launch.workers to "
            f"{device.number}, or CUDA_VISIBLE_DEVICES to one",
        )
    if workers > device.number:
        return warn("launch", found, "several would share a GPU's memory")
    return ok("launch", found)


def check_precision(recipe: Recipe, device: Device) -> Check:
    """Whether the device computes in the weights' type, and small updates are kept."""
    if not recipe.model.master_weights:
        return warn("precision", PURE.format(dtype=recipe.model.dtype), "leave model.master_weights out")
    if recipe.model.dtype != "bfloat16":
        return ok("precision", recipe.model.dtype)
    if device.kind == "cpu":
        return warn("precision", "bfloat16, which is slow on most CPUs", "set model.dtype: float32")
    if not torch.cuda.is_bf16_supported():
        return fail(
            "precision", "this GPU has no bfloat16", "set model.dtype to float32, and fp16 in trainer"
        )
    return ok("precision", "bfloat16, which the device supports")


def check_optional_packages(recipe: Recipe) -> Iterator[Check]:
    """Packages that only some recipes need: optimizers, DeepSpeed, trackers, attention kernels."""
    for block in ("score", "train"):
        settings = getattr(recipe, block).trainer
        optimizer = str(settings.get("optim", ""))
        if any(word in optimizer for word in ("bnb", "8bit", "paged", "ademamix")):
            yield _needs("bitsandbytes", f"{block}.trainer.optim {optimizer}", "the gpu extra")
        if settings.get("deepspeed"):
            yield _needs("deepspeed", f"{block}.trainer.deepspeed", "the gpu extra")
        if settings.get("use_liger_kernel"):
            yield _needs("liger_kernel", f"{block}.trainer.use_liger_kernel", "liger-kernel")
        for name in tracker_names(settings):
            yield _needs(name, f"{block}.trainer.report_to {name}", "the tracker's package")
    yield check_attention(recipe.model.attention)


def check_attention(name: str) -> Check:
    """Whether the attention implementation is there. What the model can take shows when it is loaded."""
    available = {
        "flash_attention_2": import_utils.is_flash_attn_2_available,
        "flash_attention_3": import_utils.is_flash_attn_3_available,
        "flex_attention": import_utils.is_torch_flex_attn_available,
    }.get(name, lambda: True)
    if available():
        return ok("attention", name)
    return fail(
        "attention", f"{name} is not available here", "install its package, or set model.attention: sdpa"
    )


def _needs(module: str, key: str, source: str) -> Check:
    if importlib.util.find_spec(module) is not None:
        return ok(key, f"{module} is installed")
    return fail(key, f"{module} is not installed", f"install {source}, or change the option")


# --- what the recipe names: model, tokenizer, adapters, judge, trainer settings -----------------------------


def check_weights(recipe: Recipe) -> Check:
    """The architecture, and for a local folder that it holds all its weights, in the one format that is read.

    Raises:
        ModelError: weights are missing, of other shapes than the configuration says, or not to be loaded.
    """
    model = build_on_meta(recipe.model)
    size = readable(sum(parameter.numel() for parameter in model.parameters()))
    found = f"{type(model).__name__}, {size} parameters"
    folder = Path(recipe.model.path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        return fail("model", f"{found}, but no .safetensors in {folder}", "save its weights as safetensors")
    if problem := damaged_weights(folder):
        return fail("model", f"{found}, but {problem}", "copy or download it again")
    if folder.is_dir():
        # An attention that is not installed has been named already.
        is_there = check_attention(recipe.model.attention).status == "ok"
        attention = {} if is_there else {"attention": "eager"}
        load_policy(recipe.model.model_copy(update=attention), device_map="meta")
    return ok("model", found)


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
        return fail("tokenizer", f"{found}, none for {', '.join(outside)}", remedy)
    if tokens > rows:
        return warn("tokenizer", found, "texts with the tokens beyond that would stop the run")
    if tokenizer.eos_token is None:
        return warn("tokenizer", found, "without an end-of-sequence token, answers have no end")
    return ok("tokenizer", found)


def check_positions(recipe: Recipe, model: Any) -> Check:
    """Whether the longest sequence fits into the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = recipe.data.max_length
    generation = recipe.evaluate.generation
    if generation.prompts:
        longest = max(longest, recipe.data.max_prompt_length + generation.max_new_tokens)
    found = f"sequences of up to {longest:,} tokens, the model has {positions or 'no limit of'} positions"
    if positions is not None and longest > positions:
        return fail("length", found, "lower data.max_length or evaluate.generation.max_new_tokens")
    return ok("length", found)


def check_adapter(recipe: Recipe, block: str) -> Check:
    """Whether the LoRA settings of `block` ("score" or "train") find their modules in the model."""
    lora = getattr(recipe, block).lora
    if lora is None:
        return ok(f"{block}.lora", "none: all weights are trained")
    trained = adapter_parameters(build_on_meta(recipe.model), lora, f"{block}.lora")
    return ok(f"{block}.lora", f"{readable(trained)} parameters in the adapter")


def check_memory(recipe: Recipe, models: Models, device: Device) -> Check:
    """The plan's largest estimate, at the longest sequences that the recipe allows, against the device."""
    need, name = max((job_memory(recipe, models, kind).total, kind) for kind in job_kinds(recipe))
    found = f"{name} needs about {readable_bytes(need)} of {readable_bytes(device.memory)}"
    if device.memory and need > MAX_MEMORY_SHARE * device.memory:
        remedy = "lower per_device_train_batch_size or tokens_per_batch, use LoRA, or shard over processes"
        return warn("memory", found, remedy)
    return ok("memory", found)


def check_trainer(recipe: Recipe, block: str) -> Check:
    """Whether TRL accepts the trainer settings on this machine (mixed precision, for one)."""
    settings = getattr(recipe, block).trainer
    name = f"{block}.trainer"
    if settings.get("deepspeed") or settings.get("fsdp") or under_deepspeed():
        return ok(name, "options are known; sharding is set up by the launched processes")
    with tempfile.TemporaryDirectory() as scratch:
        dpo_arguments(
            settings,
            model=recipe.model,
            max_length=recipe.data.max_length,
            output_dir=Path(scratch),
            seed=0,
            sequential=block == "train",
        )
    return ok(name, "accepted on this machine")


def check_judge(recipe: Recipe) -> Check:
    """Whether the judge can be made; its weights are not loaded."""
    judge, reward_model = judge_for(recipe.evaluate), recipe.evaluate.reward_model
    if reward_model and (problem := damaged_weights(Path(reward_model))):
        return fail("judge", f"reward model {reward_model}: {problem}", "copy or download it again")
    return ok("judge", "none: no answers are compared" if judge is None else judge.name)


# --- the data -----------------------------------------------------------------------------------------------


class FirstRows(NamedTuple):
    """The beginning of one source."""

    check: Check
    pairs: tuple[Pair, ...]
    """Those of its rows that are pairs."""
    rows: int
    """Rows of the source, counted to just above `FEW_ROWS`."""


def check_source(source: SourceConfig) -> FirstRows:
    """Read and parse the first rows of a source."""
    name = f"data {source_label(source)}"
    try:
        opened = open_source(source)
        rows = list(islice(opened.rows(), FEW_ROWS + 1))
        parsed = [
            row.problem if isinstance(row, Malformed) else parse_row(row, opened.adapter)
            for row in rows[:FIRST_ROWS]
        ]
    except SelectiveDPOError as error:
        return FirstRows(fail(name, str(error)), (), 0)
    pairs = tuple(row for row in parsed if isinstance(row, Pair))
    statuses = Counter(KEPT if isinstance(row, Pair) else str(row) for row in parsed)
    counts = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    found = f"first {len(parsed)} rows: {counts or 'none'}"
    remedy = "wanted are columns chosen and rejected, with or without prompt; see docs"
    if not pairs:
        return FirstRows(fail(name, found, remedy), (), len(rows))
    if len(pairs) < len(parsed) / 2:
        return FirstRows(warn(name, found, "more than half would be dropped"), pairs, len(rows))
    return FirstRows(ok(name, found), pairs, len(rows))


def check_pairs(recipe: Recipe) -> Check:
    """Prepare all rows of the sources, as a run does, in a folder that goes again.

    Raises:
        SelectiveDPOError: what a run would refuse, such as fewer pairs than the scorers' evaluations need.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(recipe, RunDirectory(Path(scratch) / "run"), say=lambda line: None)
        prepare(run)
        summary = load_summary(run.folder.pairs)
    return ok("pairs", f"{summary.kept:,} of {summary.rows:,} rows kept, enough for {recipe.score.protocol}")


def check_curriculum(path: str, pairs: Sequence[Pair]) -> Check:
    """The difficulties that a recipe imports, and whether the first training rows have any.

    Raises:
        SelectiveDPOError: as for a run: they cannot be read.
    """
    outside = read_outside(path)
    found = f"{outside.facts['kind']} of {len(outside.ids):,} difficulties by {outside.names}"
    if not pairs:
        return warn("curriculum", found, "no rows to join it with were found")
    ids, prompt_ids = (
        pa.chunked_array([[getattr(pair, name) for pair in pairs]]) for name in ("pair_id", "prompt_id")
    )
    try:
        without = pairs_joined(outside, ids, prompt_ids).counts["pairs_without_difficulty"]
    except IdentityError as error:  # later rows may have some
        return warn(
            "curriculum", f"{found}; of the first rows, {error}", "a run with no pair joined is refused"
        )
    return ok("curriculum", f"{found}; {len(pairs) - without:,} of the first {len(pairs):,} pairs have one")


def check_tokens(
    recipe: Recipe, pairs: Sequence[Pair], tokens: Sequence[PairTokens | DropReason], embedded: int | None
) -> Iterator[Check]:
    """What the template made of the first pairs: the prompt's boundary, the length limits, and whether the
    model, with `embedded` rows (None: not known), has one for every token."""
    data = recipe.data
    kept = [item for item in tokens if isinstance(item, PairTokens)]
    chats = sum(pair.is_conversational for pair in pairs)
    found = f"{chats} conversations and {len(pairs) - chats} plain texts rendered"
    if len(kept) < len(pairs):
        found += f", {len(pairs) - len(kept)} refused by the template"
        yield warn("template", found, "these rows would be dropped; see model.chat_template")
    else:
        yield ok("template", found)
    if not kept:
        return
    largest = max(max(ids, default=0) for item in kept for ids in item[:3])
    if embedded is not None and largest >= embedded:
        remedy = "use the tokenizer the model was trained with (model.tokenizer)"
        yield fail("token ids", f"up to {largest:,}, the model embeds {embedded:,} tokens", remedy)
    mismatches, limit = sum(item.boundary_mismatch for item in kept), data.max_boundary_mismatch
    found = f"prompt is no token prefix in {mismatches} of {len(kept)} pairs"
    if mismatches / len(kept) > limit:
        remedy = "use a template that writes the prompt alike in both, or raise data.max_boundary_mismatch"
        yield fail("boundary", f"{found}, more than {limit:.0%}", remedy)
    else:
        yield ok("boundary", found)
    statuses = Counter(str(fit_length(item, data).drop or KEPT) for item in kept)
    found = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    if statuses[KEPT] < len(kept) / 2:
        yield warn("lengths", found, "raise data.max_length, or set data.overlong: truncate")
    else:
        yield ok("lengths", found)


def check_forward(
    recipe: Recipe,
    tokenizer: Any,
    pairs: Sequence[Pair],
    tokens: Sequence[PairTokens | DropReason],
    size: float,
    device: Device,
) -> Check:
    """A forward pass of the first pairs, where the weights, `size` bytes, are a local folder's and fit into
    memory.

    Raises:
        ModelError: no pair has finite log-probabilities.
    """
    name, rows = "forward pass", []
    if not Path(recipe.model.path).is_dir():
        return ok(name, "not tried with a model of the hub; a run tries it before its reference")
    if device.memory and size > device.memory / 2:
        return ok(name, f"not tried with {readable_bytes(size)} of weights; a run tries it first")
    for pair, item in zip(pairs, tokens, strict=True):
        if isinstance(item, PairTokens) and (fitted := fit_length(item, recipe.data)).drop is None:
            ids = {
                side: getattr(fitted.tokens, side) for side in ("prompt_ids", "chosen_ids", "rejected_ids")
            }
            rows.append({"pair_id": pair.pair_id, "prompt_id": pair.prompt_id, **ids})
    if not rows:
        return ok(name, "not tried: none of the first rows is short enough")
    model = load_policy(recipe.model).to(this_process().device)
    require_finite_start(model, Dataset.from_list(rows), pad_token_id=tokenizer.pad_token_id)
    return ok(name, f"log-probabilities of {min(TRIED, len(rows))} pairs are finite")
