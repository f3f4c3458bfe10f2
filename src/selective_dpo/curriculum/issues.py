"""Which pairs look wrong, and how: `issues.parquet`, one row a measured pair, sorted by id.

`p_wrong` comes from held-out margins (`stats.calibration`), so it is out of sample: no scorer that measured a
pair has seen its prompt. The flags are named and explained in `MEANINGS`; their thresholds are the recipe's
`issues` block. What they assume is in docs/issues.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.config import FLAGS, Flag, IssuesConfig
from selective_dpo.criteria import by_record
from selective_dpo.curriculum.records import LossTable, text_array
from selective_dpo.curriculum.table import FLIPPED, P_WRONG, PAIR_ID, PROMPT_ID, Curriculum, paths_of
from selective_dpo.data.adapters import KEPT
from selective_dpo.data.text_checks import COLUMNS as TEXTS
from selective_dpo.data.text_checks import check_texts
from selective_dpo.errors import ArtifactError
from selective_dpo.identity import positions_of, swaps_answers
from selective_dpo.stats.calibration import probability_wrong
from selective_dpo.storage.artifacts import SCHEMA_VERSION, file_digest, read_json, replacing, write_json

TABLE, FACTS = "issues.parquet", "issues.json"

SCHEMA = pa.schema(
    [(PAIR_ID, pa.string()), (PROMPT_ID, pa.string()), (P_WRONG, pa.float64())]
    + [(flag, pa.bool_()) for flag in FLAGS]
)

MEANINGS: Mapping[Flag, str] = {
    "suspected_flip": "p_wrong of {suspected_flip:g} or more: by the scorers, more likely wrong than right",
    "tie": "p_wrong within {tie:g} of one half, or equal scores in the data: no preference to learn",
    "too_hard": "in between: the scorers lean to the other answer; wrong, or beyond this model",
    "contradicting": "on a cycle of preferences under one prompt ({similar_prompts:.0%} of the words common)",
    "length_driven": "without the part of its margin that goes with length, the verdict would turn",
    "truncated": "cut to data.max_length",
    "degenerate": "an answer is blank or repeats itself ({repetition:g} times shorter when compressed), or "
    "both are the same but for case and space",
}

_LEAST = 1e-12
"""Probabilities nearer to 0 and to 1 count as this near."""

_NUMBERS = ("chosen_tokens", "rejected_tokens", "truncated", "score_chosen", "score_rejected")

_ROWS_AT_ONCE = 10_000


def issues_of(
    curriculum: Curriculum, pairs: Path, config: IssuesConfig | Mapping[str, Any] | None = None
) -> pa.Table:
    """A table of `SCHEMA` for the pairs of `curriculum` that were measured, in its order.

    They are about the labels that the data have, whatever `select.action` made of them.

    Args:
        curriculum: made from records; it need not select anything.
        pairs: the `pairs.parquet` that it was made from, for lengths and texts.
        config: thresholds, as in the recipe's block `issues`.

    Raises:
        ArtifactError: the curriculum has no `p_wrong`, since its difficulties were imported.
        IdentityError: a pair is not in `pairs`.
    """
    table = curriculum.measured.table
    if P_WRONG not in table.column_names:
        raise ArtifactError(
            "the curriculum has no p_wrong, which needs margins: its difficulties were imported; score the "
            "pairs with this package"
        )
    p_wrong_P = table[P_WRONG].to_numpy()
    if FLIPPED in table.column_names:  # there it is that of the new label
        p_wrong_P = np.where(np.asarray(table[FLIPPED], dtype=np.bool_), 1.0 - p_wrong_P, p_wrong_P)
    return flag_pairs(table, p_wrong_P, pairs, config)


def issues_of_losses(losses: LossTable, pairs: Path, config: IssuesConfig) -> pa.Table:
    """The same for the pairs of `losses`, which come with their margins."""
    ids = {PAIR_ID: pa.array(losses.pair_ids_P), PROMPT_ID: pa.array(losses.prompt_ids_P)}
    margin_P = np.nanmean(by_record(losses.others["margin"]), axis=1)
    return flag_pairs(pa.table(ids), probability_wrong(margin_P), pairs, config)


def flag_pairs(
    ids: pa.Table,
    p_wrong_P: NDArray[np.float64],
    pairs: Path,
    config: IssuesConfig | Mapping[str, Any] | None = None,
) -> pa.Table:
    """The same for the pairs of `ids`, which has columns `pair_id` and `prompt_id`."""
    given = config if isinstance(config, IssuesConfig) else IssuesConfig(**(config or {}))
    pair_ids = ids[PAIR_ID].to_pylist()
    kept = pc.field("status") == KEPT
    known = pq.read_table(pairs, columns=[PAIR_ID, *_NUMBERS], filters=kept)
    at = positions_of(pair_ids, known[PAIR_ID].to_pylist(), what="flagged pairs")
    numbers = {name: known[name].take(pa.array(at)).to_numpy() for name in _NUMBERS}
    found = check_texts(
        partial(_kept_texts, pairs), repetition=given.repetition, similar_prompts=given.similar_prompts
    )
    text_at = positions_of(pair_ids, found.pair_ids, what="flagged pairs")
    from_half_P = p_wrong_P - 0.5
    is_tie_P = (np.abs(from_half_P) <= given.tie) | (numbers["score_chosen"] == numbers["score_rejected"])
    is_flip_P = p_wrong_P >= given.suspected_flip
    flags: dict[Flag, NDArray[np.bool_]] = {
        "suspected_flip": is_flip_P,
        "tie": is_tie_P,
        "too_hard": (from_half_P > given.tie) & ~is_flip_P,
        "contradicting": found.contradicting_P[text_at],
        "length_driven": length_driven(p_wrong_P, numbers["chosen_tokens"], numbers["rejected_tokens"]),
        "truncated": numbers["truncated"].astype(np.bool_),
        "degenerate": found.degenerate_P[text_at],
    }
    columns = [ids[PAIR_ID], ids[PROMPT_ID], pa.array(p_wrong_P), *(pa.array(flags[flag]) for flag in FLAGS)]
    return pa.table(columns, schema=SCHEMA)


def _kept_texts(pairs: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(pairs) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[*TEXTS, "status"]):
            yield batch.filter(pc.equal(batch["status"], KEPT))


def length_driven(
    p_wrong_P: NDArray[np.float64],
    chosen_tokens_P: NDArray[np.int64],
    rejected_tokens_P: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Whether the scorers' verdict would turn without the part of the margin that goes with length. [P]

    That part is slope x log(chosen tokens / rejected tokens), with the slope of a regression of the margins
    on these without intercept. So a pair with its answers exchanged is driven by length as it was before.
    """
    certain_P = np.clip(p_wrong_P, _LEAST, 1.0 - _LEAST)
    margin_P = np.log1p(-certain_P) - np.log(certain_P)
    longer_P = np.log(np.maximum(chosen_tokens_P, 1)) - np.log(np.maximum(rejected_tokens_P, 1))
    squares = float(longer_P @ longer_P)
    slope = float(margin_P @ longer_P) / squares if squares else 0.0
    return np.asarray((margin_P - slope * longer_P) * margin_P < 0.0)


# --- on disk ----------------------------------------------------------------------------------------------


def save_issues(folder: Path, issues: pa.Table, facts: Mapping[str, Any]) -> Path:
    """Write `issues.parquet` and `issues.json`, each whole, and return the table's path.

    The facts hold the SHA-256 of the curriculum's table as `curriculum_sha256`.
    """
    path = folder / TABLE
    with replacing(folder / FACTS) as partial_facts, replacing(path) as partial:
        pq.write_table(issues, partial)
        head = {"schema_version": SCHEMA_VERSION, "table_sha256": file_digest(partial)}
        write_json(partial_facts, {**head, **facts})
    return path


class Issues(NamedTuple):
    """What `load_issues` reads."""

    table: pa.Table
    """Columns of `SCHEMA`."""
    facts: dict[str, Any]
    """Thresholds, counts, and what was found of planted labels."""


def load_issues(folder: Path) -> Issues | None:
    """The issues of the run in `folder`; None where none were looked for, or for another curriculum.

    Raises:
        ArtifactError: the table is not the one that was written with the facts.
    """
    path, facts_path = folder / TABLE, folder / FACTS
    if not (path.is_file() and facts_path.is_file()):
        return None
    facts = read_json(facts_path)
    if facts.get("schema_version") != SCHEMA_VERSION or facts.get("table_sha256") != file_digest(path):
        raise ArtifactError(f"{path} is not what {FACTS} was written for: run `selective-dpo issues` again")
    if facts.get("curriculum_sha256") != file_digest(paths_of(folder)[0]):
        return None
    return Issues(pq.read_table(path), facts)


def with_flags(curriculum: Curriculum, issues: pa.Table) -> Curriculum:
    """The curriculum with a column for each flag, null where a pair was not measured; as it is, if it has
    them."""
    table = curriculum.table
    if FLAGS[0] in table.column_names:
        return curriculum
    at = pc.index_in(table[PAIR_ID], value_set=issues[PAIR_ID].combine_chunks())
    for flag in FLAGS:
        table = table.append_column(flag, issues[flag].combine_chunks().take(at))
    return Curriculum(table, curriculum.facts)


# --- as cleanlab has it -----------------------------------------------------------------------------------


class CleanlabInputs(NamedTuple):
    """What `cleanlab.filter.find_label_issues` takes: pairs as a classification of which answer is better."""

    labels_P: NDArray[np.int64]
    """0 or 1: which of the pair's two answers the label prefers. They are put in an order that depends on the
    pair's id alone, or all labels would be one class."""
    pred_probs_P2: NDArray[np.float64]
    """Out-of-sample probability that each of them is better, by the scorers."""


def cleanlab_inputs(issues: pa.Table) -> CleanlabInputs:
    """Labels and predicted probabilities for cleanlab, a row for each of `issues`.

    cleanlab's label quality ("self confidence") of a pair is then 1 - `p_wrong`.
    """
    p_wrong_P = issues[P_WRONG].to_numpy()
    labels_P = np.array([swaps_answers(name) for name in issues[PAIR_ID].to_pylist()], dtype=np.int64)
    given_P, other_P = 1.0 - p_wrong_P, p_wrong_P
    first_P = np.where(labels_P == 0, given_P, other_P)
    return CleanlabInputs(labels_P, np.stack([first_P, 1.0 - first_P], axis=1))


def label_quality(issues: pa.Table) -> NDArray[np.float64]:
    """1 - `p_wrong`: the score that cleanlab's `get_label_quality_scores` gives, lower is worse. [P]"""
    return 1.0 - np.asarray(issues[P_WRONG].to_numpy(), dtype=np.float64)


def find_label_issues(issues: pa.Table, *, ranked: bool = False) -> NDArray[Any]:
    """The suspected flips in the forms that cleanlab's `find_label_issues` returns.

    A boolean mask [P]; or, with `ranked`, row numbers, the worst label first, as with cleanlab's
    `return_indices_ranked_by="self_confidence"`.
    """
    mask_P = np.asarray(issues["suspected_flip"].to_numpy(zero_copy_only=False), dtype=np.bool_)
    if not ranked:
        return mask_P
    rows = np.flatnonzero(mask_P)
    return rows[np.argsort(label_quality(issues)[rows], kind="stable")]


def prompts_of(issues: pa.Table) -> NDArray[np.str_]:
    """The prompts' ids, which intervals are clustered by. [P]"""
    return text_array(issues[PROMPT_ID])


def meaning(flag: Flag, config: IssuesConfig) -> str:
    """What the flag means, with the threshold that was used."""
    return MEANINGS[flag].format(**config.model_dump())
