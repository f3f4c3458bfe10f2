"""Where rows come from: local files, saved `datasets` folders, and data sets of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selective_dpo.config import SourceConfig
from selective_dpo.data.adapters import (
    COLUMNS,
    MAX_CHARACTERS,
    WANTED_COLUMNS,
    Adapter,
    DropReason,
    adapter_digest,
    contents_of,
    find_adapter,
    is_encodable,
    read_messages,
    read_pair,
    text_size,
)
from selective_dpo.data.readers import (
    BATCH_ROWS,
    Malformed,
    Row,
    count_file,
    damage_named,
    read_file,
    rows_of_batch,
)
from selective_dpo.errors import ConfigError, DataError, name_some
from selective_dpo.identity import Text
from selective_dpo.storage.artifacts import file_digest, folder_digests
from selective_dpo.storage.digests import digest

if TYPE_CHECKING:
    from datasets import Dataset

_SAVED_DATASET = "dataset_info.json"

_SAVED_DATASET_DICT = "dataset_dict.json"

_LOCAL_PATH = re.compile(r"^[/~.\\]|[/\\].*[/\\]|\.[A-Za-z]+$")
"""What no hub name looks like: a leading slash, tilde or dot, two slashes, or a file's suffix."""


class Source(NamedTuple):
    """A source that exists and whose options make sense; no row has been read yet."""

    label: str
    """What it is called in tables and messages: its path, with subset, split and revision if given."""
    rows: Callable[[], Iterator[Row]]
    """The rows, from the first, one after the other."""
    row_count: Callable[[], int]
    """How many rows there are."""
    digest: Callable[[], str]
    """SHA-256 over the content (hub data: over the name and the fingerprint of the resolved revision), and
    over `columns` and the adapter's code where they are given."""
    adapter: Adapter = read_pair
    """What makes a pair of a row."""

    @property
    def has_own_adapter(self) -> bool:
        """Whether the user's own code makes the pairs."""
        return self.adapter is not read_pair

    @property
    def wanted_columns(self) -> tuple[str, ...]:
        """What a row must have to be a pair; nothing is known of the rows of an adapter of the user's own."""
        return () if self.has_own_adapter else WANTED_COLUMNS


def open_source(config: SourceConfig) -> Source:
    """Find what `config` names, without reading its rows (hub data are downloaded).

    Raises:
        ConfigError: an option that would have no effect here, a missing split, or no such adapter.
        DataError: no such file, not a data folder, or the hub does not give the data.
    """
    source = _open(config)
    if config.adapter:
        source = source._replace(adapter=find_adapter(config.adapter))
    elif unknown := [name for name in config.columns if name not in COLUMNS]:
        raise ConfigError(
            f"source {config.path}: columns.{unknown[0]} would have no effect; names to give are "
            f"{', '.join(COLUMNS)}"
        )
    if not config.columns and not config.adapter:
        return source
    read = [config.columns, adapter_digest(config.adapter)]
    return source._replace(
        rows=lambda: _renamed(source.rows(), config), digest=lambda: digest([source.digest(), *read])
    )


def _renamed(rows: Iterator[Row], config: SourceConfig) -> Iterator[Row]:
    """Rows with the names that `columns` gives; another column that has such a name already is left out."""
    columns, found = config.columns, dict[str, None]()
    for row in rows:
        if isinstance(row, Malformed):
            yield row
            continue
        found.update(dict.fromkeys(map(str, row)))
        others = {name: value for name, value in row.items() if name not in columns}
        yield others | {name: row[column] for name, column in columns.items() if column in row}
    if missing := [column for column in columns.values() if found and column not in found]:
        raise DataError(
            f"{config.path}: no row has the column {missing[0]!r}, which columns names; found are "
            f"{name_some(found, limit=12)}"
        )


def _open(config: SourceConfig) -> Source:
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _open_folder(config, path)
    if path.is_file():
        _refuse_options(config, ("split", "subset", "revision"), "a plain file")
        return Source(
            config.path, lambda: read_file(path), lambda: count_file(path), lambda: _named_digest(path)
        )
    if _LOCAL_PATH.search(config.path):
        raise DataError(f"no file or folder {config.path}; check the path (it is relative to {Path.cwd()})")
    return _open_hub(config)


def source_label(config: SourceConfig) -> str:
    """The source's path, with subset, split and revision if given."""
    options = {"subset": config.subset, "split": config.split, "revision": config.revision}
    named = ", ".join(f"{name} {value}" for name, value in options.items() if value)
    return f"{config.path} ({named})" if named else config.path


def source_digest(config: SourceConfig) -> str:
    """SHA-256 over the content of a source: equal digests, equal rows (see `Source.digest`)."""
    return open_source(config).digest()


def _open_folder(config: SourceConfig, path: Path) -> Source:
    is_dict = (path / _SAVED_DATASET_DICT).is_file()
    if not is_dict and not (path / _SAVED_DATASET).is_file():
        raise DataError(f"{path} is not a folder of datasets' save_to_disk; name a file in it instead")
    ignored = ("subset", "revision") if is_dict else ("split", "subset", "revision")
    _refuse_options(config, ignored, "a saved DatasetDict" if is_dict else "a saved Dataset")
    return _arrow_source(
        config, _load_saved(config, path), lambda: digest([folder_digests(path), config.split])
    )


def _load_saved(config: SourceConfig, path: Path) -> Dataset:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds, and each of them means the same to the user
        raise DataError(f"{path} cannot be loaded as a datasets folder: {error}") from error
    if isinstance(saved, datasets.Dataset):
        return saved
    if config.split not in saved:
        problem = f"has no split {config.split!r}" if config.split else "needs a split"
        raise ConfigError(f"source {path} {problem}; it has {name_some(saved)}")
    return saved[config.split]


def _open_hub(config: SourceConfig) -> Source:
    import datasets

    if not config.split:
        raise ConfigError(
            f"source {config.path}: a data set of the hub needs a split, such as split: train "
            "(if a local file was meant: there is none of this name)"
        )
    try:
        dataset = datasets.load_dataset(
            config.path, name=config.subset or None, split=config.split, revision=config.revision or None
        )
    except Exception as error:  # network, access, name, split: the hub's own words say which
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"the hub does not give {source_label(config)}: {first_line}; check the name, your access and "
            "the network, or download the data and name the local file"
        ) from error
    # The fingerprint that datasets gives a freshly loaded split is made from name, options and commit.
    fingerprint = str(dataset._fingerprint)
    return _arrow_source(config, dataset, lambda: digest(["hub", source_label(config), fingerprint]))


def _arrow_source(config: SourceConfig, dataset: Any, content_digest: Callable[[], str]) -> Source:
    def rows() -> Iterator[Row]:
        batches = dataset.with_format("arrow").iter(batch_size=BATCH_ROWS)
        while True:
            with damage_named(config.path):
                batch = next(batches, None)
            if batch is None:
                return
            yield from rows_of_batch(batch)

    return Source(source_label(config), rows, lambda: len(dataset), content_digest)


def _named_digest(path: Path) -> str:
    # The name's ending decides how the bytes are read, so it is part of the content; the folder is not.
    return digest([path.name, file_digest(path)])


def _refuse_options(config: SourceConfig, names: tuple[str, ...], what: str) -> None:
    given = [name for name in names if getattr(config, name)]
    if given:
        raise ConfigError(
            f"source {config.path} is {what}: {', '.join(given)} would have no effect; remove it"
        )


# ----------------------------------------------------------------------------------------------------
# Which rows of several sources are used.


_ALL_SOURCES = 0

_FIRST_SOURCE = 1


def sample_rows(
    counts_S: Sequence[int], fractions_S: Sequence[float], *, max_rows: int = 0, seed: int = 0
) -> list[NDArray[np.bool_]]:
    """For each source a mask over its rows: True for those that are used, in their original order.

    From source s, round(fraction * rows) rows are drawn without replacement (at least one, if it has any),
    by a generator seeded with (seed, s): so what one source gives does not depend on the others. Of the
    rows drawn, `max_rows` (0: all) are then drawn evenly over all sources.
    """
    masks = [
        _draw(count, max(1, int(fraction * count + 0.5)), _generator(seed, _FIRST_SOURCE + index))
        for index, (count, fraction) in enumerate(zip(counts_S, fractions_S, strict=True))
    ]
    used = np.concatenate([*masks, np.zeros(0, dtype=np.bool_)])
    drawn = np.flatnonzero(used)
    if 0 < max_rows < len(drawn):
        used[drawn] = _draw(len(drawn), max_rows, _generator(seed, _ALL_SOURCES))
    return np.split(used, np.cumsum(counts_S)[:-1]) if counts_S else []


def _draw(count: int, size: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    mask = np.zeros(count, dtype=np.bool_)
    if size >= count:
        mask[:] = True
    else:
        mask[generator.choice(count, size=size, replace=False)] = True
    return mask


def _generator(seed: int, stream: int) -> np.random.Generator:
    # NumPy takes no negative seeds, a recipe may hold one: it is read as 64 bits.
    return np.random.default_rng([seed % 2**64, stream])


# ----------------------------------------------------------------------------------------------------
# A file of prompts to be answered, without completions.


def read_prompts(path: Path) -> list[Text]:
    """The column `prompt` of each row, text or messages; of these only role and content.

    Raises:
        DataError: the file cannot be read, or a row of it has no prompt that can be asked; it is named.
    """
    return [_prompt(row, f"{path}, row {number:,}") for number, row in enumerate(read_file(path))]


def _prompt(row: Row, where: str) -> Text:
    value = None if isinstance(row, Malformed) else row.get("prompt")
    prompt = read_messages(value) if isinstance(value, list) and value else value
    if isinstance(prompt, DropReason) or not prompt or not isinstance(prompt, (str, list)):
        raise DataError(f"{where}: needs a prompt, as text or as messages of role and content")
    if text_size(prompt) > MAX_CHARACTERS:
        raise DataError(f"{where}: the prompt has more than {MAX_CHARACTERS:,} characters; leave it out")
    if not all(map(is_encodable, contents_of(prompt))):
        raise DataError(f"{where}: the prompt holds half of a character (a lone surrogate); mend the row")
    return prompt
