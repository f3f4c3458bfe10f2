"""What a row's content and the rows before it decide of its status; tokens decide the rest (`finishing`)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from selective_dpo.core.identity import prompt_id
from selective_dpo.data.pairs import KEPT, DropReason, Pair, fault_of, read_pair
from selective_dpo.data.readers import Malformed, Row
from selective_dpo.data.store import PairsSummary, RowOutcome
from selective_dpo.data.tally import Tally, in_order
from selective_dpo.data.templates import template_digest
from selective_dpo.data.tokenize import tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
