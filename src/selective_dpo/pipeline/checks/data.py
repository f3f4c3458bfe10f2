"""Checks of the data: each source's first rows, the template on them, their lengths; all of few rows."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from selective_dpo.config import Recipe, SourceConfig
from selective_dpo.curriculum.outside import pairs_joined, read_outside
from selective_dpo.data.pairs import KEPT, Pair, parse_row
from selective_dpo.data.readers import Malformed
from selective_dpo.data.sources import open_source, source_label
from selective_dpo.data.store import load_summary
from selective_dpo.data.tokenize import PairTokens, fit_length, tokenize_pairs
from selective_dpo.errors import IdentityError, SelectiveDPOError
from selective_dpo.pipeline.checks.check import Check, fail, ok, refused, warn
from selective_dpo.pipeline.run_directory import RunDirectory
from selective_dpo.pipeline.stages import Run, prepare

ROWS = 100
"""Rows that are looked at in each source."""
FEW_ROWS = 2_000
"""So many rows are prepared whole. More leave enough updates to scorers with any usual batch size."""


class FirstRows(NamedTuple):
    """The beginning of one source."""

    check: Check
    pairs: tuple[Pair, ...]
    """Those of its rows that are pairs."""
    rows: int
    """Rows of the source, counted to just above `FEW_ROWS`."""


def check_source(source: SourceConfig) -> FirstRows:
    """Read and parse the first rows of a source."""
    name = f"data {source_label(source)}"
    try:
        rows = list(islice(open_source(source).rows(), FEW_ROWS + 1))
    except SelectiveDPOError as error:
        return FirstRows(refused(name, error), (), 0)
    parsed = [row.problem if isinstance(row, Malformed) else parse_row(row) for row in rows[:ROWS]]
    pairs = tuple(row for row in parsed if isinstance(row, Pair))
    statuses = Counter(KEPT if isinstance(row, Pair) else str(row) for row in parsed)
    counts = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    found = f"first {len(parsed)} rows: {counts or 'none'}"
    remedy = "wanted are columns chosen and rejected, with or without prompt; see docs"
    if not pairs:
        return FirstRows(fail(name, found, remedy), (), len(rows))
    if len(pairs) < len(parsed) / 2:
        return FirstRows(warn(name, found, "more than half would be dropped"), pairs, len(rows))
    return FirstRows(ok(name, found), pairs, len(rows))


def check_pairs(recipe: Recipe) -> Check:
    """Prepare all rows of the sources, as a run does, in a folder that goes again.

    Raises:
        SelectiveDPOError: what a run would refuse, such as fewer pairs than the scorers' evaluations need.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(recipe, RunDirectory(Path(scratch) / "run"), say=lambda line: None)
        prepare(run)
        summary = load_summary(run.folder.pairs)
    return ok("pairs", f"{summary.kept:,} of {summary.rows:,} rows kept, enough for {recipe.score.protocol}")


def check_curriculum(path: str, pairs: Sequence[Pair]) -> Check:
    """The difficulties that a recipe imports, and whether the first training rows have any.

    Raises:
        SelectiveDPOError: as for a run: they cannot be read.
    """
    outside = read_outside(path)
    found = f"{outside.facts['kind']} of {len(outside.ids):,} difficulties by {outside.names}"
    if not pairs:
        return warn("curriculum", found, "no rows to join it with were found")
    ids, prompt_ids = (
        pa.chunked_array([[getattr(pair, name) for pair in pairs]]) for name in ("pair_id", "prompt_id")
    )
    try:
        without = pairs_joined(outside, ids, prompt_ids).counts["pairs_without_difficulty"]
    except IdentityError as error:  # later rows may have some
        return warn(
            "curriculum", f"{found}; of the first rows, {error}", "a run with no pair joined is refused"
        )
    return ok("curriculum", f"{found}; {len(pairs) - without:,} of the first {len(pairs):,} pairs have one")


def check_template(
    recipe: Recipe, tokenizer: Any, pairs: list[Pair], embedded: int | None
) -> Iterator[Check]:
    """Render and tokenize pairs: the template, the prompt's boundary, the length limits, and whether the
    model, with `embedded` rows (None: not known), has one for every token.

    Raises:
        SelectiveDPOError: as for a run: no template for conversations, an option without effect ...
    """
    data = recipe.data
    tokens = tokenize_pairs(pairs, tokenizer, empty_system_message=data.empty_system_message)
    kept = [item for item in tokens if isinstance(item, PairTokens)]
    chats = sum(pair.is_conversational for pair in pairs)
    found = f"{chats} conversations and {len(pairs) - chats} plain texts rendered"
    if len(kept) < len(pairs):
        refused = f"{found}, {len(pairs) - len(kept)} refused by the template"
        yield warn("template", refused, "these rows would be dropped; see model.chat_template")
    else:
        yield ok("template", found)
    if not kept:
        return
    largest = max(max(ids, default=0) for item in kept for ids in item[:3])
    if embedded is not None and largest >= embedded:
        remedy = "use the tokenizer the model was trained with (model.tokenizer)"
        yield fail("token ids", f"up to {largest:,}, the model embeds {embedded:,} tokens", remedy)
    yield _boundary(kept, data.max_boundary_mismatch)
    yield _lengths([str(fit_length(item, data).drop or KEPT) for item in kept])


def _boundary(tokens: list[PairTokens], most: float) -> Check:
    mismatches = sum(item.boundary_mismatch for item in tokens)
    found = f"prompt is no token prefix in {mismatches} of {len(tokens)} pairs"
    if mismatches / len(tokens) > most:
        remedy = "use a template that writes the prompt alike in both, or raise data.max_boundary_mismatch"
        return fail("boundary", f"{found}, more than {most:.0%}", remedy)
    return ok("boundary", found)


def _lengths(statuses: list[str]) -> Check:
    counts = Counter(statuses)
    found = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    if counts[KEPT] < len(statuses) / 2:
        return warn("lengths", found, "raise data.max_length, or set data.overlong: truncate")
    return ok("lengths", found)
