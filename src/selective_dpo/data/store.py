"""The published folder of pairs: a table of every input row, the tokens of the kept ones, and counts."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selective_dpo.data.adapters import KEPT, DropReason, Pair
from selective_dpo.data.tokenize import PairTokens
from selective_dpo.errors import ArtifactError, ConfigError, name_some
from selective_dpo.identity import ID_HEX_DIGITS, Text, canonical_text
from selective_dpo.storage.artifacts import read_json, read_manifest
from selective_dpo.storage.digests import canonical_json

if TYPE_CHECKING:
    from datasets import Dataset

KIND = "pairs"

PAIRS, TOKENS, SUMMARY = "pairs.parquet", "tokens.parquet", "summary.json"

PAIRS_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "source": pa.string(),
        "pair_id": pa.string(),
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        "chosen": pa.string(),
        "rejected": pa.string(),
        "prompt_tokens": pa.int32(),
        "chosen_tokens": pa.int32(),
        "rejected_tokens": pa.int32(),
        "truncated": pa.bool_(),
        "boundary_mismatch": pa.bool_(),
        "score_chosen": pa.float64(),
        "score_rejected": pa.float64(),
        "status": pa.string(),
    }
)
"""One row an input row. `row` counts from 0 within its source; texts are canonical JSON (ASCII); the
numbers of tokens are 0 where a row was dropped before it was tokenized, and those after truncation."""

TOKENS_SCHEMA = pa.schema(
    {
        "pair_id": pa.string(),
        "prompt_id": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
    }
)
"""One row a kept pair, in input order; columns named as TRL's tokenized ones."""


class RowOutcome(NamedTuple):
    """What became of one input row."""

    row: int
    source: str
    status: str
    pair: Pair | None = None
    tokens: PairTokens | None = None

    @property
    def place(self) -> str:
        """Where the row stands, for messages: counted from 0 within its source."""
        return f"row {self.row:,} of {self.source}"


class PairsSummary(NamedTuple):
    """Counts of a published folder of pairs."""

    rows: int
    """Input rows; `counts` add up to it."""
    kept: int
    prompts: int
    """Distinct `prompt_id` among the kept pairs."""
    counts: dict[str, int]
    """Rows by status: "kept", or a `DropReason`."""
    sources: dict[str, dict[str, int]]
    """The same by source."""
    tokenized: int
    boundary_mismatches: int
    """Tokenized pairs whose prompt is not a token prefix of prompt plus completion."""
    truncated: int
    """Kept pairs that lost tokens."""
    prompt_tokens: int
    completion_tokens: int
    """Over the kept pairs; chosen plus rejected."""
    joined_prompts: int
    """Pairs that took the `prompt_id` of an earlier pair with the same prompt, instead of their own."""
    tokenizer_digest: str
    template_digest: str
    empty_system_messages: int = 0
    """Kept pairs whose prompt was given an empty system message (`data.empty_system_message`)."""
    first_rows: Mapping[str, str] = MappingProxyType({})
    """For each reason to drop, the first row of it: `row 5 of data.jsonl`, counted from 0 as in
    `pairs.parquet`."""

    @property
    def boundary_mismatch_share(self) -> float:
        """Share of the tokenized pairs with a boundary mismatch; 0 if none was tokenized."""
        return self.boundary_mismatches / self.tokenized if self.tokenized else 0.0

    def describe(self) -> str:
        """Several lines of text: rows by status, then by source if there are several, then what to know."""
        lines = [f"{self.rows:,} rows: {self.kept:,} pairs kept, over {self.prompts:,} prompts"]
        lines += _count_lines(self.counts, self.first_rows)
        if len(self.sources) > 1:
            for source, counts in self.sources.items():
                lines += [f"  {source}: {sum(counts.values()):,} rows", *_count_lines(counts, {}, indent=4)]
        lines.append(
            f"  tokens: {self.prompt_tokens:,} in prompts, {self.completion_tokens:,} in completions; "
            f"{self.truncated:,} pairs truncated"
        )
        if self.boundary_mismatches:
            lines.append(
                f"  in {self.boundary_mismatches:,} pairs ({self.boundary_mismatch_share:.1%} of those "
                "tokenized) the prompt's tokens are not a prefix of prompt plus completion"
            )
        if self.empty_system_messages:
            lines.append(f"  {self.empty_system_messages:,} pairs were given an empty system message")
        if self.joined_prompts:
            lines.append(
                f"  {self.joined_prompts:,} pairs took the prompt_id of another pair of their prompt"
            )
        return "\n".join(lines)


class PairsWriter:
    """Writes both tables, a row group a call."""

    def __init__(self, pairs: pq.ParquetWriter, tokens: pq.ParquetWriter) -> None:
        self._pairs = pairs
        self._tokens = tokens

    def write(self, pairs: pa.Table, tokens: pa.Table) -> None:
        """Add rows, in input order (see `pairs_table` and `tokens_table`)."""
        self._pairs.write_table(pairs)
        if len(tokens):
            self._tokens.write_table(tokens)


@contextmanager
def open_writer(folder: Path) -> Iterator[PairsWriter]:
    """A writer of `pairs.parquet` and `tokens.parquet` in `folder`."""
    with (
        pq.ParquetWriter(folder / PAIRS, PAIRS_SCHEMA, compression="zstd") as pairs,
        pq.ParquetWriter(folder / TOKENS, TOKENS_SCHEMA, compression="zstd") as tokens,
    ):
        yield PairsWriter(pairs, tokens)


def pairs_table(outcomes: Sequence[RowOutcome]) -> pa.Table:
    """One row (`PAIRS_SCHEMA`) for each outcome."""
    return pa.Table.from_pylist([_pairs_row(outcome) for outcome in outcomes], schema=PAIRS_SCHEMA)


def tokens_table(outcomes: Sequence[RowOutcome]) -> pa.Table:
    """One row (`TOKENS_SCHEMA`) for each kept pair."""
    kept = [_tokens_row(outcome) for outcome in outcomes if outcome.status == KEPT]
    return pa.Table.from_pylist(kept, schema=TOKENS_SCHEMA)


def load_pairs(folder: Path) -> pa.Table:
    """Every input row (`PAIRS_SCHEMA`) of a published folder; `ArtifactError` if it is not complete."""
    return pq.read_table(pairs_file(folder))


def pairs_file(folder: Path) -> Path:
    """The `pairs.parquet` of a published folder; `ArtifactError` if it is not complete."""
    return _published(folder, PAIRS)


MAX_BYTES_IN_MEMORY = 2**30
"""Of token ids. Each process holds a table of its own, and a million pairs have some 7 GB of them."""


def load_tokens(folder: Path) -> Dataset:
    """The kept pairs' tokens (`TOKENS_SCHEMA`); those of more than `MAX_BYTES_IN_MEMORY` are mapped from a
    file in the cache of `datasets`, which all processes of a machine share.

    The data set's fingerprint is the file's digest, so whatever caches by fingerprint finds it again.
    """
    from datasets import Dataset

    path, counts = _published(folder, TOKENS), read_json(folder / SUMMARY)
    if 4 * (counts["prompt_tokens"] + counts["completion_tokens"]) > MAX_BYTES_IN_MEMORY:
        table = Dataset.from_parquet(str(path)).data
    else:
        table = pq.read_table(path)
    return Dataset(table, fingerprint=read_manifest(folder).files[TOKENS][:32])


def load_ids(folder: Path) -> pa.Table:
    """`pair_id` and `prompt_id` of the kept pairs, in input order; `ArtifactError` if it is not complete."""
    return pq.read_table(_published(folder, TOKENS), columns=["pair_id", "prompt_id"])


def load_summary(folder: Path) -> PairsSummary:
    """The counts of a published folder; `ArtifactError` if it is not complete."""
    read_manifest(folder)
    values = read_json(folder / SUMMARY)
    values.pop("boundary_mismatch_share", None)
    return PairsSummary(**values)


def summary_json(summary: PairsSummary) -> dict[str, Any]:
    """What `summary.json` holds."""
    return {
        **summary._asdict(),
        "first_rows": dict(summary.first_rows),
        "boundary_mismatch_share": summary.boundary_mismatch_share,
    }


def prompt_keys(folder: Path) -> frozenset[str]:
    """`identity.prompt_id` of the content of each kept prompt, whatever id the data gave it."""
    keys: set[str] = set()
    with pq.ParquetFile(pairs_file(folder)) as file:
        for batch in file.iter_batches(columns=["prompt", "status"]):
            prompts = batch["prompt"].filter(pc.equal(batch["status"], KEPT))
            keys.update(_json_key(prompt) for prompt in prompts.unique().to_pylist())
    return frozenset(keys)


def require_known(excluded: Collection[str], folders: Sequence[Path]) -> None:
    """Refuse pairs to leave out that are in no row of these published folders.

    Raises:
        ConfigError: some of the ids are named.
    """
    unknown = set(excluded)
    for folder in folders if excluded else ():
        table = pq.read_table(pairs_file(folder), columns=["pair_id", "status"])
        unknown -= set(table.filter(pc.equal(table["status"], DropReason.EXCLUDED))["pair_id"].to_pylist())
    if unknown:
        raise ConfigError(
            f"data.exclude names {len(unknown):,} pair(s) that are not in the data: "
            f"{name_some(sorted(unknown))}; give pair ids, as messages and the curriculum have them"
        )


def text_json(text: Text) -> str:
    """A text or its messages as in `pairs.parquet`: `json.loads` gives it back."""
    return canonical_json(canonical_text(text))


def _json_key(prompt_json: str) -> str:
    # The column is spelled as the id's hash input is, so this is identity.prompt_id of the prompt.
    return hashlib.sha256(prompt_json.encode("ascii")).hexdigest()[:ID_HEX_DIGITS]


def _published(folder: Path, name: str) -> Path:
    if read_manifest(folder).kind != KIND:
        raise ArtifactError(f"{folder} does not hold pairs; name the folder that preparing data made")
    return folder / name


def _pairs_row(outcome: RowOutcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "row": outcome.row,
        "source": outcome.source,
        "status": str(outcome.status),
        "prompt_tokens": 0,
        "chosen_tokens": 0,
        "rejected_tokens": 0,
        "truncated": False,
        "boundary_mismatch": False,
    }
    if outcome.pair is not None:
        texts = {name: text_json(getattr(outcome.pair, name)) for name in ("prompt", "chosen", "rejected")}
        same = ("pair_id", "prompt_id", "score_chosen", "score_rejected")
        row |= texts | {name: getattr(outcome.pair, name) for name in same}
    if outcome.tokens is not None:
        row |= {
            "prompt_tokens": len(outcome.tokens.prompt_ids),
            "chosen_tokens": len(outcome.tokens.chosen_ids),
            "rejected_tokens": len(outcome.tokens.rejected_ids),
            "truncated": outcome.tokens.truncated,
            "boundary_mismatch": outcome.tokens.boundary_mismatch,
        }
    return row


def _tokens_row(outcome: RowOutcome) -> dict[str, Any]:
    pair, tokens = outcome.pair, outcome.tokens
    if pair is None or tokens is None:
        raise RuntimeError(f"row {outcome.row} of {outcome.source} is kept and was not tokenized")
    return {
        "pair_id": pair.pair_id,
        "prompt_id": pair.prompt_id,
        "prompt_ids": tokens.prompt_ids,
        "chosen_ids": tokens.chosen_ids,
        "rejected_ids": tokens.rejected_ids,
    }


def _count_lines(counts: Mapping[str, int], first: Mapping[str, str], indent: int = 2) -> list[str]:
    total = sum(counts.values())
    return [
        f"{'':{indent}}{status:<28}{count:>12,}  {count / total:>6.1%}"
        + (f"  first: {first[status]} (from 0)" if status in first else "")
        for status, count in counts.items()
    ]
