"""The training step in shared rows: what TRL's loss asks of a model, computed from half the tokens.

TRL calls its model on a padded row for each completion and reads fields of its fused head. `SharedModel`
stands in for the model there: it puts each pair into one row, runs the model on these, and gives the
fields back in the layout of TRL's rows, so TRL's losses and metrics need not know.

Dimension suffixes: B pairs of a batch, T tokens of TRL's padded rows, N completion tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from selective_dpo.engine.forward import shared_outputs, width_multiple
from selective_dpo.engine.paths import Path
from selective_dpo.engine.shared_rows import IGNORED_LABEL, make_shared_batch, shared_lengths
from selective_dpo.engine.ways import PathName, choose_way, say_once
from selective_dpo.errors import ConfigError
from selective_dpo.training.length_groups import group_by_length

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
