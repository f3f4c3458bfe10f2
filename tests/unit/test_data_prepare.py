"""Each input row gets one status, the counts add up, and what is published is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data import prepare as prepare_module
from selective_dpo.data.prepare import pairs_key, prepare_pairs
from selective_dpo.data.store import PairsSummary, load_pairs, load_summary, load_tokens, prompt_keys
from selective_dpo.data.templates import load_template
from selective_dpo.errors import ArtifactError, ConfigError, DataError, TemplateError
from selective_dpo.identity import pair_id, prompt_id
from selective_dpo.storage.artifacts import is_complete, read_manifest
from tests.fixtures.tokenizers import CHATML, byte_tokenizer

GOOD = [{"prompt": f"question {number}", "chosen": " yes", "rejected": " no"} for number in range(4)]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in GOOD
]


def write_lines(path: Path, rows: list[Any]) -> SourceConfig:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return SourceConfig(path=str(path))


def limits(*sources: SourceConfig, **options: Any) -> DataConfig:
    return DataConfig.model_validate({"train": sources, "max_length": 60, "max_prompt_length": 30} | options)


def prepare(
    folder: Path,
    rows: list[Any],
    *,
    exclude: frozenset[str] = frozenset(),
    template: str | None = CHATML,
    **options: Any,
) -> PairsSummary:
    source = write_lines(folder / "data.jsonl", rows)
    config = limits(source, **options)
    tokenizer = byte_tokenizer(template=template)
    return prepare_pairs([source], config, tokenizer, folder / "pairs", key="k", exclude_prompts=exclude)


def test_every_row_has_one_status_in_its_place(tmp_path: Path) -> None:
    rows = [
        GOOD[0],
        "{broken",
        GOOD[1],
        GOOD[0],
        {**GOOD[2], "rejected": " yes"},
        {**GOOD[2], "prompt": "q" * 40},
        {**GOOD[2], "chosen": "c" * 60},
        {**GOOD[2], "chosen": "\ud800"},
        GOOD[3],
        {"other": 1},
    ]
    seen: list[int] = []
    source = write_lines(tmp_path / "data.jsonl", rows)
    summary = prepare_pairs(
        [source],
        limits(source),
        byte_tokenizer(),
        tmp_path / "pairs",
        key="k",
        exclude_prompts={prompt_id(GOOD[3]["prompt"])},
        progress=seen.append,
    )
    table = load_pairs(tmp_path / "pairs")
    assert table["status"].to_pylist() == [
        "kept",
        "malformed",
        "kept",
        "duplicate pair",
        "identical",
        "prompt too long",
        "too long",
        "malformed",
        "in training data",
        "malformed",
    ]
    assert table["row"].to_pylist() == list(range(10))
    assert set(table["source"].to_pylist()) == {source.path}
    assert seen == [10]
    assert summary.counts == {
        "kept": 2,
        "malformed": 3,
        "identical": 1,
        "duplicate pair": 1,
        "in training data": 1,
        "prompt too long": 1,
        "too long": 1,
    }
    assert sum(summary.counts.values()) == summary.rows == 10
    assert load_summary(tmp_path / "pairs") == summary
    # A row whose content can be read keeps it, whatever became of it; surrogates survive the way there.
    assert json.loads(table["chosen"][7].as_py()) == "\ud800"
    assert table["pair_id"][4].as_py() == pair_id(GOOD[2]["prompt"], " yes", " yes")
    assert table["pair_id"][1].as_py() is None


def test_token_counts_are_those_of_the_tokens(tmp_path: Path) -> None:
    summary = prepare(tmp_path, GOOD)
    table, tokens = load_pairs(tmp_path / "pairs"), load_tokens(tmp_path / "pairs")
    # <s> and 10 bytes "question 0"; " yes" and its end; " no" and its end.
    assert table["prompt_tokens"].to_pylist() == [11] * 4
    assert table["chosen_tokens"].to_pylist() == [5] * 4
    assert table["rejected_tokens"].to_pylist() == [4] * 4
    assert (summary.prompt_tokens, summary.completion_tokens) == (44, 36)
    assert tokens.column_names == ["pair_id", "prompt_id", "prompt_ids", "chosen_ids", "rejected_ids"]
    assert tokens["pair_id"][:] == table["pair_id"].to_pylist()
    assert byte_tokenizer().decode(tokens[3]["prompt_ids"] + tokens[3]["chosen_ids"]) == (
        "<s>question 3 yes<|im_end|>"
    )
    assert tokens.cache_files == []
    assert load_tokens(tmp_path / "pairs")._fingerprint == tokens._fingerprint


def test_too_long_rows_still_tell_how_long(tmp_path: Path) -> None:
    prepare(tmp_path, [*GOOD, {**GOOD[0], "chosen": "c" * 70}])
    assert load_pairs(tmp_path / "pairs")["chosen_tokens"][4].as_py() == 71


def test_truncated_pairs_are_counted(tmp_path: Path) -> None:
    summary = prepare(tmp_path, [*GOOD, {**GOOD[0], "chosen": "c" * 70}], overlong="truncate")
    table = load_pairs(tmp_path / "pairs")
    assert summary.truncated == 1
    assert table["truncated"].to_pylist() == [False] * 4 + [True]
    assert table["chosen_tokens"][4].as_py() == 60 - 30  # max_length - max_prompt_length


def test_sampling_leaves_rows_out_with_a_reason(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", GOOD * 1 + [{**GOOD[0], "chosen": f" {n}"} for n in range(16)])
    second = write_lines(tmp_path / "b.jsonl", [{**GOOD[1], "chosen": f" {n}"} for n in range(10)])
    half = first.model_copy(update={"fraction": 0.5})
    config = limits(half, second, max_pairs=15, seed=4)
    summary = prepare_pairs([half, second], config, byte_tokenizer(), tmp_path / "pairs", key="k")
    # 10 of the first's 20 rows and all 10 of the second's, of which 15 are drawn.
    assert summary.counts == {"kept": 15, "not sampled": 15}
    assert {source: sum(counts.values()) for source, counts in summary.sources.items()} == {
        first.path: 20,
        second.path: 10,
    }
    assert "b.jsonl: 10 rows" in summary.describe()
    kept = load_pairs(tmp_path / "pairs").filter(load_pairs(tmp_path / "pairs")["pair_id"].is_valid())
    assert load_tokens(tmp_path / "pairs")["pair_id"][:] == kept["pair_id"].to_pylist()


def test_pairs_of_one_prompt_share_one_id(tmp_path: Path) -> None:
    rows = [
        {**GOOD[0], "prompt_id": "own"},
        {**GOOD[0], "chosen": " maybe", "prompt_id": "another"},
        {**GOOD[0], "chosen": " perhaps"},
        GOOD[1],
    ]
    summary = prepare(tmp_path, rows)
    assert load_tokens(tmp_path / "pairs")["prompt_id"][:] == [*["own"] * 3, prompt_id(GOOD[1]["prompt"])]
    assert (summary.prompts, summary.joined_prompts) == (2, 2)
    assert "2 pairs took the prompt_id" in summary.describe()


@pytest.mark.parametrize("rows", [GOOD, CHAT], ids=["text", "chat"])
def test_test_pairs_leave_out_the_training_prompts(tmp_path: Path, rows: list[Any]) -> None:
    (tmp_path / "test").mkdir()
    # One training row is dropped, so its prompt is free for the test.
    prepare(tmp_path, [{**rows[0], "prompt_id": "own"}, rows[1], {**rows[2], "rejected": rows[2]["chosen"]}])
    keys = prompt_keys(tmp_path / "pairs")
    assert keys == {prompt_id(rows[0]["prompt"]), prompt_id(rows[1]["prompt"])}
    summary = prepare(tmp_path / "test", rows, exclude=keys)
    assert summary.counts == {"kept": 2, "in training data": 2}


def test_conversations_and_their_boundary(tmp_path: Path) -> None:
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(TemplateError, match=r"in 100\.0% of 4 pairs .* data.max_boundary_mismatch = 0\.05"):
        prepare(tmp_path, CHAT, template=thinking, max_prompt_length=50)
    assert list(tmp_path.iterdir()) == [tmp_path / "data.jsonl"]
    summary = prepare(tmp_path, CHAT, template=thinking, max_prompt_length=50, max_boundary_mismatch=1.0)
    assert (summary.boundary_mismatches, summary.boundary_mismatch_share) == (4, 1.0)
    assert load_pairs(tmp_path / "pairs")["boundary_mismatch"].to_pylist() == [True] * 4
    assert json.loads(load_pairs(tmp_path / "pairs")["prompt"][0].as_py()) == CHAT[0]["prompt"]
    with pytest.raises(TemplateError, match="no chat template"):
        prepare(tmp_path, CHAT, template=None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"question": "q", "answer": "a"}], "found are question, answer; wanted are chosen and rejected"),
        (["[1]", "nonsense"], "none of its 2 rows can be read"),
        ([GOOD[0], {**GOOD[1], "rejected": ""}], r"1 pairs of 1 prompts .*\(1 kept, 1 empty completion\)"),
        ([GOOD[0], {**GOOD[0], "rejected": " never"}], "2 pairs of 1 prompts"),
        ([{**row, "images": ["sky.png"]} for row in GOOD], r"\(0 kept, 4 images or parts not supported\)"),
        ([{**row, "tools": "[{}]"} for row in GOOD], r"\(0 kept, 4 tools not supported\)"),
    ],
)
def test_too_little_data_is_refused_and_nothing_is_left(
    tmp_path: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, rows)
    assert list(tmp_path.iterdir()) == [tmp_path / "data.jsonl"]


def test_empty_system_messages_are_counted(tmp_path: Path) -> None:
    own = {**CHAT[0], "prompt": [{"role": "system", "content": "s"}, *CHAT[0]["prompt"]]}
    identical = {**CHAT[1], "rejected": CHAT[1]["chosen"]}
    rows = [
        own,
        *CHAT[1:],
        identical,
        GOOD[0],
    ]  # of the kept, three are conversations without one
    summary = prepare(tmp_path, rows, empty_system_message=True, max_length=200, max_prompt_length=100)
    assert summary.counts == {"kept": 5, "identical": 1}
    assert summary.empty_system_messages == 3
    assert "\n  3 pairs were given an empty system message" in summary.describe()
    assert load_summary(tmp_path / "pairs") == summary


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plain text"):
        prepare(tmp_path, GOOD, empty_system_message=True)
    source = write_lines(tmp_path / "data.jsonl", GOOD)
    with pytest.raises(ConfigError, match="listed more than once"):
        prepare_pairs([source, source], limits(source), byte_tokenizer(), tmp_path / "pairs", key="k")


def test_the_folder_is_complete_and_only_it_is_read(tmp_path: Path) -> None:
    prepare(tmp_path, GOOD)
    assert is_complete(tmp_path / "pairs", key="k")
    assert sorted(read_manifest(tmp_path / "pairs").files) == [
        "pairs.parquet",
        "summary.json",
        "tokens.parquet",
    ]
    (tmp_path / "pairs" / "manifest.json").unlink()
    for load in (load_pairs, load_tokens, load_summary):
        with pytest.raises(ArtifactError, match="not complete"):
            load(tmp_path / "pairs")


def test_the_key_follows_what_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "data.jsonl", GOOD)
    tokenizer = byte_tokenizer()
    key = pairs_key([source], limits(source), tokenizer)
    assert key == pairs_key([source], limits(source, seed=9), tokenizer)  # Nothing is drawn.
    half = source.model_copy(update={"fraction": 0.5})
    others = [
        pairs_key([source], limits(source, max_length=61), tokenizer),
        pairs_key([half], limits(half), tokenizer),
        pairs_key([half], limits(half, seed=9), tokenizer),
        pairs_key([source], limits(source), byte_tokenizer(bos=False)),
        pairs_key([source], limits(source), byte_tokenizer(template=None)),
        pairs_key([source], limits(source), byte_tokenizer(template=load_template("zephyr"))),
        pairs_key([source], limits(source, overlong="truncate"), tokenizer),
        pairs_key([source], limits(source, empty_system_message=True), tokenizer),
        pairs_key([source], limits(source), tokenizer, exclude_prompts={"x"}),
    ]
    write_lines(tmp_path / "data.jsonl", GOOD[:3])
    others.append(pairs_key([source], limits(source), tokenizer))
    monkeypatch.setattr(prepare_module, "RULES", prepare_module.RULES - 1)  # What rows come to has changed.
    others.append(pairs_key([source], limits(source), tokenizer))
    assert len({key, *others}) == 12
