"""The world's small language model, trained from scratch on demonstrations.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from selective_dpo.worlds.config import SFTConfig, TasksConfig
from selective_dpo.worlds.demonstrations import IGNORED, draw_demonstrations
from selective_dpo.worlds.tokenizer import (
    BOS,
    EOS,
    MAX_POSITIONS,
    PAD,
    SYMBOL_IDS,
    VOCABULARY_SIZE,
    build_tokenizer,
)


class SFTResult(NamedTuple):
    """A trained model and its mean loss per response token (nats) over the last tenth of the steps."""

    model: Qwen2ForCausalLM
    loss: float


def model_config(config: SFTConfig) -> Qwen2Config:
    """The transformers configuration of the world's model (about 150 thousand parameters by default)."""
    return Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=config.feed_forward_size,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=SYMBOL_IDS[BOS],
        eos_token_id=SYMBOL_IDS[EOS],
        pad_token_id=SYMBOL_IDS[PAD],
        dtype="float32",
    )


def train_sft(tasks: TasksConfig, config: SFTConfig, *, seed: int) -> SFTResult:
    """Train a fresh model by next-token prediction of the answers only. fp32, on the CPU.

    The same seed gives the same weights on the same machine; the global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(model_config(config))
    drawn = draw_demonstrations(
        config.steps * config.batch_size,
        np.random.default_rng(seed),
        operations=tasks.operations,
        lengths=tasks.lengths,
        hasty_share=config.hasty_share,
    )
    batches_input = torch.split(torch.from_numpy(drawn.input_ids_DT), config.batch_size)
    batches_labels = torch.split(torch.from_numpy(drawn.labels_DT), config.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    model.train()
    losses = []
    for input_ids_BT, labels_BT in zip(batches_input, batches_labels, strict=True):
        loss = answer_loss(model, input_ids_BT, labels_BT)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.train(False)
    last = losses[-max(1, config.steps // 10) :]
    return SFTResult(model, float(torch.stack(last).mean()))


def answer_loss(model: Qwen2ForCausalLM, input_ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) over the labelled tokens.

    Rows are padded on the right and attention is causal, so no mask is needed: padding comes after
    every position whose prediction counts.
    """
    logits_BTV = model(input_ids=input_ids_BT[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
    )


def learning_rate_factor(step: int, config: SFTConfig) -> float:
    """Share of the highest rate at `step` (from 0): linear warm-up, then a cosine to the final one."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    final = config.final_learning_rate
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def save_model(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Weights (safetensors), configuration and tokenizer, as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
