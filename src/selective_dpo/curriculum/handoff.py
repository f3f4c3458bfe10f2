"""A curriculum as a folder that another program trains on or reviews: its data file, its settings, a README.

The data files keep the training order. Whether a program follows it is said in the folder's README, and
set where its settings can: TRL and LLaMA-Factory can, axolotl by a plugin of six lines, OpenRLHF cannot.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import yaml

from selective_dpo.curriculum.export import TEXTS, Pairs, require_free, rows_with_texts, write_rows
from selective_dpo.curriculum.issues import cleanlab_inputs
from selective_dpo.curriculum.table import P_WRONG, Curriculum
from selective_dpo.errors import ConfigError, DataError, name_some
from selective_dpo.identity import swaps_answers
from selective_dpo.storage.artifacts import publish_folder

if TYPE_CHECKING:
    from datasets import Dataset

KIND = "handoff"
DATA = "pairs.jsonl"


class Library(NamedTuple):
    """How one program gets its folder."""

    write: Callable[[Dataset, Path, bool], None]
    """Writes the files from rows in order (texts as JSON), and whether the pairs are messages."""
    readme: str
    """What to do with the folder, as Markdown."""
    reviews: bool = False
    """Whether it is given every measured pair, the hardest first, instead of the selected ones in order."""


def hand_on(
    curriculum: Curriculum, path: Path, library: str, *, pairs: Pairs | None, overwrite: bool = False
) -> Path:
    """Publish the folder `path` for the program `library` (see `LIBRARIES`), and return it.

    `pairs` is as for `export.export_curriculum`.

    Raises:
        ConfigError: `path` exists and `overwrite` is off, or `pairs` is missing.
        IdentityError: pairs of the curriculum are not in `pairs`.
        DataError: the program cannot hold the pairs: some are text and some messages, or an answer is several
            messages.
    """
    form = LIBRARIES[library]
    require_free(path, overwrite=overwrite, kind=KIND)
    if pairs is None:
        raise ConfigError(
            f"format '{library}' needs the pairs' texts: pass --pairs with the run's pairs folder"
        )
    with publish_folder(path, kind=KIND, key=curriculum.order_digest) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        wanted = _hardest_first(curriculum) if form.reviews else None
        rows = rows_with_texts(curriculum, pairs, scratch, wanted)
        form.write(rows, folder, _is_messages(rows))
        (folder / "README.md").write_text(_readme(form, len(rows)), encoding="utf-8")
        shutil.rmtree(scratch)
    return path


def _hardest_first(curriculum: Curriculum) -> pa.Table:
    return curriculum.measured.table.sort_by([("difficulty", "descending"), ("pair_id", "ascending")])


def _is_messages(rows: Dataset) -> bool:
    signs = {text[:1] for batch in rows.iter(10_000) for name in TEXTS for text in batch[name]}
    if len(signs) > 1:
        raise DataError("some pairs are text and some are messages, which no program holds: export jsonl")
    return signs != {'"'}


def _readme(form: Library, count: int) -> str:
    what = "measured pairs, the hardest first" if form.reviews else "selected pairs in training order"
    return f"# {count:,} {what}\n\nMade by selective-dpo. Run these lines in this folder.\n\n{form.readme}"


def _decoded(rows: Dataset) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {**row, **{name: json.loads(row[name]) for name in TEXTS}}


def _write_yaml(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")


# --- TRL ----------------------------------------------------------------------------------------------------


def _write_trl(rows: Dataset, folder: Path, is_messages: bool) -> None:
    write_rows(rows, folder / DATA)
    settings = {
        "datasets": [{"path": "json", "data_files": DATA, "split": "train", "columns": list(TEXTS)}],
        "train_sampling_strategy": "sequential",
    }
    _write_yaml(folder / "trl.yaml", settings)


_TRL = """\
```
trl dpo --config trl.yaml --model_name_or_path MODEL --output_dir policy
```

`train_sampling_strategy: sequential` keeps the order. `pairs.jsonl` also has `pair_id`, `difficulty` and,
where it is known, `p_wrong`; `trl dpo` reads the texts only.
"""


# --- axolotl ------------------------------------------------------------------------------------------------

_PLUGIN = '''\
"""axolotl's DPO trainer shuffles and has no setting against it: this plugin is one."""

from axolotl.integrations.base import BasePlugin


class KeepOrder(BasePlugin):
    def get_training_args(self, cfg):
        return {"train_sampling_strategy": "sequential"}
'''


def _write_axolotl(rows: Dataset, folder: Path, is_messages: bool) -> None:
    _require_single_answers(rows, "axolotl", is_messages)
    write_rows(rows, folder / DATA)
    kind: Any = "chat_template.default"
    fields = {"field_messages": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
    if not is_messages:
        kind, fields = {f"field_{name}": name for name in TEXTS}, {}
        kind |= {f"{name}_format": f"{{{name}}}" for name in TEXTS}
    settings = {
        "rl": "dpo",
        "datasets": [{"path": DATA, "ds_type": "json", "split": "train", "type": kind, **fields}],
        **({"chat_template": "tokenizer_default"} if is_messages else {}),
        "shuffle_merged_datasets": False,
        "plugins": ["keep_order.KeepOrder"],
    }
    _write_yaml(folder / "axolotl.yaml", settings)
    (folder / "keep_order.py").write_text(_PLUGIN, encoding="utf-8")


_AXOLOTL = """\
Add `base_model`, `output_dir` and your training settings to `axolotl.yaml`, then:

```
PYTHONPATH=. axolotl train axolotl.yaml
```

`shuffle_merged_datasets: false` and the plugin `keep_order.py` keep the order. axolotl's own
`curriculum_sampling` has no effect with `rl: dpo` (read in version 0.19).
"""


# --- LLaMA-Factory ------------------------------------------------------------------------------------------

_ROLES = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def _write_llama_factory(rows: Dataset, folder: Path, is_messages: bool) -> None:
    _require_single_answers(rows, "LLaMA-Factory", is_messages)
    with (folder / DATA).open("w", encoding="ascii", newline="\n") as stream:
        for row in _decoded(rows):
            answers = {name: row[name][0] if is_messages else row[name] for name in ("chosen", "rejected")}
            stream.write(json.dumps({**row, **answers}) + "\n")
    columns = {"messages" if is_messages else "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    entry: dict[str, Any] = {"file_name": DATA, "ranking": True, "columns": columns}
    entry |= {"formatting": "sharegpt", "tags": _ROLES} if is_messages else {"formatting": "alpaca"}
    listed = json.dumps({"selected_pairs": entry}, indent=2) + "\n"
    (folder / "dataset_info.json").write_text(listed, encoding="utf-8")
    settings = {
        "stage": "dpo",
        "do_train": True,
        "dataset_dir": ".",
        "dataset": "selected_pairs",
        "disable_shuffling": True,
        "val_size": 0.0,
        **({} if is_messages else {"template": "empty"}),
    }
    _write_yaml(folder / "llama_factory.yaml", settings)


_LLAMA_FACTORY = """\
Add `model_name_or_path`, `template` (for messages), `output_dir` and your training settings to
`llama_factory.yaml`, then:

```
llamafactory-cli train llama_factory.yaml
```

`disable_shuffling: true` keeps the order. `val_size` stays 0: a split would shuffle.
"""


# --- OpenRLHF -----------------------------------------------------------------------------------------------


def _write_openrlhf(rows: Dataset, folder: Path, is_messages: bool) -> None:
    write_rows(rows, folder / DATA)
    flags = ["--data.dataset ./pairs.jsonl", *(f"--data.{name}_key {name}" for name in TEXTS)]
    flags += ["--data.apply_chat_template"] if is_messages else []
    lines = " \\\n  ".join(["openrlhf.cli.train_dpo", *flags, '"$@"'])
    script = (
        f"#!/bin/sh\n# ./train.sh --actor.model_name_or_path MODEL ...\nexec deepspeed --module {lines}\n"
    )
    (folder / "train.sh").write_text(script, encoding="utf-8")
    (folder / "train.sh").chmod(0o755)


_OPENRLHF = """\
```
./train.sh --MODEL-AND-TRAINING-OPTIONS ...
```

The selection is kept, **the order is not**: OpenRLHF shuffles its training data, and has no option against it
(read in version 0.11). The names of its other options differ between versions.
"""


# --- Argilla ------------------------------------------------------------------------------------------------


def _write_argilla(rows: Dataset, folder: Path, is_messages: bool) -> None:
    records = []
    for row in _decoded(rows):
        first, second = ("rejected", "chosen") if swaps_answers(row["pair_id"]) else ("chosen", "rejected")
        numbers = {name: row[name] for name in ("difficulty", P_WRONG) if row.get(name) is not None}
        given = "first" if first == "chosen" else "second"
        records.append(
            {
                "id": row["pair_id"],
                "fields": {"prompt": row["prompt"], "first": row[first], "second": row[second]},
                "metadata": numbers,
                "suggestions": {"better": {"value": given, "agent": "the data's label"}},
            }
        )
    with (folder / "records.json").open("w", encoding="utf-8") as stream:
        json.dump(records, stream)
    kind = "ChatField" if is_messages else "TextField"
    names = ["difficulty", *([P_WRONG] if P_WRONG in rows.column_names else [])]
    (folder / "load.py").write_text(_LOAD.format(kind=kind, numbers=names), encoding="utf-8")


_LOAD = '''\
"""Makes an Argilla data set of records.json: python load.py NAME"""

import json
import sys

import argilla as rg

SETTINGS = rg.Settings(
    guidelines="Which answer is better? The label of the data is the suggestion.",
    fields=[rg.{kind}(name=name) for name in ("prompt", "first", "second")],
    questions=[rg.LabelQuestion(name="better", labels=["first", "second", "tie"])],
    metadata=[rg.FloatMetadataProperty(name=name) for name in {numbers}],
)

if __name__ == "__main__":
    dataset = rg.Dataset(name=sys.argv[1], settings=SETTINGS)
    dataset.create()
    with open("records.json", encoding="utf-8") as stream:
        dataset.records.log([rg.Record.from_dict(record) for record in json.load(stream)])
'''

_ARGILLA = """\
```
pip install argilla
ARGILLA_API_URL=... ARGILLA_API_KEY=... python load.py my-review
```

An annotator sees each prompt with the answers as `first` and `second`, sides drawn by the pair's id, and the
data's label as a suggestion. `difficulty` and `p_wrong` are metadata to filter and sort by.
"""


# --- cleanlab -----------------------------------------------------------------------------------------------


def _write_cleanlab(rows: Dataset, folder: Path, is_messages: bool) -> None:
    if P_WRONG not in rows.column_names:
        raise ConfigError(
            "format 'cleanlab' needs p_wrong, which this curriculum does not have: its difficulty was "
            "imported, or made by a loss without margins; score the pairs with loss dpo"
        )
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="\n") as stream:
        stream.write("pair_id,label,probability_0,probability_1\n")
        table = rows.select_columns(["pair_id", P_WRONG]).with_format("arrow")[:]
        labels_P, beliefs_P2 = cleanlab_inputs(table)
        columns = table["pair_id"].to_pylist(), labels_P.tolist(), beliefs_P2.tolist()
        for name, label, (first, second) in zip(*columns, strict=True):
            stream.write(f"{name},{label},{first!r},{second!r}\n")


_CLEANLAB = """\
```python
import pandas
from cleanlab.filter import find_label_issues

table = pandas.read_csv("labels.csv")
beliefs = table[["probability_0", "probability_1"]].to_numpy()
ranked = find_label_issues(table["label"], beliefs, return_indices_ranked_by="self_confidence")
print(table["pair_id"].iloc[ranked])
```

`label` says which of a pair's two answers the data prefers, sides drawn by the pair's id, so that both
classes occur. The probabilities are held out: no scorer saw the pair before it gave its own.
"""

LIBRARIES: Mapping[str, Library] = {
    "trl": Library(_write_trl, _TRL),
    "axolotl": Library(_write_axolotl, _AXOLOTL),
    "llama-factory": Library(_write_llama_factory, _LLAMA_FACTORY),
    "openrlhf": Library(_write_openrlhf, _OPENRLHF),
    "argilla": Library(_write_argilla, _ARGILLA, reviews=True),
    "cleanlab": Library(_write_cleanlab, _CLEANLAB, reviews=True),
}


def _require_single_answers(rows: Dataset, program: str, is_messages: bool) -> None:
    if not is_messages:
        return
    long = [row["pair_id"] for row in _decoded(rows) if len(row["chosen"]) != 1 or len(row["rejected"]) != 1]
    if long:
        raise DataError(
            f"the answers of {len(long):,} of {len(rows):,} pairs are several messages, and {program} reads "
            f"one: export trl or openrlhf ({name_some(long)})"
        )
