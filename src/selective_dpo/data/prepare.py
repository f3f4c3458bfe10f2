"""Sources -> rows -> pairs -> tokens -> a published folder, with one status for each input row."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data.adapters import KEPT, WANTED_COLUMNS, DropReason, Pair, fault_of, read_pair, text_size
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
from selective_dpo.data.templates import template_digest
from selective_dpo.data.tokenize import PairTokens, fit_length, tokenize_pairs, tokenizer_digest, with_system
from selective_dpo.errors import ConfigError, DataError, RunawayTemplateError, TemplateError, name_some
from selective_dpo.identity import prompt_id
from selective_dpo.storage.artifacts import content_key, publish_folder, write_json
from selective_dpo.storage.digests import digest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


@dataclass
class Tally:
    """What was counted so far. Tallies of parts, added in the rows' order, make that of the whole."""

    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    """Rows by status, for each source."""
    totals: Counter[str] = field(default_factory=Counter)
    """`tokenized`, `mismatches`, `truncated`, `prompt_tokens`, `completion_tokens` and
    `empty_system_messages`."""
    kept_prompts: set[str] = field(default_factory=set)
    first_rows: dict[str, str] = field(default_factory=dict)
    """Where the first row of each reason to drop stands: its number and its source."""
    first_mismatch: str = ""
    """Id of the first pair whose boundary does not match."""
    has_conversations: bool = False

    def count(self, outcome: RowOutcome) -> None:
        """Add one row whose status is final."""
        if outcome.source not in self.by_source:
            self.by_source[outcome.source] = Counter()
        self.by_source[outcome.source][str(outcome.status)] += 1
        if outcome.status not in (KEPT, DropReason.NOT_SAMPLED):
            self.first_rows.setdefault(str(outcome.status), f"row {outcome.row:,} of {outcome.source}")
        pair, tokens = outcome.pair, outcome.tokens
        if pair is None or tokens is None:
            return
        self.totals["tokenized"] += 1
        self.has_conversations = self.has_conversations or pair.is_conversational
        if tokens.boundary_mismatch:
            self.totals["mismatches"] += 1
            self.first_mismatch = self.first_mismatch or pair.pair_id
        if outcome.status == KEPT:
            self.kept_prompts.add(pair.prompt_id)
            self.totals["truncated"] += tokens.truncated
            self.totals["prompt_tokens"] += len(tokens.prompt_ids)
            self.totals["completion_tokens"] += len(tokens.chosen_ids) + len(tokens.rejected_ids)

    def add(self, later: Tally) -> None:
        """Add the tally of rows that come after these."""
        for source, counts in later.by_source.items():
            self.by_source.setdefault(source, Counter()).update(counts)
        self.totals.update(later.totals)
        self.first_rows = {**later.first_rows, **self.first_rows}
        self.kept_prompts |= later.kept_prompts
        self.first_mismatch = self.first_mismatch or later.first_mismatch
        self.has_conversations = self.has_conversations or later.has_conversations

    @property
    def counts(self) -> Counter[str]:
        """Rows by status, over all sources."""
        return sum(self.by_source.values(), Counter())


def in_order(counts: Counter[str]) -> dict[str, int]:
    """Kept first, then the reasons as they are declared, so that two summaries read alike."""
    statuses = [KEPT, *map(str, DropReason)]
    return {status: counts[status] for status in statuses if status == KEPT or counts[status]}


# ----------------------------------------------------------------------------------------------------
# Judged rows -> tokens, final statuses and the rows of both tables: all that can be done chunk by chunk.


class FinishedChunk(NamedTuple):
    """Some rows, ready to be written."""

    pairs: pa.Table
    """One row an input row."""
    tokens: pa.Table
    """One row a kept pair."""
    tally: Tally


class Finisher(NamedTuple):
    """Finishes chunks, each independent of the others; it can be sent to another process."""

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig

    def finish(self, chunk: Sequence[RowOutcome]) -> FinishedChunk:
        """Tokenize what is kept so far, decide on lengths, count.

        Raises:
            TemplateError, ConfigError, ModelError: see `tokenize_pairs`.
            DataError: memory runs out on these rows.
        """
        try:
            return self._finish(chunk)
        except MemoryError as error:
            raise DataError(
                f"memory ran out on rows {chunk[0].row:,} to {chunk[-1].row:,} of {chunk[-1].source}; leave "
                "the longest texts out, or use a machine with more"
            ) from error

    def _finish(self, chunk: Sequence[RowOutcome]) -> FinishedChunk:
        tokens = iter(self._tokenize([outcome for outcome in chunk if outcome.status == KEPT]))
        outcomes = [
            self._with_tokens(outcome, next(tokens)) if outcome.status == KEPT else outcome
            for outcome in chunk
        ]
        tally = Tally()
        for outcome in outcomes:
            tally.count(outcome)
            if self.config.empty_system_message and outcome.status == KEPT:
                tally.totals["empty_system_messages"] += _has_no_system(outcome)
        return FinishedChunk(pairs_table(outcomes), tokens_table(outcomes), tally)

    def _tokenize(self, kept: Sequence[RowOutcome]) -> list[PairTokens | DropReason]:
        pairs = [outcome.pair for outcome in kept if outcome.pair is not None]  # as it always is, if kept
        try:
            return tokenize_pairs(
                pairs, self.tokenizer, empty_system_message=self.config.empty_system_message
            )
        except RunawayTemplateError as error:
            if error.pair is None:
                raise
            outcome = kept[error.pair]
            raise RunawayTemplateError(f"row {outcome.row:,} of {outcome.source}: {error}") from error

    def _with_tokens(self, outcome: RowOutcome, tokens: PairTokens | DropReason) -> RowOutcome:
        if isinstance(tokens, DropReason):
            return outcome._replace(status=tokens)
        fitted = fit_length(tokens, self.config)
        return outcome._replace(status=fitted.drop or KEPT, tokens=fitted.tokens)


def _has_no_system(outcome: RowOutcome) -> bool:
    prompt = outcome.pair.prompt if outcome.pair else ""
    return isinstance(prompt, list) and with_system(prompt) is not prompt


# ----------------------------------------------------------------------------------------------------
# Chunks finished in processes of their own, in order.
#
# Chat templates are rendered by Python, one core's work, and the tokenizer's threads only help with the rest:
# so whole chunks are spread over processes. They are programs of their own (`worker_main`) and neither forks,
# which threads of this process would not survive unharmed, nor `multiprocessing`'s children, which would
# run the caller's script again.


MOST_WORKERS = 16
"""The process that reads and writes keeps about ten busy; many more would wait for it."""

CHUNKS_ALONE = 4
"""Finished here before workers are started, which takes a second or two: small data never need them."""

_CHUNKS_AHEAD = 2
"""Chunks for each worker that are judged and not yet written; memory holds no more."""

_OUT_OF_TIME = getattr(signal, "SIGPROF", 0)
"""What ends a worker that a template keeps busy (see `render_limits`)."""

Chunk = Sequence[RowOutcome]


def finish_chunks(
    finisher: Finisher, chunks: Iterable[Chunk], *, workers: int | None = None
) -> Iterator[FinishedChunk]:
    """`finisher.finish` of each chunk, in order, by `workers` processes; None: as many as there are cores.

    What comes out does not depend on the number of processes. An error is raised where its chunk's result
    would have been.
    """
    workers = min(_cores(), MOST_WORKERS) if workers is None else workers
    chunks = iter(chunks)
    for chunk in islice(chunks, CHUNKS_ALONE):
        yield finisher.finish(chunk)
    first = next(chunks, None)
    if first is None:
        return
    if workers == 1 or not _can_be_sent(finisher):
        yield finisher.finish(first)
        yield from map(finisher.finish, chunks)
        return
    with _started(finisher, workers) as pool, ThreadPoolExecutor(workers) as threads:
        pending: deque[Future[FinishedChunk]] = deque([threads.submit(pool.finish, first)])
        try:
            for chunk in chunks:
                pending.append(threads.submit(pool.finish, chunk))
                if len(pending) > _CHUNKS_AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            # After an error, or where the caller has had enough: what waits is not begun.
            threads.shutdown(wait=False, cancel_futures=True)
            pool.end()


class _Worker:
    """One process that finishes a chunk at a time."""

    def __init__(self, finisher: Finisher) -> None:
        paths = [os.path.abspath(path) for path in sys.path]  # noqa: PTH100 (entries of any kind, as they are)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        # The processes share the cores already.
        environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "selective_dpo.data.worker_main", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        self._unsent: Finisher | None = finisher

    def finish(self, chunk: Chunk) -> FinishedChunk:
        try:
            # Not sent at the start, so that all workers load it at the same time.
            if self._unsent is not None:
                self._ours.send(self._unsent)
                self._unsent = None
            self._ours.send(chunk)
            answer = self._ours.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            if code == -_OUT_OF_TIME:
                raise RunawayTemplateError(
                    f"rows {chunk[0].row:,} of {chunk[0].source} to {chunk[-1].row:,} of {chunk[-1].source}: "
                    "the chat template takes too long on one of them; use another template"
                ) from error
            raise RuntimeError(f"a process that tokenizes pairs ended early: exit code {code}") from error
        if isinstance(answer, Exception):
            raise answer
        finished: FinishedChunk = answer
        return finished

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._ours.close()


class _Pool:
    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            self._idle.put(worker)

    def finish(self, chunk: Chunk) -> FinishedChunk:
        worker = self._idle.get()
        try:
            return worker.finish(chunk)
        finally:
            self._idle.put(worker)

    def end(self) -> None:
        for worker in self._workers:
            worker.end()


@contextlib.contextmanager
def _started(finisher: Finisher, workers: int) -> Iterator[_Pool]:
    pool = _Pool([_Worker(finisher) for _ in range(workers)])
    try:
        yield pool
    finally:
        pool.end()


def _can_be_sent(finisher: Finisher) -> bool:
    # Another process can only load a class that it finds by name; handing on a pipe is for POSIX.
    return os.name == "posix" and type(finisher.tokenizer).__module__.startswith("transformers.")


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------
# What a row's content and the rows before it decide of its status; tokens decide the rest (`finishing`).


class RowSorter:
    """Judges rows in their order, and sums up what became of them."""

    def __init__(self, exclude_prompts: Collection[str], exclude_pairs: Collection[str] = ()) -> None:
        self._excluded = frozenset(exclude_prompts)
        self._excluded_pairs = frozenset(exclude_pairs)
        self._seen_pairs: set[bytes] = set()
        self._id_of_prompt: dict[bytes, str] = {}
        self._rows = 0
        self._joined = 0
        self.tally = Tally()
        """Of the rows that are finished: each row judged or left out must come to be counted here."""

    def judge(self, row: int, source: str, raw: Row) -> RowOutcome:
        """The status of one sampled row as far as its content decides; KEPT is provisional."""
        self._rows += 1
        if isinstance(raw, Malformed):
            return RowOutcome(row, source, DropReason.MALFORMED)
        pair = read_pair(raw)
        if isinstance(pair, DropReason):
            return RowOutcome(row, source, pair)
        # Without an id of its own the pair has the content's already: hashing is what takes long here.
        content_key = prompt_id(pair.prompt) if raw.get("prompt_id") else pair.prompt_id
        if pair.pair_id in self._excluded_pairs:
            return RowOutcome(row, source, DropReason.EXCLUDED, pair)
        reason = fault_of(pair) or self._repetition(pair, content_key)
        if reason is not None:
            return RowOutcome(row, source, reason, pair)
        return RowOutcome(row, source, KEPT, self._with_joined_prompt(pair, content_key))

    def leave_out(self, row: int, source: str) -> RowOutcome:
        """The status of one row that was not sampled."""
        self._rows += 1
        return RowOutcome(row, source, DropReason.NOT_SAMPLED)

    def summary(self, tokenizer: PreTrainedTokenizerBase) -> PairsSummary:
        """The counts so far."""
        counts, totals = self.tally.counts, self.tally.totals
        if sum(counts.values()) != self._rows:
            raise RuntimeError(f"{self._rows} rows were read and {sum(counts.values())} counted")
        return PairsSummary(
            rows=self._rows,
            kept=counts[KEPT],
            prompts=len(self.tally.kept_prompts),
            counts=in_order(counts),
            sources={source: in_order(by_status) for source, by_status in self.tally.by_source.items()},
            tokenized=totals["tokenized"],
            boundary_mismatches=totals["mismatches"],
            truncated=totals["truncated"],
            prompt_tokens=totals["prompt_tokens"],
            completion_tokens=totals["completion_tokens"],
            joined_prompts=self._joined,
            empty_system_messages=totals["empty_system_messages"],
            tokenizer_digest=tokenizer_digest(tokenizer),
            template_digest=template_digest(tokenizer),
            first_rows={
                status: self.tally.first_rows[status]
                for status in in_order(counts)
                if status in self.tally.first_rows
            },
        )

    def _repetition(self, pair: Pair, content_key: str) -> DropReason | None:
        pair_key = bytes.fromhex(pair.pair_id)
        if pair_key in self._seen_pairs:
            return DropReason.DUPLICATE
        self._seen_pairs.add(pair_key)
        return DropReason.IN_TRAINING_DATA if content_key in self._excluded else None

    def _with_joined_prompt(self, pair: Pair, content_key: str) -> Pair:
        known = self._id_of_prompt.setdefault(bytes.fromhex(content_key), pair.prompt_id)
        if known == pair.prompt_id:
            return pair
        self._joined += 1
        return pair._replace(prompt_id=known)


# ----------------------------------------------------------------------------------------------------
# Sources -> rows -> pairs -> tokens -> a published folder, with one status for each input row.
#
# Rows stream through in chunks: memory holds a few of them, and some 100 bytes for each pair and prompt seen.


CHUNK_ROWS = 1024

CHUNK_CHARACTERS = 16 << 20
"""A chunk is tokenized at once, so it ends early where its texts are long."""

RULES = 2
"""Part of the key: raised when the same rows and settings come to other pairs or tokens than before."""

FEWEST = 2
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
) -> PairsSummary:
    """Read, check and tokenize all rows of `sources`, and publish them as `folder` under `key`.

    The tokenizer must have its chat template already (`templates.apply_template`). Pairs whose prompt is
    among `exclude_prompts` (`store.prompt_keys` of the training pairs) are dropped: they are no test.
    `progress` is called with the number of rows done since the last call. Large data are tokenized by
    `workers` processes (None: one for each core); what is published does not depend on their number.

    A pair whose prompt was seen before under another `prompt_id` takes that earlier id, so that pairs of one
    prompt are never told apart by it.

    Raises:
        DataError: a source cannot be read or has no row with the wanted columns; or fewer than two pairs, or
            pairs of fewer than two prompts, are kept (the counts by reason are named).
        TemplateError: no chat template for conversations, or too many boundary mismatches.
        ConfigError: an option without effect, or a source listed twice.
    """
    opened = [open_source(source) for source in sources]
    labels = Counter(source.label for source in opened)
    if repeated := [label for label, count in labels.items() if count > 1]:
        raise ConfigError(f"data: {name_some(repeated)} is listed more than once; list a source once")
    masks = _masks(opened, [source.fraction for source in sources], config)
    sorter = RowSorter(exclude_prompts, config.exclude)
    finisher = Finisher(tokenizer, config)
    rows = chain.from_iterable(
        _outcomes_before_tokens(source, mask, sorter) for source, mask in zip(opened, masks, strict=True)
    )
    with publish_folder(folder, kind=KIND, key=key) as partial:
        with open_writer(partial) as writer:
            for finished in finish_chunks(finisher, _chunks(rows), workers=workers):
                writer.write(finished.pairs, finished.tokens)
                sorter.tally.add(finished.tally)
                if progress is not None:
                    progress(len(finished.pairs))
        summary = sorter.summary(tokenizer)
        _refuse_unusable(summary, config, sorter.tally)
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


def _outcomes_before_tokens(
    source: Source, mask: NDArray[np.bool_] | None, sorter: RowSorter
) -> Iterator[RowOutcome]:
    columns = _Columns({}, [])
    has_usable = False
    number = -1
    for number, raw in enumerate(source.rows()):
        if not has_usable:
            has_usable = _note_columns(raw, columns)
        if mask is not None and number >= len(mask):
            raise DataError(_counted_otherwise(source.label, len(mask)))
        if mask is not None and not mask[number]:
            yield sorter.leave_out(number, source.label)
        else:
            yield sorter.judge(number, source.label, raw)
    if mask is not None and number + 1 != len(mask):
        raise DataError(_counted_otherwise(source.label, len(mask)))
    if not has_usable:
        raise DataError(_no_pairs_message(source.label, number + 1, columns))


def _counted_otherwise(label: str, counted: int) -> str:
    return (
        f"{label} does not give the {counted:,} rows that were counted in it: it is damaged, or was changed "
        "meanwhile"
    )


def _note_columns(raw: Row, columns: _Columns) -> bool:
    if isinstance(raw, Malformed):
        if not columns.problems:  # One example is enough, however many rows are like it.
            columns.problems.append(raw.problem)
        return False
    columns.names.update(dict.fromkeys(map(str, raw)))
    return all(name in raw for name in WANTED_COLUMNS)


def _no_pairs_message(label: str, rows: int, columns: _Columns) -> str:
    if rows == 0:
        return f"{label} has no rows"
    wanted = f"wanted are {' and '.join(WANTED_COLUMNS)}, with or without prompt"
    if columns.names:
        found = name_some(columns.names, limit=12)
        return f"{label}: no row has the columns of a pair; found are {found}; {wanted}"
    problem = next(iter(columns.problems), "they are empty")
    return f"{label}: none of its {rows:,} rows can be read ({problem}); {wanted}"


def _refuse_unusable(summary: PairsSummary, config: DataConfig, tally: Tally) -> None:
    if summary.boundary_mismatch_share > config.max_boundary_mismatch:
        raise TemplateError(
            f"in {summary.boundary_mismatch_share:.1%} of {summary.tokenized:,} pairs (first "
            f"{tally.first_mismatch}) the prompt's tokens are not a prefix of prompt plus completion, more "
            f"than data.max_boundary_mismatch = {config.max_boundary_mismatch:g}; use a template that writes "
            "the prompt alike in both (or end text prompts without a space), or raise that limit"
        )
    if summary.kept < FEWEST or summary.prompts < FEWEST:
        dropped = ", ".join(f"{count:,} {status}" for status, count in summary.counts.items())
        raise DataError(
            f"{summary.kept:,} pairs of {summary.prompts:,} prompts are left of {summary.rows:,} rows, and "
            f"at least {FEWEST} of each are needed ({dropped}); mend the data or the limits"
        )
    if config.empty_system_message and not tally.has_conversations:
        raise ConfigError(
            "data.empty_system_message has no effect: the data are plain text, not conversations; remove it"
        )


def _chunks(outcomes: Iterator[RowOutcome]) -> Iterator[list[RowOutcome]]:
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
