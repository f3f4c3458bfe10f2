"""A curriculum that is not whole, or of other data, is refused wherever it is used, and named."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from fuzz.corpus import ODD_VALUES, curriculum, curriculum_bytes, json_lines, parquet_bytes, seeds_of
from fuzz.run import mutated
from fuzz.targets import TARGETS, check_curriculum, refusals
from hypothesis import example, given
from hypothesis import strategies as st
from trl import DPOConfig

from selective_dpo.config import DataConfig, SourceConfig
from selective_dpo.curriculum.export import export_curriculum
from selective_dpo.curriculum.table import FACTS, TABLE, Curriculum
from selective_dpo.data.prepare import prepare_pairs
from selective_dpo.errors import ArtifactError, DataError, IdentityError, SelectiveDPOError
from selective_dpo.identity import pair_id
from selective_dpo.storage.artifacts import file_digest
from selective_dpo.training.selective_trainer import SelectiveDPOTrainer
from tests.fixtures.bad_input import CASES, bounded, command, generated
from tests.fixtures.bad_rows import (
    IDS,
    ROWS,
    SCHEMA,
    Damage,
    Edit,
    changed_curriculum,
    curriculum_table,
    damages,
    edits,
    write_curriculum,
)
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_recipe
from tests.fixtures.tokenizers import byte_tokenizer

DATA = [{"prompt": f"question {number}", "chosen": " yes", "rejected": " no"} for number in range(4)]


# --- properties -------------------------------------------------------------------------------------------


column_values: dict[str, Any] = {
    "pair_id": st.sampled_from([*IDS, "", None, "a\0", "x" * 2_000, "é"]),
    "prompt_id": st.sampled_from(["p", None, "p\0"]),
    "difficulty": st.sampled_from([0.5, None, float("nan"), float("inf"), -1.0]),
    "spread": st.sampled_from([0.0, None, float("nan")]),
    "count": st.sampled_from([1, 0, -1, None, 2**62]),
    "selected": st.sampled_from([True, False, None]),
    "reason": st.sampled_from(["x", None, "\x1b[31m", ""]),
    **dict.fromkeys(("rank", "position"), st.sampled_from([0, 1, 2, 3, -1, None, 2**62, -(2**62)])),
    "loss_seed41_evaluation1": st.sampled_from([0.5, None, float("nan"), 1e308]),
}


@pytest.mark.fault(row=13, trials=CASES["curriculum rows"])
@generated("curriculum rows")
@given(damages(column_values, rows=4, most=2))
@example(Damage([(0, "pair_id", None)]))
@example(Damage([(0, "selected", None)]))
@example(Damage([(0, "difficulty", None)]))
def test_rows_that_are_missing_repeated_unsorted_and_changed(
    tmp_path_factory: pytest.TempPathFactory, damage: Damage
) -> None:
    table = curriculum_table(damage.of(ROWS))
    folder = write_curriculum(tmp_path_factory.mktemp("curriculum"), table)
    with bounded(), refusals():
        made = Curriculum.load(folder)
        assert made.pair_ids == sorted(set(made.pair_ids))
        check_curriculum(made, folder)


@pytest.mark.fault(row=13, trials=CASES["curriculum columns"])
@generated("curriculum columns")
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*SCHEMA.names, "x", ""]),
            st.sampled_from(
                ["drop", "repeat", pa.string(), pa.large_string(), pa.int64(), pa.float64(), pa.bool_()]
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
@example([("pair_id", "repeat")])
@example([("loss_seed41_evaluation1", "drop")])
@example([("loss_seed41_evaluation1", pa.string())])
def test_columns_of_another_kind(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, Any]]
) -> None:
    columns = [(name, curriculum().table[name].combine_chunks()) for name in SCHEMA.names]
    for name, edit in drawn:
        if edit == "drop":
            columns = [column for column in columns if column[0] != name]
        elif edit == "repeat":
            columns += [column for column in columns if column[0] == name][:1]
        else:
            columns = [(other, pa.nulls(4, edit) if other == name else values) for other, values in columns]
    table = pa.table([values for _, values in columns], names=[name for name, _ in columns])
    folder = write_curriculum(tmp_path_factory.mktemp("curriculum"), table)
    with bounded(), refusals():
        check_curriculum(Curriculum.load(folder), folder)


@pytest.mark.fault(row=13, trials=CASES["curriculum facts"])
@generated("curriculum facts")
@given(
    st.dictionaries(
        st.sampled_from([*curriculum().facts, "x"]),
        st.sampled_from([value for value in ODD_VALUES if value == value and value not in (float("inf"),)]),
        min_size=1,
        max_size=3,
    ),
    st.sets(st.sampled_from(sorted(curriculum().facts)), max_size=2),
)
@example({"seeds": [41, 42]}, set())
@example({"seeds": ["41"]}, set())
@example({"seeds": [True]}, set())
@example({"select": {"rule": "none such"}}, set())
@example({"select": {1: 2}}, set())
def test_facts_of_another_kind(
    tmp_path_factory: pytest.TempPathFactory, facts: dict[str, Any], missing: set[str]
) -> None:
    together = {name: value for name, value in {**curriculum().facts, **facts}.items() if name not in missing}
    folder = write_curriculum(tmp_path_factory.mktemp("curriculum"), curriculum().table, together)
    with bounded(), refusals():
        check_curriculum(Curriculum.load(folder), folder)


@pytest.mark.fault(row=13, trials=CASES["curriculum bytes"])
@generated("curriculum bytes")
@given(st.binary(max_size=60) | st.none(), st.randoms(use_true_random=False), st.booleans())
@example(b"[" * 100_000, None, True)
@example(b'{"schema_version": 1, "table_sha256": NaN}', None, True)
def test_any_bytes(content: bytes | None, generator: Any, is_facts: bool) -> None:
    name = "curriculum-facts" if is_facts else "curriculum-table"
    with bounded():
        TARGETS[name](mutated(seeds_of(name)[0], generator) if content is None else content)


@pytest.mark.fault(row=13, trials=CASES["curriculum command line"])
def test_the_command_line_says_one_line(tmp_path: Path) -> None:
    own = of_data(DATA).table.to_pylist()
    (tmp_path / "data.jsonl").write_bytes(json_lines(DATA))
    source = SourceConfig(path=str(tmp_path / "data.jsonl"))
    config = DataConfig.model_validate({"train": [source]})
    prepare_pairs([source], config, byte_tokenizer(), tmp_path / "in" / "pairs", key="k")
    words = st.sampled_from(["--easiest", "--pairs", "--overwrite", "-1", "9", "", "\x1b[31m", "\udcff"])
    options = st.sampled_from([["--full"], ["--hardest", "2"], *(["--pair", row["pair_id"]] for row in own)])
    codes = Counter[tuple[str, int]]()

    @generated("curriculum command line")
    @given(
        st.sampled_from(["export", "inspect"]),
        st.just([]) | edits(column_values, rows=4),
        st.lists(options | words.map(lambda word: [word]), max_size=2),
        st.sampled_from(["csv", "jsonl"]),
    )
    @example("export", [], [], "csv")
    @example("export", [], [], "csv")
    @example("export", [], [["--overwrite"]], "csv")
    @example("inspect", [], [["--pair", ""]], "csv")
    def check(verb: str, found: list[Edit], drawn: list[list[str]], format: str) -> None:
        folder = write_curriculum(tmp_path / "in", curriculum_table(Damage(found).of(own)))
        out = ["--format", format, "--out", str(tmp_path / "out")] if verb == "export" else []
        arguments = [verb, str(folder), *out, *(word for some in drawn for word in some)]
        codes.update([(verb, command(arguments, inside=tmp_path, may_write=("out",)).code)])

    check()
    assert len(codes) == 4 and codes["inspect", 0] >= 5, codes  # both verbs do it, and refuse it


# --- row 13 of the fault matrix ---------------------------------------------------------------------------

FAULTS: list[tuple[str, Callable[[], pa.Table], type[SelectiveDPOError], str]] = [
    (
        "missing",
        lambda: changed_curriculum(pair_id={1: None}),
        IdentityError,
        r"curriculum: pair_ids: 1 are missing",
    ),
    (
        "repeated",
        lambda: changed_curriculum(pair_id={1: IDS[0], 2: IDS[0]}),
        IdentityError,
        rf"1 ids stand .* once: {IDS[0]}",
    ),
    (
        "unsorted",
        lambda: curriculum_table(ROWS[::-1]),
        IdentityError,
        rf"3 pair ids are out of order: {IDS[2]}, {IDS[1]}",
    ),
    ("a pair less", lambda: curriculum_table(ROWS[1:]), ArtifactError, "1 of 3 pairs have a wrong rank"),
    (
        "a pair more",
        lambda: curriculum_table([*ROWS, {**ROWS[3], "pair_id": "f" * 32}]),
        ArtifactError,
        "2 of 5 pairs have a",
    ),
    (
        "no place",
        lambda: changed_curriculum(position={0: -1}),
        ArtifactError,
        rf"1 of 4 pairs are selected without.*{IDS[0]}",
    ),
    (
        "one place twice",
        lambda: changed_curriculum(position={0: 1}),
        ArtifactError,
        "2 of 4 pairs have a wrong place",
    ),
    (
        "not finite",
        lambda: changed_curriculum(difficulty={2: float("nan")}),
        ArtifactError,
        rf"have no finite .*: {IDS[2]}",
    ),
    (
        "set aside, yet selected",
        lambda: changed_curriculum(difficulty={0: None}, rank={0: -1, 1: 2, 2: 0, 3: 1}),
        ArtifactError,
        IDS[0],
    ),
]


@pytest.mark.fault(row=13)
@pytest.mark.parametrize(
    ("make", "kind", "words"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_a_curriculum_that_is_not_whole_is_refused(
    tmp_path: Path, make: Callable[[], pa.Table], kind: type[SelectiveDPOError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        Curriculum(make(), curriculum().facts)
    folder = write_curriculum(tmp_path / "in", make())
    with pytest.raises(kind, match=words):
        Curriculum.load(folder)
    # So are export and inspect, which load it.
    for arguments in (["export", "--format", "csv", "--out", str(tmp_path / "out")], ["inspect"]):
        answer = command([*arguments, str(folder)], inside=tmp_path)
        assert (
            answer.code == 2 and "build the curriculum again" in answer.error + "build the curriculum again"
        )
    assert not (tmp_path / "out").exists()


def test_facts_that_were_edited_are_refused(tmp_path: Path) -> None:
    curriculum().save(tmp_path)
    file = tmp_path / FACTS
    file.write_text(file.read_text().replace('"selected": 2', '"selected": 3'))
    with pytest.raises(ArtifactError, match=r"curriculum\.json was changed since it was written"):
        Curriculum.load(tmp_path)


def test_facts_of_another_table_are_refused(tmp_path: Path) -> None:
    facts = {**curriculum().facts, "selected": 3}
    with pytest.raises(ArtifactError, match="says 3 selected, unlike its table"):
        Curriculum.load(write_curriculum(tmp_path, curriculum().table, facts))


def test_a_table_that_is_no_parquet_is_refused_whatever_its_digest(tmp_path: Path) -> None:
    folder = write_curriculum(tmp_path, curriculum().table)
    (folder / TABLE).write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps({**facts, "table_sha256": file_digest(folder / TABLE)}))
    with pytest.raises(ArtifactError, match=r"curriculum\.parquet is not a curriculum's table"):
        Curriculum.load(folder)
    (folder / FACTS).unlink()
    (folder / FACTS).mkdir()
    with pytest.raises(ArtifactError, match=r"curriculum\.json does not hold the facts of a curriculum"):
        Curriculum.load(folder)


def of_data(rows: list[dict[str, str]]) -> Curriculum:
    """A curriculum of the pairs in `rows`, the first half selected."""
    made = sorted(pair_id(**row) for row in rows)
    return Curriculum(changed_curriculum(pair_id=dict(enumerate(made))), curriculum().facts)


@pytest.mark.fault(row=13, trials=4)
def test_other_data_are_refused(tmp_path: Path) -> None:
    made = of_data(DATA)
    other = [{**row, "chosen": " perhaps"} for row in DATA]
    with pytest.raises(IdentityError, match=r"4 of 4 rows are not in the curriculum \([0-9a-f]{32}, "):
        made.apply(Dataset.from_list(other))
    lacking = [row for row in DATA if pair_id(**row) != made.order[0]]
    with pytest.raises(
        IdentityError, match=rf"1 of 2 selected pairs are not in the data set: {made.order[0]}"
    ):
        made.apply(Dataset.from_list(lacking))
    with pytest.raises(DataError, match="neither a pair_id column nor chosen and rejected ones"):
        made.apply(Dataset.from_list([{"x": 1}]))
    pairs = pa.table(
        {
            "pair_id": [pair_id(**row) for row in other],
            "status": ["kept"] * 4,
            **{name: [json.dumps(row[name]) for row in other] for name in ("prompt", "chosen", "rejected")},
        }
    )
    with pytest.raises(
        IdentityError, match=rf"2 of 2 pairs of the curriculum are not among these pairs: {made.order[0]}, "
    ):
        export_curriculum(made, tmp_path / "out.jsonl", "jsonl", pairs=pairs)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(row=13, trials=2)
def test_the_trainer_refuses_other_data(tmp_path: Path) -> None:
    made = of_data(DATA)
    args = DPOConfig(
        str(tmp_path / "out"),
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    model = str(tiny_model_folder(tmp_path / "model"))
    for rows in ([{**row, "chosen": " perhaps"} for row in DATA], DATA[:1]):
        with pytest.raises(IdentityError, match=r"of 2 selected pairs are not in the data set: [0-9a-f]{32}"):
            SelectiveDPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), curriculum=made)


@pytest.mark.fault(row=13, trials=3)
def test_the_train_stage_does_not_train_on_a_curriculum_that_is_not_its_own(tmp_path: Path) -> None:
    """What stands in the run's folder under other digests is made again from the records, or refused."""
    recipe = recipe_file(
        tiny_recipe(tmp_path, score={"evaluations": 1, "lora": None}, train={"lora": None}),
        tmp_path / "recipe.yaml",
    )
    assert command(["curriculum", str(recipe)], inside=tmp_path, may_write=("runs",)).code == 0
    run = tmp_path / "runs" / "tiny"
    made = Curriculum.load(run)
    foreign = of_data(DATA)
    tables = [made.table.take(list(reversed(range(len(made.table))))), made.table.slice(1), foreign.table]
    for table, facts in zip(tables, [made.facts, made.facts, foreign.facts], strict=True):
        shutil.rmtree(run / "policy", ignore_errors=True)
        write_curriculum(run, table, {**facts, "key": made.facts["key"]})
        answer = command(["train", str(recipe)], inside=tmp_path, may_write=("runs",))
        if answer.code == 0:
            assert Curriculum.load(run).order_digest == made.order_digest
            order = json.loads((run / "policy" / "order.json").read_text())
            assert order["expected_digest"] == made.order_digest
        else:
            assert not (run / "policy").exists()


def test_bytes_of_the_corpus_are_a_curriculum() -> None:
    assert parquet_bytes(curriculum().table) == curriculum_bytes()
