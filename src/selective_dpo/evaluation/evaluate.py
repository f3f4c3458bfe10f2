"""Arms side by side: each policy answers the same prompts and is judged against the starting model.

1. What the recipe asks for is checked before anything is trained for it (`check_evaluation`).
2. Each model is loaded, measured and freed before the next: answers to the prompts, held-out pairs.
3. When all have left the device, the judge compares the answers, every sample of an arm with every
   sample of the starting model.
4. Win rates, differences and lengths become one `EvaluationResults`, beside the tables they came from.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import ArrayLike

from selective_dpo.config import EvaluateConfig, GenerationConfig
from selective_dpo.config.schema import file_name
from selective_dpo.errors import ConfigError, DataError, IdentityError, RecordsError, name_some
from selective_dpo.evaluation.benchmarks import question_file, read_questions
from selective_dpo.evaluation.generate import (
    Answers,
    Encode,
    Prompt,
    check_generation,
    choose_prompts,
    generate_answers,
)
from selective_dpo.evaluation.judges import Judge, judge_for
from selective_dpo.evaluation.language_judges import LanguageModelJudge
from selective_dpo.evaluation.results import (
    REFERENCE,
    SELECTED,
    ArmResult,
    EvaluationResults,
    PreferenceMetrics,
    preference_metrics,
    repeat_name,
    to_json,
)
from selective_dpo.evaluation.side_effects import (
    Documents,
    Measured,
    check_guard,
    measure,
    read_documents,
    side_effects,
    text_nats,
)
from selective_dpo.identity import canonical_text, positions_of, require_same
from selective_dpo.losses import is_pairwise, pair_losses
from selective_dpo.stats.estimates import clustered_mean
from selective_dpo.stats.length_control import MIN_PROMPTS, LengthControlled, joint_lc
from selective_dpo.stats.win_rates import (
    Pairing,
    Verdicts,
    cross_pairing,
    prompt_scores,
    self_pairing,
    win_rate,
    win_rate_difference,
)
from selective_dpo.storage.artifacts import write_atomic, write_json
from selective_dpo.storage.digests import canonical_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selective_dpo.logprobs.compute import PairLogps

RESULTS = "results.json"
GENERATIONS = "generations.parquet"
VERDICTS = "verdicts.parquet"
ALPACA_EVAL_OUTPUTS = "alpaca_eval_outputs"

GENERATION_COLUMNS = {
    "arm": pa.string(),
    "prompt_id": pa.string(),
    "prompt": pa.string(),
    "sample": pa.int64(),
    "answer": pa.string(),
    "tokens": pa.int64(),
    "ended": pa.bool_(),
}
"""`prompt` is the JSON of a text or of messages, as in `pairs.parquet`."""

VERDICT_COLUMNS = {
    "arm": pa.string(),
    "prompt_id": pa.string(),
    "sample": pa.int64(),
    "opponent_sample": pa.int64(),
    "score": pa.float64(),
}
"""`score` is 1 where the arm's sample won, 0.5 for a tie, 0 where it lost."""

_NO_PROMPTS = (
    "evaluate.generation.prompts is above 0, but there are no prompts: give data.test or "
    "evaluate.generation.source"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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


class Evaluation(NamedTuple):
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
                outputs = model_outputs(arm, self.prompts, answers)
                path = folder / ALPACA_EVAL_OUTPUTS / f"{arm}.json"
                write_atomic(path, json.dumps(outputs, indent=2) + "\n")


def check_evaluation(config: EvaluateConfig, *, has_test: bool) -> None:
    """Check what the `evaluate` block asks for; `has_test` says whether there are held-out pairs.

    Raises:
        ConfigError: a control's name cannot be used, there is nothing to answer, or an option has no effect.
        DataError: the file of prompts is not there, or a benchmark's questions are not.
    """
    check_arm_names(policy_names(config))
    if config.guard is not None:
        check_guard(config.guard)
    if config.text:
        read_documents(Path(config.text))
        if not has_test and not config.generation.prompts:
            raise ConfigError(
                "evaluate.text has no effect without data.test or evaluate.generation.prompts: no policy is "
                "measured"
            )
    for name, benchmark in config.benchmarks.items():
        read_questions(name, question_file(name, benchmark.source))
    generation = config.generation
    if generation.prompts == 0:
        if generation.source:
            raise ConfigError(
                "evaluate.generation.source has no effect without evaluate.generation.prompts above 0"
            )
        return
    check_generation(generation)
    if generation.source and not Path(generation.source).is_file():
        raise DataError(f"evaluate.generation.source: no file {generation.source}")
    if not generation.source and not has_test:
        raise ConfigError(_NO_PROMPTS)


def policy_names(config: EvaluateConfig) -> list[str]:
    """Of all that is trained: the run's own arm, its repeats with other seeds, the controls."""
    return [SELECTED, *map(repeat_name, config.training_seeds), *config.controls]


def check_arm_names(names: Iterable[str]) -> None:
    """Raise `ConfigError` where an arm's name is no file name, stands twice or is the starting model's."""
    taken = {REFERENCE}
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"evaluate.controls: {name!r} cannot be a name; use letters, digits, '.', '_' and '-'"
            )
        try:
            file_name(name)
        except ValueError as error:
            raise ConfigError(f"evaluate.controls: {error}") from None
        if name in taken:
            raise ConfigError(f"evaluate.controls: the name {name!r} is taken; choose another")
        taken.add(name)


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
    documents: Documents = MappingProxyType({}),
) -> Evaluation:
    """Evaluate `arms` against `reference` on prompts drawn from `prompts` (see `choose_prompts`).

    `repeats` are further trainings of the arm `selected`. `tokenizer` and `encode` serve all models, which
    start from one. `judge` replaces the one that `config` names. `documents` are other text, of which the
    perplexity is measured. A model that has nothing to answer and no held-out pairs is not loaded.

    Raises:
        ConfigError: an arm's name cannot be used, prompts are wanted and there are none, or an option
            of the generation has no effect.
        ModelError: a reward model or an answer's length is more than can be done.
    """
    if reference.name != REFERENCE:
        raise ConfigError(f"the starting model's arm must be named {REFERENCE!r}, not {reference.name!r}")
    check_arm_names([arm.name for arm in (*arms, *repeats)])
    judge = judge or judge_for(config)
    asked: list[Prompt] = []
    if config.generation.prompts > 0:
        check_generation(config.generation)
        if not prompts:
            raise ConfigError(_NO_PROMPTS)
        asked = choose_prompts(prompts, config.generation)
    everyone = (reference, *arms, *repeats)
    answers_by_arm: dict[str, Answers] = {}
    held_out: dict[str, PreferenceMetrics | None] = {}
    measured: dict[str, Measured] = {}
    for arm in everyone:
        answers, held_out[arm.name], nats = _measure(
            arm, tokenizer, asked, config.generation, encode, documents
        )
        answers_by_arm[arm.name], measured[arm.name] = answers, measure(answers, nats)
    tables: dict[str, pa.Table] = {}
    if judge is not None and asked:
        samples, opponents = config.generation.samples, answers_by_arm[REFERENCE]
        for name, answers in answers_by_arm.items():
            # Against itself the starting model needs two different samples.
            pairing = self_pairing(samples) if name == REFERENCE else cross_pairing(samples, samples)
            if len(pairing.sample_C):
                tables[name] = judge_answers(judge, name, asked, answers, opponents, pairing)
    verdicts = {
        name: Verdicts(table["prompt_id"].to_pylist(), table["score"]) for name, table in tables.items()
    }
    found = [
        arm_result(
            name=arm.name,
            label=arm.label,
            pairs=arm.pairs,
            updates=arm.updates,
            held_out=held_out[arm.name],
            answers=answers_by_arm[arm.name],
            verdicts=verdicts.get(arm.name),
            selected_verdicts=verdicts.get(SELECTED) if arm.name != SELECTED else None,
        )
        for arm in everyone
    ]
    controlled = length_controlled(verdicts, answers_by_arm)
    start = measured[REFERENCE]
    found = [
        at_equal_length(arm, controlled)._replace(
            side_effects=side_effects(measured[arm.name], None if arm.name == REFERENCE else start)
        )
        for arm in found
    ]
    results = EvaluationResults(
        judge="none" if judge is None else judge.name,
        prompts=len(asked),
        samples=config.generation.samples if asked else 0,
        arms=tuple(found[: 1 + len(arms)]),
        repeats=tuple(found[1 + len(arms) :]),
        judge_notes=judge.notes() if tables and isinstance(judge, LanguageModelJudge) else (),
    )
    verdicts_table = pa.concat_tables([pa.schema(VERDICT_COLUMNS).empty_table(), *tables.values()])
    generations = generations_table(asked, answers_by_arm)
    return Evaluation(results, generations, verdicts_table, tuple(asked), answers_by_arm)


def _measure(
    arm: Arm,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    encode: Encode | None,
    documents: Documents,
) -> tuple[Answers, PreferenceMetrics | None, dict[str, float]]:
    """An arm's answers, held-out metrics and `text_nats`; its model has left the device afterwards."""
    if not prompts and arm.held_out is None:
        return {}, None, {}
    model = arm.load()
    answers: Answers = {}
    if prompts:
        answers = generate_answers(model, tokenizer, prompts, config, stream=arm.name, encode=encode)
    held_out = arm.held_out(model) if arm.held_out is not None else None
    nats = text_nats(model, documents)
    del model
    # A model whose forward was replaced (as a fused head does) refers to itself, and would keep its
    # weights until some later collection.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return answers, held_out, nats


def judge_answers(
    judge: Judge,
    arm: str,
    prompts: Sequence[Prompt],
    answers: Answers,
    opponents: Answers,
    pairing: Pairing,
) -> pa.Table:
    """Compare the samples that `pairing` names, for each prompt; one row a comparison (`VERDICT_COLUMNS`)."""
    comparisons = len(pairing.sample_C)
    texts_a, texts_b = (
        [side[prompt.prompt_id][sample].text for prompt in prompts for sample in samples_C.tolist()]
        for side, samples_C in ((answers, pairing.sample_C), (opponents, pairing.opponent_sample_C))
    )
    asked = [prompt.text for prompt in prompts for _ in range(comparisons)]
    columns = [
        [arm] * len(asked),
        [prompt.prompt_id for prompt in prompts for _ in range(comparisons)],
        np.tile(pairing.sample_C, len(prompts)),
        np.tile(pairing.opponent_sample_C, len(prompts)),
        judge.compare(asked, texts_a, texts_b),
    ]
    return pa.table(columns, schema=pa.schema(VERDICT_COLUMNS))


def arm_result(
    *,
    name: str,
    label: str,
    pairs: int,
    updates: int,
    held_out: PreferenceMetrics | None,
    answers: Answers,
    verdicts: Verdicts | None,
    selected_verdicts: Verdicts | None,
) -> ArmResult:
    """The result of one arm from its answers and verdicts.

    `selected_verdicts` are those of the arm `selected`, None for that arm itself.

    Raises:
        IdentityError: the arm and `selected` were judged on different prompts.
    """
    lengths = [answer.tokens for samples in answers.values() for answer in samples]
    prompt_ids = [prompt_id for prompt_id, samples in answers.items() for _ in samples]
    return ArmResult(
        name=name,
        label=label,
        pairs=pairs,
        updates=updates,
        held_out=held_out,
        win_rate=win_rate(verdicts) if verdicts else None,
        difference=win_rate_difference(selected_verdicts, verdicts)
        if verdicts and selected_verdicts
        else None,
        answer_tokens=clustered_mean(lengths, prompt_ids) if answers else None,
        answer_characters=clustered_mean(
            [len(answer.text) for samples in answers.values() for answer in samples], prompt_ids
        )
        if answers
        else None,
    )


def length_controlled(
    verdicts: Mapping[str, Verdicts], answers_by_arm: Mapping[str, Answers]
) -> dict[str, LengthControlled]:
    """Win rates of the arms at the starting model's length, by name, the arm `selected` first.

    None where they cannot be estimated: of few prompts, or answers of one length.
    """
    names = sorted((name for name in verdicts if name != REFERENCE), key=lambda name: name != SELECTED)
    scores = {name: prompt_scores(verdicts[name]) for name in names}
    if not scores:
        return {}

    def lengths(name: str, prompt_ids: Sequence[str]) -> list[float]:
        answers = answers_by_arm[name]
        return [float(np.mean([len(answer.text) for answer in answers[each]])) for each in prompt_ids]

    prompt_ids = next(iter(scores.values()))[0]
    baseline_N = np.array(lengths(REFERENCE, prompt_ids))
    deltas_AN = []
    for name, (ids, _) in scores.items():
        require_same(ids, prompt_ids, what=f"judged prompts of {name}")
        deltas_AN.append(baseline_N - lengths(name, prompt_ids))
    if len(prompt_ids) < MIN_PROMPTS or np.std(deltas_AN) == 0.0:
        return {}
    fits = joint_lc([score_N for _, score_N in scores.values()], deltas_AN)
    return dict(zip(scores, fits, strict=True))


def at_equal_length(arm: ArmResult, controlled: Mapping[str, LengthControlled]) -> ArmResult:
    """The arm with its numbers of `length_controlled`, if it has any."""
    if arm.name not in controlled:
        return arm
    fit = controlled[arm.name]
    difference = fit.first_minus if SELECTED in controlled else None
    return arm._replace(length_controlled=fit.win_rate, length_controlled_difference=difference)


def held_out_metrics(
    policy: PairLogps,
    reference: PairLogps,
    tokens_P2: ArrayLike,
    prompt_ids: Mapping[str, str],
    settings: Mapping[str, Any],
) -> PreferenceMetrics:
    """Loss, accuracy and margin of `policy` on its pairs, each clustered by prompt.

    `reference` and `prompt_ids` (pair_id -> prompt_id) may hold further pairs, in any order; `tokens_P2` are
    the completions' numbers of tokens, in the policy's order. `settings` are those that the policy was
    trained with: the loss is the trained one, and DPO's own at that beta where the trained one is not
    pairwise (see `losses`). Margins of policies with different betas are not comparable.

    Raises:
        DataError: no pairs.
        IdentityError: a pair has no reference log-probs or no prompt id, or stands twice.
        RecordsError: a loss is not finite; some of the pairs are named.
    """
    if not policy.pair_ids:
        raise DataError("no held-out pairs are left to evaluate; look at the drop reasons of data.test")
    place_P = positions_of(policy.pair_ids, reference.pair_ids, what="held-out reference log-probs")
    missing = [pair_id for pair_id in policy.pair_ids if pair_id not in prompt_ids]
    if missing:
        raise IdentityError(f"{len(missing):,} held-out pairs have no prompt id: {name_some(missing)}")
    if not is_pairwise(settings):
        settings = {"beta": settings["beta"]}
    policy_P2 = np.stack([policy.chosen_P, policy.rejected_P], axis=1)
    reference_P2 = np.stack([reference.chosen_P, reference.rejected_P], axis=1)[place_P]
    losses = pair_losses(policy_P2, reference_P2, tokens_P2, settings)
    finite_P = np.isfinite(losses.loss_P)
    if not finite_P.all():
        bad = [policy.pair_ids[row] for row in np.flatnonzero(~finite_P)]
        raise RecordsError(f"{len(bad):,} held-out pairs have a loss that is not finite: {name_some(bad)}")
    return preference_metrics(
        losses.loss_P,
        losses.margin_P,
        [prompt_ids[pair_id] for pair_id in policy.pair_ids],
        policy_P2 - reference_P2,
    )


def generations_table(prompts: Sequence[Prompt], answers_by_arm: Mapping[str, Answers]) -> pa.Table:
    """One row an answer, by arm, prompt and sample; see `GENERATION_COLUMNS`."""
    rows = [
        {
            "arm": arm,
            "prompt_id": prompt.prompt_id,
            "prompt": canonical_json(canonical_text(prompt.text)),
            "sample": sample,
            "answer": answer.text,
            "tokens": answer.tokens,
            "ended": answer.ended,
        }
        for arm, answers in answers_by_arm.items()
        for prompt in prompts
        for sample, answer in enumerate(answers.get(prompt.prompt_id, ()))
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(GENERATION_COLUMNS))


def model_outputs(arm: str, prompts: Sequence[Prompt], answers: Answers) -> list[dict[str, str]]:
    """The first sample of each prompt, in their order, as AlpacaEval reads `model_outputs`.

    The format (https://github.com/tatsu-lab/alpaca_eval) is a JSON list of objects: `instruction`, `output`
    and `generator`, which is `arm`. The instruction is plain text as it is, and the last user message of a
    conversation.

    Raises:
        DataError: a prompt has no user message.
    """
    outputs = []
    for prompt in prompts:
        instruction = prompt.text
        if not isinstance(instruction, str):
            asked = [str(message["content"]) for message in instruction if message["role"] == "user"]
            if not asked:
                raise DataError("a prompt without a user message has no instruction; drop it from data.test")
            instruction = asked[-1]
        output = answers[prompt.prompt_id][0].text
        outputs.append({"instruction": instruction, "output": output, "generator": arm})
    return outputs
