"""Counts of rows by status and source, of their tokens, and of what a summary says besides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from selective_dpo.data.pairs import KEPT, DropReason
from selective_dpo.data.store import RowOutcome


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
