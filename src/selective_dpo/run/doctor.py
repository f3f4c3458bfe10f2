"""`doctor`: checks of the environment and of a recipe before any work is done. Nothing is written.

What it refuses of model, settings and machine, a run refuses before its first result (`require_sound`). Of
many data it sees the beginning only.
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

from selective_dpo.config import Recipe, SourceConfig
from selective_dpo.config.trainer_options import under_deepspeed
from selective_dpo.curriculum.import_ import pairs_joined, read_outside
from selective_dpo.data.adapters import KEPT, Pair, parse_row
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
from selective_dpo.run import doctor as environment
from selective_dpo.run import doctor as models
from selective_dpo.run.costs import (
    BYTES,
    Architecture,
    Device,
    Disk,
    Models,
    adapter_parameters,
    build_on_meta,
    disk_need,
    job_kinds,
    job_memory,
    models_of,
    readable_bytes,
    readable_count,
    this_device,
)
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import Run
from selective_dpo.run.stages import prepare
from selective_dpo.training.arguments import PURE, dpo_arguments
from selective_dpo.training.train import tracker_names

Found = TypeVar("Found")

P = ParamSpec("P")


def diagnose(recipe: Recipe | None = None) -> Iterator[Check]:
    """Check the environment and, where there is one, all that `recipe` names; one answer at a time.

    A check that needs what another did not find is left out: the first fault is the one to mend. Only
    configurations, tokenizers, first rows and the weights of a local model that fits into memory are loaded,
    and nothing from anywhere that the recipe does not name.
    """
    device = this_device()
    yield environment.check_python()
    yield from environment.check_packages()
    yield environment.check_device(device)
    yield environment.check_hub()
    if recipe is None:
        return
    sound = True
    for check in _checks(recipe, device):
        sound = sound and check.status != "FAIL"
        yield check
    sizes = _sizes(recipe)
    yield environment.check_disk(recipe, disk_need(recipe, sizes))
    if sizes is not None:
        yield models.check_memory(recipe, sizes, device)
    yield from _diagnose_data(recipe, sizes, device, sound=sound)


def require_sound(run: Run) -> None:
    """Refuse what `doctor` refuses of everything but the data: they are looked at when they are prepared.

    Of a run that has begun the disk is not looked at: it holds some of what it needs.

    Raises:
        SelectiveDPOError: the first check that fails.
    """
    recipe = run.recipe
    checks = list(_checks(recipe, this_device()))
    if not run.folder.is_claimed:
        checks.append(environment.check_disk(recipe, disk_need(recipe, _sizes(recipe))))
    for check in checks:
        if check.status == "FAIL":
            raise check.error()


def _checks(recipe: Recipe, device: Device) -> Iterator[Check]:
    """What `doctor` and a run look at alike."""
    yield environment.check_launch(recipe, device)
    yield environment.check_precision(recipe, device)
    yield from environment.check_optional_packages(recipe)
    for block in _trained_blocks(recipe):
        yield _guarded(f"{block}.trainer", models.check_trainer, recipe, block)
    yield _guarded("evaluate", _check_evaluation, recipe)
    yield _guarded("judge", models.check_judge, recipe)
    model, problem = _attempt("model", lambda: build_on_meta(recipe.model))
    if model is not None:
        yield _guarded("model", models.check_weights, recipe, model)
        yield models.check_positions(recipe, model)
        for block in _trained_blocks(recipe):
            yield _guarded(f"{block}.lora", models.check_adapter, recipe, block)
    elif problem is not None:
        yield problem
    tokenizer, problem = _attempt("tokenizer", lambda: load_tokenizer(recipe.model))
    if problem is not None:
        yield problem
    elif model is not None:
        yield models.check_tokenizer(tokenizer, model)


def _diagnose_data(recipe: Recipe, sizes: Models | None, device: Device, *, sound: bool) -> Iterator[Check]:
    sources = [check_source(source) for source in (*recipe.data.train, *recipe.data.test)]
    yield from (source.check for source in sources)
    sound = sound and all(source.check.status != "FAIL" for source in sources)
    pairs = [pair for source in sources for pair in source.pairs]
    if recipe.curriculum:
        trained = [pair for source in sources[: len(recipe.data.train)] for pair in source.pairs]
        check = _guarded("curriculum", check_curriculum, recipe.curriculum, trained)
        sound = sound and check.status != "FAIL"
        yield check
    tokenizer, problem = _attempt("tokenizer", lambda: load_tokenizer(recipe.model))
    if problem is not None or not pairs:
        return
    embedded = None if sizes is None else sizes.sizes.vocabulary
    try:
        for check in check_template(recipe, tokenizer, pairs, embedded):
            sound = sound and check.status != "FAIL"
            yield check
    except SelectiveDPOError as error:
        yield refused("template", error)
        return
    if sound and sizes is not None:
        yield _guarded("forward pass", models.check_forward, recipe, tokenizer, pairs, sizes.sizes, device)
    if sound and sum(source.rows for source in sources) <= FEW_ROWS:
        yield _guarded("pairs", check_pairs, recipe)


def _trained_blocks(recipe: Recipe) -> tuple[str, ...]:
    return ("train",) if recipe.curriculum else ("score", "train")


def _check_evaluation(recipe: Recipe) -> Check:
    check_evaluation(recipe.evaluate, has_test=bool(recipe.data.test))
    arms = ", ".join(policy_names(recipe.evaluate))
    return ok("evaluate", f"arms {arms}; {recipe.evaluate.generation.prompts:,} prompts to answer")


def _sizes(recipe: Recipe) -> Models | None:
    try:
        return models_of(recipe)
    except SelectiveDPOError:  # `check_adapter` and `build_on_meta` say so
        return None


def _guarded(name: str, check: Callable[P, Check], *args: P.args, **kwargs: P.kwargs) -> Check:
    """The check's answer; an error that the user has to mend is one."""
    try:
        return check(*args, **kwargs)
    except SelectiveDPOError as error:
        return refused(name, error)


def _attempt(name: str, make: Callable[[], Found]) -> tuple[Found | None, Check | None]:
    try:
        return make(), None
    except SelectiveDPOError as error:
        return None, refused(name, error)


# ----------------------------------------------------------------------------------------------------
# The answer of one check.


Status = Literal["ok", "warn", "FAIL"]


class Check(NamedTuple):
    """What was found, and what to do about it."""

    status: Status
    name: str
    found: str
    remedy: str = ""
    """Empty for `ok`."""
    cause: SelectiveDPOError | None = None
    """The error that a run would end in, where one was met."""

    def line(self) -> str:
        """One line of text."""
        words = f"{self.status:<5} {self.name}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")
        return " ".join(words.split()) if "\n" in words else words

    def error(self) -> SelectiveDPOError:
        """A failed check as the error for whoever goes on all the same."""
        told = f"{self.name}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")
        return self.cause or ConfigError(told)


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check("ok", name, found)


def warn(name: str, found: str, remedy: str) -> Check:
    """A run would go through; perhaps not as wanted."""
    return Check("warn", name, found, remedy)


def fail(name: str, found: str, remedy: str = "") -> Check:
    """A run would stop here."""
    return Check("FAIL", name, found, remedy)


def refused(name: str, error: SelectiveDPOError) -> Check:
    """A run would stop here, with this error; its text holds the remedy."""
    return Check("FAIL", name, str(error), cause=error)


# ----------------------------------------------------------------------------------------------------
# Checks of the machine: Python and packages, device, disk, settings of the hub's client.


_DISTRIBUTION = "selective-dpo"

_BASE_NEED = 100 * (1 << 20)
"""Bytes for tables, logs and the report, beside trained weights."""

# What transformers calls them -> the package to install.
_TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}


def check_python() -> Check:
    """The interpreter against what the installed package asks for."""
    found, wanted = platform.python_version(), metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return ok("python", found)
    return fail("python", found, f"use a version {wanted}")


def check_packages() -> Iterator[Check]:
    """Each package that is always needed, against the bounds that this one declares."""
    good = []
    for text in metadata.requires(_DISTRIBUTION) or []:
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
    wanted = need.total + _BASE_NEED
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
            yield _needs(
                _TRACKERS.get(name, name), f"{block}.trainer.report_to {name}", "the tracker's package"
            )
    yield check_attention(recipe.model.attention)


def check_attention(name: str) -> Check:
    """Whether the attention implementation is there. What the model can take shows when it is loaded."""
    from transformers.utils import import_utils

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


# ----------------------------------------------------------------------------------------------------
# Checks of what a recipe names: model, tokenizer, adapters, judge, trainer settings.


_NEARLY_FULL = 0.9


def check_weights(recipe: Recipe, model: Any) -> Check:
    """The architecture, and for a local folder that it holds all its weights, in the one format that is read.

    Raises:
        ModelError: weights are missing, of other shapes than the configuration says, or not to be loaded.
    """
    size = readable_count(sum(parameter.numel() for parameter in model.parameters()))
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


def check_tokenizer(tokenizer: Any, model: Any) -> Check:
    """Special tokens, and that the model has a row for each of them."""
    special = {name: getattr(tokenizer, f"{name}_token") for name in ("pad", "bos", "eos")}
    rows, tokens = embedded_tokens(model), len(tokenizer)
    named = ", ".join(f"{name} {token!r}" for name, token in special.items())
    found = f"{tokens:,} tokens, {named}; the model embeds {rows:,}"
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


def embedded_tokens(model: Any) -> int:
    """How many tokens the model has a row for."""
    return int(model.get_input_embeddings().weight.shape[0])


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
    return ok(f"{block}.lora", f"{readable_count(trained)} parameters in the adapter")


def check_forward(
    recipe: Recipe, tokenizer: Any, pairs: Sequence[Pair], sizes: Architecture, device: Device
) -> Check:
    """A forward pass of the first pairs, where the weights are a local folder's and fit into memory.

    Raises:
        ModelError: no pair has finite log-probabilities.
    """
    name, size = "forward pass", sizes.parameters * BYTES[recipe.model.dtype]
    if not Path(recipe.model.path).is_dir():
        return ok(name, "not tried with a model of the hub; a run tries it before its reference")
    if device.memory and size > device.memory / 2:
        return ok(name, f"not tried with {readable_bytes(size)} of weights; a run tries it first")
    data, rows = recipe.data, []
    tokens = tokenize_pairs(pairs, tokenizer, empty_system_message=data.empty_system_message)
    for pair, item in zip(pairs, tokens, strict=True):
        if isinstance(item, PairTokens) and (fitted := fit_length(item, data)).drop is None:
            ids = {
                name: getattr(fitted.tokens, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
            }
            rows.append({"pair_id": pair.pair_id, "prompt_id": pair.prompt_id, **ids})
    if not rows:
        return ok(name, "not tried: none of the first rows is short enough")
    model = load_policy(recipe.model).to(this_process().device)
    require_finite_start(model, Dataset.from_list(rows), pad_token_id=tokenizer.pad_token_id)
    return ok(name, f"log-probabilities of {min(TRIED, len(rows))} pairs are finite")


def check_memory(recipe: Recipe, models: Models, device: Device) -> Check:
    """The plan's largest estimate, at the longest sequences that the recipe allows, against the device."""
    need, name = max((job_memory(recipe, models, kind).total, kind) for kind in job_kinds(recipe))
    found = f"{name} needs about {readable_bytes(need)} of {readable_bytes(device.memory)}"
    if device.memory and need > _NEARLY_FULL * device.memory:
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


# ----------------------------------------------------------------------------------------------------
# Checks of the data: each source's first rows, the template on them, their lengths; all of few rows.


ROWS = 100
"""Rows that are looked at in each source."""

FEW_ROWS = 2_000
"""So many rows are prepared whole. More leave enough updates to scorers with any usual batch size."""


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
        rows = list(islice(open_source(source).rows(), FEW_ROWS + 1))
    except SelectiveDPOError as error:
        return FirstRows(refused(name, error), (), 0)
    parsed = [row.problem if isinstance(row, Malformed) else parse_row(row) for row in rows[:ROWS]]
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


def check_template(
    recipe: Recipe, tokenizer: Any, pairs: list[Pair], embedded: int | None
) -> Iterator[Check]:
    """Render and tokenize pairs: the template, the prompt's boundary, the length limits, and whether the
    model, with `embedded` rows (None: not known), has one for every token.

    Raises:
        SelectiveDPOError: as for a run: no template for conversations, an option without effect ...
    """
    data = recipe.data
    tokens = tokenize_pairs(pairs, tokenizer, empty_system_message=data.empty_system_message)
    kept = [item for item in tokens if isinstance(item, PairTokens)]
    chats = sum(pair.is_conversational for pair in pairs)
    found = f"{chats} conversations and {len(pairs) - chats} plain texts rendered"
    if len(kept) < len(pairs):
        refused = f"{found}, {len(pairs) - len(kept)} refused by the template"
        yield warn("template", refused, "these rows would be dropped; see model.chat_template")
    else:
        yield ok("template", found)
    if not kept:
        return
    largest = max(max(ids, default=0) for item in kept for ids in item[:3])
    if embedded is not None and largest >= embedded:
        remedy = "use the tokenizer the model was trained with (model.tokenizer)"
        yield fail("token ids", f"up to {largest:,}, the model embeds {embedded:,} tokens", remedy)
    yield _boundary(kept, data.max_boundary_mismatch)
    yield _lengths([str(fit_length(item, data).drop or KEPT) for item in kept])


def _boundary(tokens: list[PairTokens], most: float) -> Check:
    mismatches = sum(item.boundary_mismatch for item in tokens)
    found = f"prompt is no token prefix in {mismatches} of {len(tokens)} pairs"
    if mismatches / len(tokens) > most:
        remedy = "use a template that writes the prompt alike in both, or raise data.max_boundary_mismatch"
        return fail("boundary", f"{found}, more than {most:.0%}", remedy)
    return ok("boundary", found)


def _lengths(statuses: list[str]) -> Check:
    counts = Counter(statuses)
    found = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    if counts[KEPT] < len(statuses) / 2:
        return warn("lengths", found, "raise data.max_length, or set data.overlong: truncate")
    return ok("lengths", found)
