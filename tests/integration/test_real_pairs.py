"""`selective-dpo run` on 300 real preference pairs and a small model made on the spot, to the end."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from selective_dpo.cli import main
from selective_dpo.curriculum.records import read_records
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.store import load_pairs, load_tokens
from selective_dpo.evaluation.results import from_json
from selective_dpo.identity import ids_digest, pair_id
from selective_dpo.stats.estimates import clustered_mean
from selective_dpo.storage.artifacts import read_json, verify_folder

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TRAIN, TEST = DATA / "alpaca_pairs_train.jsonl.gz", DATA / "alpaca_pairs_test.jsonl.gz"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TRAIN.is_file(), reason=f"needs the real pairs in {DATA.name}/{TRAIN.name}"),
]

PAIRS = 300
SEEDS, EVALUATIONS = (41, 42), 2
BATCH = 16


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def small_model(folder: Path, texts: Iterator[str]) -> Path:
    """A random Qwen2 of two layers, with a byte-level BPE of 1,500 tokens learned from `texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(text, special=True) for text in special],
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(  # as Qwen's: no beginning of sequence, no template of its own here
        tokenizer_object=backend, pad_token=special[0], eos_token=special[2]
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder, after `selective-dpo run`."""
    folder = tmp_path_factory.mktemp("real")
    texts = (row[side][-1]["content"] for row in rows_of(TRAIN)[:300] for side in ("chosen", "rejected"))
    small_model(folder / "model", texts)
    trainer = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": BATCH,
        "activation_checkpointing": False,
        "beta": 0.1,
    }
    recipe = {
        "name": "real",
        "output_dir": str(folder / "runs"),
        "model": {"path": "model", "dtype": "float32", "chat_template": "chatml"},
        "data": {
            "train": [{"path": str(TRAIN)}],
            "test": [{"path": str(TEST), "fraction": 0.1}],
            "max_pairs": PAIRS,
            "max_length": 512,
            "max_prompt_length": 192,
            "seed": 7,
        },
        "score": {
            "protocol": "custom",
            "seeds": list(SEEDS),
            "evaluations": EVALUATIONS,
            "trainer": trainer,
        },
        "select": {"fraction": 0.4},
        "train": {"trainer": {**trainer, "logging_steps": 1}},
        "evaluate": {"generation": {"prompts": 3, "max_new_tokens": 8}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    assert main(["run", str(folder / "recipe.yaml")]) == 0
    return folder / "runs" / "real"


def test_every_folder_is_whole(run: Path) -> None:
    scorers = [f"scores/seed{seed}-fold{fold}" for seed in SEEDS for fold in (0, 1)]
    stages = ["pairs", "test-pairs", "reference", "test-reference", *scorers, "policy", "evaluation"]
    for name in stages:
        verify_folder(run / name)
    assert not list(run.rglob(".partial-*"))


def test_input_rows_are_kept_or_dropped_for_a_reason(run: Path) -> None:
    summary, table = read_json(run / "pairs" / "summary.json"), load_pairs(run / "pairs")
    statuses = table["status"].to_pylist()
    counts = {status: statuses.count(status) for status in set(statuses)}
    source = rows_of(TRAIN)
    assert summary["counts"] == counts
    assert summary["rows"] == len(table) == sum(counts.values()) == len(source)
    assert counts["not sampled"] == len(source) - PAIRS
    assert summary["kept"] == counts["kept"] == len(load_tokens(run / "pairs"))
    assert 100 < counts["kept"] < PAIRS  # some are too long, which is counted
    assert counts["too long"] + counts.get("prompt too long", 0) > 0
    # The ids are those of the rows' content, the prompts' ids are the data's own.
    for row, source_row in zip(table.to_pylist()[::97], source[::97], strict=True):
        if row["status"] != "not sampled":
            prompt = [{"role": "user", "content": source_row["prompt"]}]
            completions = (source_row["chosen"][1:], source_row["rejected"][1:])
            assert row["pair_id"] == pair_id(prompt, *completions)
            assert row["prompt_id"] == source_row["prompt_id"]


def kept_ids(folder: Path) -> list[str]:
    table = load_pairs(folder)
    return [
        row["pair_id"] for row in table.select(["pair_id", "status"]).to_pylist() if row["status"] == "kept"
    ]


def test_kept_scored_and_curriculum_ids_are_the_same(run: Path) -> None:
    kept = kept_ids(run / "pairs")
    curriculum = Curriculum.load(run)
    assert len(set(kept)) == len(kept)
    assert (
        set(kept)
        == set(curriculum.pair_ids)
        == set(pq.read_table(run / "reference" / "logps.parquet")["pair_id"].to_pylist())
    )
    rows = 0
    cells: set[tuple[str, int, int]] = set()
    for seed in SEEDS:
        folds = []
        for fold in (0, 1):
            folder = run / "scores" / f"seed{seed}-fold{fold}"
            records = read_records(folder / "records.parquet")
            cost = read_json(folder / "cost.json")
            assert cost["train_pairs"] + cost["held_out_pairs"] == len(kept)
            assert len(records) == cost["held_out_pairs"] * EVALUATIONS
            assert set(records.step.tolist()) == {
                -(-steps // 2) if (steps := cost["optimizer_steps"]) % 2 else steps // 2,
                steps,
            }
            rows += len(records)
            cells |= set(
                zip(records.pair_id.tolist(), records.seed.tolist(), records.evaluation.tolist(), strict=True)
            )
            folds.append((set(records.pair_id.tolist()), set(records.prompt_id.tolist())))
        (pairs_0, prompts_0), (pairs_1, prompts_1) = folds
        assert pairs_0 | pairs_1 == set(kept)
        assert not pairs_0 & pairs_1
        assert not prompts_0 & prompts_1
    assert rows == len(cells) == len(kept) * len(SEEDS) * EVALUATIONS


def test_the_difficulty_is_the_mean_of_the_records(run: Path) -> None:
    losses: dict[str, list[float]] = {}
    for folder in (run / "scores").iterdir():
        records = read_records(folder / "records.parquet")
        log_ratios = (
            records.policy_chosen_logp
            - records.reference_chosen_logp
            - records.policy_rejected_logp
            + records.reference_rejected_logp
        )
        np.testing.assert_allclose(records.margin, 0.1 * log_ratios, atol=1e-9)
        np.testing.assert_allclose(records.loss, np.log1p(np.exp(-records.margin)), atol=1e-9)
        for name, loss in zip(records.pair_id.tolist(), records.loss.tolist(), strict=True):
            losses.setdefault(name, []).append(loss)
    curriculum = Curriculum.load(run)
    expected = [float(np.mean(losses[name])) for name in curriculum.pair_ids]
    np.testing.assert_allclose(curriculum.difficulty_P, expected, atol=1e-12)
    assert np.std(expected) > 1e-4  # training moved them apart


def test_the_easiest_are_selected_and_trained_in_order(run: Path) -> None:
    curriculum = Curriculum.load(run)
    pairs = len(curriculum.pair_ids)
    facts, order = curriculum.facts, read_json(run / "policy" / "order.json")
    by_difficulty = [curriculum.pair_ids[row] for row in np.argsort(curriculum.difficulty_P, kind="stable")]
    assert curriculum.order == by_difficulty[: len(curriculum.order)]
    assert abs(len(curriculum.order) - 0.4 * pairs) <= 0.5
    assert facts["pairs"] == pairs
    assert facts["selected"] == order["pairs"] == order["consumed"] == len(curriculum.order)
    assert order["consumed_digest"] == order["expected_digest"] == ids_digest(curriculum.order)
    assert order["matches"]
    log = read_json(run / "policy" / "trainer_log.json")["log_history"]
    updates = -(-len(curriculum.order) // BATCH)
    difficulty = [entry["difficulty"] for entry in log if "difficulty" in entry]
    assert read_json(run / "policy" / "cost.json")["optimizer_steps"] == updates == len(difficulty)
    assert difficulty == sorted(difficulty)


def test_the_policy_loads_and_is_no_longer_the_starting_model(run: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(run / "policy", use_safetensors=True)
    start = AutoModelForCausalLM.from_pretrained(run.parents[1] / "model", use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    moved = [
        float((one - other).detach().abs().max())
        for one, other in zip(policy.parameters(), start.parameters(), strict=True)
    ]
    assert min(moved) > 0  # full fine-tuning
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert bool(policy(torch.tensor([ids])).logits.isfinite().all())
    assert "easiest 40%, easy to hard" in (run / "policy" / "README.md").read_text("utf-8")


def test_the_evaluation_is_of_the_held_out_pairs(run: Path) -> None:
    results = from_json(read_json(run / "evaluation" / "results.json"))
    assert [arm.name for arm in results.arms] == ["reference", "selected"]
    kept = kept_ids(run / "test-pairs")
    assert not set(kept) & set(kept_ids(run / "pairs"))
    for arm in results.arms:
        assert arm.held_out is not None
        assert arm.held_out.pairs == len(kept)
        assert arm.answer_tokens is not None
    reference, selected = results.arms
    assert reference.held_out is not None
    # The starting model against itself: every margin 0, every loss ln 2.
    assert reference.held_out.loss.value == pytest.approx(np.log(2), abs=1e-4)
    assert selected.pairs == len(Curriculum.load(run).order)
    generations = pq.read_table(run / "evaluation" / "generations.parquet").to_pylist()
    assert len(generations) == results.prompts * results.samples * 2 == 6
    assert all(0 <= row["tokens"] <= 8 for row in generations)


def test_the_agreement_between_seeds_is_computed_from_the_losses(run: Path) -> None:
    curriculum = Curriculum.load(run)
    (between,) = curriculum.facts["agreement"]["seeds"]
    assert (between["a"], between["b"]) == SEEDS
    assert (
        -1 <= between["spearman"]["low"] <= between["spearman"]["value"] <= between["spearman"]["high"] <= 1
    )
    above = clustered_mean(curriculum.difficulty_P > np.log(2), curriculum.table["prompt_id"].to_pylist())
    assert curriculum.facts["agreement"]["above_chance"]["value"] == pytest.approx(above.value)


def test_the_report_tells_the_counts(run: Path) -> None:
    page = (run / "report.html").read_text("utf-8")
    curriculum, summary = Curriculum.load(run), read_json(run / "pairs" / "summary.json")
    assert f"{len(curriculum.pair_ids):,} pairs were scored" in page
    assert f"{len(curriculum.order):,} were kept" in page
    for status, count in summary["counts"].items():
        row = page[page.index(f">{status}<") :][:200]
        assert f"{count:,}" in row
    assert f"{summary['rows']:,}" in page
    assert page.count("<script") == 2  # the page's own


def test_a_second_run_does_nothing_but_the_report(run: Path) -> None:
    def written_at() -> dict[str, int]:
        files = (path for path in run.rglob("*") if path.is_file())
        return {path.relative_to(run).as_posix(): path.stat().st_mtime_ns for path in files}

    before = written_at()
    assert main(["run", str(run.parents[1] / "recipe.yaml")]) == 0
    after = written_at()
    assert {name for name in after if after[name] != before.get(name)} == {"report.html"}
    assert after.keys() == before.keys()


def export(run: Path, kind: str, path: Path) -> Path:
    assert main(["export", str(run), "--format", kind, "--out", str(path)]) == 0
    return path


def test_exports_are_read_back(run: Path, tmp_path: Path) -> None:
    curriculum = Curriculum.load(run)
    source = {}
    for row in rows_of(TRAIN):
        prompt = [{"role": "user", "content": row["prompt"]}]
        source[pair_id(prompt, row["chosen"][1:], row["rejected"][1:])] = (
            prompt,
            row["chosen"][1:],
            row["rejected"][1:],
        )

    with export(run, "csv", tmp_path / "c.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["pair_id"] for line in lines] == curriculum.pair_ids
    np.testing.assert_allclose(
        [float(line["learning_order"]) for line in lines], curriculum.difficulty_P, rtol=1e-14
    )
    steps = [f"loss_step{step:02d}_seed{seed}" for seed in SEEDS for step in range(EVALUATIONS)]
    assert list(lines[0]) == ["prompt_id", *steps, "learning_order", "pair_id", "p_wrong"]

    assert pq.read_table(export(run, "parquet", tmp_path / "c.parquet")).equals(curriculum.table)

    text = export(run, "jsonl", tmp_path / "c.jsonl").read_text("utf-8")
    objects = [json.loads(line) for line in text.splitlines()]
    assert [row["pair_id"] for row in objects] == curriculum.order
    loaded = datasets.load_from_disk(str(export(run, "datasets", tmp_path / "c")))
    assert loaded["pair_id"] == curriculum.order
    for rows in (objects, loaded.to_list()):
        assert all((row["prompt"], row["chosen"], row["rejected"]) == source[row["pair_id"]] for row in rows)
