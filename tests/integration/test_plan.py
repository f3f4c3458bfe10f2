"""`plan` says what a run then does, changes nothing, and goes as far as it can while offline."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from selective_dpo.cli import main
from selective_dpo.config import Recipe
from selective_dpo.config.load import load_recipe
from selective_dpo.errors import ConfigError, DataError
from selective_dpo.logprobs import packing_support
from selective_dpo.run import run as verbs
from selective_dpo.run.plan import Job, Plan, make_plan, plan_text
from selective_dpo.storage.artifacts import folder_digests, read_json
from tests.fixtures.models import TRAINER, recipe_file, tiny_pairs_file, tiny_recipe

RECIPES = Path(__file__).resolve().parents[2] / "src" / "selective_dpo" / "recipes"
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
    """Tokens of the model's inputs, padding included: in passes that are learned from, and in others.

    Before each pass over pairs one of them is tried in several layouts, which no plan counts.
    """

    def __init__(self) -> None:
        self.trained = 0
        self.forwarded = 0
        self.is_trying = False


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counts = Counted()
    forward = Qwen2Model.forward

    @functools.wraps(forward)
    def count(self: Any, input_ids: Any, *arguments: Any, **options: Any) -> Any:
        if counts.is_trying:
            pass
        elif torch.is_grad_enabled():
            counts.trained += input_ids.numel()
        else:
            counts.forwarded += input_ids.numel()
        return forward(self, input_ids, *arguments, **options)

    tried_difference = packing_support._tried_difference

    def uncounted(*arguments: Any) -> tuple[float, float]:
        counts.is_trying = True
        difference = tried_difference(*arguments)
        counts.is_trying = False
        return difference

    monkeypatch.setattr(Qwen2Model, "forward", count)
    monkeypatch.setattr(packing_support, "_tried_difference", uncounted)
    return counts


def by_name(plan: Plan) -> dict[str, Job]:
    return {job.name: job for job in plan.jobs}


def test_a_plan_comes_true(tmp_path: Path, counted: Counted) -> None:
    tiny_pairs_file(tmp_path / "pairs.jsonl", pairs=60)
    recipe = recipe_with_all_stages(tmp_path)
    before = by_name(make_plan(recipe))
    root = tmp_path / "runs" / "tiny"
    assert not root.exists()
    assert not any(job.cached for job in before.values())

    run = verbs.open_run(recipe, say=lambda line: None)
    counted.trained = counted.forwarded = 0
    verbs.score(run)
    # References of both folders, and every evaluation of both scorers, which are trained in random order.
    planned = sum(job.tokens or 0.0 for job in before.values() if job.kind in ("reference", "scorer"))
    assert counted.trained + counted.forwarded == pytest.approx(planned, rel=0.05)

    jobs = by_name(make_plan(recipe))
    assert {name for name, job in jobs.items() if job.cached} == {
        "reference", "test-reference", "scores/seed41-fold0", "scores/seed41-fold1"
    }  # fmt: skip
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
    planned = sum(ordered[name].tokens or 0.0 for name in policies)
    assert counted.trained == planned  # the order is known now
    for name in policies:
        assert ordered[name].updates == read_json(root / name / "cost.json")["optimizer_steps"]
        assert ordered[name].pairs == before[name].pairs
        assert not ordered[name].cached

    verbs.evaluate(run)
    files = folder_digests(root)
    done = make_plan(recipe)
    assert all(job.cached for job in done.jobs)
    assert done.seconds == 0.0
    assert folder_digests(root) == files
    # The table of protocols is of the scoring as a whole, whatever is there.
    (own,) = [protocol for protocol in done.protocols if protocol.own]
    scoring = [job for job in done.jobs if job.name == "reference" or job.kind == "scorer"]
    assert own.tokens == pytest.approx(sum(job.tokens or 0.0 for job in scoring))
    assert own.flops == pytest.approx(sum(job.flops or 0.0 for job in scoring))

    # A run would refuse one more seed, so nothing of what is there counts.
    more = make_plan(recipe.model_copy(update={"score": recipe.score.model_copy(update={"seeds": (41, 7)})}))
    assert not any(job.cached for job in more.jobs)
    assert "score.seeds" in more.refused and "a run would refuse this: " in plan_text(more)
    # Nor of what was made from other data; and the new pairs are counted.
    tiny_pairs_file(tmp_path / "pairs.jsonl", pairs=50)
    changed = make_plan(recipe)
    assert changed.pairs is not None and changed.pairs.kept == 50
    assert not any(job.cached for job in changed.jobs)
    assert "made from other inputs" in changed.refused
    assert folder_digests(root) == files


def test_what_is_printed_and_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_with_all_stages(tmp_path)
    path = recipe_file(recipe, tmp_path / "recipe.yaml")
    capfd.readouterr()
    assert main(["plan", str(path), "--json", str(tmp_path / "plan.json"), "--select.fraction", "0.25"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.startswith("plan of tiny, in ")
    assert "24 rows: 24 pairs kept, over 16 prompts" in out
    assert "selection  easiest 25%" in out
    assert "FLOP/s in float32 measured here" in out
    assert "unknown: time of the answers" in out
    assert "to do: 8 of 8 jobs; time: about " in out
    # A half of 12 pairs, 2 in an update.
    assert "warning: a scorer makes 6 updates, fewer than 10: it will hardly move" in out
    assert not (tmp_path / "runs").exists()

    plan = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    jobs = {job["name"]: job for job in plan["jobs"]}
    # 24 pairs, a quarter, in batches of 4 and updates of 2 batches: 1 an epoch.
    assert (jobs["policy"]["pairs"], jobs["policy"]["updates"]) == (6, 2)
    # All 24: 6 batches, 3 updates an epoch.
    assert (jobs["controls/all/policy"]["pairs"], jobs["controls/all/policy"]["updates"]) == (24, 6)
    assert jobs["evaluation: answers"]["seconds"] is None
    # Prompts of at most 32 tokens and 3 new ones, 4 prompts, 2 policies and the starting model.
    assert jobs["evaluation: answers"]["tokens"] == 35 * 4 * 3
    assert all(job["flops"] > 0 and job["memory_bytes"]["total"] > 0 for job in plan["jobs"])
    # The order is not known: a quarter of what all pairs take.
    assert jobs["policy"]["tokens"] == jobs["controls/all/policy"]["tokens"] / 4
    assert plan["measured_flops_per_second"]["float32"] > 0
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
    assert "unknown: model, pairs, jobs and disk: cannot load model" in out
    assert "pairs: ?" in out and "jobs: ?" in out and "disk: ?" in out
    score = load_recipe(RECIPES / f"{name}.yaml").score
    (own,) = [line for line in out.splitlines() if "(this recipe)" in line]
    assert f"  {len(score.seeds)} x {score.evaluations}  " in own
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
    assert plan.model is not None
    # The policy's adapter; a checkpoint has it and AdamW's two states, and there are up to three at a time.
    assert plan.disk_bytes == (plan.model.policy_adapter * 4, 3 * plan.model.policy_adapter * (4 + 2 * 4))
    assert (plan.pairs, plan.jobs, plan.seconds) == (None, (), None)
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


def test_what_is_not_counted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights of more than half of the memory are not loaded, so there is no time.
    monkeypatch.setattr("selective_dpo.run.costs.fits", lambda *_: False)
    trainer = {**TRAINER, "eval_strategy": "steps", "eval_steps": 2}
    plan = make_plan(recipe_with_all_stages(tmp_path, train={"trainer": trainer}, evaluate={}))
    assert plan.seconds is None
    assert {job.seconds for job in plan.jobs} == {None}
    assert plan.measured_flops_per_second == {}
    assert [line.split(":")[0] for line in plan.unknown] == ["time", "train"]
