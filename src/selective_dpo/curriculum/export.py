"""A curriculum in other programs' formats."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from selective_dpo.config import FLAGS
from selective_dpo.curriculum.records import difficulty
from selective_dpo.curriculum.table import (
    ACTION,
    FLIPPED,
    P_WRONG,
    WEIGHT,
    Curriculum,
    curriculum_losses,
    loss_column,
)
from selective_dpo.errors import ConfigError, DataError, IdentityError, name_some
from selective_dpo.storage.artifacts import MANIFEST, publish_folder, read_manifest, replacing

if TYPE_CHECKING:
    from datasets import Dataset

Format = Literal["csv", "parquet", "jsonl", "datasets"]
"""Of one file or data set; `handoff.LIBRARIES` has those of other programs."""

_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))

_ROWS_AT_ONCE = 10_000

_KNOWN = (P_WRONG, FLIPPED, WEIGHT, *FLAGS)
"""Columns of a curriculum that every format has, where they are known."""


def export_curriculum(
    curriculum: Curriculum,
    path: str | Path,
    format: Format,
    *,
    pairs: Pairs | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the curriculum to `path`, whole or not at all, and return it.

    - `csv`: every pair with a difficulty, in the columns of the original repository: `prompt_id`,
      `loss_step00_seed41` ..., `learning_order` (the mean loss, or the difficulty that was imported); then
      `difficulty`, where another criterion makes it, `pair_id`, where it differs, and `p_wrong`, if known;
    - `parquet`: every scored pair, the table as it is;
    - `jsonl`: the selected pairs in training order: ids, difficulty, `p_wrong`, prompt, chosen, rejected;
    - `datasets`: the same as a folder for `datasets.load_from_disk`, in the columns TRL reads.

    `pairs` is the run's `pairs.parquet` or its table (`data.store`), whose texts the last two need. The texts
    are read in batches and looked up on disk: memory holds only some of them.

    Raises:
        ConfigError: `path` exists and `overwrite` is off, the format is unknown, or `pairs` is missing.
        IdentityError: selected pairs are not in `pairs`.
        DataError: `datasets` cannot hold the pairs: some are text, some messages.
    """
    path = Path(path)
    if format not in ("csv", "parquet", "jsonl", "datasets"):
        raise ConfigError(f"unknown format '{format}': use csv, parquet, jsonl or datasets")
    require_free(path, overwrite=overwrite, kind="dataset" if format == "datasets" else None)
    if format == "csv":
        _write_csv(_original_columns(curriculum), path)
    elif format == "parquet":
        with replacing(path) as partial:
            pq.write_table(curriculum.table, partial)
    else:
        _write_texts(curriculum, path, format, pairs)
    return path


def _write_texts(curriculum: Curriculum, path: Path, format: str, pairs: Pairs | None) -> None:
    if pairs is None:
        raise ConfigError(
            f"format '{format}' needs the pairs' texts: pass --pairs with the run's pairs folder, "
            "or export csv or parquet"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-texts-", dir=path.parent) as scratch:
        rows = rows_with_texts(curriculum, pairs, Path(scratch))
        if format == "jsonl":
            write_rows(rows, path)
        else:
            _write_dataset(rows, path, Path(scratch), key=curriculum.order_digest)


def require_free(path: Path, *, overwrite: bool, kind: str | None) -> None:
    """Refuse a path that something is at, unless it may be replaced: a file, or a folder of this kind.

    Raises:
        ConfigError: `path` exists and `overwrite` is off, or something else is there.
    """
    if not path.exists():
        return
    if not overwrite:
        raise ConfigError(f"{path} exists: choose another path, or pass --overwrite to replace it")
    # A folder is replaced with all it holds, so only one that an export made may be.
    has_manifest = (path / MANIFEST).is_file()
    is_ours = path.is_file() if kind is None else has_manifest and read_manifest(path).kind == kind
    if not is_ours:
        raise ConfigError(
            f"{path} is not an exported {'file' if kind is None else 'folder'}: choose another path"
        )


def _original_columns(curriculum: Curriculum) -> pa.Table:
    table, facts = curriculum.measured.table, curriculum.facts
    # The original counts evaluations from 0 and calls them steps.
    losses = {
        f"loss_step{evaluation - 1:02d}_seed{seed}": table[loss_column(seed, evaluation)]
        for seed in facts["seeds"]
        for evaluation in facts["evaluations"]
    }
    order = table["difficulty"]
    if losses:
        order = pa.array(difficulty(curriculum_losses(curriculum), allow_partial=True).difficulty_P)
    columns: dict[str, Any] = {
        "prompt_id": table["prompt_id"],
        **losses,
        "learning_order": order,
    }
    if (facts.get("select") or {}).get("aggregate", "mean") != "mean":
        columns["difficulty"] = table["difficulty"]
    if table["pair_id"] != table["prompt_id"]:
        columns["pair_id"] = table["pair_id"]
    columns |= {name: table[name] for name in _KNOWN if name in table.column_names}
    return pa.table(columns)


def _write_csv(table: pa.Table, path: Path) -> None:
    ids = [table[name] for name in ("prompt_id", "pair_id") if name in table.column_names]
    # The original writes bare ids; quotes only where a data set's own ids need them.
    needs_quotes = any(pc.any(pc.match_substring_regex(column, '[,"\r\n]')).as_py() for column in ids)
    options = pyarrow.csv.WriteOptions(
        include_header=False, quoting_style="needed" if needs_quotes else "none"
    )
    with replacing(path) as partial, partial.open("wb") as stream:
        stream.write((",".join(table.column_names) + "\n").encode())
        pyarrow.csv.write_csv(table, stream, options)


def write_rows(rows: Dataset, path: Path) -> None:
    """Write rows of `rows_with_texts` as JSON Lines."""
    with replacing(path) as partial, partial.open("w", encoding="ascii", newline="\n") as stream:
        for table in rows.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            for row in table.to_pylist():
                plain = json.dumps({name: value for name, value in row.items() if name not in TEXTS})
                # The texts are JSON already: spliced in as they stand, nothing can be lost on the way.
                spliced = "".join(f', "{name}": {row[name]}' for name in TEXTS)
                stream.write(f"{plain[:-1]}{spliced}}}\n")


def _write_dataset(rows: Dataset, path: Path, scratch: Path, *, key: str) -> None:
    from datasets import Features, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    is_text = rows[0]["prompt"].startswith('"')
    kind = pa.string() if is_text else _MESSAGES
    schema = rows.features.arrow_schema
    for name in TEXTS:
        schema = schema.set(schema.get_field_index(name), pa.field(name, kind))
    had_bars = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        decoded = rows.map(
            _decoded,
            batched=True,
            batch_size=_ROWS_AT_ONCE,
            features=Features.from_arrow_schema(schema),
            fn_kwargs={"sign": '"' if is_text else "["},
            cache_file_name=str(scratch / "decoded.arrow"),
            new_fingerprint=key[:32],
        )
        with publish_folder(path, kind="dataset", key=key) as partial:
            decoded.save_to_disk(partial)
    finally:
        if had_bars:
            enable_progress_bars()


def _decoded(batch: dict[str, list[Any]], sign: str) -> dict[str, list[Any]]:
    """The texts as the strings or messages that they are."""
    if not all(text.startswith(sign) for name in TEXTS for text in batch[name]):
        raise DataError("some pairs are text and some are messages, which no data set holds: export jsonl")
    return {name: [json.loads(text) for text in batch[name]] for name in TEXTS}


# --- The texts of pairs in a given order, looked up on disk -------------------------------------------------


TEXTS = ("prompt", "chosen", "rejected")

KEPT = "kept"

Pairs: TypeAlias = pa.Table | Path
"""Rows as in `pairs.parquet`: as a table, or the file."""


def rows_with_texts(
    curriculum: Curriculum, pairs: Pairs, scratch: Path, wanted: pa.Table | None = None
) -> Dataset:
    """Rows of ids, `difficulty`, `p_wrong` if known, and the texts (as JSON): the selected in training order.

    Of a curriculum with an `action` also `flipped` and `weight`; the answers of flipped pairs are exchanged.
    Flags come along where the curriculum has them.

    `wanted`: other rows of the curriculum's table, in their order. The texts are copied once to a file in the
    folder `scratch`, from which rows are read when needed.

    Raises:
        IdentityError: wanted pairs are not in `pairs`.
    """
    from datasets import Dataset

    columns = ["pair_id", "prompt_id", "difficulty"]
    columns += [name for name in _KNOWN if name in curriculum.table.column_names]
    if wanted is None:
        wanted = curriculum.table.filter(pc.greater_equal(curriculum.table["position"], 0))
        wanted = wanted.sort_by("position")
    ordered = pa.record_batch([wanted[name].combine_chunks() for name in columns], names=columns)
    schema = pa.schema([*ordered.schema, *((name, pa.string()) for name in TEXTS)])
    file, places = scratch / "texts.arrow", [np.empty(0, dtype=np.int64)]
    with pa.ipc.new_stream(str(file), schema) as writer:
        for batch in _batches(pairs, ("pair_id", "status", *TEXTS)):
            place = pc.index_in(batch["pair_id"], value_set=ordered["pair_id"])
            is_used = pc.and_(place.is_valid(), pc.equal(batch["status"], KEPT))
            place, texts = place.filter(is_used), batch.filter(is_used)
            found = ordered.take(place)
            prompt, chosen, rejected = (texts[name] for name in TEXTS)
            if FLIPPED in columns:
                turned = found[FLIPPED]
                chosen, rejected = (
                    pc.if_else(turned, rejected, chosen),
                    pc.if_else(turned, chosen, rejected),
                )
            values = [*found.columns, prompt, chosen, rejected]
            writer.write_batch(pa.record_batch(values, schema=schema))
            places.append(place.to_numpy())
    place_R = np.concatenate(places)
    absent = np.setdiff1d(np.arange(len(ordered)), place_R)
    if len(absent):
        named = name_some(ordered["pair_id"].take(pa.array(absent)).to_pylist())
        raise IdentityError(
            f"{len(absent):,} of {len(ordered):,} pairs of the curriculum are not among these pairs: "
            f"{named}; pass the pairs that it was made from"
        )
    return Dataset.from_file(str(file)).select(np.argsort(place_R))


def _batches(pairs: Pairs, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    if isinstance(pairs, pa.Table):
        yield from pairs.select(columns).to_batches(max_chunksize=_ROWS_AT_ONCE)
        return
    with pq.ParquetFile(pairs) as file:
        yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(columns))


# --- The chosen answers of pairs that `select.action` sends to SFT ----------------------------------------


SFT = "sft.jsonl"


def write_sft(curriculum: Curriculum, pairs: Path, path: Path) -> int:
    """Write a data set for TRL's `SFTTrainer` (prompt and completion), whole or not at all.

    JSON Lines with `pair_id`, `prompt_id`, `prompt` and `completion`, the chosen answer of each pair whose
    `action` is `sft`; an answer that several pairs share comes once. Returns the number of lines.
    """
    sent = curriculum.table.filter(pc.equal(curriculum.table[ACTION], "sft"))["pair_id"].combine_chunks()
    seen: set[tuple[str, str]] = set()
    with replacing(path) as partial, partial.open("w", encoding="ascii", newline="\n") as stream:
        for batch in _batches(pairs, ("pair_id", "prompt_id", "status", "prompt", "chosen")):
            is_sent = pc.and_(pc.is_in(batch["pair_id"], value_set=sent), pc.equal(batch["status"], KEPT))
            for row in batch.filter(is_sent).to_pylist():
                if (row["prompt"], row["chosen"]) in seen:
                    continue
                seen.add((row["prompt"], row["chosen"]))
                ids = json.dumps({name: row[name] for name in ("pair_id", "prompt_id")})
                stream.write(f'{ids[:-1]}, "prompt": {row["prompt"]}, "completion": {row["chosen"]}}}\n')
    return len(seen)
