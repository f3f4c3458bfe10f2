"""The batches of an update: pairs as lists of tokens, until a pass makes the rows that the model reads.

`PairCollator` hands on the pairs of a batch. `weigh_equally` gives each pair of an update the same weight,
and `group_batches` puts those of similar length together. `WithinMemory` runs a batch in as many passes as
memory allows, and `row_model` stands for the model where TRL computes the loss of a pass. Nothing moves from
one update to another, or from one process to another.

Dimension suffixes: B pairs of a batch, L labels of the longest completion.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from selective_dpo.curriculum.table import PAIR_ID, WEIGHT
from selective_dpo.errors import ConfigError, ModelError
from selective_dpo.logprobs.memory import attempt
from selective_dpo.logprobs.packing_support import (
    PathName,
    RowCollator,
    packing_obstacle,
    plan_rows,
    say_once,
)
from selective_dpo.logprobs.reference import CHOSEN_COLUMN, REJECTED_COLUMN
from selective_dpo.logprobs.rows import TOKEN_COLUMNS, PairRows, forward_fields, part_lengths

PAIRS = "pairs"
"""Key of a batch: its `PairBatch`."""

logger = logging.getLogger(__name__)


def is_tokenized(dataset: Any) -> bool:
    """Whether the rows carry TRL's token columns."""
    return isinstance(dataset, Dataset) and set(TOKEN_COLUMNS) <= set(dataset.column_names)


# --- pairs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairRow:
    """One pair of a batch."""

    example: dict[str, Any]
    """The row of the data set."""
    tokens: tuple[list[int], list[int], list[int]] | None
    """Prompt, chosen and rejected as they are trained on; None: not text alone, or two different prompts."""
    is_blank: bool = False
    """Whether it only fills the batch: it is not trained on."""

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens of prompt, chosen and rejected; a blank pair is not computed and has none."""
        prompt, chosen, rejected = ((), (), ()) if self.is_blank or self.tokens is None else self.tokens
        return (len(prompt), len(chosen), len(rejected))

    @property
    def longest(self) -> int:
        """Tokens of the longer of prompt + chosen and prompt + rejected."""
        prompt, chosen, rejected = self.lengths
        return prompt + max(chosen, rejected)


@dataclass(frozen=True)
class PairBatch:
    """Pairs that go through the model together."""

    pairs: list[PairRow]
    weight: float = 1.0
    """The factor of the batch's mean loss, for equal parts of each pair in an update."""

    @property
    def blanks(self) -> int:
        """How many pairs are blank."""
        return sum(pair.is_blank for pair in self.pairs)

    @property
    def ids(self) -> list[str]:
        """The pairs' ids, as far as they have any."""
        return [pair.example[PAIR_ID] for pair in self.pairs if PAIR_ID in pair.example]

    @property
    def pair_weights(self) -> list[float]:
        """What each pair weighs, by the curriculum; a blank pair has no loss to be weighed."""
        return [1.0 if pair.is_blank else float(pair.example[WEIGHT]) for pair in self.pairs]

    @property
    def is_text(self) -> bool:
        """Whether all pairs are tokens that rows can be made of."""
        return all(pair.tokens is not None for pair in self.pairs)

    @property
    def padded_tokens(self) -> int:
        """Tokens of the batch in padded rows."""
        return 2 * len(self.pairs) * max(1, *(pair.longest for pair in self.pairs))

    def take(self, places: Sequence[int]) -> PairBatch:
        """Some of the pairs, with their share of the weight.

        The weighted losses of parts that hold all pairs once add up to the weighted loss of the batch.
        """
        share = len(places) / len(self.pairs)
        return PairBatch([self.pairs[place] for place in places], self.weight * share)


class PairCollator:
    """Makes a `PairBatch` of rows, cut to `max_length` as TRL's collator cuts them.

    Beside it is a tensor with as many entries as TRL's padded rows, for transformers to read the size from.
    """

    def __init__(self, max_length: int | None, truncation_mode: str, *, has_tokens: bool) -> None:
        self._max_length, self._keeps_start = max_length, truncation_mode == "keep_start"
        self._has_tokens = has_tokens

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate `examples`."""
        pairs = [PairRow(example, self._tokens(example)) for example in examples]
        return {"rows": torch.arange(2 * len(pairs)), PAIRS: PairBatch(pairs)}

    def _tokens(self, example: dict[str, Any]) -> tuple[list[int], list[int], list[int]] | None:
        if not self._has_tokens:
            return None
        prompt, chosen, rejected = (example[name] for name in TOKEN_COLUMNS)
        most = self._max_length
        if most is None or len(prompt) + max(len(chosen), len(rejected)) <= most:
            return prompt, chosen, rejected
        if not self._keeps_start:
            return None  # rows that are cut at the beginning have no common prompt
        left = max(0, most - len(prompt))
        return prompt[:most], chosen[:left], rejected[:left]


# --- weights and places in an update ------------------------------------------------------------------------


def weigh_equally(
    batches: Sequence[PairBatch],
    *,
    first: int,
    pairs: int,
    batch_size: int,
    processes: int,
    process: int,
) -> list[PairBatch]:
    """The batches of one update with their weights, and with their repeated pairs blank.

    An optimizer step averages over processes and over accumulated batches. The last update of an epoch has
    fewer pairs: its batches differ in size, and on several processes the data loader fills them with pairs
    from the epoch's beginning. Averages of averages would weigh some pairs more than others, and train on the
    repeated ones twice. Here the update becomes the mean over its own pairs, for every loss that is a mean
    over pairs (`losses.LOSSES`). A blank pair has no completion, hence log-probs of 0 without a gradient.

    Batches are dealt in rounds, in which each process in turn gets `batch_size` consecutive pairs of the
    epoch's `pairs`. `first` is the update's first round.
    """
    starts = [(first + number) * batch_size * processes for number in range(len(batches))]
    in_update = sum(min(batch_size * processes, pairs - start) for start in starts)
    weighed = []
    for batch, start in zip(batches, starts, strict=True):
        own = pairs - start - process * batch_size  # what is left of the epoch for this process and the next
        marked = [replace(pair, is_blank=place >= own) for place, pair in enumerate(batch.pairs)]
        # The step averages over pairs, processes and batches; the factor makes it 1 / in_update for each.
        weighed.append(PairBatch(marked, len(batch.pairs) * processes * len(batches) / in_update))
    return weighed


def group_batches(batches: Sequence[PairBatch]) -> list[PairBatch]:
    """The same pairs in as many batches of the same sizes, pairs of similar length together, longest first.

    That saves padding; the smallest batch gets the longest pairs. Where a pair weighs more in one batch than
    in another, or is no text, the batches stay as they are.
    """
    a_pair = [batch.weight / len(batch.pairs) for batch in batches]
    is_equal = np.allclose(a_pair, a_pair[:1], rtol=1e-9)
    if len(batches) == 1 or not is_equal or not all(batch.is_text for batch in batches):
        return list(batches)
    left = sorted(
        (pair for batch in batches for pair in batch.pairs),
        key=lambda pair: (-2 * pair.lengths[0] - pair.lengths[1] - pair.lengths[2], -pair.longest),
    )
    grouped = []
    for size in sorted(len(batch.pairs) for batch in batches):
        grouped.append(PairBatch(left[:size], a_pair[0] * size))
        left = left[size:]
    return grouped


# --- memory -------------------------------------------------------------------------------------------------


PAIR_MEANS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""What TRL logs as means over the pairs of a batch."""


def split_batch(batch: PairBatch, max_tokens: int | None) -> list[PairBatch]:
    """The batch in parts of at most `max_tokens` padded tokens, a pair being the least; the longest first.

    None, or a batch that fits: the batch itself.
    """
    if max_tokens is None or batch.padded_tokens <= max_tokens or not batch.is_text:
        return [batch]
    left = sorted(range(len(batch.pairs)), key=lambda place: -batch.pairs[place].longest)
    parts = []
    while left:
        count = max(1, max_tokens // max(1, 2 * batch.pairs[left[0]].longest))
        parts.append(batch.take(left[:count]))
        left = left[count:]
    return parts


class WithinMemory:
    """Runs the batches of one update after the other, each in as many passes as memory allows.

    A failed backward pass may have left part of its gradient, so the whole update is repeated from gradients
    of zero: no pair is lost, none counts twice. Several processes exchange gradients in each pass; there,
    running out of memory ends the training, with the remedy, and its checkpoints are kept.

    TRL appends a number to each of its lists in each pass, a mean over its pairs or tokens, and logs the
    mean of the list. The lists, and TRL's count of tokens, are kept right where a batch is split or run
    again.

    Args:
        obstacle: why batches cannot be split, in a few words; empty: they can.
    """

    def __init__(self, trainer: Any, obstacle: Callable[[], str]) -> None:
        self._trainer, self._obstacle = trainer, obstacle
        self.max_tokens: int | None = None
        """Padded tokens that a pass holds at most, once memory has run out; None: those of a whole batch."""
        self.start_update()

    def start_update(self) -> None:
        """The next batch, and what is logged from here on, are those of another update."""
        self._done: list[PairBatch] = []
        self._logged_before, self._tokens_before = self._logged(), self._trainer._total_train_tokens

    def _logged(self) -> dict[str, int]:
        return {name: len(values) for name, values in self._trainer._metrics["train"].items()}

    def step(self, batch: PairBatch, run: Callable[[PairBatch], Tensor]) -> Tensor:
        """`run` the batch forward and backward, and return the sum of what it returns for its parts.

        Raises:
            ModelError: a single pair does not fit, or the passes cannot be made smaller.
        """
        batches, losses = [batch], list[Tensor]()
        while len(losses) < len(batches):
            loss = self._run(batches[len(losses)], run)
            if loss is not None:
                losses.append(loss)
                continue
            self._trainer.model.zero_grad()
            for name, values in self._trainer._metrics["train"].items():
                del values[self._logged_before.get(name, 0) :]
            self._trainer._total_train_tokens = self._tokens_before
            batches, losses = [*self._done, batch], []
        self._done.append(batch)
        return losses[-1]

    def _run(self, batch: PairBatch, run: Callable[[PairBatch], Tensor]) -> Tensor | None:
        """The loss; None where memory ran out, and will be used more sparingly from now on."""
        before = self._logged()
        parts = split_batch(batch, self.max_tokens)
        losses = list[Tensor]()
        for part in parts:
            loss, problem = attempt(partial(run, part))
            if loss is None:
                self._lower(part, problem)
                return None
            losses.append(loss)
        if len(parts) > 1:
            share = np.array([len(part.pairs) for part in parts]) / len(batch.pairs)
            for name, values in self._trainer._metrics["train"].items():
                own = values[before.get(name, 0) :]
                if len(own) == len(parts):  # the means over pairs are weighed already, as the losses are
                    values[-len(own) :] = [float(sum(own) if name in PAIR_MEANS else share @ own)]
        return torch.stack(losses).sum()

    def _lower(self, part: PairBatch, problem: str) -> None:
        pairs, longest = len(part.pairs), part.padded_tokens // (2 * len(part.pairs))
        what = f"out of memory in a training pass over {pairs:,} pair(s) of up to {longest:,} tokens"
        if pairs == 1:
            raise ModelError(
                f"{what}, and there is no smaller one: lower data.max_length, or use lora, bfloat16, "
                f"activation_checkpointing or more devices ({problem.splitlines()[0][:100]})"
            )
        if obstacle := self._obstacle() or ("" if part.is_text else "it holds more than pairs of text"):
            raise ModelError(
                f"{what}, which cannot be split ({obstacle}): lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps by the same factor, which leaves each update its pairs; "
                "checkpoints are kept, for the same command where there is more memory"
            )
        before, self.max_tokens = self.max_tokens, part.padded_tokens // 2
        logger.warning(
            "out of memory%s: this update is repeated, and all go on, in passes of at most %s padded "
            "tokens; its pairs and their weights stay the same",
            "" if before is None else f" with {before:,} tokens a pass",
            f"{self.max_tokens:,}",
        )


# --- what stands for the model in TRL's loss ----------------------------------------------------------------


def row_model(model: Any, accelerator: Any, rows: PairRows) -> Callable[..., FusedCausalLMOutput]:
    """What TRL's `_compute_loss` calls as its model: TRL's fields, [2B, L], of `rows`; 0 without a label.

    `model` may be wrapped (DDP, FSDP): it is called as it is, and once where there are several processes.
    """

    def run(labels: Tensor, **inputs: Any) -> FusedCausalLMOutput:
        # A packed row's mask is built in the precision of the forward pass, which accelerate hides in it.
        with accelerator.autocast():
            fields = forward_fields(model, rows)
        return FusedCausalLMOutput(label_mask=labels[:, 1:] != -100, **fields)

    return run


def weighted(model: Callable[..., Any], pair_weights_B: Sequence[float]) -> Callable[..., Any]:
    """`model` with the gradient of each pair's log-probs multiplied by the pair's weight.

    A pairwise loss is a function of the pair's own log-probs, so the gradient of the mean loss becomes that
    of the mean of weight x loss. The log-probs themselves, and the loss that is logged, are those without
    weights; with weights of 1 nothing differs, bit by bit.
    """

    def run(**inputs: Any) -> Any:
        outputs = model(**inputs)
        logps_2BL = outputs.log_probs
        weights_2B1 = torch.tensor([*pair_weights_B, *pair_weights_B])[:, None].to(logps_2BL)
        fixed_2BL = logps_2BL.detach()
        outputs.log_probs = fixed_2BL + weights_2B1 * (logps_2BL - fixed_2BL)
        return outputs

    return run


def loss_inputs(batch: PairBatch) -> dict[str, Tensor]:
    """What TRL's loss reads instead of its padded batch: rows of completions only, [2B, 1 + L].

    The first column stands for the prompt. Of `attention_mask` TRL takes nothing but the sum, to count
    tokens: it holds each row's length.
    """
    prompt_B, chosen_B, rejected_B = np.array([pair.lengths for pair in batch.pairs]).T
    prompt_2B, completion_2B = np.tile(prompt_B, 2), np.concatenate([chosen_B, rejected_B])
    # To TRL, the first token after an empty prompt is part of a completion, although nothing predicts it.
    unpredicted_2B = (prompt_2B == 0) & (completion_2B > 0)
    labels_2B = completion_2B - unpredicted_2B
    is_label_2BL = np.arange(max(1, labels_2B.max())) < labels_2B[:, None]
    completion_mask = torch.from_numpy(np.column_stack([unpredicted_2B, is_label_2BL]).astype(np.int64))
    counted_3B = np.array([[len(part) for part in pair.tokens or ()] for pair in batch.pairs]).T
    inputs = {
        "input_ids": completion_mask,  # its values are nobody's
        "attention_mask": torch.from_numpy(counted_3B[0] + counted_3B[1:]).flatten(),
        "completion_mask": completion_mask,
    }
    for name in (CHOSEN_COLUMN, REJECTED_COLUMN):
        if name in batch.pairs[0].example:
            values = [0.0 if pair.is_blank else pair.example[name] for pair in batch.pairs]
            inputs[name] = torch.tensor(values)
    return inputs


def token_columns(batch: PairBatch) -> dict[str, list[list[int]]]:
    """The tokens of the batch's pairs, which are text, by column; a blank pair has none."""
    blank: tuple[list[int], ...] = ([], [], [])
    columns = zip(*(blank if pair.is_blank else pair.tokens or blank for pair in batch.pairs), strict=True)
    return dict(zip(TOKEN_COLUMNS, map(list, columns), strict=True))


def row_collator(trainer: Any, model: Any, path: PathName) -> RowCollator | None:
    """The collator of `trainer`'s rows; None: TRL's own is used. Said once, with the reason.

    Packed rows are tried on one pair. `model` is called on all processes.

    Raises:
        ConfigError: `path` is `shared`, and the settings or the model do not allow it.
    """
    obstacle = "asked for" if path == "padded" else _obstacle(trainer, model)
    if obstacle is not None:
        if path == "shared":
            raise ConfigError(f'path="shared" cannot be had: {obstacle}; leave path out')
        say_once(2, obstacle)
        return None
    pad_token_id = trainer._tokenizer.pad_token_id
    was_training = model.training
    model.eval()
    try:
        with trainer.accelerator.autocast():
            plan = plan_rows(model, trainer.train_dataset, pad_token_id, path)
    finally:
        model.train(was_training)
    if plan.kind == "masked":
        return None
    is_cpu = trainer.accelerator.device.type == "cpu"
    return RowCollator(
        model,
        pad_token_id=pad_token_id,
        kind="packed" if path == "shared" else None,
        multiple_of=getattr(trainer.data_collator, "pad_to_multiple_of", None) or 1,
        splits=is_cpu and trainer.accelerator.num_processes == 1,
    )


def _obstacle(trainer: Any, model: nn.Module) -> str | None:
    """What in a trainer's settings and models rules collated rows out, if anything."""
    args, reference = trainer.args, trainer.ref_model
    obstacles = [
        (not is_tokenized(trainer.train_dataset), "the rows are not text tokenized beforehand"),
        (trainer.aux_loss_enabled, "the router's balancing loss needs a plain padding mask"),
        (any(dropouts(model)), "dropout is on, and would be the same for a pair's two prompts"),
        (trainer.accelerator.parallelism_config is not None, "rows are cut between processes"),
        (args.n_gpu > 1, "DataParallel copies the model"),
        (args.torch_compile, "the model is compiled"),
    ]
    for applies, reason in obstacles:
        if applies:
            return reason
    longest = int(part_lengths(trainer.train_dataset).padded_P.max(initial=0))
    found = packing_obstacle(model, longest)
    if found is None and reference is not None and not trainer.precompute_ref_logps:
        problem = packing_obstacle(reference, longest)
        found = problem and f"the reference model: {problem}"
    return found


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where dropout is on: modules, and the names of their attributes that say how much.

    transformers' attention takes its dropout as a number (`attention_dropout`) and not as an `nn.Dropout`;
    so do skipped layers (`layerdrop`).
    """
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name]
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float) and value > 0:
                yield module, name


def disable_dropout(model: nn.Module) -> None:
    """What TRL's `disable_dropout` promises; TRL itself leaves attention's dropout on.

    The model's config keeps its values: it is saved with the weights.
    """
    for module, name in list(dropouts(model)):
        setattr(module, name, 0.0)
