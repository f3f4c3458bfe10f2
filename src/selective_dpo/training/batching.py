"""Each pair of an update weighs the same, however the update is dealt to processes and batches.

An optimizer step averages over processes and over accumulated batches. The last update of an epoch has
fewer pairs: its batches differ in size, and on several processes the data loader fills them with pairs from
the epoch's beginning. Averages of averages would then weigh some pairs more than others, and the repeated
ones would be trained on twice, so a policy would depend on the number of processes. Here repeated rows are
blanked and each batch's loss is scaled, so that the update is the mean over its own pairs. That holds for
every loss that is a mean over pairs (`core.losses.LOSSES`); what another one does with an uneven update is
left to TRL.

Shapes: B rows of a batch (pairs), R processes, A batches accumulated in an update.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from selective_dpo.errors import ConfigError, ModelError, is_out_of_memory
from selective_dpo.logprobs.packed import (
    IGNORED_LABEL,
    make_shared_batch,
    shared_lengths,
    shared_outputs,
    width_multiple,
)
from selective_dpo.logprobs.packing_support import Path, PathName, choose_way, say_once

WEIGHT = "update_weight"

BLANK = "blank_pairs"
"""Keys of a batch: the factor of its loss, and how many of its pairs are blank."""


class Share(NamedTuple):
    """One process's part of one batch round."""

    own: int
    """Pairs that are this process's to train on."""
    everyones: int
    """Pairs that all processes train on."""


def share_of(batch: int, *, pairs: int, batch_size: int, processes: int, process: int) -> Share:
    """What is left of an epoch of `pairs` pairs for its `batch`-th round (from 0).

    A round deals `batch_size` consecutive pairs to each process in turn.
    """
    start = batch * batch_size * processes
    own = min(batch_size, max(0, pairs - start - process * batch_size))
    return Share(own, min(batch_size * processes, pairs - start))


def weigh_equally(
    batches: Sequence[dict[str, Any]],
    *,
    first: int,
    pairs: int,
    batch_size: int,
    processes: int,
    process: int,
) -> None:
    """Mark the batches of one update with their weight, and blank their repeated rows, in place.

    `first` is the update's first round. Batches are as TRL collates them: `completion_mask` [2B, T] with
    the chosen rows before the rejected, and reference log-probs [B] where there are any. A blank pair has
    no completion, hence log-probs of 0 without a gradient. Nothing is done to an update that is full.
    """
    shares = [
        share_of(first + number, pairs=pairs, batch_size=batch_size, processes=processes, process=process)
        for number in range(len(batches))
    ]
    in_update = sum(share.everyones for share in shares)
    for batch, share in zip(batches, shares, strict=True):
        mask = batch["completion_mask"]
        rows = mask.shape[0] // 2
        # The step averages over rows, processes and batches; the factor makes it 1 / in_update for each.
        batch[WEIGHT] = rows * processes * len(batches) / in_update
        batch[BLANK] = rows - share.own
        mask[share.own : rows] = 0
        mask[rows + share.own :] = 0
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in batch:
                batch[name][share.own :] = 0.0


# ----------------------------------------------------------------------------------------------------
# TRL's lists of numbers to log, kept right where batches are weighed, parted or run again.
#
# TRL appends one number a pass, the mean over its pairs or tokens, and logs the mean of each list.


PAIR_MEANS = tuple(
    f"{kind}/{part}"
    for kind, parts in (
        ("rewards", ("chosen", "rejected", "accuracies", "margins")),
        ("logps", ("chosen", "rejected")),
    )
    for part in parts
)
"""What TRL logs as means over the pairs of a batch."""


class LoggedMeans:
    """The lists of a `DPOTrainer`'s training, and its count of tokens."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.start_update()

    def weigh(self, weight: float) -> None:
        """Weigh the last pass as its loss is.

        TRL's mean over passes of each one's mean then becomes the mean over the update's own pairs; a blank
        pair counts in it with 0.
        """
        for name in PAIR_MEANS:
            self._lists[name][-1] *= weight

    def start_update(self) -> None:
        """What is logged from here on belongs to the next update."""
        self._at_update = self._lengths()
        self._tokens = self._trainer._total_train_tokens
        self._at_batch = self._at_update

    def back_to_update(self) -> None:
        """Forget what was logged since the update began."""
        for name, values in self._lists.items():
            del values[self._at_update.get(name, 0) :]
        self._trainer._total_train_tokens = self._tokens

    def start_batch(self) -> None:
        """What is logged from here on belongs to the next batch."""
        self._at_batch = self._lengths()

    def join(self, pairs: Sequence[int]) -> None:
        """The batch was run in passes of so many pairs, each weighed: make one number of theirs."""
        share = np.array(pairs) / sum(pairs)
        for name, values in self._lists.items():
            start = self._at_batch.get(name, 0)
            own = values[start:]
            if len(own) == len(pairs):
                values[start:] = [float(sum(own) if name in PAIR_MEANS else share @ own)]

    @property
    def _lists(self) -> Any:
        return self._trainer._metrics["train"]

    def _lengths(self) -> dict[str, int]:
        return {name: len(values) for name, values in self._lists.items()}


# ----------------------------------------------------------------------------------------------------
# An update in as many passes as memory allows: where it runs out, the update is begun again in smaller ones.
#
# The pairs of an update, their weights, and the data loader stay what they are, so the effective batch, the
# schedule and the order consumed do too. transformers' `auto_find_batch_size` keeps none of that: it starts
# the training again with 0.9 times the batch size and the same number of accumulated batches.
#
# A failed backward pass may have left part of its gradient. So the whole update is repeated from gradients of
# zero: no pair is lost, none counts twice. Several processes exchange gradients in each pass; there, running
# out of memory ends the training, with the remedy, and its checkpoints are kept.
#
# Dimension suffixes: B pairs of a batch, T tokens of TRL's padded rows (chosen rows before rejected, [2B,
# T]).


Batch = dict[str, Any]

ROW = "train_row"
"""Key of a batch: which row of the training data each pair is, [B]."""

PADDED = ("input_ids", "attention_mask", "completion_mask")
"""[2B, T] each."""

OF_A_PAIR = ("ref_chosen_logps", "ref_rejected_logps", ROW)
"""[B] each, where they are there."""

_KNOWN = {*PADDED, *OF_A_PAIR, WEIGHT, BLANK}

logger = logging.getLogger(__name__)


def can_part(batch: Batch) -> bool:
    """Whether the batch holds nothing but pairs of text, which can be told apart."""
    return set(PADDED) <= set(batch) <= _KNOWN


def pairs_in(batch: Batch) -> int:
    """Number of pairs, B."""
    return len(batch["input_ids"]) // 2


def take_pairs(batch: Batch, pairs: Sequence[int]) -> Batch:
    """Some pairs of a batch as one of its own, no wider than they need, with their share of its weight.

    The weighted losses of parts that hold all pairs once add up to the weighted loss of the batch.
    """
    whole = pairs_in(batch)
    index = torch.tensor([*pairs, *(whole + pair for pair in pairs)], device=batch["input_ids"].device)
    last = batch["attention_mask"][index].any(dim=0).nonzero()
    width = int(last[-1]) + 1 if len(last) else 1
    part = {name: batch[name][index, :width] for name in PADDED}
    part |= {name: batch[name][index[: len(pairs)]] for name in OF_A_PAIR if name in batch}
    part[WEIGHT] = batch.get(WEIGHT, 1.0) * len(pairs) / whole
    # A blank pair is one without a completion (see `equal_weights`).
    blank_B = ~part["completion_mask"].bool().view(2, len(pairs), -1).any(dim=2).any(dim=0)
    part[BLANK] = int(blank_B.sum()) if batch.get(BLANK) else 0
    return part


def cut(batch: Batch, most_tokens: int | None) -> list[Batch]:
    """The batch in parts of at most `most_tokens` padded tokens, a pair being the least; the longest first.

    None, or a batch that fits: the batch itself.
    """
    if most_tokens is None or batch["input_ids"].numel() <= most_tokens or not can_part(batch):
        return [batch]
    lengths_B = _lengths(batch)
    left = _longest_first(lengths_B)
    parts = []
    while left:
        many = max(1, most_tokens // max(1, 2 * int(lengths_B[left[0]])))
        parts.append(take_pairs(batch, left[:many]))
        left = left[many:]
    return parts


def _lengths(batch: Batch) -> Tensor:
    """Tokens of each pair's longer row, [B]."""
    lengths_B: Tensor = batch["attention_mask"].sum(dim=1).view(2, -1).amax(dim=0)
    return lengths_B


def _longest_first(lengths_B: Tensor) -> list[int]:
    order: list[int] = lengths_B.argsort(descending=True, stable=True).tolist()
    return order


class WithinMemory:
    """Runs the batches of one update after the other, each in as many passes as memory allows.

    Args:
        obstacle: why batches cannot be run in parts, in a few words; empty: they can.
        logged: what passes log.
        zero_gradients: sets them to what they are when an update begins.
    """

    def __init__(
        self,
        *,
        obstacle: Callable[[], str],
        logged: LoggedMeans,
        zero_gradients: Callable[[], object],
    ) -> None:
        self._obstacle, self._logged, self._zero_gradients = obstacle, logged, zero_gradients
        self._most_tokens: int | None = None
        self._done: list[Batch] = []

    @property
    def most_tokens(self) -> int | None:
        """Padded tokens that a pass holds at most, once memory has run out; None: as they are dealt."""
        return self._most_tokens

    def start_update(self) -> None:
        """The next batch is the first of an update."""
        self._done = []
        self._logged.start_update()

    def step(self, batch: Batch, run: Callable[[Batch], Tensor]) -> Tensor:
        """`run` the batch forward and backward, and return the sum of what it returns for its parts.

        Raises:
            ModelError: a single pair does not fit, or the passes cannot be made smaller.
        """
        batches, losses = [batch], list[Tensor]()
        while len(losses) < len(batches):
            before = self._most_tokens
            loss = self._run(batches[len(losses)], run)
            if loss is not None:
                losses.append(loss)
                continue
            self._say(before)
            self._zero_gradients()
            self._logged.back_to_update()
            batches, losses = [*self._done, batch], []
        self._done.append(batch)
        return losses[-1]

    def _run(self, batch: Batch, run: Callable[[Batch], Tensor]) -> Tensor | None:
        """The loss; None where memory ran out, and will be used more sparingly from now on."""
        self._logged.start_batch()
        parts = cut(batch, self._most_tokens)
        losses = []
        for part in parts:
            problem = ""
            try:
                losses.append(run(dict(part)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            if problem:
                # After the handler: until then its traceback holds the failed pass's tensors.
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self._lower(part, problem)
                return None
        if len(parts) > 1:
            self._logged.join([pairs_in(part) for part in parts])
        return torch.stack(losses).sum()

    def _lower(self, part: Batch, problem: str) -> None:
        tokens, pairs = part["input_ids"].numel(), pairs_in(part)
        longest = tokens // (2 * pairs)
        what = f"out of memory in a training pass over {pairs:,} pair(s) of up to {longest:,} tokens"
        if pairs == 1:
            raise ModelError(
                f"{what}, and there is no smaller one: lower data.max_length, or use lora, bfloat16, "
                f"activation_checkpointing or more devices ({problem.splitlines()[0][:100]})"
            )
        obstacle = self._obstacle() or ("" if can_part(part) else "it holds more than pairs of text")
        if obstacle:
            raise ModelError(
                f"{what}, which cannot be parted ({obstacle}): lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps by the same factor, which leaves each update its pairs"
            )
        self._most_tokens = tokens // 2

    def _say(self, before: int | None) -> None:
        logger.warning(
            "out of memory%s: this update is repeated, and all go on, in passes of at most %s padded tokens; "
            "its pairs and their weights stay the same",
            "" if before is None else f" with {before:,} tokens a pass",
            f"{self._most_tokens:,}",
        )


# ----------------------------------------------------------------------------------------------------
# The training step in shared rows: what TRL's loss asks of a model, computed from half the tokens.
#
# TRL calls its model on a padded row for each completion and reads fields of its fused head. `SharedModel`
# stands in for the model there: it puts each pair into one row, runs the model on these, and gives the
# fields back in the layout of TRL's rows, so TRL's losses and metrics need not know.
#
# Dimension suffixes: B pairs of a batch, T tokens of TRL's padded rows, N completion tokens of the batch.


TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""TRL's tokenized pair."""

SHARED_INPUTS = frozenset({"input_ids", "attention_mask", "completion_mask"})
"""TRL's batch of text, all that shared rows are made from."""

WORTH_A_PASS = 256
"""Tokens of padding that are worth another pass through the model on a CPU, which gains nothing from
batches."""

_TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

Rows = dict[str, list[NDArray[np.int64]]]


def is_tokenized(dataset: Any) -> bool:
    """Whether the rows carry TRL's token columns."""
    return isinstance(dataset, Dataset) and set(TOKEN_COLUMNS) <= set(dataset.column_names)


class SharedModel:
    """A model as TRL's `_compute_loss` calls it; the model itself sees shared rows.

    `model` may be wrapped (DDP, FSDP): it is called as it is, and once where there are several processes.
    """

    def __init__(self, model: Any, accelerator: Any, pad_token_id: int) -> None:
        self._model = model
        self._accelerator = accelerator
        self._pad_token_id = pad_token_id

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **options: Any
    ) -> FusedCausalLMOutput:
        """TRL's fields for padded rows, [2B, T - 1]; 0 where there is no label, as TRL has it."""
        is_completion = labels != IGNORED_LABEL
        rows = pair_rows(input_ids, attention_mask, is_completion)
        if rows is None:
            return self._model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **options)
        mask = is_completion[:, 1:]
        passes = self._passes(rows)
        outputs = [self._run(rows, group) for group in passes]
        # In which order the passes give TRL's rows back: each its chosen ones, then its rejected ones.
        given = [torch.tensor([*group, *(len(mask) // 2 + pair for pair in group)]) for group in passes]
        back = torch.cat(given).argsort().to(mask.device)
        fields = {}
        for name in _TOKEN_FIELDS:
            if getattr(outputs[0], name) is not None:
                laid_out = [
                    _laid_out(getattr(output, name)[0], mask[own])
                    for output, own in zip(outputs, given, strict=True)
                ]
                fields[name] = torch.cat(laid_out)[back]
        return FusedCausalLMOutput(label_mask=mask, **fields)

    def _run(self, rows: Rows, group: list[int]) -> Any:
        own = {name: [part[pair] for pair in group] for name, part in rows.items()}
        batch = make_shared_batch(own, self._pad_token_id, multiple_of=width_multiple(self._model))
        # The mask is built in the precision of the model's forward pass, which accelerate hides in it.
        with self._accelerator.autocast():
            return shared_outputs(self._model, batch.to(self._accelerator.device))

    def _passes(self, rows: Rows) -> list[list[int]]:
        """Pairs that go through the model together: all of them, or on a CPU those of similar length."""
        lengths_B = shared_lengths(*(np.array([len(ids) for ids in rows[name]]) for name in TOKEN_COLUMNS))
        if self._accelerator.device.type != "cpu" or self._accelerator.num_processes > 1:
            return [list(range(len(lengths_B)))]
        return group_by_length(lengths_B, WORTH_A_PASS)


def pair_rows(input_ids: Tensor, attention_mask: Tensor, is_completion: Tensor) -> Rows | None:
    """Prompt, chosen and rejected of each pair in TRL's padded rows (the chosen ones first), [2B, T] each.

    None where the two rows of a pair have not the same prompt, as after cutting from the left. A pair
    without any completion, as `equal_weights` leaves them, is nothing to compute: all its parts are empty.
    """
    ids, attended, completed = (part.cpu().numpy() for part in (input_ids, attention_mask, is_completion))
    pairs = len(ids) // 2
    rows: Rows = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for chosen, rejected in zip(range(pairs), range(pairs, 2 * pairs), strict=True):
        completions = [ids[row][completed[row] & (attended[row] != 0)] for row in (chosen, rejected)]
        prompts = [ids[row][~completed[row] & (attended[row] != 0)] for row in (chosen, rejected)]
        if not any(len(each) for each in completions):
            prompts = [prompts[0][:0]] * 2
        if not np.array_equal(*prompts):
            return None
        rows["prompt_ids"].append(prompts[0])
        for name, completion in zip(("chosen_ids", "rejected_ids"), completions, strict=True):
            rows[name].append(completion)
    return rows


def shares_rows(trainer: Any, model: Any, path: PathName) -> bool:
    """Whether `trainer`'s training can take shared rows: its settings allow it, and `model` computes them
    rightly, which is tried on one pair. `model` is called on all processes.

    Raises:
        ConfigError: `path` is `shared`, and the settings do not allow it.
    """
    obstacle = "asked for" if path == "padded" else _obstacle(trainer, model)
    if obstacle is not None:
        if path == "shared":
            raise ConfigError(f'path="shared" cannot be had: {obstacle}; leave path out')
        say_once(Path("padded", obstacle))
        return False
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            way = choose_way(model, trainer.train_dataset, trainer._tokenizer.pad_token_id, path)
    finally:
        model.train(was_training)
    return way.rows_per_pair == 1


def _obstacle(trainer: Any, model: nn.Module) -> str | None:
    """What in a trainer's settings rules shared rows out, if anything."""
    rows, args = trainer.train_dataset, trainer.args
    obstacles = [
        (not is_tokenized(rows), "the rows are not text tokenized beforehand"),
        (trainer.aux_loss_enabled, "the router's balancing loss needs a plain padding mask"),
        (
            any(dropouts(model)),
            "dropout is on, and would be the same for a pair's two prompts",
        ),
        (trainer.accelerator.parallelism_config is not None, "rows are cut between processes"),
        (args.n_gpu > 1, "DataParallel copies the model"),
        (args.torch_compile, "the model is compiled"),
    ]
    return next((reason for applies, reason in obstacles if applies), None)


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


def _laid_out(field_N: Tensor, mask: Tensor) -> Tensor:
    """The tokens where `mask` says that there are any; both list them row by row."""
    # Connected to the model even where no token is scored, so that every process has a gradient to share.
    empty = torch.zeros(mask.shape, dtype=field_N.dtype, device=field_N.device)
    return empty.masked_scatter(mask.to(field_N.device), field_N)


# ----------------------------------------------------------------------------------------------------
# Pairs of similar length, grouped so that padding and passes together cost least.


def group_by_length(lengths_B: NDArray[np.int64], worth_a_pass: int) -> list[list[int]]:
    """Groups of pairs, the longest pairs first, that cost the fewest tokens: those of their padded rows, and
    `worth_a_pass` for each group.

    Shapes: lengths_B [B]. Numbers of pairs, rising in each group; together the groups hold each
    of 0..B-1 exactly once.
    """
    order = np.argsort(-lengths_B, kind="stable")
    # costs[n]: of the best grouping of the n longest; starts[n]: where its last group begins.
    costs, starts = [0], [0]
    for end in range(1, len(order) + 1):
        each = [
            costs[start] + worth_a_pass + (end - start) * int(lengths_B[order[start]]) for start in range(end)
        ]
        starts.append(int(np.argmin(each)))
        costs.append(each[starts[end]])
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.insert(0, sorted(order[starts[end] : end].tolist()))
        end = starts[end]
    return groups


# ----------------------------------------------------------------------------------------------------
# The pairs of one update, dealt to its batches by length.
#
# Padding costs what the longest row of a batch is longer than the others. Curricula and shuffling deal long
# and short pairs to the same batch; within one optimizer step they may change places, since the step
# averages over all of them. Nothing moves from one update to another, or from one process to another.
#
# Dimension suffixes: P pairs of the update on this process, T tokens of TRL's padded rows.


_MARKS = frozenset({WEIGHT, BLANK})

_ROWS = {"input_ids": 0, "attention_mask": 0, "completion_mask": 0}
"""Padded parts of a batch, and their padding; masked, so any token will do."""


def can_deal_by_length(batches: Sequence[dict[str, Any]]) -> bool:
    """Whether these batches hold nothing but pairs of text, each with the same weight in the update."""
    if len(batches) < 2 or any(set(batch) - SHARED_INPUTS - {*OF_A_PAIR} - _MARKS for batch in batches):
        return False
    if len({frozenset(batch) for batch in batches}) > 1:
        return False
    return WEIGHT in batches[0] or len({len(batch["input_ids"]) for batch in batches}) == 1


def deal_by_length(batches: Sequence[dict[str, Any]], *, multiple_of: int = 1) -> list[dict[str, Any]]:
    """The same pairs in as many batches of the same sizes, those of similar length together, longest first.

    The smallest batch gets the longest pairs. `batches` must have passed `can_deal_by_length`; weights
    and blanks (see `equal_weights`) go with the pairs. Rows are padded to a multiple of `multiple_of`.
    """
    sizes = [len(batch["input_ids"]) // 2 for batch in batches]
    width = max(batch["input_ids"].shape[1] for batch in batches)
    rows = {name: _stacked(batches, name, width) for name in _ROWS}
    of_pairs = {
        name: torch.cat([batch[name] for batch in batches]) for name in OF_A_PAIR if name in batches[0]
    }
    # A blank pair's rows are never computed: it has no length.
    scored_P2 = rows["completion_mask"].any(dim=2)
    lengths_P2 = rows["attention_mask"].sum(dim=2) * scored_P2
    totals_P, longest_P = (part.tolist() for part in (lengths_P2.sum(dim=1), lengths_P2.amax(dim=1)))
    blank_P = (~scored_P2.any(dim=1)).tolist()
    order = sorted(range(len(totals_P)), key=lambda pair: (-totals_P[pair], -longest_P[pair]))
    start, dealt = 0, []
    for size in sorted(sizes):
        own = order[start : start + size]
        start += size
        index = torch.tensor(own, device=scored_P2.device)
        used = max(1, int(rows["attention_mask"][index].sum(dim=2).max()))
        used = min(width, -(-used // multiple_of) * multiple_of)
        batch: dict[str, Any] = {
            name: part[index, :, :used].transpose(0, 1).flatten(0, 1) for name, part in rows.items()
        }
        batch.update({name: part[index] for name, part in of_pairs.items()})
        if WEIGHT in batches[0]:
            # Each pair's part of the update's mean, times the pairs that the batch's mean is over.
            batch[WEIGHT] = batches[0][WEIGHT] / sizes[0] * size
            batch[BLANK] = sum(blank_P[pair] for pair in own)
        dealt.append(batch)
    return dealt


def _stacked(batches: Sequence[dict[str, Any]], name: str, width: int) -> Tensor:
    """One padded part of all batches: [P, 2, T], chosen before rejected."""
    padded = [
        torch.nn.functional.pad(batch[name], (0, width - batch[name].shape[1]), value=_ROWS[name])
        for batch in batches
    ]
    return torch.cat([part.view(2, -1, width).transpose(0, 1) for part in padded])
