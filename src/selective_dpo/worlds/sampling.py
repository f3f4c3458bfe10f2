"""Answers sampled from a small model, fast: prompts of one length share a batch, so nothing is padded.

Shapes: B rows, T prompt positions, G generated positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 2048,
) -> list[list[str]]:
    """`samples` answers to each prompt, in the order of `prompts`: result [len(prompts)][samples].

    An answer ends at <eos> (which is not part of its text) or after `max_new_tokens`. Temperature 0 is
    greedy. The same arguments give the same answers.
    """
    generator = torch.Generator().manual_seed(seed)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    rows = [row for row in range(len(prompts)) for _ in range(samples)]
    rows.sort(key=lambda row: len(encoded[row]))  # stable: the samples of a prompt stay together
    answers: list[list[str]] = [[] for _ in prompts]
    was_training = model.training
    model.train(False)
    start = 0
    while start < len(rows):
        length = len(encoded[rows[start]])
        end = start + 1
        while end < min(len(rows), start + batch_size) and len(encoded[rows[end]]) == length:
            end += 1
        prompt_BT = torch.tensor([encoded[row] for row in rows[start:end]])
        answer_BG = _extend(model, prompt_BT, max_new_tokens, temperature, generator)
        for row, ids_G in zip(rows[start:end], answer_BG.tolist(), strict=True):
            answers[row].append(_decode(tokenizer, ids_G))
        start = end
    model.train(was_training)
    return answers


def _extend(
    model: PreTrainedModel,
    prompt_BT: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """New tokens [B, G]; what follows a row's first <eos> is to be ignored."""
    cache = DynamicCache(config=model.config)
    end_id = model.config.eos_token_id
    done_B = torch.zeros(len(prompt_BT), dtype=torch.bool)
    input_ids = prompt_BT
    generated: list[torch.Tensor] = []
    while len(generated) < max_new_tokens and not done_B.all():
        outputs = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_BV = outputs.logits[:, -1].float()
        if temperature == 0.0:
            next_B = logits_BV.argmax(dim=-1)
        else:
            probabilities_BV = torch.softmax(logits_BV / temperature, dim=-1)
            next_B = torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]
        generated.append(next_B)
        done_B |= next_B == end_id
        input_ids = next_B[:, None]
    return torch.stack(generated, dim=1)


def _decode(tokenizer: PreTrainedTokenizerBase, ids_G: list[int]) -> str:
    end = ids_G.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids_G else len(ids_G)
    return str(tokenizer.decode(ids_G[:end], skip_special_tokens=True))
