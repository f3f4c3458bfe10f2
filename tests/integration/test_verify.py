"""`verify`: a good run passes, and each kind of damage is found and named, also where all digests agree.

Most damage here is done as somebody would who rewrites the manifest, too: then only ids and numbers can tell.
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

from selective_dpo.cli import main
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
    assert counted["scores"] == "6 of 6 scorers"
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
        (["evaluation", "controls"], {"evaluation", "policy all", "curriculum all"}),
        (
            ["evaluation", "policy", "controls", "curriculum.*", "scores", "*reference"],
            {"evaluation", "keys", "policy selected", "curriculum selected", "scores", "reference"},
        ),
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
    assert {name for name in absent if statuses[name] != "absent"} == set()
    assert statuses["pairs"] == "ok"
    assert "1 unfinished" in found.checks[0].counted


def test_without_its_recipe_digests_and_pairs_are_checked(run: Path) -> None:
    (run / "config.json").unlink()
    found = verify_run(run)
    assert found.problems == []
    assert [check.counted for check in found.checks if check.name == "recipe"] == [
        "absent: what depends on the recipe is not checked"
    ]
    assert status_of(found)["pairs"] == "ok"


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
    lost = f"reference/logps.parquet: pairs that need a reference: 1 ids missing ({bad})"
    assert any(problem.startswith(lost) for problem in problems)
    assert any(problem.startswith("scores/seed41-fold") and bad in problem for problem in problems)


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


def swap_folders(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap_places(positions: list[int]) -> None:
    first, second = positions.index(0), positions.index(1)
    positions[first], positions[second] = 1, 0


def remove_weights(policy: str) -> Damage:
    def damage(root: Path) -> None:
        for path in (root / policy).glob("*.safetensors"):
            path.unlink()
        reseal(root / policy)

    return damage


def repeat_last_verdict(root: Path) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        for values in columns.values():
            values.append(values[-1])

    edit_table(root / "evaluation/verdicts.parquet", change)


def turn_verdicts(arm: str) -> Damage:
    """Every verdict on an arm becomes a win."""

    def damage(root: Path) -> None:
        def change(columns: dict[str, list[Any]]) -> None:
            columns["score"] = [
                1.0 if name == arm else score
                for name, score in zip(columns["arm"], columns["score"], strict=True)
            ]

        edit_table(root / "evaluation/verdicts.parquet", change)

    return damage


R = "scores/{}/records.parquet"
ID = "[0-9a-f]{32}"
GIVES = "is not what the stored inputs give"

# Several to a copy of the run, each of another artifact: none may hide another.
FORGERIES: dict[str, list[tuple[Damage, str]]] = {
    "files": [
        (flip_a_bit("policy/*.safetensors"), r"^policy: .*\S+\.safetensors differ"),
        (
            flip_a_bit("controls/random/curriculum.parquet"),
            r"^controls/random/curriculum\.parquet: .* not the table",
        ),
        (delete(R.format("seed41-fold0")), r"^scores/seed41-fold0: .*records\.parquet differ"),
        (
            delete("scores/seed42-fold1"),
            r"^curriculum\.parquet: cannot be checked: scores/seed42-fold1 is not complete",
        ),
        (delete("controls/all/policy/manifest.json"), r"^controls/all/policy: .*it has no manifest\.json"),
        (
            delete("controls/all/curriculum.json"),
            r"^controls/all/curriculum\.parquet: .*curriculum\.json does not exist",
        ),
        (write("evaluation/model.bin", "x"), r"^evaluation: .*model\.bin differ"),
    ],
    "pairs": [
        (
            in_table("pairs/pairs.parquet", "chosen", set_at(7, '"another answer"')),
            rf"^pairs/pairs\.parquet: the id is not that of the texts for 1 ids: {ID}$",
        ),
        (
            in_json("pairs/summary.json", lambda value: value["counts"].update({"empty completion": 2})),
            r"^pairs/summary\.json: counts is .* and should be ",
        ),
        (
            in_table("pairs/tokens.parquet", "chosen_ids", set_at(3, lambda ids: ids[:-1])),
            rf"^pairs/tokens\.parquet: chosen_tokens {GIVES} for 1 ids: {ID}$",
        ),
        (
            repeat_first_row("test-pairs/tokens.parquet"),
            rf"^test-pairs/tokens\.parquet: .* 1 ids stand more than once: {ID}$",
        ),
        (
            drop_rows("test-reference/logps.parquet", lambda rows: [0, 1]),
            rf"^test-reference/logps\.parquet: .* 2 ids missing \({ID}, {ID}\)",
        ),
        (
            in_table("reference/logps.parquet", "chosen", set_at(0, float("nan"))),
            rf"^reference/logps\.parquet: log-probs are not finite for 1 ids: {ID}$",
        ),
    ],
    "records": [
        (
            in_table(R.format("seed41-fold0"), "loss", set_at(11, lambda loss: loss + 1e-5)),
            rf"^scores/seed41-fold0/records\.parquet: loss {GIVES} for 1 ids: {ID} \d$",
        ),
        (
            in_table(R.format("seed41-fold1"), "reference_chosen_logp", set_at(2, lambda value: value + 1.0)),
            rf"^scores/seed41-fold1/records\.parquet: reference_chosen_logp {GIVES} for 1 ids: {ID} 1$",
        ),
        (
            drop_rows(R.format("seed42-fold0"), lambda rows: [0]),
            rf"^scores/seed42-fold0: cannot be checked: .* 1 of \d+ ids are missing: {ID}$",
        ),
        (
            in_table(R.format("seed42-fold1"), "prompt_id", set_at(0, "f" * 32)),
            rf"^scores/seed42-fold1/records\.parquet: prompt_id {GIVES} for 1 ids: {ID} 1$",
        ),
        (
            swap(R.format("seed43-fold0"), R.format("seed43-fold1")),
            r"^scores/seed43-fold0: cannot be checked: .* \d+ of \d+ ids are missing: ",
        ),
        (
            in_json("scores/seed42-fold0/manifest.json", lambda value: value.update(key="0" * 64)),
            r"^scores/seed42-fold0/manifest\.json: made from other inputs than ",
        ),
        (lambda root: None, r"^curriculum\.parquet: cannot be checked: .*pairs (lack|have)"),
    ],
    "selection": [
        (
            in_table("curriculum.parquet", "difficulty", set_at(0, lambda value: value + 1e-6)),
            rf"^curriculum\.parquet: difficulty {GIVES} for 1 ids: {ID}$",
        ),
        (
            in_table("curriculum.parquet", "loss_seed42_evaluation3", set_at(4, lambda value: value + 1e-6)),
            rf"^curriculum\.parquet: loss_seed42_evaluation3 {GIVES} for 1 ids: {ID}$",
        ),
        (
            in_table("controls/hardest/curriculum.parquet", "position", swap_places),
            rf"^controls/hardest/curriculum\.parquet: position {GIVES} for 2 ids: {ID}, {ID}$",
        ),
        (
            lambda root: None,
            r"^controls/hardest/policy/order\.json: expected_digest is [0-9a-f]{64} and should be ",
        ),
        (
            in_json("controls/random/curriculum.json", lambda value: value["select"].update(fraction=0.6)),
            r"^controls/random/curriculum\.json: select is .*0\.6",
        ),
        (
            drop_rows("controls/all/curriculum.parquet", lambda rows: [0]),
            r"^controls/all/curriculum\.parquet: cannot be checked: .* wrong rank: ",
        ),
    ],
    "recipe": [
        (
            in_json("config.json", lambda value: value["select"].update(fraction=0.6)),
            r"^config\.json: differs from recipe\.yaml: select\.fraction: .* -> 0\.6$",
        ),
        (lambda root: None, r"^curriculum\.json: key is "),
        (
            in_json("inputs.json", lambda value: value.update({next(iter(value)): "0" * 64})),
            r"^curriculum\.json: model is [0-9a-f]{64} and should be 0{64}$",
        ),
    ],
    "policy and evaluation": [
        (
            in_json("policy/order.json", lambda value: value.update(consumed_digest="0" * 64)),
            r"^policy/order\.json: consumed_digest is 0{64} and should be [0-9a-f]{64}$",
        ),
        (
            lambda root: swap_folders(root / "controls/random/policy", root / "controls/hardest/policy"),
            r"^controls/random/policy/order\.json: expected_digest is ",
        ),
        (lambda root: None, r"^controls/hardest/policy/manifest\.json: made from other inputs than "),
        (
            remove_weights("controls/all/policy"),
            r"^controls/all/policy: there are no weights \(\*\.safetensors\)$",
        ),
        (
            in_table("evaluation/generations.parquet", "prompt_id", set_at(0, "e" * 32)),
            r"^evaluation/generations\.parquet: answers: .* 1 not asked for \(reference e{32} 0\)",
        ),
        (
            repeat_last_verdict,
            r"^evaluation/verdicts\.parquet: verdicts: 1 ids stand more than once: hardest ",
        ),
        (turn_verdicts("all"), r"^evaluation/results\.json: win_rate of all is .* and should be "),
        (
            in_json("evaluation/results.json", lambda value: value["arms"][1].update(updates=1)),
            r"^evaluation/results\.json: updates of selected is 1 and should be \d+$",
        ),
    ],
}


def problems_of(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(["verify", str(run)]) == 2
    printed = capsys.readouterr()
    problems = [line.removeprefix("selective-dpo: ") for line in printed.err.splitlines()]
    assert printed.out.splitlines()[-1] == f"{run}: {len(problems)} problem(s)"
    assert "WRONG" in printed.out
    return problems


@pytest.mark.parametrize("name", FORGERIES)
def test_each_forgery_is_found_and_named(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for damage, _ in FORGERIES[name]:
        damage(run)
    problems = problems_of(run, capsys)
    missed = [
        pattern for _, pattern in FORGERIES[name] if not any(re.search(pattern, each) for each in problems)
    ]
    assert missed == [], "\n".join(problems)


@pytest.mark.parametrize("content", [b"\x00" * 40, b"PAR1garbagePAR1", b"{}"])
def test_files_that_are_no_files_of_their_kind_are_named_each(run: Path, content: bytes) -> None:
    names = ["curriculum.json", "pairs/summary.json", "policy/order.json", "reference/logps.parquet"]
    names += ["evaluation/results.json", "policy/manifest.json", R.format("seed41-fold0")]
    for name in names:
        (run / name).write_bytes(content)
    found = verify_run(run)
    wrong = {name for name, status in status_of(found).items() if status == "WRONG"}
    assert {
        "digests",
        "pairs",
        "reference",
        "scores/seed41-fold0",
        "curriculum selected",
        "evaluation",
    } <= wrong
    assert all("\n" not in problem and len(problem) < 1500 for problem in found.problems)


def test_a_recipe_that_cannot_be_read_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_bytes(b"{")
    assert problems_of(run, capsys)[0].startswith("config.json: cannot be checked: config.json is not JSON")
