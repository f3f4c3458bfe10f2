"""Valid inputs of each parser, and pieces that make them invalid in interesting ways."""

from __future__ import annotations

import functools
import gzip
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tests.fixtures.tokenizers import CHATML

from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.records import SCHEMA, LossTable
from selective_dpo.data.adapters import Pair, parse_row

RECIPE = """\
name: a-run
output_dir: runs
model: {path: org/model, dtype: float32, tokenizer: org/tokenizer, chat_template: chatml}
data:
  train: [{path: pairs.jsonl, fraction: 0.5}, {path: org/pairs, split: train, revision: main}]
  test: [{path: held-out.csv}]
  max_length: 512
  max_prompt_length: 256
  overlong: truncate
score: {protocol: custom, seeds: [1, 2], evaluations: 3, lora: {r: 8}, trainer: {learning_rate: 5e-6}}
select: {rule: easiest, fraction: 0.5, order: easy-to-hard}
train: {lora: null, trainer: {num_train_epochs: 1, report_to: none}, hub_id: ""}
evaluate:
  generation: {prompts: 10, samples: 2, temperature: 0.7}
  judge: reward-model
  reward_model: org/judge
  controls: {hardest: {rule: hardest, fraction: 0.5}, all: {rule: all}}
launch: {workers: 2}
"""
TEXT_ROWS: list[dict[str, Any]] = [
    {"prompt": f"question {number}", "chosen": " yes", "rejected": " no", "score_chosen": number}
    for number in range(4)
]
CHAT_ROWS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"hello {number}"}],
        "chosen": [{"role": "assistant", "content": "good day"}],
        "rejected": [{"role": "assistant", "content": "bye"}],
        "prompt_id": f"p{number}",
    }
    for number in range(4)
]
ODD_TEXTS = (
    "",
    " ",
    "\u0000",
    "a\u0000",
    "\ud800",
    "\udfff\ud800",
    "\ufeff",
    "\u202eשלום \u2067مرحبا\u2069",
    "e\u0301" * 50,
    "👩‍👩‍👧‍👦",
    "\n\nHuman: a\n\nAssistant:",
    "<|im_end|>",
    "<s><pad>",
    "{{ 1/0 }}",
    "\x1b[31m",
    "x" * 300,
)
"""Texts that break things elsewhere."""
ODD_VALUES: tuple[Any, ...] = (
    *ODD_TEXTS,
    None,
    True,
    False,
    0,
    -1,
    2**31,
    2**63,
    -(2**70),
    10**400,
    0.0,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"role": "user"},
    [{"role": "user", "content": None}],
    [{"role": 1, "content": "x"}],
    [{"content": "x"}],
    [{"role": "assistant", "content": [{"type": "image"}]}],
)
PIECES = (
    *(text.encode("utf-8", "surrogatepass") for text in ODD_TEXTS),
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"NaN",
    b"Infinity",
    b"1e999",
    b"-1",
    b"0x" + b"f" * 60,
    b"9" * 50,
    b"9" * 5000,
    b"[" * 200,
    b'{"a":' * 60,
    b"&a [*a, *a]",
    b"<<: *a",
    b"!!timestamp x",
    b"!!python/object:os.system x",
    b'"\\ud800"',
    b'"\\UFFFFFFFF"',
    b"null",
    b"true",
    b",",
    b"\n",
    b'"',
    b"{{",
    b"{% for x in y %}",
    b"../../x",
    b"~nobody/x",
)
"""Bytes that are spliced into seeds."""
CHAT_PAIRS = [pair for pair in map(parse_row, CHAT_ROWS) if isinstance(pair, Pair)]


def json_lines(rows: list[Any]) -> bytes:
    """Rows as JSON Lines, lone surrogates as escapes."""
    return b"".join(json.dumps(row).encode("ascii") + b"\n" for row in rows)


def csv_bytes(rows: list[dict[str, Any]]) -> bytes:
    """Rows of texts as CSV."""
    import csv

    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode("utf-8", "surrogatepass")


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file."""
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def records_rows(pairs: int = 4) -> list[dict[str, Any]]:
    """Plausible records: one seed, two evaluations."""
    numbers = {name: 0.5 for name in SCHEMA.names if SCHEMA.field(name).type == pa.float64()}
    return [
        {
            "pair_id": f"{pair:032x}",
            "prompt_id": f"p{pair}",
            "seed": 41,
            "fold": pair % 2,
            "evaluation": evaluation,
            "step": evaluation,
            **numbers,
        }
        for evaluation in (1, 2)
        for pair in range(pairs)
    ]


def records_bytes(rows: list[dict[str, Any]]) -> bytes:
    """Records as the bytes of a file."""
    return parquet_bytes(pa.Table.from_pylist(rows, schema=SCHEMA))


@functools.cache
def curriculum() -> Any:
    """A curriculum of four pairs, two of them selected."""
    ids = np.array([f"{pair:032x}" for pair in range(4)])
    losses_PSE = np.array([0.4, 0.9, 0.6, 0.7]).reshape(4, 1, 1)
    return build_curriculum(LossTable(ids, ids, (41,), (1,), losses_PSE), {"fraction": 0.5})


@functools.cache
def curriculum_bytes() -> bytes:
    """Its table."""
    return parquet_bytes(curriculum().table)


def _facts_bytes() -> bytes:
    import hashlib

    from selective_dpo.storage.digests import digest

    facts = dict(curriculum().facts)
    table = hashlib.sha256(curriculum_bytes()).hexdigest()
    head = {"schema_version": 1, "table_sha256": table, "facts_sha256": digest(facts)}
    return json.dumps({**head, **facts}).encode()


GRADE = {"model": "a", "judge": ["gpt-4", "single-v1"], "score": 7}
PREFERENCE = {"instruction": "p", "output_1": "x", "output_2": "yy", "generator_1": "g", "generator_2": "a"}
PREFERENCE |= {"preference": 1.5, "annotator": "gpt-4"}
BATTLE = {"uid": "u", "category": "hard", "judge": "gpt-4", "model": "a", "baseline": "b"}
BATTLE |= {"games": [{"score": "A>>B"}, {"score": "A=B"}]}


def seeds_of(target: str) -> list[bytes]:
    """Valid inputs of a target."""
    csv_records = b"".join(b"id%d,0.%d\n" % (number, number + 1) for number in range(6))
    makers: dict[str, Any] = {
        "recipe": lambda: [RECIPE.encode(), b"a: &a {b: 1}\nc: {<<: *a}\n" + RECIPE.encode()],
        "override": lambda: [
            b"select.fraction=0.6",
            b"score.seeds=[1, 2]",
            b"data.train.0.path=x.csv",
            b"train.lora.r=8",
            b"evaluate.controls.one.rule=random",
        ],
        "pairs-jsonl": lambda: [json_lines(TEXT_ROWS), json_lines(CHAT_ROWS)],
        "pairs-json": lambda: [json.dumps(TEXT_ROWS).encode(), json.dumps(CHAT_ROWS, indent=1).encode()],
        "pairs-csv": lambda: [csv_bytes(TEXT_ROWS), csv_bytes([_as_cells(row) for row in CHAT_ROWS])],
        "pairs-parquet": lambda: [
            parquet_bytes(pa.Table.from_pylist(rows)) for rows in (TEXT_ROWS, CHAT_ROWS)
        ],
        "pairs-gzip": lambda: [gzip.compress(json_lines(TEXT_ROWS)), gzip.compress(json_lines(CHAT_ROWS))],
        "records-csv": lambda: [csv_records, csv_records + b"\0" + csv_records[::1]],
        "records-parquet": lambda: [records_bytes(records_rows())],
        "curriculum-table": lambda: [curriculum_bytes()],
        "curriculum-facts": lambda: [_facts_bytes()],
        "prompts": lambda: [json_lines([{"prompt": row["prompt"]} for row in TEXT_ROWS + CHAT_ROWS])],
        "judgments": lambda: [
            json_lines(
                [{**GRADE, "turn": turn, "question_id": number} for turn in (1, 2) for number in (1, 2)]
            ),
            json_lines([PREFERENCE, {**PREFERENCE, "generator_2": "b", "preference": 0}]),
            json_lines([BATTLE, {**BATTLE, "category": "creative"}]),
        ],
        "questions": lambda: [
            json_lines([{"instruction": "Why?", "dataset": "koala"}]),
            json_lines([{"uid": "ab", "prompt": "Why?", "category": "hard_prompt"}]),
            json_lines([{"question_id": 81, "category": "math", "turns": ["Why?", "How?"]}]),
        ],
        "difficulties": lambda: [b"instruction,difficulty\np,1\nq,-2.5\n"],
        "template": lambda: [CHATML.encode(), b"{{ messages[0]['content'] }}{% set x = 1 %}"],
    }
    return list(makers[target]())


def _as_cells(row: dict[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
