"""Input rows -> kept and dropped -> tokens -> the reference's log-probs: every row is somewhere, once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.data.adapters import KEPT, DropReason
from selective_dpo.data.store import (
    PAIRS,
    PAIRS_SCHEMA,
    SUMMARY,
    TOKENS,
    TOKENS_SCHEMA,
    PairsSummary,
    load_summary,
    prompt_keys,
)
from selective_dpo.identity import ID_HEX_DIGITS
from selective_dpo.logprobs.nonfinite import read_quarantine
from selective_dpo.logprobs.reference import FILE as LOGPS
from selective_dpo.logprobs.reference import load_reference
from selective_dpo.run.verification.check import Check, Checks, counts_in_words
from selective_dpo.run.verification.files import artifact_name


class Kept(NamedTuple):
    """The pairs that everything after is about, in input order."""

    pair_ids: list[str]
    prompt_ids: list[str]
    tokens_P2: NDArray[np.int64]
    """Tokens of the chosen and the rejected completion."""

    @property
    def prompt_of(self) -> dict[str, str]:
        """pair_id -> prompt_id."""
        return dict(zip(self.pair_ids, self.prompt_ids, strict=True))


def check_pairs(checks: Checks, root: Path, folder: Path) -> Kept | None:
    """A folder of prepared pairs; returns the kept ones, where they can be read."""
    name = artifact_name(root, folder)
    kept: Kept | None = None
    with checks.of(name) as check:
        if not (folder / PAIRS).is_file():
            check.absent()
            return None
        table = _read(check, name, folder / PAIRS, PAIRS_SCHEMA)
        if table is None:
            return None
        is_kept = pc.equal(table["status"], KEPT)
        rows = table.filter(is_kept)
        statuses = Counter(table["status"].to_pylist())
        dropped = {status: count for status, count in sorted(statuses.items()) if status != KEPT}
        words = f" ({counts_in_words(dropped)})" if dropped else ""
        check.counted = (
            f"{len(table):,} rows = {statuses[KEPT]:,} kept + {sum(dropped.values()):,} dropped{words}"
        )
        _check_counts(check, f"{name}/{SUMMARY}", table, rows, load_summary(folder))
        _check_rows(check, f"{name}/{PAIRS}", table, rows)
        tokens_P2 = np.stack([rows[name].to_numpy() for name in ("chosen_tokens", "rejected_tokens")], axis=1)
        kept = Kept(rows["pair_id"].to_pylist(), rows["prompt_id"].to_pylist(), tokens_P2)
        check.same_ids(f"{name}/{PAIRS}", kept.pair_ids, kept.pair_ids, "the kept pairs")
        _check_tokens(check, f"{name}/{TOKENS}", folder, rows, kept)
    return kept


def check_reference(
    checks: Checks, root: Path, folder: Path, pair_ids: Sequence[str] | None, of: str = "the kept pairs"
) -> None:
    """The log-probs of these pairs (None: not known) under the starting policy; `of` says which they are."""
    name = artifact_name(root, folder)
    with checks.of(name) as check:
        if not (folder / LOGPS).is_file():
            check.absent()
            return
        logps = load_reference(folder)
        check.counted = f"{len(logps.pair_ids):,} pairs"
        is_finite = np.isfinite(logps.chosen_P) & np.isfinite(logps.rejected_P)
        check.at_no_row(f"{name}/{LOGPS}", logps.pair_ids, ~is_finite, "log-probs are not finite")
        aside = read_quarantine([folder])
        check.counted += f", {len(aside):,} more set aside as not finite" if aside else ""
        if pair_ids is not None:
            check.same_ids(f"{name}/{LOGPS}", [*logps.pair_ids, *aside], pair_ids, of)


def check_apart(checks: Checks, root: Path, train: Path, test: Path) -> None:
    """No prompt is in the training and in the held-out pairs."""
    with checks.of("held-out prompts", artifact_name(root, test)) as check:
        if not (test / PAIRS).is_file() or not (train / PAIRS).is_file():
            check.absent()
            return
        held_out = prompt_keys(test)
        both = sorted(held_out & prompt_keys(train))
        check.counted = f"{len(held_out):,} prompts, none of which is trained on"
        check.require(not both, artifact_name(root, test), f"{len(both):,} prompts are in {train.name}, too")


def _read(check: Check, name: str, path: Path, schema: pa.Schema) -> pa.Table | None:
    table = pq.read_table(path)
    if not table.schema.equals(schema):
        wrong = sorted(set(map(str, table.schema)) ^ set(map(str, schema)))
        check.wrong(f"{name}/{path.name}", f"columns missing, extra or mistyped: {', '.join(wrong)}")
        return None
    return table


def _check_counts(check: Check, name: str, table: pa.Table, rows: pa.Table, summary: PairsSummary) -> None:
    def total(column: str) -> int:
        return int(pc.sum(rows[column]).as_py() or 0)

    by_source: dict[str, Counter[str]] = {}
    for source, status in zip(table["source"].to_pylist(), table["status"].to_pylist(), strict=True):
        by_source.setdefault(source, Counter())[status] += 1
    found = {
        "rows": len(table),
        "kept": len(rows),
        "counts": dict(sum(by_source.values(), Counter())),
        "sources": {source: dict(counts) for source, counts in by_source.items()},
        "prompts": len(set(rows["prompt_id"].to_pylist())),
        "truncated": total("truncated"),
        "prompt_tokens": total("prompt_tokens"),
        "completion_tokens": total("chosen_tokens") + total("rejected_tokens"),
    }
    written = summary._asdict()
    without_zeros = {status: count for status, count in written["counts"].items() if count}
    written["counts"] = without_zeros
    written["sources"] = {
        source: {status: count for status, count in counts.items() if count}
        for source, counts in written["sources"].items()
    }
    for key, value in found.items():
        check.equal(name, key, written[key], value)


def _check_rows(check: Check, name: str, table: pa.Table, rows: pa.Table) -> None:
    unknown = sorted(set(table["status"].to_pylist()) - {KEPT, *map(str, DropReason)})
    check.require(not unknown, name, f"unknown status: {', '.join(map(str, unknown))}")
    place: dict[str, list[int]] = {}
    for source, row in zip(table["source"].to_pylist(), table["row"].to_pylist(), strict=True):
        place.setdefault(source, []).append(row)
    for source, numbers in place.items():
        is_counted = sorted(numbers) == list(range(len(numbers)))
        check.require(
            is_counted, name, f"rows of {source} are not numbered 0 to {len(numbers) - 1:,}, each once"
        )
    ids = rows["pair_id"].to_pylist()
    texts = zip(*(rows[column].to_pylist() for column in ("prompt", "chosen", "rejected")), strict=True)
    # The columns are spelled as the id's hash input is, so this is `identity.pair_id` of the texts.
    is_other = np.array([_id_of(text) != given for text, given in zip(texts, ids, strict=True)], dtype=bool)
    check.at_no_row(name, ids, is_other, "the id is not that of the texts")
    id_of: dict[str, str] = {}
    given = zip(rows["prompt"].to_pylist(), rows["prompt_id"].to_pylist(), strict=True)
    is_split = np.array([id_of.setdefault(prompt, own) != own for prompt, own in given], dtype=bool)
    check.at_no_row(name, ids, is_split, "another pair of the same prompt has another prompt_id")


def _id_of(texts: tuple[str, str, str]) -> str:
    return hashlib.sha256(f"[{','.join(texts)}]".encode()).hexdigest()[:ID_HEX_DIGITS]


def _check_tokens(check: Check, name: str, folder: Path, rows: pa.Table, kept: Kept) -> None:
    tokens = _read(check, folder.name, folder / TOKENS, TOKENS_SCHEMA)
    if tokens is None:
        return
    found = tokens["pair_id"].to_pylist()
    if not check.same_ids(name, found, kept.pair_ids, "the kept pairs"):
        return
    check.require(found == kept.pair_ids, name, "the pairs are not in input order")
    where = {pair_id: place for place, pair_id in enumerate(found)}
    tokens = tokens.take([where[pair_id] for pair_id in kept.pair_ids])
    is_other = np.array(pc.not_equal(tokens["prompt_id"], rows["prompt_id"]), dtype=bool)
    check.at_no_row(name, kept.pair_ids, is_other, f"prompt_id is not that of {PAIRS}")
    for part in ("prompt", "chosen", "rejected"):
        lengths = pc.list_value_length(tokens[f"{part}_ids"])
        differs = np.array(pc.not_equal(lengths, rows[f"{part}_tokens"]), dtype=bool)
        check.at_no_row(name, kept.pair_ids, differs, f"{part}_ids are not as many as {PAIRS} says")
