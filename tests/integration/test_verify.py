"""`verify`: a good run passes, and each kind of damage is found and named, also where all digests agree.

Most damage here is done as somebody would who rewrites the manifest as well: then only the ids and numbers
themselves can tell.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selective_dpo.cli.main import main
from selective_dpo.errors import ArtifactError
from selective_dpo.run.run import curriculum as build_curriculum
from selective_dpo.run.run import open_run
from selective_dpo.run.verify import Verification, verify_run
from selective_dpo.storage.artifacts import (
    MANIFEST,
    SCHEMA_VERSION,
    file_digest,
    folder_digests,
    read_json,
    write_json,
)
from selective_dpo.storage.digests import digest
from tests.faults.test_not_finite import poison_folder, write_inputs
from tests.fixtures.models import tiny_recipe

pytestmark = pytest.mark.slow

Damage = Callable[[Path], None]
HEAD = ("schema_version", "table_sha256", "facts_sha256")


@pytest.fixture
def run(finished_demo: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished_demo, tmp_path / "run"))


def status_of(found: Verification) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


# --- a good run -------------------------------------------------------------------------------------------


def test_a_good_run_passes_and_says_what_was_counted(finished_demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_demo.rglob("*")}
    found = verify_run(finished_demo)
    assert found.problems == []
    assert set(status_of(found).values()) == {"ok"}
    counted = {check.name: check.counted for check in found.checks}
    summary = read_json(finished_demo / "pairs" / "summary.json")
    rows, kept = summary["rows"], summary["kept"]
    assert counted["pairs"].startswith(f"{rows} rows = {kept} kept + {rows - kept} dropped")
    assert counted["folds"] == "6 of 6 scorers"
    # Six scorers, four policies, the evaluation.
    assert counted["keys"].startswith("11 folders ")
    assert counted["policy selected"].startswith(f"{(kept + 1) // 2} pairs consumed")
    assert {path: path.stat().st_mtime_ns for path in finished_demo.rglob("*")} == before, "it only reads"


def test_the_command_prints_a_table_and_the_same_as_json(
    finished_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(finished_demo), "--json", str(tmp_path / "answer.json")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[-1] == f"{finished_demo}: nothing is wrong"
    answer = read_json(tmp_path / "answer.json")
    assert answer["ok"] is True
    assert main(["verify", str(finished_demo), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == answer


def test_a_moved_run_without_its_inputs_passes(
    finished_demo: Path, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.move(run, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere" / "world")  # the model and the pairs that it was made from
    assert verify_run(Path("elsewhere")).problems == []


@pytest.mark.parametrize(
    ("gone", "absent"),
    [
        (["evaluation"], {"evaluation"}),
        (
            ["evaluation", "policy", "controls"],
            {"evaluation", "policy selected", "policy all", "curriculum all"},
        ),
        (["evaluation", "policy", "controls", "curriculum.*"], {"curriculum selected"}),
        (["evaluation", "policy", "controls", "curriculum.*", "scores"], {"folds", "keys"}),
        (["evaluation", "policy", "controls", "curriculum.*", "scores", "*reference"], {"reference"}),
    ],
)
def test_an_unfinished_run_passes_and_what_is_absent_is_said(
    run: Path, gone: list[str], absent: set[str]
) -> None:
    for path in [path for pattern in gone for path in run.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / ".partial-policy-0123abcd").mkdir()
    found = verify_run(run)
    assert found.problems == []
    statuses = status_of(found)
    assert {name for name in absent if statuses.get(name) != "absent"} == set()
    assert statuses["pairs"] == "ok"
    assert "1 unfinished" in found.checks[0].counted


def test_without_its_recipe_a_run_is_checked_as_far_as_possible(run: Path) -> None:
    (run / "config.json").unlink()
    found = verify_run(run)
    assert found.problems == []
    statuses = status_of(found)
    assert statuses["recipe"] == "absent"
    assert {statuses[name] for name in ("folds", "curriculum all", "policy hardest", "evaluation")} == {"ok"}


def test_a_pair_that_was_set_aside_is_accounted_for(tmp_path: Path) -> None:
    (bad,) = write_inputs(tmp_path, poisoned_pairs=1)
    poison_folder(tmp_path / "model")
    build_curriculum(open_run(tiny_recipe(tmp_path), say=lambda line: None))
    run = tmp_path / "runs" / "tiny"
    found = verify_run(run)
    assert found.problems == []
    counted = {check.name: check.counted for check in found.checks}
    assert counted["reference"] == "23 pairs, 1 more set aside as not finite"
    assert counted["curriculum selected"].startswith("23 pairs, ")
    (run / "reference" / "quarantine.json").unlink()
    reseal(run / "reference")
    problems = verify_run(run).problems
    assert f"reference/logps.parquet: 1 ids of the kept pairs are missing: {bad}" in problems
    assert any("set aside" in problem and bad in problem for problem in problems)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArtifactError, match="is not a run's folder"):
        verify_run(tmp_path)
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- damage -----------------------------------------------------------------------------------------------


def reseal(folder: Path) -> None:
    """Make the manifest agree with the files."""
    manifest = read_json(folder / MANIFEST)
    write_json(folder / MANIFEST, {**manifest, "files": folder_digests(folder)})


def reseal_curriculum(folder: Path) -> None:
    facts = read_json(folder / "curriculum.json")
    own = {name: value for name, value in facts.items() if name not in HEAD}
    digests = {"table_sha256": file_digest(folder / "curriculum.parquet"), "facts_sha256": digest(own)}
    write_json(folder / "curriculum.json", {"schema_version": SCHEMA_VERSION, **digests, **own})


def edit_table(path: Path, change: Callable[[dict[str, list[Any]]], None]) -> None:
    """Change the columns of a Parquet file, as lists, and reseal what it belongs to."""
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=table.schema), path)
    reseal_curriculum(path.parent) if path.name == "curriculum.parquet" else reseal(path.parent)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same for a JSON file."""
    value = read_json(path)
    change(value)
    write_json(path, value)
    if path.name == "curriculum.json":
        reseal_curriculum(path.parent)
    elif (path.parent / MANIFEST).is_file() and path.name != MANIFEST:
        reseal(path.parent)


def in_table(path: str, column: str, change: Callable[[list[Any]], object]) -> Damage:
    def damage(root: Path) -> None:
        edit_table(root / path, lambda columns: change(columns[column]))

    return damage


def in_json(path: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(root: Path) -> None:
        edit_json(root / path, lambda value: change(value))

    return damage


def flip_a_bit(path: str) -> Damage:
    def damage(root: Path) -> None:
        (file,) = root.glob(path)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return damage


def delete(path: str) -> Damage:
    def damage(root: Path) -> None:
        file = root / path
        shutil.rmtree(file) if file.is_dir() else file.unlink()

    return damage


def drop_rows(path: str, which: Callable[[list[Any]], list[int]]) -> Damage:
    def damage(root: Path) -> None:
        def change(columns: dict[str, list[Any]]) -> None:
            gone = set(which(next(iter(columns.values()))))
            for values in columns.values():
                values[:] = [value for row, value in enumerate(values) if row not in gone]

        edit_table(root / path, change)

    return damage


def repeat_first_row(path: str) -> Damage:
    def damage(root: Path) -> None:
        edit_table(root / path, lambda columns: [values.append(values[0]) for values in columns.values()])  # type: ignore[arg-type,return-value]

    return damage


def set_at(row: int, value: Any) -> Callable[[list[Any]], None]:
    def change(values: list[Any]) -> None:
        values[row] = value(values[row]) if callable(value) else value

    return change


def swap(one: str, other: str) -> Damage:
    """The files change places, and both manifests are made to agree."""

    def damage(root: Path) -> None:
        first, second = (root / one).read_bytes(), (root / other).read_bytes()
        (root / one).write_bytes(second)
        (root / other).write_bytes(first)
        for path in (root / one, root / other):
            reseal(path.parent)

    return damage


def write(path: str, content: str) -> Damage:
    def damage(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)

    return damage


F0, F1 = "scores/seed41-fold0/records.parquet", "scores/seed41-fold1/records.parquet"
ID = "[0-9a-f]{32}"

DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    # what digests tell
    "flipped bit in the pairs": (flip_a_bit("pairs/pairs.parquet"), [r"^pairs: pairs\.parquet: changed$"]),
    "flipped bit in weights": (flip_a_bit("policy/*.safetensors"), [r"^policy: \S+\.safetensors: changed$"]),
    "flipped bit in the curriculum": (
        flip_a_bit("curriculum.parquet"),
        [r"^curriculum\.parquet: not the table that curriculum\.json was written for$"],
    ),
    "deleted records": (
        delete(F0),
        [
            r"^scores/seed41-fold0: records\.parquet: missing$",
            r"^curriculum\.json: made from .* seed41-fold0",
        ],
    ),
    "deleted scorer": (
        delete("scores/seed42-fold1"),
        [r"^curriculum\.json: made from the records of seed42-fold1, which are not there$"],
    ),
    "deleted manifest": (
        delete("reference/manifest.json"),
        [r"^reference: .*is not complete: it has no manifest\.json"],
    ),
    "deleted table": (delete("curriculum.parquet"), [r"^curriculum\.parquet: missing$"]),
    "deleted facts": (
        delete("controls/all/curriculum.json"),
        [r"^controls/all/curriculum\.parquet: .*does not exist"],
    ),
    "extra file": (write("policy/model.bin", "x"), [r"^policy: model\.bin: not in the manifest$"]),
    "manifest that is none": (write("evaluation/manifest.json", "{"), [r"^evaluation: .* is not a manifest"]),
    "another kind": (
        in_json("reference/manifest.json", lambda value: value.update(kind="pairs")),
        [r"^reference/manifest\.json: kind is pairs and should be reference$"],
    ),
    # pairs
    "a pair dropped without a word": (
        drop_rows("pairs/pairs.parquet", lambda rows: [5]),
        [
            r"^pairs/summary\.json: rows is 300 and should be 299$",
            rf"^pairs/tokens\.parquet: 1 ids are not those of the kept pairs: {ID}$",
            r"^pairs/pairs\.parquet: rows of .* are not numbered 0 to 298",
        ],
    ),
    "a count changed": (
        in_json("pairs/summary.json", lambda value: value["counts"].update({"empty completion": 2})),
        [r"^pairs/summary\.json: counts is .*'empty completion': 2.* and should be .*'empty completion': 1"],
    ),
    "a text changed": (
        in_table("pairs/pairs.parquet", "chosen", set_at(7, '"another answer"')),
        [rf"^pairs/pairs\.parquet: the id is not that of the texts for 1 ids: {ID}$"],
    ),
    "another status": (
        in_table("pairs/pairs.parquet", "status", set_at(0, "whim")),
        [
            r"^pairs/pairs\.parquet: unknown status: whim$",
            r"^pairs/summary\.json: kept is 299 and should be 298$",
        ],
    ),
    "tokens of a pair twice": (
        repeat_first_row("pairs/tokens.parquet"),
        [rf"^pairs/tokens\.parquet: 1 ids stand more than once: {ID}$"],
    ),
    "a token cut off": (
        in_table("pairs/tokens.parquet", "chosen_ids", set_at(3, lambda ids: ids[:-1])),
        [rf"^pairs/tokens\.parquet: chosen_ids are not as many as pairs\.parquet says for 1 ids: {ID}$"],
    ),
    "held-out pairs that are trained on": (
        swap("test-pairs/pairs.parquet", "pairs/pairs.parquet"),
        [
            r"^test-pairs/summary\.json: rows is 20 and should be 300$",
            rf"^test-pairs/tokens\.parquet: .*{ID}",
        ],
    ),
    # reference
    "a log-prob lost": (
        drop_rows("reference/logps.parquet", lambda rows: [0, 1]),
        [rf"^reference/logps\.parquet: 2 ids of the kept pairs are missing: {ID}, {ID}$"],
    ),
    "a log-prob that is not finite": (
        in_table("reference/logps.parquet", "chosen", set_at(0, float("nan"))),
        [rf"^reference/logps\.parquet: log-probs are not finite for 1 ids: {ID}$"],
    ),
    "another reference": (
        in_table("reference/logps.parquet", "chosen", set_at(0, lambda value: value + 1.0)),
        [rf"^scores/seed4\d-fold\d/records\.parquet: reference_chosen_logp is not that of reference .*{ID}"],
    ),
    # records
    "folds swapped": (
        swap(F0, F1),
        [
            rf"^{F0}: records of fold 1 stand among those of 0$",
            rf"^{F0}, evaluation 1: \d+ ids of the held-out half are missing: ({ID}, ){{4}}",
            rf"^{F1}, evaluation 5: \d+ ids are not those of the held-out half: {ID}",
            r"^curriculum\.json: made from other records than those in scores/seed41-fold0$",
        ],
    ),
    "a scorer of another seed": (
        swap(F0, "scores/seed42-fold0/records.parquet"),
        [rf"^{F0}: records of seed 42 stand among those of 41$"],
    ),
    "a loss changed": (
        in_table(F0, "loss", set_at(11, lambda loss: loss + 1e-5)),
        [rf"^{F0}: loss is not that of the log-probs \(sigmoid, beta [0-9.]+\) for 1 ids: {ID}$"],
    ),
    "a log-prob changed": (
        in_table(F1, "policy_chosen_logp", set_at(11, lambda value: value + 1.0)),
        [rf"^{F1}: margin is not that of the log-probs .* 1 ids: {ID}$", rf"^{F1}: loss is not that"],
    ),
    "a record lost": (
        drop_rows(F0, lambda rows: [0]),
        [rf"^{F0}, evaluation 1: 1 ids of the held-out half are missing: {ID}$"],
    ),
    "a record twice": (repeat_first_row(F0), [rf"^{F0}, evaluation 1: 1 ids stand more than once: {ID}$"]),
    "an evaluation lost": (
        drop_rows(F0, lambda ids: [row for row in range(len(ids)) if row >= 4 * len(ids) // 5]),
        [rf"^{F0}: evaluations is \[1, 2, 3, 4\] and should be \[1, 2, 3, 4, 5\]$"],
    ),
    "another step": (
        in_table(F0, "step", lambda values: values.__setitem__(slice(None), [9] * len(values))),
        [rf"^{F0}: steps by evaluation is .* and should be "],
    ),
    "another prompt id": (
        in_table(F1, "prompt_id", set_at(0, "f" * 32)),
        [rf"^{F1}: prompt_id is not that of the pairs for 1 ids: {ID}$"],
    ),
    # curriculum
    "a difficulty changed": (
        in_table("curriculum.parquet", "difficulty", set_at(0, lambda value: value + 1e-6)),
        [rf"^curriculum\.parquet: difficulty is not the records' for 1 ids: {ID}$"],
    ),
    "a loss changed in the curriculum": (
        in_table("curriculum.parquet", "loss_seed42_evaluation3", set_at(4, lambda value: value + 1e-9)),
        [rf"^curriculum\.parquet: losses are not those of the records for 1 ids: {ID}$"],
    ),
    "another selected": (
        in_table("curriculum.parquet", "selected", set_at(0, lambda value: not value)),
        [rf"^curriculum\.parquet: selected is not what the difficulty and the selection .* 1 ids: {ID}$"],
    ),
    "another order": (
        in_table("controls/hardest/curriculum.parquet", "position", lambda values: values.reverse()),
        [rf"^controls/hardest/curriculum\.parquet: position is not what .* for \d+ ids: {ID}"],
    ),
    "a pair left out of the curriculum": (
        drop_rows("curriculum.parquet", lambda rows: [0]),
        [rf"^curriculum\.parquet: 1 ids of the kept pairs are missing: {ID}$"],
    ),
    "a pair twice in the curriculum": (
        repeat_first_row("curriculum.parquet"),
        [rf"^curriculum\.parquet: curriculum: 1 ids stand more than once: {ID}$"],
    ),
    "another fraction": (
        in_json("curriculum.json", lambda value: value["select"].update(fraction=0.6)),
        [r"^curriculum\.json: select is .*0\.6.* and should be .*0\.5"],
    ),
    "another recipe": (
        in_json("config.json", lambda value: value["select"].update(fraction=0.6)),
        [
            r"^config\.json: differs from recipe\.yaml: select\.fraction: .* -> 0\.6$",
            r"^curriculum\.json: key is ",
        ],
    ),
    # policy
    "another order consumed": (
        in_json("policy/order.json", lambda value: value.update(consumed_digest="0" * 64)),
        [r"^policy/order\.json: consumed_digest is 0{64} and should be [0-9a-f]{64}$"],
    ),
    "both digests of the order": (
        in_json(
            "policy/order.json",
            lambda value: value.update(consumed_digest="0" * 64, expected_digest="0" * 64),
        ),
        [r"^policy/order\.json: expected_digest is 0{64} and should be [0-9a-f]{64}$"],
    ),
    "the policy of a control": (
        swap("policy/order.json", "controls/all/policy/order.json"),
        [r"^policy/order\.json: pairs is 299 and should be 150$"],
    ),
    "policies swapped with their manifests": (
        lambda root: swap_folders(root / "controls/random/policy", root / "controls/hardest/policy"),
        [
            r"^controls/random/policy/order\.json: expected_digest is ",
            r"^controls/hardest/policy/manifest\.json: made from other inputs than ",
        ],
    ),
    "weights removed": (
        lambda root: (
            [path.unlink() for path in (root / "policy").glob("*.safetensors")] and reseal(root / "policy")
        ),  # type: ignore[func-returns-value]
        [r"^policy: there are no weights \(\*\.safetensors\)$"],
    ),
    # evaluation
    "an answer of a prompt that nobody asked": (
        in_table("evaluation/generations.parquet", "prompt_id", set_at(0, "e" * 32)),
        [
            r"^evaluation/generations\.parquet: 1 prompts are not among those to ask: e{32}$",
            r"^evaluation/verdicts\.parquet: reference: verdicts on answers that are not there: ",
        ],
    ),
    "an answer twice": (
        repeat_first_row("evaluation/generations.parquet"),
        [r"^evaluation/generations\.parquet: 1 answers \(arm, prompt_id, sample\) stand more than once: "],
    ),
    "a verdict turned": (
        in_table(
            "evaluation/verdicts.parquet",
            "score",
            set_at(-1, lambda score: 1.0 - score if score != 0.5 else 1.0),
        ),
        [r"^evaluation/results\.json: win rate of hardest is 0\.\d+, and its verdicts give 0\.\d+$"],
    ),
    "a result changed": (
        in_json("evaluation/results.json", lambda value: value["arms"][1].update(updates=1)),
        [r"^evaluation/results\.json: updates of selected is 1 and should be \d+$"],
    ),
    "an arm removed": (
        in_json("evaluation/results.json", lambda value: value["arms"].pop(2)),
        [r"^evaluation/results\.json: arms is \['hardest', 'random', 'reference', 'selected'\] and "],
    ),
    "results that are none": (
        write("evaluation/results.json", "[]"),
        [r"^evaluation: cannot be checked: .*results\.json holds list, not an object$"],
    ),
    # keys
    "records of another setting": (
        in_json("scores/seed43-fold0/manifest.json", lambda value: value.update(key="0" * 64)),
        [r"^scores/seed43-fold0/manifest\.json: made from other inputs than "],
    ),
}


def swap_folders(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, patterns = DAMAGES[name]
    damage(run)
    capsys.readouterr()
    assert main(["verify", str(run)]) == 2
    printed = capsys.readouterr()
    problems = [line.removeprefix("selective-dpo: ") for line in printed.err.splitlines()]
    for pattern in patterns:
        assert any(re.search(pattern, problem) for problem in problems), problems
    assert printed.out.splitlines()[-1] == f"{run}: {len(problems)} problem(s)"
    assert "WRONG" in printed.out


def test_the_first_problem_does_not_hide_the_others(run: Path) -> None:
    for name in (
        "a text changed",
        "a log-prob lost",
        "a loss changed",
        "another selected",
        "a verdict turned",
    ):
        DAMAGES[name][0](run)
    wrong = {name for name, status in status_of(verify_run(run)).items() if status == "WRONG"}
    assert {"pairs", "reference", "scores/seed41-fold0", "curriculum selected", "evaluation"} <= wrong


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"PAR1garbagePAR1", b"{}", b"\xff\xfe"])
def test_files_that_are_no_files_of_their_kind_are_named_each(run: Path, content: bytes) -> None:
    names = ["config.json", "inputs.json", "curriculum.json", "pairs/summary.json", "policy/order.json", F0]
    names += [
        "pairs/tokens.parquet",
        "reference/logps.parquet",
        "evaluation/results.json",
        "policy/manifest.json",
    ]
    for name in names:
        (run / name).write_bytes(content)
    found = verify_run(run)
    wrong = {name for name, status in status_of(found).items() if status == "WRONG"}
    assert {"digests", "recipe", "pairs", "reference", "scores/seed41-fold0", "policy selected"} <= wrong
    assert all("\n" not in problem and len(problem) < 1500 for problem in found.problems)
