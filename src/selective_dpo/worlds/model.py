"""The embedded world's small language model: tokenizer, demonstrations, supervised fine-tuning, sampling.

The tokenizer has to be a `Qwen2Tokenizer`: beside a Qwen2 model, `AutoTokenizer` makes one out of any
tokenizer.json whatever class that names, and would read a word-level vocabulary wrongly without a warning.

Shapes: D demonstrations, B rows, T positions, N operands, G generated positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from tokenizers import AddedToken, processors
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from selective_dpo.config import Block, Count, Fraction
from selective_dpo.worlds.tasks import BASE, COLON, EQUALS, LETTERS, OPERATIONS, Digits, solve

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
MAX_POSITIONS = 128
IGNORED = -100
"""Label of positions that carry no loss (PyTorch's `ignore_index`)."""
_SPACE = "Ġ"
"""How byte-level BPE writes a space."""
_SPACED = (COLON, EQUALS, *LETTERS)

SYMBOL_IDS: Mapping[str, int] = MappingProxyType(
    {symbol: at for at, symbol in enumerate((PAD, BOS, EOS, UNKNOWN, *_SPACED, *OPERATIONS))}
)
"""Token id of each symbol where it stands in a prompt or answer, that is after a space or at the start."""

VOCABULARY_SIZE = len(SYMBOL_IDS) + 1 + len(_SPACED)
"""With the bare space and the bare letters that byte-level merging starts from; no text here uses them."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class TasksConfig(Block):
    """What is asked."""

    operations: tuple[str, ...] = tuple(OPERATIONS)
    """Operations that prompts ask for, equally often; the last two by default are beyond the model."""
    lengths: tuple[Count, ...] = (3, 4, 5, 6)
    """Numbers of operands, equally often."""

    @model_validator(mode="after")
    def _known_operations(self) -> Self:
        unknown = sorted(set(self.operations) - set(OPERATIONS))
        if unknown or not self.operations:
            raise ValueError(f"operations must be some of {list(OPERATIONS)}, not {unknown}")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError("lengths must be at least 2: an operand alone has no halves")
        return self


class SFTConfig(Block):
    """The model, and how it learns from demonstrations."""

    hidden_size: Count = 64
    """Width of the residual stream."""
    layers: Count = 3
    """Transformer blocks."""
    heads: Count = 4
    """Attention heads, each with its own keys and values."""
    feed_forward_size: Count = 168
    """Width inside the feed-forward blocks."""
    rope_theta: Positive = 1000.0
    """Base of the rotary position embedding."""
    initializer_range: Positive = 0.08
    """Standard deviation of the first weights. With transformers' 0.02, made for wider models, some seeds
    have not learned all five easy operations by the last step."""
    hasty_share: Share = 0.45
    """Share of demonstrations by hasty writers, who overwrite 1 or 2 symbols of the right answer with
    random letters and never change its length."""
    steps: Count = 1000
    """Updates."""
    batch_size: Count = 64
    """Demonstrations per update; each is drawn anew and seen once."""
    learning_rate: Positive = 4e-3
    """AdamW's highest learning rate."""
    final_learning_rate: Fraction = 0.1
    """Where the cosine ends, as a share of the highest."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Updates of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's averaging of gradients and squared gradients."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""


def build_tokenizer() -> Qwen2Tokenizer:
    """Encoding puts <bos> in front and nothing behind: "copy : a =" is <bos>, copy, " :", " a", " =".

    An answer brings its own space, " a b": then the tokens of the prompt are a prefix of those of prompt +
    answer, and decoding an answer's tokens gives back its text.
    """
    vocabulary = {
        _SPACE + symbol if symbol in _SPACED else symbol: token_id for symbol, token_id in SYMBOL_IDS.items()
    }
    vocabulary |= {symbol: len(vocabulary) + at for at, symbol in enumerate((_SPACE, *_SPACED))}
    merges: Any = [(_SPACE, symbol) for symbol in _SPACED]  # pairs, though annotated as strings
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
    )
    # As added tokens the operations' names stay whole without merges for their parts.
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in OPERATIONS])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SYMBOL_IDS[BOS])]
    )
    return tokenizer


class Demonstrations(NamedTuple):
    """Token ids and labels, both [D, T] int64, padded on the right; labels only where the answer is."""

    input_ids_DT: NDArray[np.int64]
    labels_DT: NDArray[np.int64]


def draw_demonstrations(
    count: int,
    generator: np.random.Generator,
    *,
    operations: Sequence[str],
    lengths: Sequence[int],
    hasty_share: float,
) -> Demonstrations:
    """`count` independent demonstrations: "<bos> op : x1 .. xn = y1 .. yn <eos>".

    Operation and length are uniform. A share `hasty_share` of the answers has 1 or 2 symbols overwritten
    by random letters (which may happen to be the right ones); the length is never changed.
    """
    longest = max(lengths)
    width = 2 * longest + 5  # <bos> op : n operands = n answers <eos>
    input_ids = np.full((count, width), SYMBOL_IDS[PAD], dtype=np.int64)
    labels = np.full((count, width), IGNORED, dtype=np.int64)
    letter_ids = np.array([SYMBOL_IDS[letter] for letter in LETTERS], dtype=np.int64)
    operation_D: NDArray[np.int64] = generator.integers(len(operations), size=count)
    length_D: NDArray[np.int64] = generator.choice(np.asarray(lengths), size=count)
    hasty_D: NDArray[np.bool_] = generator.random(count) < hasty_share
    for index, operation in enumerate(operations):
        for length in sorted(set(lengths)):
            rows = np.flatnonzero((operation_D == index) & (length_D == length))
            operands = generator.integers(BASE, size=(len(rows), length))
            answers = solve(operation, operands)
            hasty = np.flatnonzero(hasty_D[rows])
            answers[hasty] = overwrite(answers[hasty], generator)
            head = [SYMBOL_IDS[BOS], SYMBOL_IDS[operation], SYMBOL_IDS[COLON]]
            text = np.concatenate(
                [
                    np.tile(head, (len(rows), 1)),
                    letter_ids[operands],
                    np.full((len(rows), 1), SYMBOL_IDS[EQUALS]),
                    letter_ids[answers],
                    np.full((len(rows), 1), SYMBOL_IDS[EOS]),
                ],
                axis=1,
            )
            first = len(head) + length + 1  # position of the answer's first letter
            input_ids[rows, : text.shape[1]] = text
            labels[rows, first : text.shape[1]] = text[:, first:]
    return Demonstrations(input_ids, labels)


def overwrite(digits_BN: Digits, generator: np.random.Generator) -> Digits:
    """A copy of `digits_BN` in which each row has 1 or 2 places (equally likely) set to random digits."""
    rows, size = digits_BN.shape
    # The rank of random numbers is a random order of the places: the first one or two are overwritten.
    order_BN = generator.random((rows, size)).argsort(axis=1).argsort(axis=1)
    places_B1 = generator.integers(1, 3, size=(rows, 1))
    random_BN = generator.integers(BASE, size=(rows, size))
    return np.where(order_BN < places_B1, random_BN, digits_BN)


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
    input_ids, labels = (torch.split(torch.from_numpy(ids_DT), config.batch_size) for ids_DT in drawn)
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
    for input_ids_BT, labels_BT in zip(input_ids, labels, strict=True):
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


@torch.inference_mode()
def sample_answers(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
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
            stop = ids_G.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids_G else len(ids_G)
            answers[row].append(str(tokenizer.decode(ids_G[:stop], skip_special_tokens=True)))
        start = end
    model.train(was_training)
    return answers


def _extend(
    model: Qwen2ForCausalLM,
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
