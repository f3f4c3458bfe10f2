"""Real preference data: every row accounted for, prompts where they should be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data.prepare import prepare_pairs
from selective_dpo.data.sources import open_source
from selective_dpo.data.store import load_pairs, load_tokens, prompt_keys
from tests.fixtures.tokenizers import byte_tokenizer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}"),
]


def source_of(name: str) -> SourceConfig:
    return SourceConfig(path=str(DATA / name))


def test_alpaca_pairs_reconcile(tmp_path: Path) -> None:
    source = source_of("alpaca_pairs_train.jsonl.gz")
    config = DataConfig(train=(source,), max_length=4096, max_prompt_length=2048)
    summary = prepare_pairs([source], config, byte_tokenizer(), tmp_path / "train", key="k")
    table = load_pairs(tmp_path / "train")
    assert sum(summary.counts.values()) == summary.rows == table.num_rows == 4349
    assert Counter(table["status"].to_pylist()) == summary.counts
    assert summary.boundary_mismatches == 0
    raw = list(open_source(source).rows())
    distinct = {json.dumps([row["chosen"], row["rejected"]]) for row in raw}
    assert summary.counts["duplicate pair"] == len(raw) - len(distinct)
    # One completion of row 1,520 is the other after a space.
    assert summary.counts["same but for space at the ends"] == 1
    assert table["status"][1520].as_py() == "same but for space at the ends"
    reasons = set(summary.counts) - {"kept", "duplicate pair", "same but for space at the ends"}
    assert reasons <= {"too long", "prompt too long", "empty completion", "identical"}
    assert table["prompt_id"].to_pylist() == [row["prompt_id"] for row in raw]
    assert table["score_chosen"].to_pylist() == [row["score_chosen"] for row in raw]
    assert json.loads(table["prompt"][0].as_py()) == raw[0]["chosen"][:-1]
    per_prompt = Counter(table["prompt_id"].to_pylist())
    assert max(per_prompt.values()) == 6
    tokens = load_tokens(tmp_path / "train")
    assert len(tokens) == summary.kept
    assert len(set(tokens["pair_id"][:])) == summary.kept

    test = source_of("alpaca_pairs_test.jsonl.gz")
    held_out = prepare_pairs(
        [test],
        config,
        byte_tokenizer(),
        tmp_path / "test",
        key="k",
        exclude_prompts=prompt_keys(tmp_path / "train"),
    )
    assert held_out.rows == 479
    assert "in training data" not in held_out.counts  # The file's prompts are disjoint from train's.


def test_hh_dialogues_end_their_prompt_with_the_assistants_turn(tmp_path: Path) -> None:
    source = source_of("hh_harmless_test.jsonl.gz")
    config = DataConfig(train=(source,), max_length=4096, max_prompt_length=3072)
    summary = prepare_pairs([source], config, byte_tokenizer(template=None), tmp_path / "pairs", key="k")
    table = load_pairs(tmp_path / "pairs")
    assert sum(summary.counts.values()) == summary.rows == table.num_rows == 2312
    # By an independent count over the file: four blank completions. Five rows have one assistant turn more on
    # one side, and stay.
    assert summary.counts["empty completion"] == 4
    assert summary.counts.keys() <= {
        "kept",
        "empty completion",
        "too long",
        "prompt too long",
        "duplicate pair",
    }
    assert summary.kept > 2000
    raw = list(open_source(source).rows())
    for number, row in enumerate(raw):
        prompt, chosen, rejected = (json.loads(table[name][number].as_py()) for name in COLUMNS)
        assert prompt.endswith("\n\nAssistant:")
        assert (prompt + chosen, prompt + rejected) == (row["chosen"], row["rejected"])


COLUMNS = ("prompt", "chosen", "rejected")
