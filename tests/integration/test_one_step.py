"""Protocol `one-step` on tiny models: against brute force, however the work is divided, and after a kill."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from selective_dpo.cli import main
from selective_dpo.config import Recipe
from selective_dpo.config.load import make_recipe
from selective_dpo.curriculum.records import Records
from selective_dpo.curriculum.table import Curriculum, loss_column
from selective_dpo.data.store import load_tokens
from selective_dpo.difficulty import one_step, step_scorers
from selective_dpo.difficulty.folds import assign_folds
from selective_dpo.difficulty.one_step import GradientSums, add_sums, micro_batches, step_direction
from selective_dpo.difficulty.scorer import collect_records
from selective_dpo.difficulty.step_scorers import StepScorer
from selective_dpo.logprobs.reference import load_reference
from selective_dpo.losses import LN_2, chance_loss, pair_losses
from selective_dpo.run.keys import Run
from selective_dpo.run.run import curriculum, open_run, score
from selective_dpo.storage.artifacts import read_json
from tests.fixtures.fork_server import ForkServer
from tests.fixtures.models import LORA, TRAINER, recipe_file, tiny_pairs_file, tiny_recipe

PAIRS = 40
# Log-probs are sums of up to 60 float32 numbers of about 5: rounding is about 2e-5.
LOGP_TOLERANCE = 2e-4


ROUNDED = {"beta": 0.1, "bf16": True, "activation_checkpointing": False}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pairs_file(folder / "pairs.jsonl", PAIRS)
    tiny_recipe(folder)
    return folder


def one_step_recipe(inputs: Path, name: str, *, pairs: str = "pairs.jsonl", **blocks: Any) -> Recipe:
    base = tiny_recipe(inputs, name=name).model_dump(mode="json")
    block = {
        "protocol": "one-step",
        "lora": LORA,
        "trainer": {"beta": 0.1, "bf16": False, "activation_checkpointing": False},
        "tokens_per_batch": 512,
    }
    base["data"]["train"][0]["path"] = str(inputs / pairs)
    launch = blocks.pop("launch", base["launch"])
    return make_recipe({**base, "score": {**block, **blocks}, "launch": launch})


def scored(recipe: Recipe) -> Run:
    run = open_run(recipe, say=lambda line: None)
    score(run)
    return run


def records_of(run: Run) -> Records:
    return collect_records([run.folder.scores(scorer) for scorer in run.scorer_runs])


def log_ratios(run: Run) -> dict[str, float]:
    """What one step of size 1 would make of each pair's log-ratio difference, if it were linear."""
    records, found = records_of(run), {}
    for scorer in run.scorer_runs:
        cost = read_json(run.folder.scores(scorer) / "cost.json")
        for row in np.flatnonzero((records.fold == scorer.fold) & (records.seed == scorer.seed)):
            chosen = records.policy_chosen_logp[row] - records.reference_chosen_logp[row]
            rejected = records.policy_rejected_logp[row] - records.reference_rejected_logp[row]
            found[str(records.pair_id[row])] = (chosen - rejected) / cost["scale"] / cost["step_size"]
    return found


@pytest.fixture(scope="module")
def alone(inputs: Path) -> Run:
    return scored(one_step_recipe(inputs, "alone"))


def require_the_same(run: Run, alone: Run) -> None:
    """The rows of `alone`, and its numbers but for rounding."""
    records, wanted = records_of(run), records_of(alone)
    assert len(records) == PAIRS
    for name in ("pair_id", "prompt_id", "seed", "fold", "evaluation", "step"):
        assert (getattr(records, name) == getattr(wanted, name)).all(), name
    names = [name for name in vars(records) if name.startswith("reference")]
    for name in names:
        np.testing.assert_allclose(getattr(records, name), getattr(wanted, name), rtol=0, atol=LOGP_TOLERANCE)
    # Log-ratios are some hundredths of a nat before they are scaled, here by less than 10.
    np.testing.assert_allclose(records.loss, wanted.loss, rtol=0, atol=1e-3)
    assert wanted.loss.std() > 20e-3


# --- what is measured ---------------------------------------------------------------------------------------


def brute_force(run: Run) -> dict[str, float]:
    """<g, D gbar> of each pair from its own gradient, by plain forward passes of one completion each."""
    tokens = load_tokens(run.folder.pairs)
    model = StepScorer(run.recipe, tokens, 41)
    gradients_P: list[NDArray[np.float64]] = []
    for row in tokens:
        difference: Any = 0.0
        for sign, side in ((1, "chosen_ids"), (-1, "rejected_ids")):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            logps = model.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = logps.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :]
            difference = difference + sign * picked.sum()
        found = torch.autograd.grad(difference, model.weights)
        gradients_P.append(torch.cat([part.flatten() for part in found]).double().numpy())
    lengths = np.array(
        [len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) - 2 for row in tokens]
    )
    fold_P = assign_folds(tokens["prompt_id"], seed=41, folds=one_step.FOLDS)
    parts = {}
    for fold in range(one_step.FOLDS):
        rows = np.flatnonzero(fold_P == fold)
        sums = GradientSums(np.zeros_like(gradients_P[0]), np.zeros_like(gradients_P[0]), 0, 0)
        for batch in micro_batches([tokens["pair_id"][row] for row in rows], lengths[rows]):
            # DPO's loss falls by beta / 2 for each nat.
            sums = sums.plus(sum(-0.05 * gradients_P[rows[place]] for place in batch), len(batch))
        parts[fold] = sums
    expected = {}
    for place, (pair_id, fold) in enumerate(zip(tokens["pair_id"], fold_P, strict=True)):
        direction = step_direction(add_sums(part for other, part in parts.items() if other != fold))
        expected[pair_id] = float(gradients_P[place] @ direction)
    return expected


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all weights"])
def test_margins_are_the_dot_products_of_gradients(
    inputs: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_step, "TARGET_DELTA", 1e-3)
    small = scored(one_step_recipe(inputs, f"small-{lora is None}", lora=lora))
    expected, measured = brute_force(small), log_ratios(small)
    names = sorted(expected)
    assert names == sorted(measured)
    wanted, found = (np.array([each[name] for name in names]) for each in (expected, measured))
    # In the limit of small steps they are equal; what is left is curvature and float32's rounding.
    assert np.abs(found - wanted).max() < 0.05 * np.sqrt(np.mean(wanted**2))
    monkeypatch.undo()
    usual = log_ratios(scored(one_step_recipe(inputs, f"usual-{lora is None}", lora=lora)))
    assert spearmanr(wanted, [usual[name] for name in names])[0] > 0.98


def test_a_step_in_bfloat16_is_above_its_roundings(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = brute_force(scored(one_step_recipe(inputs, "exact")))
    names = sorted(expected)

    def agreement(name: str) -> float:
        found = log_ratios(scored(one_step_recipe(inputs, name, trainer=ROUNDED)))
        return float(spearmanr([expected[each] for each in names], [found[each] for each in names])[0])

    assert agreement("bfloat16") > 0.9
    monkeypatch.setattr(one_step, "ROUNDED_TARGET_DELTA", 2e-4)
    assert agreement("drowned") < 0.5


def test_losses_are_on_the_scale_of_the_pairs_own_loss(alone: Run) -> None:
    records = records_of(alone)
    np.testing.assert_allclose(records.loss, np.logaddexp(0.0, -records.margin))
    assert (records.step == 1).all() and (records.evaluation == 1).all()
    assert sorted(set(records.fold.tolist())) == list(range(8))
    reference = load_reference(alone.folder.reference)
    by_id = dict(zip(reference.pair_ids, reference.chosen_P, strict=True))
    assert [by_id[name] for name in records.pair_id] == records.reference_chosen_logp.tolist()


def test_a_pairs_own_prompt_never_contributes(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    measured: dict[str, list[str]] = {}
    load, move = step_scorers.load_file, StepScorer.measure

    def spied_load(path: Path) -> Any:
        read.append(path.parent.name)
        return load(path)

    def spied_measure(self: StepScorer, rows: Any, what: str) -> Any:
        measured[what] = list(read)
        read.clear()
        return move(self, rows, what)

    monkeypatch.setattr(step_scorers, "load_file", spied_load)
    monkeypatch.setattr(StepScorer, "measure", spied_measure)
    run = scored(one_step_recipe(inputs, "spied"))
    for fold in range(8):
        others = {f"gradient-{other}" for other in range(8) if other != fold}
        assert set(measured[f"held-out fold {fold + 1} of 8"]) == others
    fold_of: dict[str, set[int]] = {}
    records = records_of(run)
    for prompt, fold in zip(records.prompt_id.tolist(), records.fold.tolist(), strict=True):
        fold_of.setdefault(prompt, set()).add(fold)
    assert all(len(folds) == 1 for folds in fold_of.values())


# --- however the work is divided ----------------------------------------------------------------------------


def test_neither_the_order_of_the_pairs_nor_the_size_of_batches_matters(inputs: Path, alone: Run) -> None:
    lines = (inputs / "pairs.jsonl").read_text("utf-8").splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    (inputs / "shuffled.jsonl").write_text("".join(lines), "utf-8")
    shuffled = one_step_recipe(inputs, "shuffled", pairs="shuffled.jsonl", tokens_per_batch=64)
    require_the_same(scored(shuffled), alone)


@pytest.mark.slow
def test_two_processes_equal_one(inputs: Path, alone: Run, server: ForkServer) -> None:
    recipe = one_step_recipe(inputs, "two", launch={"processes": 2})
    ended = server.run_ranks(2, "score", recipe_file(recipe, inputs / "two.yaml"))
    assert [each.code for each in ended] == [0, 0], ended
    run = open_run(recipe, say=lambda line: None)
    require_the_same(run, alone)
    assert read_json(run.folder.scores(run.scorer_runs[0]) / "cost.json")["processes"] == 2


def test_killed_in_either_pass_it_goes_on(inputs: Path, alone: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    accumulate, measure = StepScorer.accumulate, StepScorer.measure

    def counted_accumulate(self: StepScorer, *arguments: Any) -> Any:
        if done.count("gradient") == 3 and "killed in gradients" not in done:
            done.append("killed in gradients")
            raise KeyboardInterrupt
        done.append("gradient")
        return accumulate(self, *arguments)

    def counted_measure(self: StepScorer, rows: Any, what: str) -> Any:
        if what == "held-out fold 4 of 8" and "killed in measurements" not in done:
            done.append("killed in measurements")
            raise KeyboardInterrupt
        done.append(what)
        return measure(self, rows, what)

    monkeypatch.setattr(StepScorer, "accumulate", counted_accumulate)
    monkeypatch.setattr(StepScorer, "measure", counted_measure)
    recipe = one_step_recipe(inputs, "killed")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            scored(recipe)
    run = scored(recipe)
    assert done.count("gradient") == 8
    assert [done.count(f"held-out fold {fold} of 8") for fold in range(1, 9)] == [1] * 8
    require_the_same(run, alone)
    assert not run.folder.checkpoints("one-step-41").exists()


def test_splits_show_how_well_they_agree(inputs: Path) -> None:
    lines: list[str] = []
    run = open_run(one_step_recipe(inputs, "splits", splits=2), say=lines.append)
    made = curriculum(run)
    told = [line for line in lines if line.startswith("scores: ")]
    assert [line.rpartition(",")[0] for line in told] == [
        f"scores: one-step, seed {seed}: 40 pairs in 8 folds" for seed in (41, 42)
    ]
    assert made.facts["seeds"] == [41, 42]
    (agreement,) = made.facts["agreement"]["seeds"]
    assert 0.2 < agreement["spearman"]["value"] < 1.0
    p_wrong = made.table["p_wrong"].to_numpy()
    assert ((p_wrong > 0) & (p_wrong < 1)).all()
    # Where both splits agree with a label, or contradict it, their mean margin does, too.
    losses = np.stack([made.table[loss_column(seed, 1)].to_numpy() for seed in (41, 42)])
    agreed, contradicted = (losses < LN_2).all(axis=0), (losses > LN_2).all(axis=0)
    assert agreed.sum() > 5 and (p_wrong[agreed] <= 0.5).all()
    assert contradicted.sum() > 5 and (p_wrong[contradicted] >= 0.5).all()
    out = inputs / "exported.csv"
    assert main(["export", str(run.folder.root), "--format", "csv", "--out", str(out)]) == 0
    head, first, *_ = out.read_text("utf-8").splitlines()
    assert head.endswith(",p_wrong") and float(first.rpartition(",")[2]) == pytest.approx(p_wrong[0])
    records = records_of(run)
    folds = [
        dict(zip(records.pair_id[rows], records.fold[rows], strict=True))
        for rows in (records.seed == 41, records.seed == 42)
    ]
    assert folds[0].keys() == folds[1].keys() and folds[0] != folds[1]


def test_the_gradient_of_a_sample_and_the_log_probs_of_all(inputs: Path, alone: Run) -> None:
    run = scored(one_step_recipe(inputs, "sampled", gradient_pairs=20))
    costs = [read_json(run.folder.scores(scorer) / "cost.json") for scorer in run.scorer_runs]
    assert sum(cost["gradient_pairs"] for cost in costs) == 20
    ours, wanted = (load_reference(each.folder.reference) for each in (run, alone))
    assert ours.pair_ids == wanted.pair_ids
    np.testing.assert_allclose(ours.chosen_P, wanted.chosen_P, rtol=0, atol=LOGP_TOLERANCE)


def test_kept_scorers_give_the_log_ratios_that_were_measured(inputs: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = scored(one_step_recipe(inputs, "kept", keep_scorers=True))
    records, tokens = records_of(run), load_tokens(run.folder.pairs)
    folder = run.folder.scores(run.scorer_runs[5])
    cost = read_json(folder / "cost.json")
    place = int(np.flatnonzero(records.fold == 5)[0])
    row = next(each for each in tokens if each["pair_id"] == records.pair_id[place])
    base = AutoModelForCausalLM.from_pretrained(run.recipe.model.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "scorer")
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    found = float(logps.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :].sum())
    ratio = (records.policy_chosen_logp[place] - records.reference_chosen_logp[place]) / cost["scale"]
    assert found - records.reference_chosen_logp[place] == pytest.approx(ratio, abs=LOGP_TOLERANCE)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"seeds": [7]}, "give splits and leave seeds and evaluations out"),
        ({"evaluations": 5}, "give splits and leave seeds and evaluations out"),
        (
            {"trainer": {"learning_rate": 1e-4}},
            "trainer.learning_rate has no effect with protocol 'one-step'",
        ),
        # All weights are changed, on each process.
        ({"lora": None, "trainer": {"fsdp": True}}, "trainer.fsdp has no effect with protocol 'one-step'"),
        ({"lora": {**LORA, "init_lora_weights": False}}, "an adapter that starts as none"),
        ({"protocol": "fast", "splits": 2}, "splits works only with protocol 'one-step'"),
        ({"protocol": "fast", "check": 5}, "check works only with protocol 'one-step'"),
        ({"protocol": "fast", "gradient_pairs": 5}, "gradient_pairs works only with protocol 'one-step'"),
        ({"min_fold_prompts": 6}, "min_fold_prompts has no effect with protocol 'one-step'"),
    ],
)
def test_options_without_effect_are_refused(
    inputs: Path, tmp_path: Path, block: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads(one_step_recipe(inputs, "refused").model_dump_json(exclude_defaults=True))
    raw["score"] = {"protocol": "one-step", **block}
    raw["output_dir"] = str(tmp_path / "runs")
    (tmp_path / "recipe.json").write_text(json.dumps(raw), "utf-8")
    assert main(["score", str(tmp_path / "recipe.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_loss_that_starts_the_wrong_way_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # DiscoPOP's loss rises at a log-ratio of 0, with its usual temperature of 0.05.
    trainer = {"beta": 0.1, "bf16": False, "loss_type": "discopop"}
    recipe = one_step_recipe(inputs, "discopop", trainer=trainer)
    assert main(["score", str(recipe_file(recipe, tmp_path / "discopop.yaml"))]) == 2
    assert "does not prefer chosen to rejected" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["ipo", "hinge", "sigmoid_norm"])
def test_other_losses_are_on_their_own_scale(inputs: Path, loss: str) -> None:
    trainer = {"beta": 0.1, "bf16": False, "loss_type": loss, "activation_checkpointing": False}
    run = scored(one_step_recipe(inputs, loss, trainer=trainer))
    records, tokens = records_of(run), load_tokens(run.folder.pairs)
    at = {name: row for row, name in enumerate(tokens["pair_id"])}
    rows = [tokens[at[name]] for name in records.pair_id]
    pairs = [
        np.stack([getattr(records, f"{who}_{side}_logp") for side in ("chosen", "rejected")], axis=1)
        for who in ("policy", "reference")
    ]
    counts = np.array([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in rows])
    np.testing.assert_allclose(records.loss, pair_losses(*pairs, counts, trainer).loss_P, rtol=1e-9)
    # One number for all pairs of a fold, fitted on the others: on the whole better than not moving.
    assert records.loss.mean() < chance_loss(trainer)


def test_fewer_prompts_than_folds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pairs_file(tmp_path / "pairs.jsonl", 20, prompts=7)
    recipe = one_step_recipe(tmp_path, "few")
    assert main(["score", str(recipe_file(recipe, tmp_path / "few.yaml"))]) == 2
    assert "cannot split 7 prompt(s) into 8 folds" in capsys.readouterr().err


def test_a_check_trains_scorers_beside_it_and_is_told(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = one_step_recipe(inputs, "checked", trainer={**TRAINER, "beta": 0.1}, check=30)
    path = str(recipe_file(recipe, tmp_path / "checked.yaml"))
    assert main(["plan", path]) == 0
    planned = capsys.readouterr().out
    assert "check/scores/seed41-fold0" in planned and "check/scores/seed41-fold1" in planned
    assert main(["curriculum", path]) == 0
    told = capsys.readouterr().out
    assert "check: with scorers trained on 30 pairs one-step agrees to " in told
    run = open_run(recipe, say=lambda line: None)
    facts = Curriculum.load(run.folder.curriculum).facts
    assert facts["check"]["pairs"] == 30
    # The scorers' records are no part of the difficulty.
    assert (facts["seeds"], facts["evaluations"], facts["pairs"]) == ([41], [1], PAIRS)
    scorers = [each.name for each in (run.folder.check / "scores").iterdir() if each.is_dir()]
    assert sorted(scorers) == ["seed41-fold0", "seed41-fold1"]
    # Nothing is made again; the check is verified with the rest, and by itself.
    made: list[str] = []
    curriculum(open_run(recipe, say=made.append))
    assert made == []
    assert main(["verify", str(run.folder.root)]) == 0
    assert main(["verify", str(run.folder.check)]) == 0
    assert main(["report", path]) == 0
    assert "check: with scorers trained on 30 pairs" in run.folder.report.read_text("utf-8")
