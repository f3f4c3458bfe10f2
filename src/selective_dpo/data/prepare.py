"""Sources -> rows -> pairs -> tokens -> a published folder, with one status for each input row.

Rows stream through in chunks: memory holds a few of them, and some 100 bytes for each pair and prompt seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from selective_dpo.artifacts import content_key, publish_folder, write_json
from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.data.finishing import Finisher
from selective_dpo.data.mixture import sample_rows
from selective_dpo.data.pairs import WANTED_COLUMNS, text_size
from selective_dpo.data.readers import Malformed, Row
from selective_dpo.data.sorting import RowSorter
from selective_dpo.data.sources import Source, open_source, source_digest
from selective_dpo.data.store import KIND, SUMMARY, PairsSummary, RowOutcome, open_writer, summary_json
from selective_dpo.data.tally import Tally
from selective_dpo.data.templates import template_digest
from selective_dpo.data.tokenize import tokenizer_digest
from selective_dpo.data.workers import finish_chunks
from selective_dpo.digests import digest
from selective_dpo.errors import ConfigError, DataError, TemplateError, name_some

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

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
