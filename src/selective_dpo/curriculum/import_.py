"""Difficulty from outside: a file of ids and numbers, another run's curriculum, or the original's records."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selective_dpo.config import SelectConfig
from selective_dpo.criteria import CRITERIA, criterion_source
from selective_dpo.curriculum.build import AttributesOf, assemble, build_curriculum, resolved_selection
from selective_dpo.curriculum.records import (
    MAX_LOSS,
    Difficulty,
    LossTable,
    arrange,
    difficulty,
    require_plain,
    text_array,
)
from selective_dpo.curriculum.table import FLIPPED, Curriculum, dataset_ids, paths_of
from selective_dpo.data.store import load_ids
from selective_dpo.errors import ArtifactError, ConfigError, DataError, IdentityError, RecordsError, name_some
from selective_dpo.identity import require_unique
from selective_dpo.storage.artifacts import content_key, file_digest, read_json

if TYPE_CHECKING:
    from datasets import Dataset

IdKind = Literal["pair_id", "prompt_id"]

ID_COLUMNS: tuple[IdKind, ...] = ("pair_id", "prompt_id")
"""What an id may name; a file that has both columns is joined by the first."""

DIFFICULTY_COLUMNS = ("learning_order", "difficulty")
"""The original's name for it, and ours."""

REASON = "no difficulty in the imported curriculum"
"""Why a pair is not selected that the outside difficulties do not know."""


class Outside(NamedTuple):
    """Difficulties that were not measured in this run; N distinct ids."""

    names: IdKind
    """What the ids name. A prompt's difficulty is that of all its pairs."""
    ids: pa.Array
    difficulty_N: NDArray[np.float64]
    digest: str
    """SHA-256 of the content."""
    facts: dict[str, Any]
    """Kind, name, columns and the like, for provenance. `nats`: whether these are DPO losses."""


def read_outside(
    path: str | Path, *, id_column: str = "", difficulty_column: str = "", names: IdKind | None = None
) -> Outside:
    """Read difficulties: what `path` is decides how.

    - a folder or `.parquet` with a curriculum's facts (`.json`) beside it: a curriculum, as a run makes it;
    - another folder: the original's records, as `read_record_folder` takes them;
    - else a CSV or Parquet file, plain or gzipped.

    Args:
        id_column, difficulty_column: of a file; default: `pair_id` or `prompt_id`, and `learning_order` or
            `difficulty`.
        names: what the ids of a file name; default: what their column is called.

    Raises:
        ConfigError: an argument would have no effect, or is needed.
        DataError: nothing that can be read.
        IdentityError: an id stands twice (named).
        ArtifactError: a damaged curriculum.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a CSV or Parquet file, or a curriculum's folder")
    if not path.is_dir() and not paths_of(path)[1].is_file():
        return _of_file(path, id_column, difficulty_column, names)
    if id_column or difficulty_column or names:
        raise ConfigError(f"{path} is no file with a choice of columns: leave out the options that name them")
    return _of_records(path) if is_records(path) else _of_curriculum(path)


def is_records(path: Path) -> bool:
    """Whether `path` is a folder, and no curriculum's: then it is read as one of the original's records."""
    return path.is_dir() and not paths_of(path)[1].is_file()


def _of_file(path: Path, id_column: str, difficulty_column: str, names: IdKind | None) -> Outside:
    wanted_ids = (id_column,) if id_column else ID_COLUMNS
    wanted_numbers = (difficulty_column,) if difficulty_column else DIFFICULTY_COLUMNS
    numbers = read_numbers(path, wanted_ids, wanted_numbers)
    kind = names or next((kind for kind in ID_COLUMNS if kind == numbers.id_column), None)
    if kind is None:
        raise ConfigError(
            f"say what the ids in column {numbers.id_column!r} name: --names pair_id or --names prompt_id"
        )
    require_unique(numbers.ids.to_pylist(), what=str(path))
    digest = file_digest(path)
    facts = {
        "kind": "file",
        "name": path.name,
        "sha256": digest,
        "id_column": numbers.id_column,
        "difficulty_column": numbers.column,
        "nats": numbers.column == DIFFICULTY_COLUMNS[0],
    }
    return Outside(kind, numbers.ids, numbers.values_N, digest, facts)


def _of_curriculum(path: Path) -> Outside:
    curriculum = Curriculum.load(path)
    table, facts = curriculum.measured.table, curriculum.facts
    if FLIPPED in table.column_names and pc.any(table[FLIPPED]).as_py():
        raise ConfigError(
            f"{path}: select.action has flipped pairs there, so their difficulty is of another label than "
            "the data have: build its curriculum without flip, and import that"
        )
    origin, earlier = facts["provenance"], imported_from(facts)
    digest = file_digest(paths_of(path)[0])
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    made_by = {
        "run": folder.name,
        "model": _model_name(folder / "config.json"),
        "model_sha256": (origin.get("inputs") or {}).get("model"),
        "recipe_sha256": origin.get("recipe_sha256"),
        "key": facts["key"],
        "aggregate": facts["select"]["aggregate"],
        "seeds": facts["seeds"],
        "evaluations": facts["evaluations"],
    }
    # A criterion of somebody else's file is not imported for this.
    is_loss = made_by["aggregate"] in CRITERIA and CRITERIA[made_by["aggregate"]].is_loss
    own = {
        "kind": "curriculum",
        "name": folder.name,
        "sha256": digest,
        "made_by": {name: value for name, value in made_by.items() if value is not None},
        "nats": is_loss and (earlier is None or earlier["nats"]),
        **({"imported": dict(earlier)} if earlier else {}),
    }
    names: IdKind = "prompt_id" if table["pair_id"] == table["prompt_id"] else "pair_id"
    return Outside(names, table["pair_id"].combine_chunks(), curriculum.measured.difficulty_P, digest, own)


def _model_name(config: Path) -> str | None:
    """The last part of the model's name or path: a path says nothing elsewhere."""
    try:
        return Path(str(read_json(config)["model"]["path"])).name
    except (ArtifactError, KeyError, TypeError):
        return None


def _of_records(path: Path) -> Outside:
    found = read_record_folder(path)
    origin, losses = found.provenance, found.losses
    digest = content_key(files=origin["files"])
    own = {"kind": "records", "name": origin["folder"], "sha256": digest, "nats": True}
    own |= {name: origin[name] for name in ("rows", "repeated_ids", "conflicting_ids")}
    return Outside("prompt_id", pa.array(losses.pair_ids_P), difficulty(losses).difficulty_P, digest, own)


def pairs_joined(outside: Outside, pair_ids: pa.ChunkedArray, prompt_ids: pa.ChunkedArray) -> Joined:
    """Look up the difficulty of each pair.

    Raises:
        IdentityError: no pair at all has one; some ids of both are named.
    """
    keys = pair_ids if outside.names == "pair_id" else prompt_ids
    row_P = pc.index_in(keys, value_set=outside.ids)
    known_P = np.asarray(row_P.is_valid())
    if not known_P.any():
        raise IdentityError(
            f"none of {len(keys):,} pairs has a difficulty in {outside.facts['name']}: its "
            f"{len(outside.ids):,} ids, such as {outside.ids[0]}, are no {outside.names} of the data, such "
            f"as {keys[0] if len(keys) else 'none'}; give the rows the {outside.names} that it was made with"
        )
    used_P = pc.fill_null(row_P, 0).to_numpy()
    times_N = np.bincount(used_P[known_P], minlength=len(outside.ids))
    counts = {
        "pairs": len(known_P),
        "pairs_without_difficulty": int((~known_P).sum()),
        "ids": len(outside.ids),
        "ids_without_pairs": int((times_N == 0).sum()),
        "ids_shared_by_pairs": int((times_N > 1).sum()),
        "pairs_sharing_an_id": int(times_N[times_N > 1].sum()),
    }
    return Joined(np.where(known_P, outside.difficulty_N[used_P], np.nan), counts)


class Joined(NamedTuple):
    """Outside difficulties of P pairs."""

    difficulty_P: NDArray[np.float64]
    """NaN: the pair has none."""
    counts: dict[str, int]


def outside_curriculum(
    outside: Outside,
    pair_ids: pa.ChunkedArray,
    prompt_ids: pa.ChunkedArray,
    select: SelectConfig | Mapping[str, Any] | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
    key: str = "",
    attributes: AttributesOf | None = None,
) -> Curriculum:
    """The curriculum of these pairs by their outside difficulty; pairs without one are not selected.

    There are no losses in it, no seeds, and nothing to agree: `count` is 0 and `spread` null.

    Raises:
        IdentityError: no pair has a difficulty, or a pair id stands twice.
        ConfigError: the selection is not valid, does not fit the number of pairs, or aggregates losses.
    """
    config = resolved_selection(select)
    if config.about_records:
        raise ConfigError(
            f"select.{config.about_records[0]} has no effect on an imported difficulty, which is one number "
            "a pair: leave it out"
        )
    found = pairs_joined(outside, pair_ids, prompt_ids)
    ids_P, prompt_ids_P = text_array(pair_ids), text_array(prompt_ids)
    require_unique(ids_P.tolist(), what="pairs")
    order_P = np.argsort(ids_P, kind="stable")
    is_known_P = np.isfinite(found.difficulty_P[order_P])
    known, aside = order_P[is_known_P], order_P[~is_known_P]
    nothing = np.zeros(len(known))
    losses = LossTable(ids_P[known], prompt_ids_P[known], (), (), np.empty((len(known), 0, 0)))
    measured = Difficulty(found.difficulty_P[known], nothing * np.nan, nothing.astype(np.int64))
    imported = {**outside.facts, "joined_by": outside.names, **found.counts}
    facts = {
        "key": key or content_key(imported=outside.digest, select=config.identity()),
        "agreement": {},
        "provenance": {**(provenance or {}), "imported": imported},
        "cost": {},
    }
    without = dict(zip(ids_P[aside].tolist(), prompt_ids_P[aside].tolist(), strict=True))
    return assemble(losses, measured, config, facts, aside=without, reason=REASON, attributes=attributes)


def import_curriculum(
    path: str | Path,
    pairs: str | Path | Dataset | None = None,
    select: SelectConfig | Mapping[str, Any] | None = None,
    **columns: Any,
) -> Curriculum:
    """Make a curriculum from difficulties that come from outside.

    Args:
        path: see `read_outside`.
        pairs: what they are joined with: a run's folder of prepared pairs, or a `datasets.Dataset` of
            preference pairs, whose rows may have their own `prompt_id`. None: the ids name pairs and prompts
            both.
        select: the selection.
        columns: the other arguments of `read_outside`.

    Raises:
        SelectiveDPOError: as `read_outside` and `outside_curriculum`.
    """
    outside = read_outside(path, **columns)
    if pairs is None:
        ids = pa.chunked_array([outside.ids])
        return outside_curriculum(outside, ids, ids, select)
    table = load_ids(Path(pairs)) if isinstance(pairs, str | Path) else dataset_ids(pairs)
    return outside_curriculum(outside, table["pair_id"], table["prompt_id"], select)


def imported_from(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a curriculum's facts say of where its difficulty was imported from; None: it was measured."""
    found: Mapping[str, Any] | None = (facts.get("provenance") or {}).get("imported")
    return found


def imported_in_words(imported: Mapping[str, Any]) -> str:
    """Of what `imported_from` gives: the join, in one line."""
    shared, without = imported["pairs_sharing_an_id"], imported["pairs_without_difficulty"]
    return (
        f"{imported['kind']} {imported['name']}, joined by {imported['joined_by']}: "
        f"{imported['pairs'] - without:,} of {imported['pairs']:,} pairs have a difficulty, "
        f"{shared:,} of which share it with another; {without:,} have none and are not selected; "
        f"{imported['ids_without_pairs']:,} of {imported['ids']:,} ids have no pair"
    )


# --- Files of ids and numbers: records without a header, and tables with named columns --------------------


MAX_BYTES = 1 << 30
"""Of a file, unpacked: some 25 million rows."""

_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"

_NO_HEADER = ("id", "loss")


class Numbers(NamedTuple):
    """Two columns of a file, in its order; blank lines are left out."""

    id_column: str
    column: str
    ids: pa.Array
    values_N: NDArray[np.float64]


def read_numbers(path: Path, id_columns: Sequence[str] = (), number_columns: Sequence[str] = ()) -> Numbers:
    """Read ids and numbers from a Parquet file or from a CSV with a header, plain or gzipped (`.gz`).

    Of the columns named, the first that the file has is read. Without any names the file is a CSV of two
    columns, ids and losses, that has no header.

    Raises:
        DataError: it cannot be read, is empty, or lacks a column or has it twice; or a line is not an id and
            a finite number, which is named.
    """
    is_parquet = ".parquet" in path.suffixes[-2:]
    read = _parquet_texts if is_parquet else _csv_texts
    try:
        table = read(path, id_columns, number_columns)
        ids, texts = (pc.fill_null(column, "").combine_chunks() for column in table.columns)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {'Parquet' if is_parquet else 'CSV'}: {error}") from error
    names, texts = table.column_names, pc.utf8_trim_whitespace(texts)
    has_id_N = np.asarray(pc.not_equal(ids, ""))
    is_blank_N = ~has_id_N & np.asarray(pc.equal(texts, ""))
    is_number_N = np.asarray(pc.match_substring_regex(texts, _NUMBER))
    values_N = pc.if_else(pa.array(is_number_N), texts, "0").cast(pa.float64()).to_numpy()
    wrong_N = ~is_blank_N & ~(has_id_N & is_number_N & (np.abs(values_N) <= MAX_LOSS))
    if wrong_N.any():
        row = int(np.argmax(wrong_N))
        first_line = 2 if id_columns and not is_parquet else 1
        raise DataError(
            f"{path} line {row + first_line}: need an id and a finite {names[1]}"
            f"{'' if id_columns else ' (and no header)'}; the {names[1]} is {texts[row].as_py()!r}"
        )
    if is_blank_N.all():
        raise DataError(f"{path} has no rows")
    kept = ids.filter(pa.array(~is_blank_N))
    try:
        require_plain(kept, what=f"{path}: ids")
    except IdentityError as error:
        raise DataError(str(error)) from error
    return Numbers(names[0], names[1], kept, values_N[~is_blank_N])


def column_names(path: Path) -> list[str]:
    """The columns of a file that `read_numbers` has read by name."""
    if ".parquet" in path.suffixes[-2:]:
        source = pa.BufferReader(_unpacked(path)) if path.suffix == ".gz" else path
        names: list[str] = pq.read_schema(source).names
        return names
    return _header(_unpacked(path))


def _header(content: bytes) -> list[str]:
    """The first row of a CSV file."""
    return next(csv.reader([content.partition(b"\n")[0].decode("utf-8-sig")]))


def _choose(
    path: Path, header: list[str], id_columns: Sequence[str], number_columns: Sequence[str]
) -> list[str]:
    found = [next((name for name in names if name in header), "") for names in (id_columns, number_columns)]
    if not all(found):
        raise DataError(
            f"{path} has columns {name_some(header, limit=12) or 'none'}, and needs one of ids "
            f"({' or '.join(id_columns)}) and one of difficulties ({' or '.join(number_columns)}): name "
            "others with `selective-dpo import-curriculum --id-column NAME --difficulty-column NAME`"
        )
    if [header.count(name) for name in found] != [1, 1] or found[0] == found[1]:
        raise DataError(f"{path} does not hold columns {found[0]!r} and {found[1]!r}, each once")
    return found


def _parquet_texts(path: Path, id_columns: Sequence[str], number_columns: Sequence[str]) -> pa.Table:
    source = pa.BufferReader(_unpacked(path)) if path.suffix == ".gz" else path
    with pq.ParquetFile(source) as file:
        chosen = _choose(path, file.schema_arrow.names, id_columns, number_columns)
        ids, values = file.read(columns=chosen).select(chosen).columns
    # A float32 as the float64 that it is, not as its own shortest text.
    values = values.cast(pa.float64()) if pa.types.is_floating(values.type) else values
    return pa.table([ids.cast(pa.string()), values.cast(pa.string())], names=chosen)


def _csv_texts(path: Path, id_columns: Sequence[str], number_columns: Sequence[str]) -> pa.Table:
    """Both columns as text, so that whatever is wrong with them can be shown."""
    content = _unpacked(path)
    # Arrow cannot hand over a wrong row that is not text: it would be left out without a word.
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line} is not UTF-8 text; save it as UTF-8") from error
    chosen = list(_NO_HEADER)
    if id_columns:
        chosen = _choose(path, _header(content), id_columns, number_columns)
    wrong: list[pyarrow.csv.InvalidRow] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    table = pyarrow.csv.read_csv(
        pa.BufferReader(content),
        # One thread, because only then rows know their number.
        pyarrow.csv.ReadOptions(column_names=None if id_columns else chosen, use_threads=False),
        pyarrow.csv.ParseOptions(invalid_row_handler=note, ignore_empty_lines=False),
        pyarrow.csv.ConvertOptions(
            include_columns=chosen,
            column_types=dict.fromkeys(chosen, pa.string()),
            strings_can_be_null=False,
        ),
    )
    if wrong:
        row = wrong[0]
        raise DataError(
            f"{path} line {row.number}: {row.actual_columns} column(s) instead of {row.expected_columns}"
        )
    return table


def _unpacked(path: Path) -> bytes:
    # In pieces: a small .gz can unpack to more than any memory holds.
    pieces: list[bytes] = []
    with pa.input_stream(str(path), compression="detect") as stream:
        while piece := stream.read(16 << 20):
            pieces.append(piece)
            if sum(map(len, pieces)) > MAX_BYTES:
                raise DataError(f"{path} has more than {MAX_BYTES >> 20:,} MiB; is it a file of records?")
    return b"".join(pieces)


# --- A folder of the original repository's learning records (CSV, no header: prompt id, loss) -------------


# Two layouts: both halves in one file, or each in its own.
_RECORDS = re.compile(
    r"(?:seed(\d{1,9})_step(\d{1,9})"
    r"|learning_record-seed(\d{1,9})-step(\d{1,9})-(first|second))\.csv(?:\.gz)?",
    re.ASCII,
)


class Evaluation(NamedTuple):
    """What the file (or the two halves) of one seed's evaluation held."""

    files: tuple[str, ...]
    seed: int
    evaluation: int
    """From 1; the original's step number plus one."""
    rows: int
    repeated_ids: tuple[str, ...]
    """Ids that stand more than once. Their first row is used, as the original's script does."""
    conflicting_ids: tuple[str, ...]
    """Those of them whose losses differ."""
    records: pa.Table
    """Each id once."""


class RecordFolder(NamedTuple):
    """The losses in a folder of records, and what was found on the way to them."""

    losses: LossTable
    evaluations: tuple[Evaluation, ...]
    """One for each seed and evaluation, in this order."""
    ignored: tuple[str, ...]
    """Names of other files in the folder."""
    provenance: dict[str, Any]
    """`files` holds the SHA-256 of each; `repeated_ids` and `conflicting_ids` count those of all files."""


class Imported(NamedTuple):
    """A curriculum, and the folder that it was made from."""

    curriculum: Curriculum
    folder: RecordFolder

    def describe(self) -> str:
        """What was found, in a few lines."""
        facts, found = self.curriculum.facts, self.folder
        repeats = [each.rows - len(each.records) for each in found.evaluations]
        lines = [
            f"{len(found.evaluations)} evaluations (seeds {', '.join(map(str, facts['seeds']))}), "
            f"{_span([each.rows for each in found.evaluations])} rows each: "
            f"{facts['pairs']:,} distinct ids, {facts['selected']:,} selected",
            f"  {_span(repeats)} rows in each repeat an id; the first row of an id is used",
            f"  {found.provenance['repeated_ids']:,} ids are repeated in some evaluation, "
            f"{found.provenance['conflicting_ids']:,} of them with different losses",
        ]
        if facts["partial"]:
            lines.append(f"  {facts['partial']:,} ids lack some of their losses")
        if found.ignored:
            lines.append(f"  {len(found.ignored):,} other files were not read: {name_some(found.ignored)}")
        return "\n".join(lines)


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def import_records(folder: str | Path, select: SelectConfig | Mapping[str, Any] | None = None) -> Imported:
    """The curriculum of the learning records in `folder` (see `read_record_folder`).

    The original's ids name prompts; they become both `pair_id` and `prompt_id`, and the curriculum's
    provenance says so.

    Raises:
        DataError, RecordsError: as `read_record_folder`.
        ConfigError: the selection is not valid.
    """
    config = resolved_selection(select)
    found = read_record_folder(Path(folder), allow_partial=config.allow_partial)
    key = content_key(
        files=found.provenance["files"],
        select=config.identity(),
        **criterion_source(config.aggregate),
    )
    return Imported(build_curriculum(found.losses, config, provenance=found.provenance, key=key), found)


def read_record_folder(folder: Path, *, allow_partial: bool = False) -> RecordFolder:
    """Read the learning records in `folder`, plain or gzipped, in either of the original's layouts.

    Of repeated ids the first row is used and all are counted.

    Raises:
        DataError: no such files; one is missing, unreadable, doubled, or has a bad line (which is named).
        RecordsError: an id is missing in some file, unless `allow_partial`.
    """
    groups, ignored = _find_files(folder, allow_partial=allow_partial)
    found = tuple(_read_evaluation(*key, paths) for key, paths in sorted(groups.items()))
    records = pa.concat_tables([each.records for each in found])
    ids = pc.unique(records["pair_id"])
    for each in () if allow_partial else found:
        absent = ids.filter(pc.invert(pc.is_in(ids, value_set=each.records["pair_id"])))
        if len(absent):
            raise RecordsError(
                f"{len(absent):,} of {len(ids):,} ids are missing in {' and '.join(each.files)}: "
                f"{name_some(absent.to_pylist())}; add them, or accept this with --allow-partial"
            )
    provenance = {
        "source": "learning records of the original repository",
        "ids": "the original's prompt ids, taken for both pair_id and prompt_id",
        "folder": folder.resolve().name,
        "files": {path.name: file_digest(path) for paths in groups.values() for path in paths},
        "rows": sum(each.rows for each in found),
        "repeated_ids": len({name for each in found for name in each.repeated_ids}),
        "conflicting_ids": len({name for each in found for name in each.conflicting_ids}),
    }
    return RecordFolder(arrange(records, allow_partial=allow_partial), found, ignored, provenance)


def _find_files(
    folder: Path, *, allow_partial: bool
) -> tuple[dict[tuple[int, int], list[Path]], tuple[str, ...]]:
    """Files by (seed, evaluation), halves in order; and the names of the files that are neither."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    found: dict[tuple[int, int], dict[str, Path]] = {}
    ignored = []
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        match = _RECORDS.fullmatch(path.name)
        if match is None:
            ignored.append(path.name)
            continue
        half = match[5] or ""
        parts = found.setdefault((int(match[1] or match[3]), int(match[2] or match[4]) + 1), {})
        if half in parts or (parts and ("" in parts or not half)):
            other = next(iter(parts.values()))
            raise DataError(f"{path.name} and {other.name} hold the same evaluation: remove one of them")
        parts[half] = path
    if not found:
        raise DataError(
            f"{folder} holds no seed41_step00.csv or learning_record-seed41-step0-first.csv files"
        )
    seeds, evaluations = (sorted(set(numbers)) for numbers in zip(*found, strict=True))
    other_half: dict[tuple[str, ...], str] = {
        ("first",): "the second half of ",
        ("second",): "the first half of ",
    }
    missing = [
        f"{other_half.get(halves, '')}seed {seed} step {evaluation - 1}"
        for seed, evaluation in itertools.product(seeds, evaluations)
        if (halves := tuple(found.get((seed, evaluation), ()))) in ((), *other_half)
    ]
    if missing and not allow_partial:
        raise DataError(f"{folder} lacks {name_some(missing)}; add it, or accept this with --allow-partial")
    # Files come sorted by name, so the first half stands before the second.
    return {key: list(parts.values()) for key, parts in found.items()}, tuple(ignored)


def _read_evaluation(seed: int, evaluation: int, paths: list[Path]) -> Evaluation:
    halves = [read_numbers(path) for path in paths]
    ids = pa.chunked_array([half.ids for half in halves])
    rows = pa.table({"pair_id": ids, "loss": np.concatenate([half.values_N for half in halves])})
    asked = [("loss", how) for how in ("first", "count", "min", "max")]
    # One thread, because only then the first row of an id is known.
    by_id = rows.group_by("pair_id", use_threads=False).aggregate(asked)
    is_repeated = pc.greater(by_id["loss_count"], 1)
    is_conflicting = pc.not_equal(by_id["loss_min"], by_id["loss_max"])
    repeated, conflicting = (by_id["pair_id"].filter(each) for each in (is_repeated, is_conflicting))
    # The halves are those of a seed's folds, which these files do not tell: 0 stands for both.
    numbers = {"seed": seed, "fold": 0, "evaluation": evaluation}
    records = pa.table(
        {
            "pair_id": by_id["pair_id"],
            "prompt_id": by_id["pair_id"],
            **{name: np.full(len(by_id), number) for name, number in numbers.items()},
            "loss": by_id["loss_first"],
        }
    )
    return Evaluation(
        files=tuple(path.name for path in paths),
        seed=seed,
        evaluation=evaluation,
        rows=len(rows),
        repeated_ids=tuple(repeated.to_pylist()),
        conflicting_ids=tuple(conflicting.to_pylist()),
        records=records,
    )
