"""`generations.parquet` and `verdicts.parquet`: every answer, and every comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selective_dpo.core.identity import canonical_text
from selective_dpo.core.winrates import Verdicts
from selective_dpo.digests import canonical_json
from selective_dpo.evaluation.generation import Answers, Prompt

GENERATION_COLUMNS = {
    "arm": pa.string(),
    "prompt_id": pa.string(),
    "prompt": pa.string(),
    "sample": pa.int64(),
    "answer": pa.string(),
    "tokens": pa.int64(),
}
"""`prompt` is the JSON of a text or of messages, as in `pairs.parquet`."""
VERDICT_COLUMNS = {
    "arm": pa.string(),
    "prompt_id": pa.string(),
    "sample": pa.int64(),
    "opponent_sample": pa.int64(),
    "score": pa.float64(),
}
"""`score` is 1 where the arm's sample won, 0.5 for a tie, 0 where it lost."""


class ArmVerdicts(NamedTuple):
    """All comparisons of one arm; columns of equal length N."""

    prompt_ids_N: list[str]
    sample_N: NDArray[np.int64]
    opponent_sample_N: NDArray[np.int64]
    scores_N: NDArray[np.float64]

    @property
    def by_prompt(self) -> Verdicts:
        """What a win rate is computed from."""
        return Verdicts(self.prompt_ids_N, self.scores_N)


def generations_table(prompts: Sequence[Prompt], answers_by_arm: Mapping[str, Answers]) -> pa.Table:
    """One row an answer, by arm, prompt and sample; see `GENERATION_COLUMNS`."""
    rows = [
        {
            "arm": arm,
            "prompt_id": prompt.prompt_id,
            "prompt": canonical_json(canonical_text(prompt.text)),
            "sample": sample,
            "answer": answer.text,
            "tokens": answer.tokens,
        }
        for arm, answers in answers_by_arm.items()
        for prompt in prompts
        for sample, answer in enumerate(answers.get(prompt.prompt_id, ()))
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(GENERATION_COLUMNS))


def verdicts_table(verdicts_by_arm: Mapping[str, ArmVerdicts]) -> pa.Table:
    """One row a comparison; see `VERDICT_COLUMNS`."""
    schema = pa.schema(VERDICT_COLUMNS)
    tables = [
        pa.table(
            [
                [arm] * len(verdicts.prompt_ids_N),
                verdicts.prompt_ids_N,
                verdicts.sample_N,
                verdicts.opponent_sample_N,
                verdicts.scores_N,
            ],
            schema=schema,
        )
        for arm, verdicts in verdicts_by_arm.items()
    ]
    return pa.concat_tables([schema.empty_table(), *tables])
