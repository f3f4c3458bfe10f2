"""Judged rows -> tokens, final statuses and the rows of both tables: all that can be done chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from selective_dpo.config import DataConfig
from selective_dpo.data.pairs import KEPT, DropReason
from selective_dpo.data.store import RowOutcome, pairs_table, tokens_table
from selective_dpo.data.tally import Tally
from selective_dpo.data.tokenize import PairTokens, fit_length, tokenize_pairs, with_system
from selective_dpo.errors import DataError, RunawayTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
