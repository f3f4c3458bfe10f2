"""The private members of transformers' and TRL's trainers that this package uses, in one place.

They may change with any release. A missing one is named here before anything else fails of it.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

import pytest
from transformers import Trainer
from trl import DPOTrainer
from trl.trainer import utils
from trl.trainer.dpo_trainer import DataCollatorForPreference

import selective_dpo

PACKAGE = Path(selective_dpo.__file__).parent

METHODS = {
    "_compute_loss": "calls its model with padded tokens, and reads its fused head's fields",
    "_get_output_dir": "where a checkpoint goes",
    "_precompute_ref_logps": "skipped for rows that carry the reference",
    "_prepare_dataset": "skipped for tokenized rows",
    "_prepare_inputs": "moves a batch to the device",
    "_save": "writes a state as safetensors",
    "_save_checkpoint": "writes a checkpoint",
    "_set_signature_columns_if_needed": "columns that reach the collator",
}
"""Methods of `DPOTrainer`, its own or inherited, that are called or overridden."""

ATTRIBUTES = {
    "_globalstep_last_logged": "kept in a checkpoint",
    "_initial_global_step": "so that the last log entry's loss is the mean over all steps",
    "_metrics": "what is logged next",
    "_precompute_model_hash": "TRL hashes all weights unless it is there",
    "_signature_columns": "columns that reach the collator",
    "_tokenizer": "holds the padding token, inside a processor, too",
    "_total_loss_scalar": "kept in a checkpoint",
    "_total_train_tokens": "kept in a checkpoint",
    "_tr_loss": "kept in a checkpoint",
    "_train_batch_size": "of a process, as the data loader has it",
}
"""Attributes of an instance, set somewhere in the trainers' sources."""

OVERRIDDEN_TO_NOTHING = {"_send_telemetry"}
"""Where a version has it, it sends nothing."""

OUR_OWN = {
    "_can_weigh_equally", "_collating_pairs", "_difficulty_P", "_has_weights", "_mean_loss",
    "_means_over_pairs", "_memory", "_note_update", "_obstacle_to_smaller_passes", "_of_all", "_order_log",
    "_path", "_plain_inputs", "_position", "_ref_model", "_rows", "_update", "_weights_of",
}  # fmt: skip
"""Names of this package's own trainers, which must not be those of the libraries."""


@cache
def sources() -> str:
    """The text of every class that `DPOTrainer` is made of."""
    return "\n".join(inspect.getsource(each) for each in DPOTrainer.__mro__ if each is not object)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_there(name: str) -> None:
    assert callable(getattr(DPOTrainer, name, None)), f"{name} is gone: {METHODS[name]}"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_is_set(name: str) -> None:
    assert f"self.{name}" in sources(), f"{name} is gone: {ATTRIBUTES[name]}"


@pytest.mark.parametrize("name", sorted(OUR_OWN))
def test_our_own_names_hide_none_of_the_libraries(name: str) -> None:
    assert not hasattr(Trainer, name) and f"self.{name} " not in sources()


def test_the_parts_that_rows_are_made_for_are_there() -> None:
    pair = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    batch = DataCollatorForPreference(pad_token_id=0)([pair])
    assert {"input_ids", "attention_mask", "completion_mask"} <= set(batch)
    fields = set(inspect.signature(utils.FusedCausalLMOutput).parameters)
    assert {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"} <= fields
    assert "outputs" in inspect.signature(utils.add_fused_lm_head).parameters
    assert callable(utils.hash_module)


TRAINERS = {
    "training/trainer.py": {"PairTrainer"},
    "training/selective_trainer.py": {"SelectiveDPOTrainer"},
    "training/checkpointing.py": {"ResumableTrainer"},
    "training/train.py": {"_PolicyTrainer"},
}
"""This package's trainers: what they use of `self` may be the libraries'."""


def private_names(node: ast.AST, owners: set[str]) -> set[str]:
    """Private attributes of `owners` that the code uses."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and each.attr.startswith("_")
        and not each.attr.startswith("__")
        and ast.unparse(each.value) in owners
    }


def test_no_other_private_member_is_used() -> None:
    found: set[str] = set()
    for path in (PACKAGE / "training").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        found |= private_names(tree, {"trainer", "self._trainer", "super()", "Trainer"})
        names = TRAINERS.get(f"training/{path.name}", set())
        classes = [each for each in ast.walk(tree) if isinstance(each, ast.ClassDef) and each.name in names]
        found |= {name for each in classes for name in private_names(each, {"self"})}
    known = METHODS.keys() | ATTRIBUTES.keys() | OVERRIDDEN_TO_NOTHING | OUR_OWN
    assert found <= known, f"not listed: {sorted(found - known)}"
