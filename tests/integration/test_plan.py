"""`plan` says what a run then does, changes nothing, and goes as far as it can while offline."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from selective_dpo.cli import main
from selective_dpo.config import Recipe
from selective_dpo.config.load import load_recipe
from selective_dpo.errors import ConfigError, DataError
from selective_dpo.logprobs import compute as logprobs
from selective_dpo.logprobs import packing_support as ways
from selective_dpo.logprobs import reference
from selective_dpo.run import run as verbs
from selective_dpo.run.plan import Plan, make_plan
from selective_dpo.run.planning import dealing
from selective_dpo.run.planning.pricing import PlannedJob
from selective_dpo.storage.artifacts import folder_digests, read_json
from selective_dpo.training import batching as shared_step
from tests.fixtures.models import LORA, TRAINER, recipe_file, tiny_pairs_file, tiny_recipe

# PEFT still reads the old name of a property that transformers has renamed.
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_with_all_stages(folder: Path, **blocks: Any) -> Recipe:
    tiny_pairs_file(folder / "test.jsonl", pairs=10, seed=5)
    return tiny_recipe(
        folder,
        **{
            "data": {"test": [{"path": str(folder / "test.jsonl")}]},
            "score": {"trainer": {**TRAINER, "per_device_train_batch_size": 2}},
            "train": {"trainer": {**TRAINER, "gradient_accumulation_steps": 2, "num_train_epochs": 2}},
            "evaluate": {
                "controls": {"all": {"rule": "all", "order": "shuffled"}},
                "generation": {"prompts": 4, "max_new_tokens": 3},
            },
            **blocks,
        },
    )


class Counted:
    """Tokens of the model's inputs, padding included: in passes that are learned from, and in others."""

    def __init__(self) -> None:
        self.trained = 0
        self.forwarded = 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counts = Counted()
    forward, choose_way = Qwen2Model.forward, ways.choose_way
    trying: list[bool] = []

    @functools.wraps(forward)
    def count(self: Any, input_ids: Any, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            counts.trained += input_ids.numel()
        elif not trying:
            counts.forwarded += input_ids.numel()
        return forward(self, input_ids, *arguments, **options)

    def try_out(*arguments: Any, **options: Any) -> Any:
        """The pair that shared rows are tried on first is no part of the plan."""
        trying.append(True)
        try:
            return choose_way(*arguments, **options)
        finally:
            trying.clear()

    monkeypatch.setattr(Qwen2Model, "forward", count)
    for module in (logprobs, shared_step):
        monkeypatch.setattr(module, "choose_way", try_out)
    return counts


def _without(counts: Counted, generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`, its tokens not counted."""

    @functools.wraps(generate)
    def uncounted(*arguments: Any, **options: Any) -> Any:
        before = counts.forwarded
        answers = generate(*arguments, **options)
        counts.forwarded = before
        return answers

    return uncounted


def by_name(plan: Plan) -> dict[str, PlannedJob]:
    return {job.name: job for job in plan.jobs}


def test_a_plan_comes_true(tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_with_all_stages(tmp_path)
    before = make_plan(recipe)
    root = tmp_path / "runs" / "tiny"
    assert not root.exists()
    assert not any(job.cached for job in before.jobs)

    run = verbs.open_run(recipe, say=lambda line: None)
    # A run first tries a few pairs, which no plan counts.
    monkeypatch.setattr(reference, "require_finite_start", lambda *_, **__: None)
    verbs.score(run)
    scored = make_plan(recipe)
    jobs = by_name(scored)
    assert {job.name for job in scored.jobs if job.cached} == {
        "reference", "test-reference", "scores/seed41-fold0", "scores/seed41-fold1"
    }  # fmt: skip
    # References of both folders, and every evaluation of both scorers; these are trained in random order.
    planned = sum(
        job.tokens or 0.0 for job in by_name(before).values() if job.kind in ("reference", "scorer")
    )
    assert planned - counted.forwarded == pytest.approx(counted.trained, rel=0.1)
    for scorer in run.scorer_runs:
        folder, job = run.folder.scores(scorer), jobs[f"scores/{scorer.name}"]
        cost = read_json(folder / "cost.json")
        assert (job.pairs, job.held_out) == (cost["train_pairs"], cost["held_out_pairs"])
        assert job.updates == cost["optimizer_steps"]
        history = read_json(folder / "trainer_log.json")["log_history"]
        assert job.updates == history[-1]["step"]
    records = verbs.collect_records([run.folder.scores(scorer) for scorer in run.scorer_runs])
    for fold in (0, 1):
        steps = tuple(sorted(set(records.step[records.fold == fold].tolist())))
        assert jobs[f"scores/seed41-fold{fold}"].evaluated_after == steps

    verbs.curriculum(run)
    ordered = by_name(make_plan(recipe))
    counted.trained = 0
    verbs.train(run)
    policies = ("policy", "controls/all/policy")
    # The order is known now, so the padded tokens are exact.
    assert counted.trained == sum(ordered[name].tokens or 0.0 for name in policies)
    for name in policies:
        assert ordered[name].updates == read_json(root / name / "cost.json")["optimizer_steps"]
        assert ordered[name].pairs == by_name(before)[name].pairs
        assert not ordered[name].cached

    counted.forwarded = 0
    with monkeypatch.context() as patch:
        # Sampling goes through the model token by token, which the plan counts otherwise.
        patch.setattr(Qwen2ForCausalLM, "generate", _without(counted, Qwen2ForCausalLM.generate))
        verbs.evaluate(run)
    assert counted.forwarded == ordered["evaluation: held-out"].tokens
    files = folder_digests(root)
    done = make_plan(recipe)
    # The table of protocols is of the scoring as a whole, whatever is there.
    (own,) = [protocol for protocol in done.protocols if protocol.scoring.is_own]
    assert own.costs is not None
    assert own.costs.tokens == sum(
        job.tokens or 0.0 for job in done.jobs if job.name == "reference" or job.kind == "scorer"
    )
    assert all(job.cached for job in done.jobs)
    assert done.seconds == 0.0
    assert folder_digests(root) == files

    # One more seed: what is there stays of use, and policies have to wait for it.
    more = make_plan(recipe.model_copy(update={"score": recipe.score.model_copy(update={"seeds": (41, 7)})}))
    missing = {job.name for job in more.jobs if not job.cached}
    assert "scores/seed7-fold0" in missing
    assert "policy" in missing
    assert "scores/seed41-fold0" not in missing
    assert "score.seeds" in more.notes[0]


def test_what_is_printed_and_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_with_all_stages(tmp_path)
    path = recipe_file(recipe, tmp_path / "recipe.yaml")
    capfd.readouterr()
    assert main(["plan", str(path), "--json", str(tmp_path / "plan.json"), "--select.fraction", "0.25"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.startswith("plan of tiny, in ")
    assert "24 rows: 24 pairs kept, over 16 prompts" in out
    assert "select: fraction 0.25" in out
    assert "matrix multiplication measured here" in out
    assert "unknown: time of the answers" in out
    assert not (tmp_path / "runs").exists()

    plan = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    jobs = {job["name"]: job for job in plan["jobs"]}
    # 24 pairs, a quarter, in batches of 4 and updates of 2 batches: 1 an epoch.
    assert (jobs["policy"]["pairs"], jobs["policy"]["updates"]) == (6, 2)
    # All 24: 6 batches, 3 updates an epoch.
    assert (jobs["controls/all/policy"]["pairs"], jobs["controls/all/policy"]["updates"]) == (24, 6)
    assert jobs["evaluation: answers"]["seconds"] is None
    assert all(job["flops"] > 0 and job["memory_bytes"]["total"] > 0 for job in plan["jobs"])
    protocols = {(each["protocol"], each["part"]): each for each in plan["protocols"]}
    assert list(protocols) == [
        ("paper", ""), ("fast", ""), ("certified", "least"), ("certified", "most"), ("custom", "")
    ]  # fmt: skip
    # One seed, two evaluations, as in `fast`: the reference, a pass to train, two to evaluate.
    assert protocols["custom", ""]["costs"] == protocols["fast", ""]["costs"]
    assert protocols["custom", ""]["costs"]["passes"] == {"forward": 24 * 4, "backward": 24}
    assert protocols["custom", ""]["own"]
    assert protocols["fast", ""]["expected_agreement"]["overlap"] == [0.951, 0.969]  # at the nearest, 0.2
    assert "custom (this recipe)" in out
    assert plan["pairs"]["kept"] == 24
    assert plan["config"]["select"]["fraction"] == 0.25


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_are_planned_offline(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(RECIPES / f"{name}.yaml")]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "unknown: parameters, so FLOPs, memory, disk and time: cannot load model" in out
    assert "unknown: pairs and tokens" in out
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    lines = [line for line in out.splitlines() if line.startswith("scores/seed")]
    assert len(lines) == 2 * len(recipe.score.seeds)
    # What needs no data: 1 + 1 + 2 passes over all pairs.
    assert "fast" in out and "  4 P  " in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--score.trainer.lr", "1"], "score.trainer.lr is not an option"),
        (["--select.fraction", "1.7"], "select.fraction is 1.7"),
        (["--evaluate.generation.source", "x"], "evaluate.generation.source has no effect"),
        (["--no-such"], "unrecognized arguments: --no-such"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_refused(
    option: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(RECIPES / "qwen2.5-7b-ultrafeedback.yaml"), *option]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1


def test_known_sizes_without_data(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "pairs.jsonl").unlink()
    plan = make_plan(recipe)
    assert plan.models is not None
    # The policy's adapter; a checkpoint has it and AdamW's two states, and there are up to three at a time.
    assert plan.disk == (plan.models.policy_adapter * 4, 3 * plan.models.policy_adapter * (4 + 2 * 4))
    assert {job.updates for job in plan.jobs} == {None}
    # Memory needs no data: max_length is the longest row there may be.
    assert all(job.memory is not None for job in plan.jobs)
    assert len(plan.unknown) == 1
    assert "no file or folder" in plan.unknown[0]


def test_a_threshold_selects_after_scoring(tmp_path: Path) -> None:
    plan = make_plan(tiny_recipe(tmp_path, select={"rule": "below", "threshold": 0.7}))
    assert by_name(plan)["policy"].pairs is None
    assert plan.unknown == ("pairs of policy: a threshold selects after scoring",)
    assert plan.seconds is None


def test_selections_of_known_size(tmp_path: Path) -> None:
    def selected(**select: Any) -> int | None:
        return by_name(make_plan(tiny_recipe(tmp_path, select=select)))["policy"].pairs

    assert selected(rule="random", count=5) == 5
    assert selected(rule="band", band=[0.25, 0.75]) == 12  # of 24 pairs
    assert selected(rule="hardest", fraction=0.1) == 2  # 2.4


def test_faults_that_are_found_are_errors(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match="no row has the columns of a pair"):
        make_plan(tiny_recipe(tmp_path, data={"train": [{"path": str(wrong)}]}))
    with pytest.raises(ConfigError, match=r"score\.lora does not fit the model: Target modules"):
        make_plan(tiny_recipe(tmp_path, score={"lora": {"target_modules": ["nope"]}}))
    with pytest.raises(ConfigError, match="have no room for 50 evaluations"):
        make_plan(tiny_recipe(tmp_path, score={"evaluations": 50}))


@pytest.mark.parametrize(
    "given",
    [
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        # Dropout acts, so each completion has a row of its own; they are dealt by length all the same.
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "disable_dropout": False},
        # Rows of the last, smaller update weigh more in this loss.
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 3, "loss_type": "hinge"},
        # Not dealt by length: this loss weighs pairs by their length.
        {"gradient_accumulation_steps": 3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    ],
)
def test_trained_tokens_in_the_order_of_the_curriculum(
    tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    # So little that the short rows here take several passes, too.
    for module in (shared_step, dealing):
        monkeypatch.setattr(module, "WORTH_A_PASS", 3)
    train = {"lora": {**LORA, "lora_dropout": 0.1}, "trainer": {**TRAINER, **given}}
    recipe = tiny_recipe(tmp_path, train=train, score={"evaluations": 1}, select={"count": 17})
    run = verbs.open_run(recipe, say=lambda line: None)
    verbs.curriculum(run)
    planned = by_name(make_plan(recipe))["policy"]
    assert planned.rows_per_pair == (2 if "disable_dropout" in given else 1)
    counted.trained = 0
    verbs.train(run)
    assert counted.trained == planned.tokens


def test_evaluations_of_the_training_stage_are_counted(tmp_path: Path, counted: Counted) -> None:
    trainer = {
        **TRAINER,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 3,
    }  # 2 and the last, 3
    recipe = recipe_with_all_stages(tmp_path, train={"trainer": trainer}, evaluate={})
    run = verbs.open_run(recipe, say=lambda line: None)
    verbs.curriculum(run)
    planned = by_name(make_plan(recipe))["policy"].tokens
    counted.trained = counted.forwarded = 0
    verbs.train(run)
    assert counted.trained + counted.forwarded == planned
