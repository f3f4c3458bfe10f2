"""The starting policy and its tokenizer: loading them, and naming their exact content."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import json
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from selective_dpo.config import ModelConfig
from selective_dpo.data.templates import apply_template
from selective_dpo.distributed.processes import this_process
from selective_dpo.errors import ModelError, SelectiveDPOError, is_out_of_memory, name_some
from selective_dpo.storage.artifacts import file_digest, read_json
from selective_dpo.storage.digests import digest

_LOCAL_PATH = re.compile(r"[/~.\\]|[^/]*/[^/]*/")
"""What no hub name looks like: a leading slash, tilde or dot, or two slashes."""

_CACHED = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")
"""In the path of a model that the hub's client has downloaded."""

logger = logging.getLogger(__name__)

_CLEAR_ERRORS = (OSError, ValueError, ImportError, SafetensorError)
"""Errors whose message is written for the user; for the others, their type is named, too."""


@contextlib.contextmanager
def loading(what: str, path: str) -> Iterator[None]:
    """Inside, a library reads files of the model, adapter or tokenizer at `path`, and only that.

    What is wrong with such files ends in errors of any kind: a list where a mapping should be, a width of -1.

    Raises:
        ModelError: for all of them, but for running out of memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SelectiveDPOError) or is_out_of_memory(error):
            raise
        raise ModelError(_explain(what, path, error)) from error


def load_policy(config: ModelConfig, *, device_map: str | dict[str, int] | None = None) -> Any:
    """The starting policy, in training precision, on the CPU or wherever a trainer will move it.

    With `device_map="meta"` the names and shapes of its weights are read, and no numbers.

    Raises:
        ModelError: it cannot be loaded, or lacks weights; only safetensors are read. As `load_model_config`.
    """
    load_model_config(config)
    if torch.accelerator.is_available() and device_map != "meta":
        # A model whose forward was replaced (as a fused head does) refers to itself, and would keep its place
        # on the device until some later collection.
        gc.collect()
        torch.accelerator.empty_cache()
    quantized: dict[str, Any] = {}
    if config.quantization and device_map != "meta":
        require_quantization(config)
        # Each process on its own device: the weights cannot be moved in another type afterwards.
        quantized = {"quantization_config": quantization_config(config)}
        device_map = {"": torch.accelerator.current_device_index()}
    with loading("model", config.path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            device_map=device_map,
            **quantized,
            output_loading_info=True,
        )
    model, found = loaded
    if found["missing_keys"]:
        raise ModelError(
            f"the weights of model {config.path!r} lack {name_some(sorted(found['missing_keys']), limit=2)}, "
            "which would be random numbers: are they those that config.json describes?"
        )
    return model


def quantization_config(config: ModelConfig) -> BitsAndBytesConfig:
    """QLoRA's: NF4 with double quantization, computing in the model's type (Dettmers et al. 2023, NeurIPS).

    Numbers are stored in the model's type, too, so that FSDP can shard them like any weights.
    """
    dtype = getattr(torch, config.dtype)
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def require_quantization(config: ModelConfig) -> None:
    """Refuse `quantization` where it cannot be done.

    Raises:
        ModelError: bitsandbytes is not installed, or there is no GPU.
    """
    absent = "bitsandbytes" if importlib.util.find_spec("bitsandbytes") is None else ""
    absent = absent or ("a GPU" if not torch.cuda.is_available() else "")
    if config.quantization and absent:
        raise ModelError(
            f"model.quantization: {config.quantization} needs {absent}, which is not there: install the gpu "
            "extra on a machine with a GPU, or leave it out"
        )


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer with the recipe's chat template and a padding token (its end-of-sequence token where
    it has none of its own).

    Raises:
        ModelError: it cannot be loaded, or has neither a padding nor an end-of-sequence token.
        ConfigError, TemplateError: there is no such chat template, or it is not valid.
    """
    path = config.tokenizer or config.path
    _announce_remote_code(config)
    tokenizer = read_tokenizer(
        path,
        revision=config.revision if path == config.path else "main",
        trust_remote_code=config.trust_remote_code,
    )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"tokenizer {path} has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    apply_template(tokenizer, config.chat_template)
    return tokenizer


def read_tokenizer(path: str, *, what: str = "tokenizer", **options: Any) -> Any:
    """The tokenizer at `path` as it is; `options` as for `AutoTokenizer.from_pretrained`.

    Raises:
        ModelError: it cannot be loaded, or knows special tokens only.
    """
    with loading(what, path):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        # Without a vocabulary's file transformers makes a tokenizer to which every text is empty.
        special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError("model_max_length in tokenizer_config.json is not a number")
        is_empty = len(tokenizer) <= len(special) and not tokenizer.encode("a b", add_special_tokens=False)
    if is_empty:
        raise ModelError(
            f"the tokenizer of {path!r} knows no tokens but {len(special)} special one(s): its vocabulary "
            "(tokenizer.json, or its model's own files) is missing"
        )
    return tokenizer


def damaged_weights(folder: Path) -> str:
    """What is wrong with the first file of weights in `folder` that is not whole; empty: none is.

    Headers are read, not weights.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path} is damaged or not whole ({' '.join(str(error).split())[:200]})"
    return ""


def load_model_config(config: ModelConfig) -> Any:
    """The architecture's configuration, without weights.

    Raises:
        ModelError: it cannot be had, or is that of a quantized model. As `require_full_model`.
    """
    _announce_remote_code(config)
    require_full_model(config.path, config.revision)
    with loading("model", config.path):
        found = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if getattr(found, "quantization_config", None):
        raise ModelError(
            f"model {config.path!r} is quantized already: name its weights in bfloat16, float16 or "
            "float32, and set model.quantization: 4bit to have them quantized here"
        )
    return found


def require_full_model(path: str, revision: str = "main") -> None:
    """Refuse what transformers takes for a model of its own kind, and is none.

    A PEFT adapter is one: transformers loads its base and the adapter, and the adapter to be trained then
    takes that one's place, so that the reference would be another model than the policy's start.

    Raises:
        ModelError: a PEFT adapter, with the command that merges it into its base; or GGUF.
    """
    folder = Path(path)
    if path.lower().endswith(".gguf") or (
        any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))
    ):
        raise ModelError(
            f"model {path!r} is GGUF, which is not supported: convert it to a folder of safetensors weights "
            "(transformers reads it with gguf_file=, save_pretrained writes the folder)"
        )
    with loading("model", path):
        adapter = find_adapter_config_file(path, revision=revision)
        if adapter is None:
            return
        base = str(read_json(Path(adapter)).get("base_model_name_or_path"))
    merged = f"{folder if folder.is_dir() else folder.name}-merged"
    has_tokenizer = not folder.is_dir() or (folder / "tokenizer_config.json").is_file()
    command = merge_command(path, path if has_tokenizer else base, merged)
    raise ModelError(
        f"model {path!r} is a PEFT adapter of {base!r}, whose place a new adapter would take: merge it with "
        f"{command} and name {merged!r}"
    )


def merge_command(adapter: str, tokenizer: str, merged: str) -> str:
    """What to type to merge a PEFT adapter into its base, as the folder `merged`."""
    source, named, target = map(json.dumps, (adapter, tokenizer, merged))
    program = (
        "from peft import AutoPeftModelForCausalLM as P; from transformers import AutoTokenizer as T; "
        f"P.from_pretrained({source}).merge_and_unload().save_pretrained({target}); "
        f"T.from_pretrained({named}).save_pretrained({target})"
    )
    return f"python -c {shlex.quote(program)}"


def shown_path(text: str) -> str:
    """What others may read in place of a path: a name on the hub as it is, of anything local `./NAME`.

    Of a model in the hub's cache the name on the hub. No folder of this machine is left.
    """
    if cached := _CACHED.search(text):
        return f"{cached['owner']}/{cached['name']}"
    path = Path(text).expanduser()
    return f"./{path.absolute().name}" if _LOCAL_PATH.match(text) or path.exists() else text


def model_digest(config: ModelConfig) -> str:
    """What identifies the weights: digests of a local folder's files, or a hub model's commit.

    Code that is run with the model (`trust_remote_code`) is part of it.
    """
    folder = Path(config.path)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
        digests = {path.name: file_digest(path) for path in files}
        found = {**digests, **(remote_code(config) or {})}
    else:
        commit = getattr(load_model_config(config), "_commit_hash", None)
        found = {"hub": config.path, "commit": commit or config.revision}
    # Weights in 4 bits are others; without them the digest is what it was before there were any.
    return digest(found | ({"quantization": config.quantization} if config.quantization else {}))


def remote_code(config: ModelConfig) -> dict[str, str] | None:
    """The code that `trust_remote_code` lets a model bring along; None where it is off.

    SHA-256 of each Python file of a local folder, by name; of a hub model its name and revision.
    """
    if not config.trust_remote_code:
        return None
    found: dict[str, str] = {}
    for path in dict.fromkeys((config.path, config.tokenizer or config.path)):
        folder = Path(path)
        if folder.is_dir():
            files = sorted(folder.rglob("*.py"))
            found |= {file.relative_to(folder).as_posix(): file_digest(file) for file in files}
        else:
            found[path] = f"revision {config.revision if path == config.path else 'main'}"
    return found


@functools.cache
def _announce_remote_code(config: ModelConfig) -> None:
    if config.trust_remote_code:
        tokenizer = f" and {config.tokenizer}" if config.tokenizer else ""
        # Without any logging set up, Python writes warnings to stderr, and so does the command line.
        logger.warning(
            "WARNING: model.trust_remote_code is on: Python code that comes with %s runs with all your "
            "rights; leave it off unless you have read that code",
            f"{config.path} ({config.revision}){tokenizer}",
        )


def _explain(what: str, path: str, error: BaseException) -> str:
    folder = Path(path).expanduser()
    if not folder.is_dir() and _LOCAL_PATH.match(path):
        return f"cannot load {what} {path!r}: there is no such folder; check the path"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if "ignore_mismatched_sizes" in str(error):  # transformers points to a report in its log
        reason = "its weights have other shapes than config.json says"
    elif not isinstance(error, _CLEAR_ERRORS) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    if folder.is_dir():
        remedy = "the folder needs config.json, the tokenizer's files and *.safetensors weights"
    else:
        remedy = "check the name, your access and the network, or name a local folder"
    return f"cannot load {what} {path!r}: {reason[:300].rstrip(' .:')}; {remedy}"


def language_model(model: Any) -> Any:
    """The causal language model inside PEFT, data-parallel or sharding wrappers.

    Raises:
        ModelError: there is none.
    """
    for module in model.modules():
        inner: Any = module
        if isinstance(module, PreTrainedModel) and inner.get_output_embeddings() is not None:
            return inner
    raise ModelError(f"{type(model).__name__} holds no transformers model with a language-model head")


def is_sharded(model: Any) -> bool:
    """Whether processes hold parts of the weights (FSDP, ZeRO-3), so that each forward needs them all."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def spread_frozen(model: Any) -> Any:
    """`model` on this process's device, its frozen weights divided among the processes (PyTorch's FSDP2).

    Each layer's are gathered for its pass and dropped after it, so all processes must run as many passes.
    Weights that are trained stay whole on each. Every process loads the model into the machine's memory.
    """
    process = this_process()
    mesh = init_device_mesh(process.device.type, (process.num_processes,))
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    layers = set(language_model(model)._no_split_modules or ())
    for module in [each for each in model.modules() if type(each).__name__ in layers]:
        fully_shard(module, mesh=mesh, ignored_params=trained)
    fully_shard(model, mesh=mesh, ignored_params=trained)
    if process.is_main_process:
        held = sum(
            weight.to_local().numel() if isinstance(weight, DTensor) else weight.numel()
            for weight in model.parameters()
        )
        share = held / sum(weight.numel() for weight in model.parameters())
        sys.stderr.write(f"weights: {share:.0%} of them on each of {process.num_processes} processes\n")
    return model.to(process.device)


def attention_of(model: Any) -> str:
    """Name of the attention implementation in use: `sdpa`, `eager`, ..."""
    name: str = language_model(model).config.get_text_config()._attn_implementation
    return name
