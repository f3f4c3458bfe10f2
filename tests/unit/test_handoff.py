"""A curriculum as the folders of other programs: their data, in order, and the settings that keep the order.

LLaMA-Factory, axolotl, OpenRLHF and Argilla do not install beside the versions that this package needs, so
their documented forms are checked here. docs/export.md says which of their own readers read these folders.
"""

from __future__ import annotations

import csv
import json
import shlex
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from selective_dpo.cli import LIBRARIES as NAMES
from selective_dpo.curriculum.handoff import LIBRARIES, hand_on
from selective_dpo.curriculum.table import P_WRONG, Curriculum
from selective_dpo.errors import ConfigError, DataError
from selective_dpo.identity import swaps_answers
from selective_dpo.storage.artifacts import verify_folder
from tests.unit.test_curriculum_export import assistant, curriculum_for, id_of, make_rows, pairs_table


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_p_wrong(curriculum: Curriculum) -> Curriculum:
    """Row number i of `make_rows` has p_wrong (6 - i) / 10: the easier, the likelier right."""
    difficulty = curriculum.table["difficulty"].to_pylist()
    column = pa.array([round(value - 0.4, 3) for value in difficulty])
    return Curriculum(curriculum.table.append_column(P_WRONG, column), curriculum.facts)


def handed(tmp_path: Path, library: str, *, chat: bool = True) -> tuple[list[dict], Path]:
    """The selected rows in training order (5, 4, 3), and the folder."""
    rows = make_rows(chat=chat)
    curriculum = with_p_wrong(curriculum_for(rows))
    folder = hand_on(curriculum, tmp_path / library, library, pairs=pairs_table(rows))
    verify_folder(folder)
    assert not list(folder.glob("scratch*"))
    return [rows[5], rows[4], rows[3]], folder


def test_the_command_line_offers_what_there_is() -> None:
    assert tuple(LIBRARIES) == NAMES


def test_trl_reads_the_pairs_in_order_and_is_told_to_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import DPOConfig, TrlParser
    from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, get_dataset

    expected, folder = handed(tmp_path, "trl")
    monkeypatch.chdir(folder)
    parser = TrlParser((ScriptArguments, DPOConfig, DatasetMixtureConfig))
    command = ["--config", "trl.yaml", "--output_dir", "policy", "--use_cpu", "True", "--bf16", "False"]
    _, settings, mixture = parser.parse_args_and_config(command)
    read = get_dataset(mixture)["train"]
    assert [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in read] == [
        {name: row[name] for name in ("prompt", "chosen", "rejected")} for row in expected
    ]
    assert settings.train_sampling_strategy == "sequential"
    (first, *_) = lines_of(folder / "pairs.jsonl")
    assert first["pair_id"] == id_of(expected[0]) and {"difficulty", P_WRONG} <= set(first)


@pytest.mark.parametrize("chat", [True, False])
def test_axolotl_gets_its_fields_and_a_plugin_that_keeps_the_order(tmp_path: Path, chat: bool) -> None:
    expected, folder = handed(tmp_path, "axolotl", chat=chat)
    settings = yaml.safe_load((folder / "axolotl.yaml").read_text())
    (listed,) = settings["datasets"]
    assert (settings["rl"], settings["shuffle_merged_datasets"]) == ("dpo", False)
    kind = listed if chat else listed["type"]
    prompt = "messages" if chat else "prompt"
    fields = [kind[f"field_{name}"] for name in (prompt, "chosen", "rejected")]
    rows = lines_of(folder / listed["path"])
    assert [[row[name] for name in fields] for row in rows] == [
        [row["prompt"], row["chosen"], row["rejected"]] for row in expected
    ]
    if not chat:
        assert kind["prompt_format"].format(prompt="as it is") == "as it is"
    module, name = settings["plugins"][0].split(".")
    source = (folder / f"{module}.py").read_text().replace("from axolotl.integrations.base import ", "# ")
    made: dict = {"BasePlugin": object}
    exec(source, made)
    assert made[name]().get_training_args(None) == {"train_sampling_strategy": "sequential"}


@pytest.mark.parametrize("chat", [True, False])
def test_llama_factory_gets_ranked_pairs_and_no_shuffling(tmp_path: Path, chat: bool) -> None:
    expected, folder = handed(tmp_path, "llama-factory", chat=chat)
    settings = yaml.safe_load((folder / "llama_factory.yaml").read_text())
    assert settings["disable_shuffling"] is True and settings["val_size"] == 0
    entry = json.loads((folder / "dataset_info.json").read_text())[settings["dataset"]]
    assert entry["ranking"] is True and entry["formatting"] == ("sharegpt" if chat else "alpaca")
    columns = entry["columns"]
    rows = lines_of(folder / entry["file_name"])
    prompts = [row[columns["messages" if chat else "prompt"]] for row in rows]
    assert prompts == [row["prompt"] for row in expected]
    for name in ("chosen", "rejected"):  # one message each, not a list of one
        wanted = [row[name][0] if chat else row[name] for row in expected]
        assert [row[columns[name]] for row in rows] == wanted
    if chat:
        tags = entry["tags"]
        assert {message[tags["role_tag"]] for row in rows for message in row["prompt"]} == {tags["user_tag"]}


def test_openrlhf_gets_its_keys_and_the_reader_is_told_that_it_shuffles(tmp_path: Path) -> None:
    expected, folder = handed(tmp_path, "openrlhf")
    words = shlex.split((folder / "train.sh").read_text(), comments=True)
    options = dict(pairwise(words))
    rows = lines_of(folder / options["--data.dataset"])
    for name in ("prompt", "chosen", "rejected"):
        assert [row[options[f"--data.{name}_key"]] for row in rows] == [row[name] for row in expected]
    assert "--data.apply_chat_template" in words
    assert "the order is not" in (folder / "README.md").read_text()


def test_argilla_gets_every_measured_pair_hardest_first_with_sides_drawn_by_id(tmp_path: Path) -> None:
    _, folder = handed(tmp_path, "argilla")
    rows = make_rows(chat=True)  # difficulty falls with the row number
    records = json.loads((folder / "records.json").read_text())
    assert [record["id"] for record in records] == [id_of(row) for row in rows]
    sides = set()
    for record, row in zip(records, rows, strict=True):
        better = record["suggestions"]["better"]["value"]
        sides.add(better)
        assert record["fields"][better] == row["chosen"] and record["fields"]["prompt"] == row["prompt"]
    assert sides == {"first", "second"}
    assert records[0]["metadata"] == {"difficulty": pytest.approx(1.015), P_WRONG: pytest.approx(0.615)}
    compile((folder / "load.py").read_text(), "load.py", "exec")


def test_cleanlab_gets_labels_of_both_classes_and_the_probability_of_each(tmp_path: Path) -> None:
    _, folder = handed(tmp_path, "cleanlab")
    with (folder / "labels.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["pair_id"] for row in table] == [id_of(row) for row in make_rows(chat=True)]
    assert {row["label"] for row in table} == {"0", "1"}
    for i, row in enumerate(table):  # p_wrong is .615, .515, ... .115: what the given label does not have
        assert int(row["label"]) == swaps_answers(row["pair_id"])
        assert float(row[f"probability_{row['label']}"]) == pytest.approx(1 - (0.615 - 0.1 * i))
        assert float(row["probability_0"]) + float(row["probability_1"]) == pytest.approx(1)


def test_cleanlab_itself_ranks_the_likeliest_errors_first(tmp_path: Path) -> None:
    find_label_issues = pytest.importorskip("cleanlab.filter").find_label_issues
    numpy = pytest.importorskip("numpy")
    _, folder = handed(tmp_path, "cleanlab")
    with (folder / "labels.csv").open() as stream:
        table = list(csv.DictReader(stream))
    beliefs = numpy.array([[float(row[f"probability_{label}"]) for label in (0, 1)] for row in table])
    labels = numpy.array([int(row["label"]) for row in table])
    ranked = find_label_issues(
        labels, beliefs, filter_by="predicted_neq_given", return_indices_ranked_by="self_confidence"
    )
    assert list(ranked) == [0, 1]  # the two whose p_wrong is above a half


def test_cleanlab_without_p_wrong_is_refused(tmp_path: Path) -> None:
    rows = make_rows()
    with pytest.raises(ConfigError, match="needs p_wrong"):
        hand_on(curriculum_for(rows), tmp_path / "x", "cleanlab", pairs=pairs_table(rows))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("library", ["axolotl", "llama-factory"])
def test_an_answer_of_several_messages_is_refused_where_one_is_read(tmp_path: Path, library: str) -> None:
    rows = make_rows(chat=True)
    rows[4]["chosen"] = [*assistant("Wait."), {"role": "user", "content": "So?"}, *assistant("Yes.")]
    with pytest.raises(DataError, match="answers of 1 of 3 pairs are several messages") as caught:
        hand_on(curriculum_for(rows), tmp_path / "x", library, pairs=pairs_table(rows))
    assert id_of(rows[4])[:8] in str(caught.value)


def test_only_a_folder_of_an_export_is_replaced(tmp_path: Path) -> None:
    rows = make_rows()
    curriculum, pairs = curriculum_for(rows), pairs_table(rows)
    hand_on(curriculum, tmp_path / "x", "trl", pairs=pairs)
    with pytest.raises(ConfigError, match="exists"):
        hand_on(curriculum, tmp_path / "x", "trl", pairs=pairs)
    hand_on(curriculum, tmp_path / "x", "openrlhf", pairs=pairs, overwrite=True)
    assert not (tmp_path / "x" / "trl.yaml").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="not an exported folder"):
        hand_on(curriculum, tmp_path / "mine", "trl", pairs=pairs, overwrite=True)
    with pytest.raises(ConfigError, match="needs the pairs' texts"):
        hand_on(curriculum, tmp_path / "y", "trl", pairs=None)
