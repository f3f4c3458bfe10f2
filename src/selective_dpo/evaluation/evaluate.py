"""Arms side by side: each policy answers the same prompts and is judged against the starting model.

1. Each model is loaded, measured and freed before the next: answers to the prompts, held-out pairs.
2. When all have left the device, the judge compares the answers, every sample of an arm with every
   sample of the starting model.
3. Win rates, differences and lengths become one `EvaluationResults`, beside the tables they came from.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from selective_dpo.artifacts import write_json
from selective_dpo.config import EvaluateConfig, GenerationConfig
from selective_dpo.core.preference_metrics import PreferenceMetrics
from selective_dpo.core.results import REFERENCE, SELECTED, EvaluationResults, to_json
from selective_dpo.core.winrates import Pairing, cross_pairing, self_pairing
from selective_dpo.errors import ConfigError
from selective_dpo.evaluation import alpaca_eval
from selective_dpo.evaluation.generation import (
    Answer,
    Answers,
    Encode,
    Prompt,
    choose_prompts,
    generate_answers,
)
from selective_dpo.evaluation.judges import Judge, judge_for
from selective_dpo.evaluation.preflight import check_arm_names, check_generation
from selective_dpo.evaluation.results import arm_result
from selective_dpo.evaluation.tables import ArmVerdicts, generations_table, verdicts_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESULTS = "results.json"
GENERATIONS = "generations.parquet"
VERDICTS = "verdicts.parquet"


class Arm(NamedTuple):
    """A policy to evaluate."""

    name: str
    """`selected` for the run's own policy, `reference` for the starting model, else a control's name."""
    label: str
    pairs: int
    updates: int
    load: Callable[[], Any]
    """Gives the model, on the device where it shall run. Called at most once; keep no reference to the
    model elsewhere, or it cannot be freed."""
    held_out: Callable[[Any], PreferenceMetrics] | None = None
    """Measures the loaded model on held-out pairs, after it has answered the prompts."""


class Measured(NamedTuple):
    """What was found while an arm's model was loaded."""

    answers: Answers
    held_out: PreferenceMetrics | None


@dataclass(frozen=True)
class Evaluation:
    """Results, and every answer and verdict they come from."""

    results: EvaluationResults
    generations: pa.Table
    verdicts: pa.Table
    prompts: tuple[Prompt, ...]
    answers_by_arm: Mapping[str, Answers]

    def write(self, folder: Path) -> None:
        """Write `results.json`, both tables and the answers for AlpacaEval into `folder`."""
        write_json(folder / RESULTS, to_json(self.results))
        pq.write_table(self.generations, folder / GENERATIONS)
        pq.write_table(self.verdicts, folder / VERDICTS)
        for arm, answers in self.answers_by_arm.items():
            if answers:
                path = folder / alpaca_eval.FOLDER / f"{arm}.json"
                alpaca_eval.write_model_outputs(path, arm, self.prompts, answers)


def evaluate_arms(
    arms: Sequence[Arm],
    reference: Arm,
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    repeats: Sequence[Arm] = (),
    judge: Judge | None = None,
    encode: Encode | None = None,
) -> Evaluation:
    """Evaluate `arms` against `reference` on prompts drawn from `prompts` (see `choose_prompts`).

    `repeats` are further trainings of the arm `selected`. `tokenizer` and `encode` serve all models, which
    start from one. `judge` replaces the one that `config` names. A model that has nothing to answer and no
    held-out pairs is not loaded.

    Raises:
        ConfigError: an arm's name cannot be used, prompts are wanted and there are none, or an option
            of the generation has no effect.
        ModelError: a reward model or an answer's length is more than can be done.
    """
    _require_names([*arms, *repeats], reference)
    judge = judge or judge_for(config)
    asked, everyone = _asked(prompts, config.generation), (reference, *arms, *repeats)
    measured = {arm.name: _measure(arm, tokenizer, asked, config.generation, encode) for arm in everyone}
    answers_by_arm = {name: found.answers for name, found in measured.items()}
    verdicts = {} if judge is None or not asked else _judge_all(judge, asked, answers_by_arm)
    selected = verdicts.get(SELECTED)
    found = [
        arm_result(
            name=arm.name,
            label=arm.label,
            pairs=arm.pairs,
            updates=arm.updates,
            held_out=measured[arm.name].held_out,
            answers=measured[arm.name].answers,
            verdicts=verdicts[arm.name].by_prompt if arm.name in verdicts else None,
            selected_verdicts=selected.by_prompt if selected and arm.name != SELECTED else None,
        )
        for arm in everyone
    ]
    results = EvaluationResults(
        judge="none" if judge is None else judge.name,
        prompts=len(asked),
        samples=config.generation.samples if asked else 0,
        arms=tuple(found[: 1 + len(arms)]),
        repeats=tuple(found[1 + len(arms) :]),
    )
    generations = generations_table(asked, answers_by_arm)
    return Evaluation(results, generations, verdicts_table(verdicts), tuple(asked), answers_by_arm)


def judge_answers(
    judge: Judge, prompts: Sequence[Prompt], answers: Answers, opponents: Answers, pairing: Pairing
) -> ArmVerdicts:
    """Compare the samples that `pairing` names, for each prompt: N = prompts * comparisons verdicts."""
    comparisons = len(pairing.sample_C)
    texts_a, texts_b = (
        [side[prompt.prompt_id][sample].text for prompt in prompts for sample in samples_C.tolist()]
        for side, samples_C in ((answers, pairing.sample_C), (opponents, pairing.opponent_sample_C))
    )
    asked = [prompt.text for prompt in prompts for _ in range(comparisons)]
    return ArmVerdicts(
        [prompt.prompt_id for prompt in prompts for _ in range(comparisons)],
        np.tile(pairing.sample_C, len(prompts)),
        np.tile(pairing.opponent_sample_C, len(prompts)),
        judge.compare(asked, texts_a, texts_b),
    )


def _judge_all(
    judge: Judge, prompts: Sequence[Prompt], answers_by_arm: Mapping[str, Answers]
) -> dict[str, ArmVerdicts]:
    opponents = answers_by_arm[REFERENCE]
    samples = len(next(iter(opponents.values()), ()))
    pairings = {
        # Against itself the starting model needs two different samples
        name: self_pairing(samples) if name == REFERENCE else cross_pairing(samples, samples)
        for name in answers_by_arm
    }
    return {
        name: judge_answers(judge, prompts, answers_by_arm[name], opponents, pairing)
        for name, pairing in pairings.items()
        if len(pairing.sample_C)
    }


def _require_names(arms: Sequence[Arm], reference: Arm) -> None:
    if reference.name != REFERENCE:
        raise ConfigError(f"the starting model's arm must be named {REFERENCE!r}, not {reference.name!r}")
    check_arm_names([arm.name for arm in arms])


def _asked(prompts: Sequence[Prompt], config: GenerationConfig) -> list[Prompt]:
    if config.prompts == 0:
        return []
    check_generation(config)
    if not prompts:
        raise ConfigError(
            "generation.prompts is above 0, but there are no prompts: give data.test or generation.source"
        )
    return choose_prompts(prompts, config)


def _measure(
    arm: Arm,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    encode: Encode | None,
) -> Measured:
    if not prompts and arm.held_out is None:
        return Measured({}, None)
    model = arm.load()
    answers: dict[str, tuple[Answer, ...]] = {}
    if prompts:
        answers = generate_answers(model, tokenizer, prompts, config, stream=arm.name, encode=encode)
    held_out = arm.held_out(model) if arm.held_out is not None else None
    del model
    _free_memory()
    return Measured(answers, held_out)


def _free_memory() -> None:
    # A model whose forward was replaced (as a fused head does) refers to itself, and would keep its
    # weights until some later collection.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
