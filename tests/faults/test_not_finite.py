"""Row 10 of the fault matrix: a pair whose loss is NaN or infinite, a gradient that is not finite.

A letter that only one pair holds has NaN in its row of the embeddings: that pair's numbers really are not
finite, all others' are.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from selective_dpo import Curriculum
from selective_dpo.cli import main
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.records import Records, read_records, sift
from selective_dpo.curriculum.table import curriculum_losses
from selective_dpo.data.store import load_pairs
from selective_dpo.difficulty import scorer as scorer_module
from selective_dpo.difficulty.scorer import collect_records
from selective_dpo.errors import ArtifactError, IdentityError, NotFiniteError, RecordsError
from selective_dpo.logprobs.nonfinite import FILE, read_quarantine, require_few
from selective_dpo.logprobs.reference import load_reference
from selective_dpo.report.content import load_report_content
from selective_dpo.report.inspect import Wanted, look_at
from selective_dpo.report.page import headline
from selective_dpo.run.run import curriculum as build
from selective_dpo.run.run import open_run
from selective_dpo.storage.artifacts import read_json, verify_folder
from selective_dpo.training import train as train_module
from selective_dpo.training.trainer import FiniteGradients, PairTrainer
from tests.fixtures.fork_server import ForkServer
from tests.fixtures.models import LORA, recipe_file, tiny_model_folder, tiny_pairs_file, tiny_recipe
from tests.fixtures.processes import trained_weights
from tests.fixtures.tokenizers import byte_tokenizer
from tests.fixtures.training import curriculum_of, dpo_config, load_model, pair_of, text_rows, tokens_of

ROOT = Path(__file__).resolve().parents[2]
POISON = "~"
"""Stands in no other pair."""


def poisoned(model: Any, value: float = math.nan) -> Any:
    model.get_input_embeddings().weight.data[ord(POISON)] = value
    return model


def poison_folder(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][ord(POISON)] = math.nan
    save_file(weights, file, metadata={"format": "pt"})


# --- scoring ----------------------------------------------------------------------------------------------


def write_inputs(folder: Path, *, poisoned_pairs: int, pairs: int = 24) -> list[str]:
    """Model and pairs in `folder`; returns the ids of the pairs that hold the poison."""
    tiny_model_folder(folder / "model")
    file = tiny_pairs_file(folder / "pairs.jsonl", pairs)
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    for row in rows[:poisoned_pairs]:
        row["chosen"] = f"{row['chosen'][:1]}{POISON}{row['chosen'][1:]} "
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [pair_of(row).pair_id for row in rows[:poisoned_pairs]]


@pytest.fixture(scope="module")
def with_bad_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run folder up to the curriculum, the one pair that is not finite, and what was told."""
    folder = tmp_path_factory.mktemp("reference")
    (bad,) = write_inputs(folder, poisoned_pairs=1)
    poison_folder(folder / "model")
    told: list[str] = []
    run = open_run(tiny_recipe(folder), say=told.append)
    build(run)
    return run.folder.root, bad, "\n".join(told)


@pytest.mark.fault(row=10)
def test_a_pair_without_finite_reference_is_in_no_training_no_record_and_no_mean(
    with_bad_reference: tuple[Path, str, str],
) -> None:
    run, bad, told = with_bad_reference
    verify_folder(run / "reference")
    assert bad not in load_reference(run / "reference").pair_ids
    (entry,) = read_json(run / "reference" / FILE)["pairs"]
    # In one row for both completions even a masked NaN spoils the other one.
    assert entry["pair_id"] == bad and entry["not_finite"] == [{"values": ["chosen", "rejected"]}]
    assert f"reference: 24 pairs; 1 of them not finite, set aside: {bad}" in told
    halves = []
    for scorer in ("seed41-fold0", "seed41-fold1"):
        records = read_records(run / "scores" / scorer / "records.parquet")
        assert bad not in records.pair_id and np.isfinite(records.loss).all()
        cost = read_json(run / "scores" / scorer / "cost.json")
        halves.append((cost["train_pairs"], cost["held_out_pairs"]))
    assert sum(train for train, _ in halves) == sum(held for _, held in halves) == 23
    assert "curriculum: 12 of 23 pairs" in told and "1 more not finite, not selected" in told


@pytest.mark.fault(row=10)
def test_the_curriculum_lists_it_without_a_difficulty_and_everything_reads_that(
    with_bad_reference: tuple[Path, str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, bad, _ = with_bad_reference
    curriculum = Curriculum.load(run)
    row = curriculum.pair_ids.index(bad)
    assert curriculum.pair_ids == sorted(curriculum.pair_ids) and len(curriculum.pair_ids) == 24
    listed = {name: curriculum.table[name][row].as_py() for name in curriculum.table.column_names}
    assert listed.pop("prompt_id") and listed.pop("pair_id") == bad
    assert listed.pop("reason") == "not finite" and listed.pop("selected") is False
    assert (listed.pop("count"), listed.pop("rank"), listed.pop("position")) == (0, -1, -1)
    assert set(listed.values()) == {None}  # difficulty, spread and every loss
    facts = curriculum.facts
    assert (facts["pairs"], facts["quarantined"], facts["selected"], facts["partial"]) == (23, 1, 12, 0)
    assert facts["agreement"]["pairs"] == 23
    assert bad not in curriculum.order
    # Ranks and difficulties of the others are those of a table that never knew the pair.
    losses = curriculum_losses(curriculum)
    assert bad not in losses.pair_ids_P and np.isfinite(losses.losses_PSE).all()
    alone = build_curriculum(losses)
    assert alone.order == curriculum.order
    assert alone.difficulty_P.tolist() == curriculum.measured.difficulty_P.tolist()

    assert "1 more has no difficulty" in " ".join(headline(load_report_content(run)))
    assert main(["report", str(recipe_of(run))]) == 0
    assert main(["export", str(run), "--format", "csv", "--out", str(tmp_path / "all.csv")]) == 0
    exported = (tmp_path / "all.csv").read_text("utf-8").splitlines()
    assert len(exported) == 1 + 23 and "nan" not in "".join(exported).lower()
    assert main(["inspect", str(run), "--pair", bad]) == 2
    assert "has no difficulty: its records are not finite" in capsys.readouterr().err
    with pytest.raises(IdentityError, match="no difficulty"):
        look_at(run, Wanted(1, 1, 1, 1, (bad[:8],)))


def recipe_of(run: Path) -> Path:
    return run / "recipe.yaml"


@pytest.mark.fault(row=10)
def test_a_starting_model_that_is_not_finite_for_many_pairs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_inputs(tmp_path, poisoned_pairs=2)  # of 24: more than one, and more than 1%
    poison_folder(tmp_path / "model")
    recipe = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    assert main(["score", str(recipe)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "under the starting model of 2 of 24 pairs is not finite" in error
    assert all(pair in error for pair in bad)
    assert not (tmp_path / "runs" / "tiny" / "reference").exists()


def bad_at(bad: dict[str, int], value: float) -> Any:
    """`pair_logps` that gives `value` for some pairs' chosen at their evaluation (counted by call)."""
    measure = scorer_module.pair_logps
    calls: dict[str, int] = {}

    def spoiled(model: Any, tokens: Dataset, **others: Any) -> Any:
        logps = measure(model, tokens, **others)
        calls[others["what"]] = calls.get(others["what"], 0) + 1
        for pair, evaluation in bad.items():
            if pair in logps.pair_ids and calls[others["what"]] == evaluation:
                logps.chosen_P[logps.pair_ids.index(pair)] = value
        return logps

    return spoiled


@pytest.mark.fault(row=10)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_held_out_pair_is_quarantined_whatever_other_records_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model_folder(tmp_path / "model")
    tiny_pairs_file(tmp_path / "pairs.jsonl")
    recipe = tiny_recipe(tmp_path, score={"seeds": [41, 42]})
    first = open_run(recipe, say=lambda line: None)
    # All pairs, both seeds; the bad one is not finite only at the second evaluation of one seed.
    bad = tokens_of([json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()])[0]
    spoiled, seen = bad_at({bad["pair_id"]: 2}, value), []

    def only_seed_41(model: Any, tokens: Dataset, **others: Any) -> Any:
        seen.append(others["what"])
        return (
            spoiled(model, tokens, **others)
            if "seed41" in others["what"]
            else measure(model, tokens, **others)
        )

    measure = scorer_module.pair_logps
    monkeypatch.setattr(scorer_module, "pair_logps", only_seed_41)
    made = build(first)
    folders = [first.folder.scores(scorer) for scorer in first.scorer_runs]
    assert read_quarantine(folders) == {bad["pair_id"]: bad["prompt_id"]}
    (with_it,) = [folder for folder in folders if (folder / FILE).is_file()]
    (entry,) = read_json(with_it / FILE)["pairs"]
    (place,) = entry["not_finite"]
    assert place["evaluation"] == 2 and "policy_chosen_logp" in place["values"]
    assert set(place) == {"evaluation", "step", "values"} and place["step"] > 0
    assert bad["pair_id"] not in read_records(with_it / "records.parquet").pair_id
    # The other seed measured it, finitely; that is no reason to average over what is left.
    (other,) = [
        folder
        for folder in folders
        if "seed42" in folder.name and bad["pair_id"] in read_records(folder / "records.parquet").pair_id
    ]
    verify_folder(other)
    assert (made.facts["pairs"], made.facts["quarantined"], made.facts["partial"]) == (23, 1, 0)
    assert bad["pair_id"] not in collect_records(folders).pair_id
    assert f"1 pair(s) not finite, without records: {bad['pair_id']}" in caplog.text
    # Nor with partial records.
    run = first.folder.root
    partial = main(
        ["curriculum", str(recipe_of(run)), "--output_dir", str(run.parent), "--allow-partial", "--fresh"]
    )
    assert partial == 0
    row = Curriculum.load(run).pair_ids.index(bad["pair_id"])
    assert Curriculum.load(run).table["difficulty"][row].as_py() is None


@pytest.mark.fault(row=10)
def test_a_scorer_with_many_pairs_that_are_not_finite_fails_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path)
    ids = tokens_of([json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()])[
        "pair_id"
    ]
    monkeypatch.setattr(scorer_module, "pair_logps", only_fold_0(dict.fromkeys(ids, 1)))
    assert main(["curriculum", str(recipe_file(recipe, tmp_path / "recipe.yaml"))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "seed41-fold0: the held-out loss of 1" in error and "more than can be set aside (1%)" in error
    scores = tmp_path / "runs" / "tiny" / "scores"
    assert [path.name for path in scores.iterdir() if path.is_dir()] == ["seed41-fold1"]
    verify_folder(scores / "seed41-fold1")


def only_fold_0(bad: dict[str, int]) -> Any:
    measure, spoiled = scorer_module.pair_logps, bad_at(bad, math.nan)

    def measured(model: Any, tokens: Dataset, **others: Any) -> Any:
        way = spoiled if "fold0" in others["what"] else measure
        return way(model, tokens, **others)

    return measured


def records_of(losses: list[list[float]]) -> Records:
    """Records of one seed and fold: row p holds pair p's loss at each evaluation."""
    count, evaluations = len(losses), len(losses[0])
    loss_R = np.array(losses, dtype=np.float64).T.reshape(-1)
    whole = {
        "pair_id": np.tile(np.array([f"p{place}" for place in range(count)]), evaluations),
        "prompt_id": np.tile(np.array([f"q{place}" for place in range(count)]), evaluations),
        "evaluation": np.repeat(np.arange(1, evaluations + 1), count),
    }
    ones = {"seed": 41, "fold": 0, "step": 7}
    return Records(
        **whole,
        **{name: np.full(len(loss_R), value) for name, value in ones.items()},
        **{
            name: np.zeros(len(loss_R))
            for name in (
                "policy_chosen_logp",
                "policy_rejected_logp",
                "reference_chosen_logp",
                "reference_rejected_logp",
                "margin",
            )
        },
        loss=loss_R,
    )


@pytest.mark.fault(row=10)
def test_all_records_of_a_pair_are_set_aside_with_one_of_them() -> None:
    records, quarantined = sift(records_of([[0.5, 0.6], [math.nan, 0.7], [0.8, 0.9], [1.0, math.inf]]))
    assert records.pair_id.tolist() == ["p0", "p2", "p0", "p2"]
    assert records.loss.tolist() == [0.5, 0.8, 0.6, 0.9]
    assert [(entry["pair_id"], entry["prompt_id"]) for entry in quarantined] == [("p1", "q1"), ("p3", "q3")]
    assert quarantined[1]["not_finite"] == [{"evaluation": 2, "step": 7, "values": ["loss"]}]


@pytest.mark.parametrize(
    ("bad", "pairs", "refused"), [(1, 10, False), (2, 199, True), (2, 200, False), (3, 200, True)]
)
def test_one_percent_and_always_one_may_be_set_aside(bad: int, pairs: int, refused: bool) -> None:
    entries = [{"pair_id": f"p{place}"} for place in range(bad)]
    if refused:
        with pytest.raises(RecordsError, match=rf"of {bad} of {pairs} pairs is not finite.*p0, p1.*; do so"):
            require_few(entries, pairs, what="it", remedy="do so")
    else:
        require_few(entries, pairs, what="it", remedy="do so")


def test_a_damaged_quarantine_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"pairs": [{"pair": "x"}]}', "utf-8")
    with pytest.raises(ArtifactError, match=f"{FILE} does not hold quarantined pairs"):
        read_quarantine([tmp_path])


# --- training: losses --------------------------------------------------------------------------------------

PAIRS, BAD = 12, 7


def rows_with_poison() -> tuple[list[dict[str, Any]], str]:
    rows = text_rows(PAIRS)
    rows[BAD] = {**rows[BAD], "rejected": f"-{BAD}{POISON} b"}
    return rows, pair_of(rows[BAD]).pair_id


def trainer_for(
    model: Any, folder: Path, *, path: str = "auto", lora: bool = False, bad_reference: float | None = None,
    with_ids: bool = True, rows: list[dict[str, Any]] | None = None, **settings: Any,
) -> PairTrainer:  # fmt: skip
    """A trainer of 12 pairs in their order, 2 a batch and 4 an update, with reference log-probs."""
    own = rows or rows_with_poison()[0]
    tokens = tokens_of(own)
    chosen = np.linspace(-40.0, -20.0, len(own))
    if bad_reference is not None:
        chosen[BAD] = bad_reference
    data = tokens.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", chosen - 1)
    return PairTrainer(
        model,
        args=dpo_config(
            folder / "out", gradient_accumulation_steps=2, precompute_ref_log_probs=True, **settings
        ),
        train_dataset=data if with_ids else data.remove_columns(["pair_id"]),
        processing_class=byte_tokenizer(bos=False),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM") if lora else None,
        path=path,  # type: ignore[arg-type]
    )


@pytest.mark.fault(row=10)
@pytest.mark.parametrize(
    ("path", "lora"), [("auto", False), ("auto", True), ("padded", False), ("padded", True)]
)
def test_training_stops_before_it_learns_from_a_pair_that_is_not_finite(
    model_folder: Path, tmp_path: Path, path: str, lora: bool
) -> None:
    _, bad = rows_with_poison()
    trainer = trainer_for(poisoned(load_model(model_folder)), tmp_path, path=path, lora=lora)
    with pytest.raises(NotFiniteError) as stopped:
        trainer.train()
    message = str(stopped.value)
    # Pair 7 is in the second update of four pairs; nobody else is named.
    assert message.startswith(
        "the loss of 1 of 2 pairs is not finite, and the training stopped before update 2"
    )
    assert f" learned from it: {bad};" in message and "data.exclude" in message
    assert trainer.state.global_step == 1
    # The weights are those after the first update, to the last bit.
    short = trainer_for(
        poisoned(load_model(model_folder)),
        tmp_path,
        path=path,
        lora=lora,
        max_steps=1,
        lr_scheduler_type="constant",
    )
    short.train()
    again = trainer_for(
        poisoned(load_model(model_folder)), tmp_path, path=path, lora=lora, lr_scheduler_type="constant"
    )
    with pytest.raises(NotFiniteError):
        again.train()
    for name, weight in trained_weights(again).items():  # type: ignore[arg-type]
        expected = trained_weights(short)[name]  # type: ignore[arg-type]
        assert torch.equal(weight.nan_to_num(7.0), expected.nan_to_num(7.0)), name


@pytest.mark.fault(row=10)
@pytest.mark.parametrize("reference", [math.nan, math.inf])
def test_an_infinite_loss_is_no_better(model_folder: Path, tmp_path: Path, reference: float) -> None:
    _, bad = rows_with_poison()
    # An infinite reference of the chosen one makes the margin minus infinity, and the loss infinite.
    trainer = trainer_for(load_model(model_folder), tmp_path, bad_reference=reference)
    with pytest.raises(NotFiniteError, match=f"learned from it: {bad};"):
        trainer.train()


def test_pairs_without_ids_stop_it_too_and_a_model_that_is_lost_names_them_all(
    model_folder: Path, tmp_path: Path
) -> None:
    nameless = trainer_for(poisoned(load_model(model_folder)), tmp_path, with_ids=False)
    with pytest.raises(NotFiniteError, match=r"the loss of some of 2 pairs.*the rows have no pair_id"):
        nameless.train()
    lost = load_model(model_folder)
    lost.get_input_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(NotFiniteError, match=r"the loss of 2 of 2 pairs is not finite.* update 1"):
        trainer_for(lost, tmp_path).train()


def test_the_other_losses_are_what_they_were(model_folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(load_model(model_folder), tmp_path)
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


# --- training: gradients -----------------------------------------------------------------------------------


@pytest.mark.fault(row=10)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    model_folder: Path, tmp_path: Path, value: float, max_grad_norm: float
) -> None:
    rows = text_rows(PAIRS)
    model = load_model(model_folder)
    trainer = trainer_for(model, tmp_path, rows=rows, max_grad_norm=max_grad_norm)
    weight = model.get_output_embeddings().weight
    before: list[torch.Tensor] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.state.global_step == 1:
            if not before:
                before.append(weight.detach().clone())
            gradient = gradient.clone()
            gradient[3, 1] = value
        return gradient

    weight.register_hook(spoil)
    with pytest.raises(NotFiniteError) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert message.startswith("the gradient of update 2 is not finite though the losses of its pairs are")
    # The update's own pairs are named: rows 4 to 7.
    ids = [pair_of(row).pair_id for row in rows]
    assert all((pair in message) == (4 <= place < 8) for place, pair in enumerate(ids))
    assert torch.equal(weight, before[0]) and weight.isfinite().all()


def test_loss_scaling_may_skip_updates_and_a_large_gradient_is_not_infinite() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.full_like(model.weight, math.inf)
    accelerator = SimpleNamespace(scaler=object(), num_processes=1, device=torch.device("cpu"))
    trainer = SimpleNamespace(model=model, accelerator=accelerator)
    check, state = FiniteGradients(trainer, list), SimpleNamespace(global_step=0)
    check.on_pre_optimizer_step(None, state, None)
    accelerator.scaler = None
    with pytest.raises(NotFiniteError):
        check.on_pre_optimizer_step(None, state, None)
    # Its square is beyond float32, it is not.
    model.weight.grad = torch.full_like(model.weight, 1e30)
    check.on_pre_optimizer_step(None, state, None)


# --- training: several processes, the command line ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault(row=10)
def test_of_two_processes_both_stop_and_name_the_pair_of_one(
    model_folder: Path, tmp_path: Path, server: ForkServer
) -> None:
    rows, bad = rows_with_poison()
    shutil.copytree(model_folder, tmp_path / "model")
    poison_folder(tmp_path / "model")
    curriculum_of(rows, [0.1 * place for place in range(PAIRS)], rule="all").save(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    ended = server.run_ranks(2, "-m", "tests.fixtures.processes", tmp_path, json.dumps({"lora": False}))
    assert all(each.code for each in ended)
    # Two pairs for each process and update: row 7 is the second process's, in the second update.
    message = "the loss of 1 of 4 pairs is not finite, and the training stopped before update 2"
    assert all(f"NotFiniteError: {message} learned from it: {bad}" in each.errors for each in ended)
    assert not (tmp_path / "trained.safetensors").exists()


@pytest.mark.slow
@pytest.mark.fault(row=10)
def test_the_command_names_the_pair_publishes_nothing_and_does_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bad,) = write_inputs(tmp_path, poisoned_pairs=1)
    recipe = tiny_recipe(
        tmp_path, score={"evaluations": 1}, select={"rule": "all"}, launch={"checkpoint_steps": 1}
    )
    path, run = recipe_file(recipe, tmp_path / "recipe.yaml"), tmp_path / "runs" / "tiny"
    assert main(["curriculum", str(path)]) == 0
    load = train_module.load_policy
    monkeypatch.setattr(train_module, "load_policy", lambda config: poisoned(load(config)))
    capsys.readouterr()
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("selective-dpo: error: selected: the loss of 1 of 4 pairs is not finite")
    assert bad in error and not (run / "policy").exists() and not list(run.glob(".partial-*"))
    # What was saved before is of finite weights.
    for weights in (run / "checkpoints").rglob("adapter_model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(weights).values())

    assert main(["train", str(path), "--fresh", "--data.exclude", f"[{bad}]"]) == 0
    table = load_pairs(run / "pairs")
    status = dict(zip(table["pair_id"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert status[bad] == "excluded" and list(status.values()).count("kept") == 23
    assert read_json(run / "pairs" / "summary.json")["counts"] == {"kept": 23, "excluded": 1}
    assert bad not in Curriculum.load(run).pair_ids
    verify_folder(run / "policy")


@pytest.mark.fault(row=10)
def test_a_pair_to_exclude_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    unknown = "0123456789abcdef" * 2
    assert main(["score", str(path), "--data.exclude", f'["{unknown}"]']) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"data.exclude names 1 pair(s) that are not in the data: {unknown}" in error
    assert not (tmp_path / "runs" / "tiny" / "scores").exists()
    assert main(["score", str(path), "--data.exclude", '["not an id"]']) == 2
