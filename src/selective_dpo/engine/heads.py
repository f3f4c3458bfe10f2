"""TRL's fused head, given only what scoring needs of it.

The head is TRL's throughout (`trl.trainer.utils.add_fused_lm_head`): logit scaling, soft-capping, bias,
sharded weights and its backward pass are not written a second time. Two things are arranged around it:
that it computes log-probabilities and nothing else, and that it is shown only the positions that
predict a completion's token. It would project every position on devices without Triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.engine.shared_rows import IGNORED_LABEL
from selective_dpo.errors import ModelError


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


@contextlib.contextmanager
def log_probs_only(model: Any) -> Iterator[None]:
    """Inside, the fused head gives log-probabilities only, whatever a trainer asked it for.

    TRL's trainer also has it compute entropy, mean logit and accuracy of each token, to log them.
    """
    inner = language_model(model)
    before = inner.__dict__.get("forward")
    add_fused_lm_head(inner)
    try:
        yield
    finally:
        if before is None:
            del inner.forward
        else:
            inner.forward = before


def predicted_outputs(model: Any, labels: Tensor, predicted_at: Tensor, **inputs: Any) -> Any:
    """TRL's fused head at the positions that predict a label, and only there.

    `inputs` go to the model as they are. Returns TRL's output; its per-token fields are [1, N], for the N
    labels that are not ignored, row by row. Which fields there are is for the head to say that `model`
    carries.

    Shapes: labels, predicted_at [R, L], as in `SharedBatch`.
    """
    is_label = labels != IGNORED_LABEL
    at_N = predicted_at[is_label]

    def keep_predicting(module: Any, arguments: Any, output: Any) -> Any:
        hidden_BTH = output.last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, at_N.to(hidden_BTH.device))
        output.last_hidden_state = hidden_NH[None]
        return output

    hook = language_model(model).base_model.register_forward_hook(keep_predicting)
    try:
        return model(shift_labels=labels[is_label][None], fused_lm_head=True, use_cache=False, **inputs)
    finally:
        hook.remove()


def completion_log_probs(model: Any, labels: Tensor, predicted_at: Tensor, **inputs: Any) -> Tensor:
    """Log-probability of each label under the position that predicts it: [R, L] float32, 0 where ignored.

    Differentiable; the model must carry TRL's fused head. Shapes and `inputs` as in `predicted_outputs`.
    """
    log_probs_N = predicted_outputs(model, labels, predicted_at, **inputs).log_probs[0].float()
    empty: Tensor = torch.zeros(labels.shape, dtype=torch.float32, device=log_probs_N.device)
    return empty.masked_scatter((labels != IGNORED_LABEL).to(log_probs_N.device), log_probs_N)
