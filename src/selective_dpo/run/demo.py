"""`demo`: the whole method on the embedded world, and what this one run shows of its claims.

`demo --real` is the same with a real language model: see `worlds/real.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from selective_dpo.config import GenerationConfig, ModelConfig, Recipe
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.evaluation.generate import Prompt, generate_answers
from selective_dpo.evaluation.results import EvaluationResults, from_json
from selective_dpo.identity import positions_of
from selective_dpo.models import load_policy, read_tokenizer
from selective_dpo.report.content import TruthRow, save_findings
from selective_dpo.report.tables import agreement_table, arms_table, share_with_interval
from selective_dpo.run.folder import alone
from selective_dpo.run.run import evaluate, open_run, report
from selective_dpo.stats.estimates import clustered_share
from selective_dpo.storage.artifacts import read_json
from selective_dpo.worlds.real import ENGLISH, RealConfig, build_real_world, make_model, real_recipe
from selective_dpo.worlds.recipe import world_recipe
from selective_dpo.worlds.world import World, WorldConfig, build_world

NAME = "demo"
REAL_NAME = "demo-real"


def demo(
    output_dir: Path = Path("runs"),
    *,
    seed: int = 0,
    config: WorldConfig | None = None,
    say: Callable[[str], object] = print,
) -> Path:
    """Make a world, score its pairs, train the arms, judge them, write the report; returns its path.

    `config` describes another world than the default one, such as a smaller one.
    """
    # A model this small loses by sharing an operation between threads; whole trainings run side by side.
    torch.set_num_threads(1)
    workers = min(2, os.cpu_count() or 1)
    root = output_dir / NAME
    with alone(root):
        say(f"world {seed}: a small model learns list tasks from careful and hasty demonstrators")
        world = build_world(root / "world", seed=seed, config=config)
        pairs = world.facts["pairs"]
        say(
            f"  {pairs['pairs']:,} pairs of its own answers, labelled by a noisy annotator: "
            f"{pairs['flip_share']:.0%} prefer the worse answer, {pairs['tie_share']:.0%} are ties"
        )
        return show(world, world_recipe(world, name=NAME, output_dir=output_dir, workers=workers), say)


def demo_real(
    output_dir: Path = Path("runs"),
    *,
    seed: int = 0,
    config: RealConfig | None = None,
    say: Callable[[str], object] = print,
) -> Path:
    """The same with SmolLM2-135M-Instruct, its own answers and a program that checks them.

    Raises:
        ConfigError: the model's package is not installed.
    """
    root = output_dir / REAL_NAME
    with alone(root):
        model = make_model(root / "model")
        say(f"real world {seed}: SmolLM2-135M-Instruct answers instructions that a program can check")
        world = build_real_world(root / "world", model=model, seed=seed, sample=sample_texts, config=config)
        pairs = world.facts["pairs"]
        say(
            f"  {pairs['pairs']:,} pairs of its own answers, labelled by the checker with noise: "
            f"{pairs['flip_share']:.0%} prefer the worse answer, {pairs['tie_share']:.0%} are ties"
        )
        return show(world, real_recipe(world, name=REAL_NAME, output_dir=output_dir), say)


def sample_texts(
    model: Path, instructions: Sequence[str], samples: int, seed: int, temperature: float, longest: int
) -> list[list[str]]:
    """`samples` answers of the model in a folder to each instruction, in order; in float32."""
    policy = load_policy(ModelConfig(path=str(model), dtype="float32"))
    prompts = [Prompt(str(at), ENGLISH.user(text)) for at, text in enumerate(instructions)]
    settings = GenerationConfig(
        prompts=len(prompts), samples=samples, temperature=temperature, max_new_tokens=longest, seed=seed
    )
    answers = generate_answers(
        policy, read_tokenizer(str(model), what="model"), prompts, settings, stream="pairs"
    )
    return [[answer.text for answer in answers[prompt.prompt_id]] for prompt in prompts]


def show(world: World, recipe: Recipe, say: Callable[[str], object]) -> Path:
    """Run the recipe of a world, and say what the run shows beside the truth about its pairs."""
    run = open_run(recipe, fresh=True, say=say)
    evaluate(run)
    results = from_json(read_json(run.folder.evaluation / "results.json"))
    curriculum = Curriculum.load(run.folder.curriculum)
    truth = truth_about_selection(curriculum, world)
    # The report's own headline compares the arms already.
    save_findings(run.folder.root, hardest_half(results), truth)
    path = report(run)
    say("\n" + arms_table(results))
    say("\n" + agreement_table(curriculum.facts["agreement"]) + "\n")
    for line in [*comparisons(results), *hardest_half(results), *_truth_lines(truth)]:
        say(line)
    return path


def comparisons(results: EvaluationResults) -> list[str]:
    """Whether this one run shows that the easiest half beats all pairs, and a random half."""
    sentences = []
    for name, claim in (("all", "beats all pairs"), ("random", "beats a random half")):
        arm = results.arm(name)
        if arm is not None and arm.difference is not None:
            difference = arm.difference
            sentences.append(
                f"The easiest half {claim}: {_verdict(difference.low > 0, difference.high < 0)} (win rate "
                f"difference {difference.value:+.3f}, 95% interval {difference.low:+.3f} to "
                f"{difference.high:+.3f})."
            )
    return sentences


def hardest_half(results: EvaluationResults) -> list[str]:
    """Whether this one run shows that training on the hardest half hurts."""
    arm = results.arm("hardest")
    if arm is None or arm.win_rate is None:
        return []
    rate = arm.win_rate
    return [
        f"Training on the hardest half hurts: {_verdict(rate.high < 0.5, rate.low > 0.5)} (win rate against "
        f"the starting model {rate.value:.3f}, 95% interval {rate.low:.3f} to {rate.high:.3f})."
    ]


def _verdict(shows: bool, opposite: bool) -> str:
    if shows:
        return "shows in this run"
    return "the OPPOSITE shows in this run" if opposite else "does NOT show in this run"


def truth_about_selection(curriculum: Curriculum, world: World) -> list[TruthRow]:
    """What the selected and the dropped pairs really are, by the gold reward that the method never saw."""
    truth = pq.read_table(world.truth)
    curriculum = curriculum.measured
    at = positions_of(curriculum.pair_ids, truth["pair_id"].to_pylist(), what="truth about the pairs")
    prompts_P = np.asarray(curriculum.table["prompt_id"].to_pylist())
    selected_P = curriculum.table["selected"].to_numpy(zero_copy_only=False)
    operation_P = np.asarray(truth["operation"].to_pylist())[at]
    groups = {
        "flipped label": truth["flipped"].to_numpy(zero_copy_only=False)[at],
        "tie": truth["tie"].to_numpy(zero_copy_only=False)[at],
    }
    groups |= {f"task: {name}": operation_P == name for name in sorted(set(operation_P.tolist()))}
    return [
        TruthRow(
            group,
            clustered_share(has_P[selected_P].astype(float), prompts_P[selected_P]),
            clustered_share(has_P[~selected_P].astype(float), prompts_P[~selected_P]),
        )
        for group, has_P in groups.items()
    ]


def _truth_lines(truth: list[TruthRow]) -> list[str]:
    lines = ["What was kept and what was dropped (share of the pairs, with 95% interval):"]
    for row in truth:
        kept, dropped = (share_with_interval(each) for each in (row.selected, row.deselected))
        lines.append(f"  {row.group:<28} kept {kept:<16} dropped {dropped}")
    return lines
