"""Sizes of a model and of its adapters, from the configuration alone: no weights are loaded."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from selective_dpo.config import ModelConfig, Settings
from selective_dpo.errors import ConfigError
from selective_dpo.models import load_model_config, loading

# They decide with which numbers an adapter starts, not how large it is, and may need the real weights.
_STARTING_VALUES = ("init_lora_weights", "loftq_config", "eva_config", "corda_config")


class Architecture(NamedTuple):
    """Sizes that decide what a model costs."""

    parameters: int
    lookup_parameters: int
    """Those of the input embedding where it is looked up only; 0 where it is the output head as well."""
    layers: int
    hidden: int
    attention_width: int
    """Heads times head size: the width of queries."""
    key_value_width: int
    """The same of keys, and of values."""
    heads: int
    vocabulary: int
    """Rows of the embedding."""

    @property
    def matrix_parameters(self) -> int:
        """Parameters that every token is multiplied with."""
        return self.parameters - self.lookup_parameters


def build_on_meta(config: ModelConfig) -> Any:
    """The recipe's model with shapes and no numbers: it takes no memory and cannot compute.

    Raises:
        ModelError: the configuration cannot be had, or is not that of a causal language model.
    """
    architecture = load_model_config(config)
    from_config: Any = AutoModelForCausalLM.from_config
    with loading("model", config.path), torch.device("meta"):
        # Shapes do not depend on the attention implementation, and this one needs no other package.
        return from_config(
            architecture, attn_implementation="eager", trust_remote_code=config.trust_remote_code
        )


def architecture_of(model: Any) -> Architecture:
    """The sizes of a model of transformers. Experts of a mixture are counted as if all were used."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    is_shared = head is not None and head.weight is embedding
    return Architecture(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        lookup_parameters=0 if is_shared else embedding.numel(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention_width=heads * head_size,
        key_value_width=key_value_heads * head_size,
        heads=heads,
        vocabulary=embedding.shape[0],
    )


def adapter_parameters(model: Any, lora: Settings | None, where: str) -> int:
    """How many parameters the adapter `lora` (keys of PEFT's `LoraConfig`) trains; 0 for None.

    `model` must be on the meta device; it is changed and of no further use. `where` is the settings' key.

    Raises:
        ConfigError: the adapter does not fit the model, such as target modules that it does not have.
    """
    if lora is None:
        return 0
    sized = {key: value for key, value in lora.items() if key not in _STARTING_VALUES}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between PEFT and transformers
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **sized))
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{where} does not fit the model: {str(error).strip().splitlines()[0]}") from error
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
