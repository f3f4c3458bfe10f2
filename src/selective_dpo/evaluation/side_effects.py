"""What alignment costs: how answers end and repeat, how likely other text is, and scores of other tasks.

The first two are measured of every evaluation. Tasks are run by lm-evaluation-harness
(https://github.com/EleutherAI/lm-evaluation-harness, extra `guard`), in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence

from selective_dpo.config import GuardConfig
from selective_dpo.data.readers import read_file
from selective_dpo.errors import ConfigError, DataError, IdentityError, ModelError, name_some
from selective_dpo.evaluation.generate import Answers
from selective_dpo.evaluation.results import SideEffects
from selective_dpo.stats.side_effects import TaskScore, change, repeated_share
from selective_dpo.storage.artifacts import read_json, write_json
from selective_dpo.storage.digests import digest

Documents = Mapping[str, Sequence[int]]
"""Document's name -> token ids."""

MAX_DOCUMENTS = 500
MAX_TOKENS = 512
"""Of a document; the rest is not read."""
_BATCH_TOKENS = 4_096

SCORES, TASKS = "scores.parquet", "tasks.json"
SCORE_COLUMNS = {
    "task": pa.string(),
    "metric": pa.string(),
    "document": pa.int64(),
    "digest": pa.string(),
    "value": pa.float64(),
}
"""`metric` is the harness's, with its filter (`exact_match,strict-match`); `digest` is the document's."""


# --- In every evaluation: answers, and other text ---------------------------------------------------------


class Measured(NamedTuple):
    """What is compared with the starting model, by prompt or document."""

    ended: Mapping[str, Sequence[float]]
    repeated: Mapping[str, Sequence[float]]
    nats: Mapping[str, Sequence[float]]
    """Negative log-probability a token of each document."""


def measure(answers: Answers, nats: Mapping[str, float]) -> Measured:
    """Of an arm's answers and its `text_nats`."""
    return Measured(
        {name: [float(each.ended) for each in several] for name, several in answers.items()},
        {name: [repeated_share(each.text) for each in several] for name, several in answers.items()},
        {name: [value] for name, value in nats.items()},
    )


def side_effects(measured: Measured, start: Measured | None) -> SideEffects:
    """An arm beside the starting model; `start` is None for the starting model itself."""
    return SideEffects(
        *(
            change(values, start and getattr(start, name)) if values else None
            for name, values in measured._asdict().items()
        )
    )


@torch.no_grad()
def text_nats(model: Any, documents: Documents) -> dict[str, float]:
    """Mean negative log-probability of each document's tokens but the first, in nats a token.

    A document of one token has none and is left out. The model's mode is restored.
    """
    rows = sorted(
        (
            (name, torch.tensor(list(ids[:MAX_TOKENS]), device=model.device))
            for name, ids in documents.items()
            if len(ids) > 1
        ),
        key=lambda row: (len(row[1]), row[0]),
    )
    was_training = model.training
    model.eval()
    found: dict[str, float] = {}
    while rows:
        size = max(1, _BATCH_TOKENS // len(rows[0][1]))
        batch = rows[: min(size, max(1, _BATCH_TOKENS // len(rows[min(size, len(rows)) - 1][1])))]
        rows = rows[len(batch) :]
        ids = pad_sequence([row for _, row in batch], batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for _, row in batch], batch_first=True)
        logits_BTV = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        for (name, row), logits_TV in zip(batch, logits_BTV, strict=True):
            target_T = row[1:]
            logps_TV = log_softmax(logits_TV[: len(target_T)].float(), dim=-1)
            found[name] = -float(logps_TV.gather(1, target_T[:, None]).mean())
    model.train(was_training)
    return found


def read_documents(path: Path) -> dict[str, str]:
    """Up to `MAX_DOCUMENTS` texts of a file: paragraphs of a .txt, or the column `text` of rows.

    Raises:
        DataError: there is no such file, or no text in it.
    """
    if not path.is_file():
        raise DataError(f"evaluate.text: no file {path}")
    if path.suffix == ".txt":
        texts = re.split(r"\n\s*\n", path.read_text("utf-8"))
    else:
        rows = (row.get("text") for row in read_file(path) if isinstance(row, Mapping))
        texts = [text for text in rows if isinstance(text, str)]
    kept = {digest(text): text for text in map(str.strip, texts) if text}
    if not kept:
        raise DataError(f"evaluate.text: {path} holds no text: give paragraphs (.txt), or rows with `text`")
    return dict(sorted(kept.items())[:MAX_DOCUMENTS])


# --- Tasks of lm-evaluation-harness -----------------------------------------------------------------------


def check_guard(config: GuardConfig) -> None:
    """Check what can be known before anything is trained.

    Raises:
        ConfigError: the harness is not installed, a task's file holds code that is not allowed, or the folder
            is not there.
    """
    if not importlib.util.find_spec("lm_eval"):
        raise ConfigError("evaluate.guard needs lm-evaluation-harness: pip install 'selective-dpo[guard]'")
    if not config.include_path:
        return
    folder = Path(config.include_path)
    if not folder.is_dir():
        raise ConfigError(f"evaluate.guard.include_path: no folder {folder}")
    with_code = [
        file.relative_to(folder).as_posix()
        for file in sorted(folder.rglob("*"))
        if file.suffix == ".py"
        or (file.suffix in (".yaml", ".yml") and "!function" in file.read_text("utf-8"))
    ]
    if with_code and not config.allow_code:
        raise ConfigError(
            f"tasks in {folder} run code of their own ({name_some(with_code)}): read it, then set "
            "evaluate.guard.allow_code: true"
        )


def run_tasks(
    config: GuardConfig,
    folder: Path,
    *,
    model: str,
    adapter: Path | None,
    tokenizer: Path,
    dtype: str,
    device: str,
) -> None:
    """Score one policy on the tasks, and write `scores.parquet` and `tasks.json` into `folder`.

    Args:
        model: the policy's folder, or, with an `adapter`, its base.
        tokenizer: of all arms, with the chat template they are trained with.

    Raises:
        ModelError: the harness failed; its last words are quoted.
    """
    arguments = {"pretrained": model, "tokenizer": str(tokenizer), "dtype": dtype}
    arguments |= {"peft": str(adapter)} if adapter else {}
    if odd := [value for value in arguments.values() if "," in value or "=" in value]:
        raise ModelError(f"lm-evaluation-harness takes no path with ',' or '=' in it: {odd[0]}; rename it")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
        command += [f"{name}={value}" for name, value in arguments.items()]
        command += ["--tasks", *config.tasks, "--output_path", scratch, "--log_samples"]
        command += ["--batch_size", str(config.batch_size), "--device", device]
        command += ["--include_path", config.include_path] if config.include_path else []
        command += ["--num_fewshot", str(config.num_fewshot)] if config.num_fewshot is not None else []
        command += ["--limit", str(config.limit)] if config.limit else []
        command += ["--apply_chat_template"] if config.chat else []
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise ModelError(f"lm-evaluation-harness failed ({said[-1][:300] if said else done.returncode})")
        table, tasks = read_harness(Path(scratch))
    pq.write_table(table, folder / SCORES)
    write_json(folder / TASKS, tasks)


def read_harness(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """What `lm_eval --log_samples` wrote below `folder`: values by document, and what is told of the tasks.

    Values that are no numbers (such as perplexities' pairs) are left out.

    Raises:
        ModelError: there are no samples, or they are not as expected.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.rglob("samples_*.jsonl")):
        named = re.fullmatch(r"samples_(.+)_\d{4}-\d\d-\d\dT[\d.\-]+", path.stem)
        for line in path.read_text("utf-8").splitlines():
            sample = json.loads(line)
            rows += [
                {
                    "task": named[1],
                    "metric": f"{metric},{sample['filter']}",
                    "document": sample["doc_id"],
                    "digest": sample["doc_hash"],
                    "value": float(sample[metric]),
                }
                for metric in sample.get("metrics", ())
                if named and isinstance(sample.get(metric), int | float)
            ]
    if not rows:
        raise ModelError(
            "lm-evaluation-harness left no samples to compare: choose tasks with scores by document"
        )
    (results,) = folder.rglob("results_*.json")
    told = read_json(results)
    kept = {name: told.get(name) for name in ("higher_is_better", "versions", "n-shot", "lm_eval_version")}
    return pa.Table.from_pylist(rows, schema=pa.schema(SCORE_COLUMNS)).sort_by(_BY), kept


_BY = [("task", "ascending"), ("metric", "ascending"), ("document", "ascending")]


def task_scores(arm: Path, start: Path | None) -> list[TaskScore]:
    """Scores of an arm's folder, and their differences from the starting model's, by document.

    Raises:
        IdentityError: the two were not asked the same documents.
    """
    mine = _scores(arm)
    theirs = _scores(start) if start else {}
    better = read_json(arm / TASKS).get("higher_is_better") or {}
    if start and set(mine) != set(theirs):
        raise IdentityError(f"{arm} and {start} hold other tasks: evaluate again")
    found = []
    for (task, metric), values in sorted(mine.items()):
        higher = (better.get(task) or {}).get(metric.split(",")[0], True)
        found.append(TaskScore(task, metric, bool(higher), change(values, theirs.get((task, metric)))))
    return found


def _scores(folder: Path) -> dict[tuple[str, str], dict[str, list[float]]]:
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in pq.read_table(folder / SCORES).to_pylist():
        # A document's place and content together: some tasks hold a question twice.
        name = f"{row['document']} {row['digest'][:16]}"
        found.setdefault((row["task"], row["metric"]), {}).setdefault(name, []).append(row["value"])
    return found


def task_line(score: TaskScore) -> str:
    """One line for people, in points: "gsm8k exact_match,strict-match: 42.1 -> 38.0, -4.1 ± 1.8, worse"."""
    value, found = score.score
    named = f"{score.task} {score.metric.removesuffix(',none')}"
    if found is None:
        return f"{named}: {100 * value.value:.1f} ± {50 * (value.high - value.low):.1f}"
    return (
        f"{named}: {100 * (value.value - found.value):.1f} -> {100 * value.value:.1f}, "
        f"{100 * found.value:+.1f} ± {50 * (found.high - found.low):.1f}, {score.verdict}"
    )
