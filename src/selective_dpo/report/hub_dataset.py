"""A curriculum as a data set repository: ids and numbers with a card, and the selected pairs if asked for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from selective_dpo.config import SelectConfig
from selective_dpo.curriculum.export import TEXTS, Pairs, rows_with_texts
from selective_dpo.curriculum.import_ import imported_from, imported_in_words
from selective_dpo.curriculum.table import TABLE, Curriculum
from selective_dpo.data.adapters import KEPT
from selective_dpo.models import shown_path
from selective_dpo.report.content import read_drops
from selective_dpo.report.tables import agreement_table, check_note, label_for, movement_note, text_table
from selective_dpo.storage.artifacts import read_json
from selective_dpo.training.card import code_block, code_span, without_paths

TEXT_TABLE = "selected.parquet"


def write_hub_dataset(
    folder: Path,
    curriculum: Curriculum,
    *,
    run: Path | None = None,
    pairs: Pairs | None = None,
    repository: str = "",
    licence: str = "",
) -> None:
    """Fill `folder` with the curriculum's table and facts, and a card in the hub's form.

    Args:
        run: the run's folder, for the model, the protocol and the counts of dropped rows.
        pairs: with it the selected pairs' texts are written, too, in training order.
        repository: its name on the hub, for the card.
        licence: of the source, by the hub's name for it (`apache-2.0`); "": the card says that none was.

    Raises:
        IdentityError: selected pairs are not in `pairs`.
    """
    Curriculum(curriculum.table, without_paths(dict(curriculum.facts))).save(folder)
    if pairs is not None:
        _write_texts(folder, curriculum, pairs)
    config = read_json(run / "config.json") if run and (run / "config.json").is_file() else {}
    counts = run / "pairs" / "pairs.parquet" if run else None
    drops = read_drops(counts) if counts and counts.is_file() else ()
    audit = [
        (shown_path(drop.source), drop.status, f"{drop.rows:,}") for drop in drops if drop.status != KEPT
    ]
    card = _card(
        curriculum, config, audit, repository=repository, licence=licence, has_texts=pairs is not None
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_texts(folder: Path, curriculum: Curriculum, pairs: Pairs) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    rows = rows_with_texts(curriculum, pairs, scratch)
    # JSON as in `pairs.parquet`: text and messages may stand side by side in it.
    table: pa.Table = rows.with_format("arrow")[:]
    pq.write_table(table, folder / TEXT_TABLE)
    shutil.rmtree(scratch)


def _card(
    curriculum: Curriculum,
    config: Mapping[str, Any],
    audit: Sequence[tuple[str, ...]],
    *,
    repository: str,
    licence: str,
    has_texts: bool,
) -> str:
    facts = curriculum.facts
    data = TEXT_TABLE if has_texts else TABLE
    header = {
        **({"license": licence} if licence else {}),
        "tags": ["selective-dpo", "dpo", "preference-data", "data-selection"],
        "configs": [{"config_name": "default", "data_files": data}],
    }
    model = code_span(shown_path(config["model"]["path"])) if config else "a model that its facts identify"
    sources = [source["path"] for source in (config.get("data") or {}).get("train", [])]
    label = label_for(SelectConfig.model_validate(facts["select"]))
    notes = [
        agreement_table(facts["agreement"]),
        check_note(facts.get("check")),
        movement_note(facts["agreement"]),
    ]
    told = (
        "\n".join(filter(None, notes)) or "Nothing is known of it: one measurement, with nothing to compare."
    )
    dropped = (
        text_table(["source", "dropped because", "rows"], audit, left=2) if audit else "No row was dropped."
    )
    listed = "\n".join(f"- {code_span(shown_path(source))}" for source in sources) or "- not recorded"
    texts = (
        f"`{TEXT_TABLE}` has the selected pairs in training order, with their texts as JSON "
        f"({', '.join(TEXTS)})."
        if has_texts
        else "It has ids and numbers only: no prompt and no answer."
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=False).rstrip()}
---

# Difficulty of {facts["pairs"]:,} preference pairs

How hard each pair is for {model}, and which {facts["selected"]:,} to train on ({label}).
{_method(facts, config)} {texts}

```python
from huggingface_hub import snapshot_download
from selective_dpo import Curriculum
rows = Curriculum.load(snapshot_download({repository or "REPOSITORY"!r}, repo_type="dataset")).apply(pairs)
```

`pairs` is the source as a `datasets.Dataset` with prompt, chosen and rejected: each pair is found by an id
made of its text. `rows` are the selected ones in training order. The table's columns are `pair_id`,
`prompt_id`, `difficulty` (nats, where it is a loss), `spread`, `rank`, `selected`, `position`, each loss.

## Agreement

{code_block(told, "")}

## Source

{listed}

Licence of the source: {code_span(licence) if licence else "not stated by who made this; look it up there"}.

{code_block(dropped, "")}

Difficulty is that of these pairs for this model under these settings; for another model it is another.
It is no verdict on a pair's quality: it goes with length in most data.
"""


def _method(facts: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if imported := imported_from(facts):
        return f"Difficulty was imported: {imported_in_words(imported)}."
    protocol = (config.get("score") or {}).get("protocol", "")
    by = f"protocol {code_span(protocol)}, " if protocol else ""
    return (
        "Difficulty is the held-out DPO loss ([Selective DPO](https://arxiv.org/abs/2502.09650); "
        f"{by}seeds {', '.join(map(str, facts['seeds']))}, {len(facts['evaluations'])} evaluations each)."
    )
