"""Each input row gets exactly one status: kept, or the first reason that applies to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from selective_dpo.config import DataConfig
from selective_dpo.core.identity import prompt_id
from selective_dpo.data.pairs import KEPT, DropReason, Pair, fault_of, read_pair
from selective_dpo.data.readers import Malformed, Row
from selective_dpo.data.store import PairsSummary, RowOutcome
from selective_dpo.data.templates import template_digest
from selective_dpo.data.tokenize import PairTokens, fit_length, tokenize_pairs, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowSorter:
    """Gives each row its one status, and counts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, exclude_prompts: Collection[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._excluded = frozenset(exclude_prompts)
        self._seen_pairs: set[bytes] = set()
        self._id_of_prompt: dict[bytes, str] = {}
        self._kept_prompts: set[str] = set()
        self._counts: dict[str, Counter[str]] = {}
        self._totals: Counter[str] = Counter()
        self.first_mismatch = ""
        """Id of the first pair whose boundary does not match."""
        self.has_conversations = False

    def judge(self, row: int, source: str, raw: Row) -> RowOutcome:
        """The status of one sampled row as far as its content decides; KEPT is provisional."""
        pair = DropReason.MALFORMED if isinstance(raw, Malformed) else read_pair(raw)
        if isinstance(pair, DropReason):
            return RowOutcome(row, source, pair)
        content_key = prompt_id(pair.prompt)
        reason = fault_of(pair) or self._repetition(pair, content_key)
        if reason is not None:
            return RowOutcome(row, source, reason, pair)
        return RowOutcome(row, source, KEPT, self._with_joined_prompt(pair, content_key))

    def finish(self, chunk: Sequence[RowOutcome]) -> list[RowOutcome]:
        """Tokenize what is kept so far, decide on lengths, count."""
        pairs = [outcome.pair for outcome in chunk if outcome.status == KEPT and outcome.pair is not None]
        tokens = iter(
            tokenize_pairs(pairs, self._tokenizer, empty_system_message=self._config.empty_system_message)
        )
        finished = [
            self._with_tokens(outcome, next(tokens)) if outcome.status == KEPT else outcome
            for outcome in chunk
        ]
        for outcome in finished:
            self._count(outcome)
        return finished

    def summary(self) -> PairsSummary:
        """The counts so far."""
        counts: Counter[str] = sum(self._counts.values(), Counter())
        if sum(counts.values()) != self._totals["rows"]:
            raise RuntimeError(f"{self._totals['rows']} rows were read and {sum(counts.values())} counted")
        return PairsSummary(
            rows=self._totals["rows"],
            kept=counts[KEPT],
            prompts=len(self._kept_prompts),
            counts=_in_order(counts),
            sources={source: _in_order(by_status) for source, by_status in self._counts.items()},
            tokenized=self._totals["tokenized"],
            boundary_mismatches=self._totals["mismatches"],
            truncated=self._totals["truncated"],
            prompt_tokens=self._totals["prompt_tokens"],
            completion_tokens=self._totals["completion_tokens"],
            joined_prompts=self._totals["joined"],
            tokenizer_digest=tokenizer_digest(self._tokenizer),
            template_digest=template_digest(self._tokenizer),
        )

    def count_row(self) -> None:
        """A row was read; each must come back through `finish`."""
        self._totals["rows"] += 1

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
        self._totals["joined"] += 1
        return pair._replace(prompt_id=known)

    def _with_tokens(self, outcome: RowOutcome, tokens: PairTokens | DropReason) -> RowOutcome:
        if isinstance(tokens, DropReason):
            return outcome._replace(status=tokens)
        fitted = fit_length(tokens, self._config)
        return outcome._replace(status=fitted.drop or KEPT, tokens=fitted.tokens)

    def _count(self, outcome: RowOutcome) -> None:
        self._counts.setdefault(outcome.source, Counter())[str(outcome.status)] += 1
        pair, tokens = outcome.pair, outcome.tokens
        if pair is None or tokens is None:
            return
        self._totals["tokenized"] += 1
        self.has_conversations = self.has_conversations or pair.is_conversational
        if tokens.boundary_mismatch:
            self._totals["mismatches"] += 1
            self.first_mismatch = self.first_mismatch or pair.pair_id
        if outcome.status == KEPT:
            self._kept_prompts.add(pair.prompt_id)
            self._totals["truncated"] += tokens.truncated
            self._totals["prompt_tokens"] += len(tokens.prompt_ids)
            self._totals["completion_tokens"] += len(tokens.chosen_ids) + len(tokens.rejected_ids)


def _in_order(counts: Counter[str]) -> dict[str, int]:
    # Kept first, then the reasons as they are declared, so that two summaries read alike.
    statuses = [KEPT, *map(str, DropReason)]
    return {status: counts[status] for status in statuses if status == KEPT or counts[status]}
