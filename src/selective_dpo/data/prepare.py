"""Sources -> rows -> pairs -> tokens -> a published folder, with one status for each input row.

Rows stream through in chunks, which several processes tokenize: memory holds a few chunks, and some 100 bytes
for each pair and prompt seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data.adapters import KEPT, WANTED_COLUMNS, DropReason, Pair, fault_of, text_size
from selective_dpo.data.processes import map_in_processes
from selective_dpo.data.readers import Malformed, Row
from selective_dpo.data.sources import Source, open_source, sample_rows, source_digest
from selective_dpo.data.store import (
    KIND,
    SUMMARY,
    PairsSummary,
    RowOutcome,
    open_writer,
    pairs_table,
    summary_json,
    tokens_table,
)
from selective_dpo.data.templates import runaway, template_digest
from selective_dpo.data.tokenize import (
    PairTokens,
    fit_length,
    render_pair,
    tokenize_pairs,
    tokenizer_digest,
    with_system,
)
from selective_dpo.errors import ConfigError, DataError, RunawayTemplateError, TemplateError, name_some
from selective_dpo.identity import prompt_id
from selective_dpo.storage.artifacts import content_key, publish_folder, write_json
from selective_dpo.storage.digests import digest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 1024

CHUNK_CHARACTERS = 16 << 20
"""A chunk is tokenized at once, so it ends early where its texts are long."""

MAX_CHUNK_SECONDS = 300.0
"""For a chunk, which takes a second or two; one of a few giant texts takes a minute or two."""

MAX_PAIR_SECONDS = 10.0
"""For rendering one pair, when a chunk took too long; it takes less than a millisecond."""

RULES = 2
"""Part of the key: raised when the same rows and settings come to other pairs or tokens than before."""

MIN_PAIRS = 2
"""Pairs, and prompts, below which there is nothing to split in halves."""


def prepare_pairs(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    key: str,
    exclude_prompts: Collection[str] = frozenset(),
    progress: Callable[[int], object] | None = None,
    workers: int | None = None,
    max_rows: int | None = None,
) -> PairsSummary:
    """Read, check and tokenize all rows of `sources`, and publish them as `folder` under `key`.

    The tokenizer must have its chat template already (`templates.apply_template`). Pairs whose prompt is
    among `exclude_prompts` (`store.prompt_keys` of the training pairs) are dropped: they are no test.
    `progress` is called with the number of rows done since the last call. `workers` processes tokenize (None:
    one for each core; 0: this one, without limits on what a chat template takes); what is published does not
    depend on their number. With `max_rows`, only the first so many rows of each source are read.

    A pair whose prompt was seen before under another `prompt_id` takes that earlier id, so that pairs of one
    prompt are never told apart by it.

    Raises:
        DataError: a source cannot be read or has no row with the wanted columns; or fewer than two pairs, or
            pairs of fewer than two prompts, are kept (the counts by reason are named).
        TemplateError: no chat template for conversations, or too many boundary mismatches.
        RunawayTemplateError: the chat template does not end, or writes or needs too much, on the pair named.
        ConfigError: an option without effect, a source listed twice, or no such adapter.
    """
    opened = [open_source(source) for source in sources]
    labels = Counter(source.label for source in opened)
    if repeated := [label for label, count in labels.items() if count > 1]:
        raise ConfigError(f"data: {name_some(repeated)} is listed more than once; list a source once")
    masks = _masks(opened, [source.fraction for source in sources], config)
    checker = RowChecker(exclude_prompts, config.exclude)
    rows = chain.from_iterable(
        _checked_rows(source, mask, checker, max_rows) for source, mask in zip(opened, masks, strict=True)
    )
    chunk_tokenizer, counts = ChunkTokenizer(tokenizer, config), RowCounts()
    tokenized = map_in_processes(
        chunk_tokenizer.tokenize,
        _chunks(rows),
        workers=workers,
        seconds=MAX_CHUNK_SECONDS,
        stopped=chunk_tokenizer.stopped,
    )
    with publish_folder(folder, kind=KIND, key=key) as partial:
        with closing(tokenized), open_writer(partial) as writer:
            for chunk in tokenized:
                writer.write(chunk.pairs, chunk.tokens)
                counts.add(chunk.counts)
                if progress is not None:
                    progress(len(chunk.pairs))
        summary = counts.summary(tokenizer, joined_prompts=checker.joined_prompts)
        if summary.rows != checker.rows:
            raise RuntimeError(f"{checker.rows} rows were read and {summary.rows} counted")
        _refuse_unusable(summary, config, counts)
        write_json(partial / SUMMARY, summary_json(summary))
    return summary


def pairs_key(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    exclude_prompts: Collection[str] = frozenset(),
) -> str:
    """Digest of all that decides what `prepare_pairs` publishes: contents, limits, tokenizer, template.

    Paths are not part of it: data moved elsewhere are the same data.
    """
    settings = config.model_dump(exclude={"train", "test"})
    if config.max_pairs == 0 and all(source.fraction == 1.0 for source in sources):
        settings.pop("seed")  # It decides nothing.
    settings["exclude"] = sorted(config.exclude)
    if not config.exclude:
        settings.pop("exclude")  # As if there were no such setting.
    return content_key(
        kind=KIND,
        rules=RULES,
        sources=[[source_digest(source), source.fraction] for source in sources],
        settings=settings,
        tokenizer=tokenizer_digest(tokenizer),
        template=template_digest(tokenizer),
        excluded=digest(sorted(exclude_prompts)),
    )


def _refuse_unusable(summary: PairsSummary, config: DataConfig, counts: RowCounts) -> None:
    if summary.boundary_mismatch_share > config.max_boundary_mismatch:
        raise TemplateError(
            f"in {summary.boundary_mismatch_share:.1%} of {summary.tokenized:,} pairs (first "
            f"{counts.first_mismatch}) the prompt's tokens are not a prefix of prompt plus completion, more "
            f"than data.max_boundary_mismatch = {config.max_boundary_mismatch:g}; use a template that writes "
            "the prompt alike in both (or end text prompts without a space), or raise that limit"
        )
    if summary.kept < MIN_PAIRS or summary.prompts < MIN_PAIRS:
        dropped = ", ".join(f"{count:,} {status}" for status, count in summary.counts.items())
        raise DataError(
            f"{summary.kept:,} pairs of {summary.prompts:,} prompts are left of {summary.rows:,} rows, and "
            f"at least {MIN_PAIRS} of each are needed ({dropped}); mend the data or the limits"
        )
    if config.empty_system_message and not counts.has_conversations:
        raise ConfigError(
            "data.empty_system_message has no effect: the data are plain text, not conversations; remove it"
        )


# --- rows, before they are tokenized ---------------------------------------------------------------------


class RowChecker:
    """Gives rows their status in their order, as far as their content and the rows before them decide it."""

    def __init__(self, exclude_prompts: Collection[str], exclude_pairs: Collection[str] = ()) -> None:
        self._excluded = frozenset(exclude_prompts)
        self._excluded_pairs = frozenset(exclude_pairs)
        self._seen_pairs: set[bytes] = set()
        self._id_of_prompt: dict[bytes, str] = {}
        self.rows = 0
        self.joined_prompts = 0

    def check(self, row: int, source: Source, raw: Row) -> RowOutcome:
        """The status of one sampled row; KEPT is provisional."""
        self.rows += 1
        outcome = RowOutcome(row, source.label, KEPT)
        if isinstance(raw, Malformed):
            return outcome._replace(status=DropReason.MALFORMED)
        try:
            pair = source.adapter(raw)
        except DataError as error:
            raise DataError(f"{outcome.place}: {error}") from error
        if isinstance(pair, DropReason):
            return outcome._replace(status=pair)
        if pair.pair_id in self._excluded_pairs:
            return outcome._replace(status=DropReason.EXCLUDED, pair=pair)
        # Hashing takes long, and without an id of its own the pair has the content's already.
        has_own_id = source.has_own_adapter or raw.get("prompt_id")
        prompt_key = prompt_id(pair.prompt) if has_own_id else pair.prompt_id
        reason = fault_of(pair) or self._repetition(pair, prompt_key)
        if reason is not None:
            return outcome._replace(status=reason, pair=pair)
        return outcome._replace(pair=self._with_joined_prompt(pair, prompt_key))

    def leave_out(self, row: int, source: Source) -> RowOutcome:
        """The status of one row that was not sampled."""
        self.rows += 1
        return RowOutcome(row, source.label, DropReason.NOT_SAMPLED)

    def _repetition(self, pair: Pair, prompt_key: str) -> DropReason | None:
        pair_key = bytes.fromhex(pair.pair_id)
        if pair_key in self._seen_pairs:
            return DropReason.DUPLICATE
        self._seen_pairs.add(pair_key)
        return DropReason.IN_TRAINING_DATA if prompt_key in self._excluded else None

    def _with_joined_prompt(self, pair: Pair, prompt_key: str) -> Pair:
        known = self._id_of_prompt.setdefault(bytes.fromhex(prompt_key), pair.prompt_id)
        if known == pair.prompt_id:
            return pair
        self.joined_prompts += 1
        return pair._replace(prompt_id=known)


class _Columns(NamedTuple):
    """What a source's rows had, for the message that says none of them will do."""

    names: dict[str, None]
    problems: list[str]


def _masks(
    opened: Sequence[Source], fractions: Sequence[float], config: DataConfig
) -> list[NDArray[np.bool_] | None]:
    if config.max_pairs == 0 and all(fraction == 1.0 for fraction in fractions):
        return [None] * len(opened)  # Everything is used: no need to count rows first.
    counts = [source.row_count() for source in opened]
    return list(sample_rows(counts, fractions, max_rows=config.max_pairs, seed=config.seed))


def _checked_rows(
    source: Source, mask: NDArray[np.bool_] | None, checker: RowChecker, max_rows: int | None
) -> Iterator[RowOutcome]:
    columns = _Columns({}, [])
    has_usable = False
    number = -1
    for number, raw in enumerate(islice(source.rows(), max_rows)):
        if not has_usable:
            has_usable = _note_columns(raw, source, columns)
        if mask is not None and number >= len(mask):
            raise DataError(_counted_otherwise(source.label, len(mask)))
        if mask is not None and not mask[number]:
            yield checker.leave_out(number, source)
        else:
            yield checker.check(number, source, raw)
    if mask is not None and number + 1 != len(mask):
        raise DataError(_counted_otherwise(source.label, len(mask)))
    if not has_usable:
        raise DataError(_no_pairs_message(source, number + 1, columns))


def _counted_otherwise(label: str, counted: int) -> str:
    return (
        f"{label} does not give the {counted:,} rows that were counted in it: it is damaged, or was changed "
        "meanwhile"
    )


def _note_columns(raw: Row, source: Source, columns: _Columns) -> bool:
    if isinstance(raw, Malformed):
        if not columns.problems:  # One example is enough, however many rows are like it.
            columns.problems.append(raw.problem)
        return False
    columns.names.update(dict.fromkeys(map(str, raw)))
    return all(name in raw for name in source.wanted_columns)


def _no_pairs_message(source: Source, rows: int, columns: _Columns) -> str:
    label = source.label
    if rows == 0:
        return f"{label} has no rows"
    wanted = (
        f"wanted are {' and '.join(WANTED_COLUMNS)}, with or without prompt; columns or adapter of a source "
        "read others"
    )
    if columns.names:
        found = name_some(columns.names, limit=12)
        return f"{label}: no row has the columns of a pair; found are {found}; {wanted}"
    problem = next(iter(columns.problems), "they are empty")
    return f"{label}: none of its {rows:,} rows can be read ({problem}); {wanted}"


def _chunks(outcomes: Iterable[RowOutcome]) -> Iterator[list[RowOutcome]]:
    chunk: list[RowOutcome] = []
    characters = 0
    for outcome in outcomes:
        chunk.append(outcome)
        if outcome.pair is not None:
            characters += sum(map(text_size, outcome.pair[:3]))
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


# --- tokens ----------------------------------------------------------------------------------------------


class TokenizedChunk(NamedTuple):
    """Some rows, ready to be written."""

    pairs: pa.Table
    """One row an input row."""
    tokens: pa.Table
    """One row a kept pair."""
    counts: RowCounts


class ChunkTokenizer(NamedTuple):
    """Tokenizes chunks of rows, each independent of the others."""

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig

    def tokenize(self, chunk: Sequence[RowOutcome]) -> TokenizedChunk:
        """Tokenize the rows that are kept so far, decide on lengths, count.

        Raises:
            TemplateError, ConfigError, ModelError: see `tokenize_pairs`.
            DataError: memory runs out on these rows.
        """
        kept = [outcome for outcome in chunk if outcome.status == KEPT]
        pairs = [outcome.pair for outcome in kept if outcome.pair is not None]  # as it always is, if kept
        try:
            tokens = iter(
                tokenize_pairs(
                    pairs,
                    self.tokenizer,
                    empty_system_message=self.config.empty_system_message,
                    places=[outcome.place for outcome in kept],
                )
            )
            outcomes = [
                self._with_tokens(outcome, next(tokens)) if outcome.status == KEPT else outcome
                for outcome in chunk
            ]
            counts = RowCounts()
            for outcome in outcomes:
                counts.count(outcome, empty_system_message=self.config.empty_system_message)
            return TokenizedChunk(pairs_table(outcomes), tokens_table(outcomes), counts)
        except MemoryError as error:
            raise DataError(
                f"memory ran out on {_range(chunk)}; leave the longest texts out, or use a machine with more"
            ) from error

    def stopped(self, chunks: Sequence[Sequence[RowOutcome]]) -> DataError:
        """The error for chunks of which the oldest took too long, or one had its process ended.

        Their conversations are rendered one by one, to find that on which the template does not end.
        """
        rows = [outcome for chunk in chunks for outcome in chunk if outcome.status == KEPT]
        rendered = map_in_processes(
            self._render, rows, workers=1, seconds=MAX_PAIR_SECONDS, stopped=self._runaway
        )
        try:
            for _ in rendered:
                pass
        except RunawayTemplateError as error:
            return error
        return DataError(
            f"tokenizing {_range(chunks[0])} takes more than {MAX_CHUNK_SECONDS:g} s, or more memory than "
            "there is; leave the longest texts out, or use another machine"
        )

    def _render(self, outcome: RowOutcome) -> None:
        if outcome.pair is not None:
            render_pair(outcome.pair, self.tokenizer, empty_system_message=self.config.empty_system_message)

    def _runaway(self, rows: Sequence[RowOutcome]) -> RunawayTemplateError:
        error = runaway(
            self.tokenizer, f"takes more than {MAX_PAIR_SECONDS:g} s, or more memory than there is"
        )
        return RunawayTemplateError(f"{rows[0].place}: {error}")

    def _with_tokens(self, outcome: RowOutcome, tokens: PairTokens | DropReason) -> RowOutcome:
        if isinstance(tokens, DropReason):
            return outcome._replace(status=tokens)
        fitted = fit_length(tokens, self.config)
        return outcome._replace(status=fitted.drop or KEPT, tokens=fitted.tokens)


def _range(chunk: Sequence[RowOutcome]) -> str:
    return f"{chunk[0].place} to {chunk[-1].place}"


# --- counts ----------------------------------------------------------------------------------------------


@dataclass
class RowCounts:
    """What became of some rows. The counts of parts, added in the rows' order, are those of the whole."""

    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    """Rows by status, for each source."""
    totals: Counter[str] = field(default_factory=Counter)
    """The fields of `PairsSummary` that are plain sums, by name."""
    kept_prompts: set[str] = field(default_factory=set)
    first_rows: dict[str, str] = field(default_factory=dict)
    """Where the first row of each reason to drop stands: its number and its source."""
    first_mismatch: str = ""
    """Id of the first pair whose boundary does not match."""
    has_conversations: bool = False

    def count(self, outcome: RowOutcome, *, empty_system_message: bool = False) -> None:
        """Add one row whose status is final."""
        status, pair, tokens = str(outcome.status), outcome.pair, outcome.tokens
        self.by_source.setdefault(outcome.source, Counter())[status] += 1
        if status not in (KEPT, DropReason.NOT_SAMPLED):
            self.first_rows.setdefault(status, outcome.place)
        if pair is None or tokens is None:
            return
        self.totals["tokenized"] += 1
        self.has_conversations = self.has_conversations or pair.is_conversational
        if tokens.boundary_mismatch:
            self.totals["boundary_mismatches"] += 1
            self.first_mismatch = self.first_mismatch or pair.pair_id
        if status == KEPT:
            self.kept_prompts.add(pair.prompt_id)
            self.totals["truncated"] += tokens.truncated
            self.totals["prompt_tokens"] += len(tokens.prompt_ids)
            self.totals["completion_tokens"] += len(tokens.chosen_ids) + len(tokens.rejected_ids)
            is_given_one = isinstance(pair.prompt, list) and with_system(pair.prompt) is not pair.prompt
            self.totals["empty_system_messages"] += empty_system_message and is_given_one

    def add(self, later: RowCounts) -> None:
        """Add the counts of rows that come after these."""
        for source, counts in later.by_source.items():
            self.by_source.setdefault(source, Counter()).update(counts)
        self.totals.update(later.totals)
        self.first_rows = {**later.first_rows, **self.first_rows}
        self.kept_prompts |= later.kept_prompts
        self.first_mismatch = self.first_mismatch or later.first_mismatch
        self.has_conversations = self.has_conversations or later.has_conversations

    def summary(self, tokenizer: PreTrainedTokenizerBase, *, joined_prompts: int) -> PairsSummary:
        """These counts as they are published."""
        counts = sum(self.by_source.values(), Counter[str]())
        by_status = _in_order(counts)
        return PairsSummary(
            rows=counts.total(),
            kept=counts[KEPT],
            prompts=len(self.kept_prompts),
            counts=by_status,
            sources={source: _in_order(own) for source, own in self.by_source.items()},
            tokenized=self.totals["tokenized"],
            boundary_mismatches=self.totals["boundary_mismatches"],
            truncated=self.totals["truncated"],
            prompt_tokens=self.totals["prompt_tokens"],
            completion_tokens=self.totals["completion_tokens"],
            joined_prompts=joined_prompts,
            empty_system_messages=self.totals["empty_system_messages"],
            tokenizer_digest=tokenizer_digest(tokenizer),
            template_digest=template_digest(tokenizer),
            first_rows={name: self.first_rows[name] for name in by_status if name in self.first_rows},
        )


def _in_order(counts: Counter[str]) -> dict[str, int]:
    """Kept first, then the reasons as they are declared, so that two summaries read alike."""
    statuses = [KEPT, *map(str, DropReason)]
    return {status: counts[status] for status in statuses if status == KEPT or counts[status]}
