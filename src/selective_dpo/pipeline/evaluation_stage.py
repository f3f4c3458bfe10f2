"""The evaluation stage: every arm on held-out pairs, and its answers against the starting model's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.artifacts import content_key, is_complete, read_json, read_manifest
from selective_dpo.core.identity import prompt_id
from selective_dpo.core.preference_metrics import PreferenceMetrics
from selective_dpo.core.results import REFERENCE, SELECTED, repeat_name
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.prompts import read_prompts
from selective_dpo.data.store import TOKENS, load_pairs, load_tokens
from selective_dpo.engine.logprobs import pair_logps
from selective_dpo.engine.models import load_policy, loading
from selective_dpo.engine.padded_rows import part_lengths
from selective_dpo.engine.processes import (
    publish_from_main,
    this_process,
    wait_for_everyone,
    whole_on_each_process,
)
from selective_dpo.engine.reference import load_reference, without_quarantined
from selective_dpo.errors import ConfigError
from selective_dpo.evaluation.evaluate import Arm, evaluate_arms
from selective_dpo.evaluation.generation import Prompt
from selective_dpo.evaluation.held_out import held_out_metrics
from selective_dpo.evaluation.prompt_tokens import encode_prompt
from selective_dpo.pipeline.jobs import trainings
from selective_dpo.pipeline.stages import Run, ensure_policy
from selective_dpo.reporting.tables import seeds_note
from selective_dpo.training.arguments import ORIGINAL_DEFAULTS, autocast_dtype

_NAMED_BY_CONTENT: Any = {
    "controls": True,
    "training_seeds": True,
    "reward_model": True,
    "generation": {"source"},
}
"""Keys of `evaluate` for which something else stands in the evaluation's key: policies, judge, prompts."""


def ensure_evaluation(run: Run) -> None:
    """Measure every arm, unless the same policies were measured in the same way already.

    In a distributed run all processes share the held-out pairs' forward passes; answers are generated
    by each, and the main process's are kept.
    """
    ensure_policy(run)
    _require_spread(run)
    key = evaluation_key(run)
    if is_complete(run.folder.evaluation, key=key):
        return
    wait_for_everyone()
    arms = [_arm(run, name) for name in trainings(run)]
    several = len(run.arms)
    reference = Arm(REFERENCE, "starting model", 0, 0, lambda: load_arm(run, None), _held_out_measure(run))
    with whole_on_each_process():
        evaluation = evaluate_arms(
            arms[:several],
            reference,
            tokenizer=run.tokenizer,
            prompts=prompts_to_answer(run),
            config=run.recipe.evaluate,
            repeats=arms[several:],
            encode=lambda text: encode_prompt(
                run.tokenizer, text, empty_system_message=run.recipe.data.empty_system_message
            ),
        )
    with publish_from_main(run.folder.evaluation, kind="evaluation", key=key) as partial:
        evaluation.write(partial)
    run.tell(f"evaluation: {len(arms)} arm(s), {evaluation.results.prompts:,} prompts answered")
    if evaluation.results.repeats:
        run.tell(f"  {seeds_note(evaluation.results)}")


def evaluation_key(run: Run) -> str:
    """Key of the evaluation of the arms that are trained. `ArtifactError` while one is not."""
    policies = {name: read_manifest(training.policy).files for name, training in trainings(run).items()}
    has_test = bool(run.recipe.data.test)
    return content_key(
        stage="evaluation",
        weights=run.model_digest,
        policies={name: _weights(files) for name, files in policies.items()},
        judge=run.judge_digest,
        evaluate=run.recipe.evaluate.model_dump(mode="json", exclude=_NAMED_BY_CONTENT),
        held_out=read_manifest(run.folder.test_pairs).files[TOKENS] if has_test else "",
        prompts=[prompt.prompt_id for prompt in prompts_to_answer(run)],
    )


def _weights(files: dict[str, str]) -> dict[str, str]:
    return {name: found for name, found in files.items() if name.endswith(".safetensors")}


def _arm(run: Run, name: str) -> Arm:
    training = trainings(run)[name]
    updates = int(read_json(training.policy / "cost.json")["optimizer_steps"])
    pairs = len(Curriculum.load(training.curriculum).order)
    measure = _held_out_measure(run)
    return Arm(name, training.label, pairs, updates, lambda: load_arm(run, training.policy), measure)


def _require_spread(run: Run) -> None:
    """Refuse to show how far trainings lie apart that no seed could change."""
    names = [SELECTED, *map(repeat_name, run.recipe.evaluate.training_seeds)]
    weights = [_weights(read_manifest(trainings(run)[name].policy).files) for name in names]
    if any(one == other for one, other in itertools.combinations(weights, 2)):
        raise ConfigError(
            "trainings with different seeds gave equal weights, so nothing in them is random: leave "
            "evaluate.training_seeds out"
        )


def load_arm(run: Run, policy: Path | None) -> Any:
    """The starting model, or a trained policy: its own weights, or the starting model with its adapter."""
    config = run.recipe.model
    if policy is None or (policy / "adapter_config.json").is_file():
        model = load_policy(config)
        add_fused_lm_head(model)
        if policy is not None:
            with loading("adapter", str(policy)):
                model = peft.PeftModel.from_pretrained(model, policy)
    else:
        model = load_policy(config.model_copy(update={"path": str(policy), "revision": "main"}))
        add_fused_lm_head(model)
    return model.to(this_process().device)


def _held_out_measure(run: Run) -> Any:
    if not run.recipe.data.test:
        return None
    tokens = without_quarantined(load_tokens(run.folder.test_pairs), run.folder.test_reference)
    reference = load_reference(run.folder.test_reference)
    prompt_ids = dict(zip(tokens["pair_id"], tokens["prompt_id"], strict=True))
    tokens_P2 = np.stack(part_lengths(tokens)[1:], axis=1)
    settings = {**ORIGINAL_DEFAULTS, **run.recipe.train.trainer}

    def measure(model: Any) -> PreferenceMetrics:
        logps = pair_logps(
            model,
            tokens,
            tokens_per_batch=run.recipe.evaluate.tokens_per_batch,
            pad_token_id=run.tokenizer.pad_token_id,
            autocast_dtype=autocast_dtype(settings, run.recipe.model),
            what="held-out pairs",
        )
        return held_out_metrics(logps, reference, tokens_P2, prompt_ids, settings)

    return measure


def prompts_to_answer(run: Run) -> list[Prompt]:
    """The prompts that answers are drawn for: a file's, or the held-out pairs'.

    Raises:
        DataError: the file cannot be read, or a row of it has no prompt.
    """
    generation = run.recipe.evaluate.generation
    if generation.prompts == 0:
        return []
    if generation.source:
        return [Prompt(prompt_id(text), text) for text in read_prompts(Path(generation.source))]
    if not run.recipe.data.test:
        return []
    table = load_pairs(run.folder.test_pairs)
    rows = zip(*(table[name].to_pylist() for name in ("status", "prompt_id", "prompt")), strict=True)
    return [Prompt(identity, json.loads(text)) for status, identity, text in rows if status == "kept"]
