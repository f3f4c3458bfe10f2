"""A recipe with `curriculum`: difficulty from outside takes the place of scoring, from a file to a policy."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from selective_dpo.cli import main
from selective_dpo.config import Recipe
from selective_dpo.config.load import dump_config, make_recipe
from selective_dpo.curriculum.import_ import read_outside
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.adapters import Pair, parse_row
from selective_dpo.errors import ConfigError, IdentityError, RecordsError, RunChangedError
from selective_dpo.logprobs.nonfinite import write_quarantine
from selective_dpo.logprobs.reference import load_reference, require_finite_reference
from selective_dpo.run import run as verbs
from selective_dpo.run.plan import make_plan, plan_text
from selective_dpo.run.verify import verify_run
from selective_dpo.storage.artifacts import file_digest, read_json
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_pairs_file, tiny_recipe

AUTHORS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "learning_records"
MODELS = ("qwen-2.5-1.5b-argilla", "qwen-2.5-7b-argilla", "qwen-2.5-14b-argilla")
DIFFICULTY = {f"prompt-{number}": round(0.9 - 0.1 * number, 1) for number in range(8)}
"""Of the toy data: prompt-7 is the easiest. Two more prompts of the data are not among them."""


def with_prompt_ids(path: Path, ids: list[str], pairs: int) -> list[Pair]:
    """Write toy rows that carry these ids in turn, and return them as pairs."""
    tiny_pairs_file(path, pairs, len(ids))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "prompt_id": ids[number % len(ids)]} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parsed = [parse_row(row) for row in rows]
    return [pair for pair in parsed if isinstance(pair, Pair)]


def toy_file(path: Path, *, extra: bool = True) -> Path:
    rows = DIFFICULTY | ({"no-such-prompt": 0.05} if extra else {})
    path.write_text(
        "prompt_id,learning_order\n" + "".join(f"{name},{value}\n" for name, value in rows.items())
    )
    return path


def toy_recipe(tmp: Path, **blocks: Any) -> tuple[Recipe, list[Pair]]:
    """Twenty pairs, two of each of ten prompts, eight of which have a difficulty."""
    pairs = with_prompt_ids(tmp / "pairs.jsonl", [f"prompt-{number}" for number in range(10)], 20)
    blocks.setdefault("curriculum", str(toy_file(tmp / "toy_learning_order.csv")))
    return tiny_recipe(tmp, **blocks), pairs


def digest_by_hand(ids: list[str]) -> str:
    return hashlib.sha256("".join(f"{each}\n" for each in ids).encode()).hexdigest()


def run_all(recipe: Recipe) -> Path:
    run = verbs.open_run(recipe, say=lambda line: None)
    verbs.run_all(run)
    return run.folder.root


@pytest.mark.skipif(not AUTHORS.is_dir(), reason="the authors' curricula (../shared/data) are not here")
@pytest.mark.parametrize("model", MODELS)
def test_from_the_authors_file_to_a_policy_trained_in_its_order(model: str, tmp_path: Path) -> None:
    source = AUTHORS / f"{model}_learning_order.csv.gz"
    with gzip.open(source, "rt") as stream:
        theirs = {row["prompt_id"]: float(row["learning_order"]) for row in csv.DictReader(stream)}
    assert len(theirs) == 6_668
    ids = sorted(theirs)[::170]
    assert len(ids) == 40
    pairs = with_prompt_ids(tmp_path / "pairs.jsonl", ids, 40)
    root = run_all(tiny_recipe(tmp_path, curriculum=str(source)))

    by_difficulty = sorted(pairs, key=lambda pair: theirs[pair.prompt_id])
    easiest = [pair.pair_id for pair in by_difficulty[:20]]
    order = read_json(root / "policy" / "order.json")
    assert order["consumed_digest"] == order["expected_digest"] == digest_by_hand(easiest)
    assert order["matches"] and order["consumed"] == 20
    curriculum = Curriculum.load(root)
    assert curriculum.order == easiest
    imported = curriculum.facts["provenance"]["imported"]
    assert (imported["ids"], imported["ids_without_pairs"], imported["pairs"]) == (6_668, 6_628, 40)
    assert (imported["joined_by"], imported["sha256"]) == ("prompt_id", file_digest(source))
    assert not verify_run(root).problems


def test_counts_reasons_and_everything_that_reads_such_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, pairs = toy_recipe(tmp_path, evaluate={"controls": {"hard": {"rule": "hardest", "count": 4}}})
    file = recipe_file(recipe, tmp_path / "recipe.yaml")
    assert main(["doctor", str(file)]) == 0
    told = capsys.readouterr().out
    assert "16 of the first 20 pairs have one" in told and "score." not in told
    assert main(["run", str(file)]) == 0
    told = capsys.readouterr().out
    assert (
        "joined by prompt_id: 16 of 20 pairs have a difficulty, 16 of which share it with another; 4 have "
        "none and are not selected; 1 of 9 ids have no pair" in told
    )
    root = tmp_path / "runs" / "tiny"
    table = Curriculum.load(root).table.to_pylist()
    known = [pair for pair in pairs if pair.prompt_id in DIFFICULTY]
    ranked = sorted(known, key=lambda pair: (DIFFICULTY[pair.prompt_id], pair.pair_id))
    assert Curriculum.load(root).order == [pair.pair_id for pair in ranked[:8]]
    hardest = [pair.pair_id for pair in ranked[-4:]]
    assert Curriculum.load(root / "controls" / "hard").order == hardest
    without = [row for row in table if row["difficulty"] is None]
    assert {row["prompt_id"] for row in without} == {"prompt-8", "prompt-9"}
    assert len(without) == 4 and not any(row["selected"] for row in without)
    assert {row["reason"] for row in without} == {"no difficulty in the imported curriculum"}
    # Neither scorers, nor a reference that training does not need.
    assert not (root / "scores").exists()
    assert sorted(load_reference(root / "reference").pair_ids) == sorted(
        [*hardest, *(pair.pair_id for pair in ranked[:8])]
    )
    digest = file_digest(tmp_path / "toy_learning_order.csv")
    assert [
        value for name, value in read_json(root / "inputs.json").items() if name.startswith("curriculum ")
    ] == [digest]
    card = (root / "policy" / "README.md").read_text()
    assert (
        f"imported from the file `toy_learning_order.csv`\n(SHA-256 `{digest}`, joined by prompt_id)" in card
    )
    assert "held-out DPO loss of scorers" not in card
    assert "Difficulty was imported: file toy_learning_order.csv" in (root / "report.html").read_text()

    assert main(["verify", str(root)]) == 0
    assert "compared with toy_learning_order.csv" in capsys.readouterr().out
    assert main(["inspect", str(root), "--hardest", "1"]) == 0
    assert "difficulty 0.9000, rank 16 of 16" in capsys.readouterr().out
    assert main(["inspect", str(root), "--pair", without[0]["pair_id"]]) == 2
    assert "has no difficulty: no difficulty in the imported" in capsys.readouterr().err
    assert main(["export", str(root), "--format", "csv", "--out", str(tmp_path / "again.csv")]) == 0
    with (tmp_path / "again.csv").open() as stream:
        again = {row["pair_id"]: float(row["learning_order"]) for row in csv.DictReader(stream)}
    assert again == {pair.pair_id: DIFFICULTY[pair.prompt_id] for pair in known}

    made = tmp_path / "made.parquet"
    command = ["import-curriculum", str(tmp_path / "toy_learning_order.csv"), "--out", str(made)]
    assert main([*command, "--pairs", str(root / "pairs")]) == 0
    assert "4 have none and are not selected; 1 of 9 ids have no pair; 8 selected" in capsys.readouterr().out
    assert Curriculum.load(made).table == Curriculum.load(root).table

    plan = make_plan(recipe)
    assert {job.kind: job.cached for job in plan.jobs} == {"reference": True, "policy": True}
    assert main(["run", str(file)]) == 0
    assert "training" not in capsys.readouterr().out


def test_plan_before_the_run(tmp_path: Path) -> None:
    recipe, _ = toy_recipe(tmp_path, select={"rule": "below", "threshold": 0.35})
    plan = make_plan(recipe)
    # prompt-6 (0.3) and prompt-7 (0.2), two pairs each: known though the rule is a threshold.
    assert [(job.kind, job.pairs, job.cached) for job in plan.jobs] == [
        ("reference", 4, False),
        ("policy", 4, False),
    ]
    assert plan.protocols == () and plan.to_json()["scoring"] is None
    assert "imported from" in plan_text(plan) and "scorers" not in plan_text(plan)
    assert not plan.folder.exists()


def test_another_models_curriculum_from_weak_to_strong(tmp_path: Path) -> None:
    weak = tiny_recipe(tmp_path, name="weak", train={"trainer": {"logging_steps": 2}})
    verbs.curriculum(verbs.open_run(weak, say=lambda line: None))
    tiny_model_folder(tmp_path / "strong", seed=1)
    before = Curriculum.load(tmp_path / "runs" / "weak")
    strong = tiny_recipe(
        tmp_path,
        name="strong",
        model={"path": str(tmp_path / "strong")},
        curriculum=str(tmp_path / "runs" / "weak"),
        select={"fraction": 0.25, "order": "hard-to-easy"},
    )
    root = run_all(strong)
    by_difficulty = np.argsort(before.difficulty_P, kind="stable")[:6][::-1]
    wanted = [before.pair_ids[row] for row in by_difficulty]
    assert read_json(root / "policy" / "order.json")["consumed_digest"] == digest_by_hand(wanted)
    imported = Curriculum.load(root).facts["provenance"]["imported"]
    made_by = imported["made_by"]
    assert (imported["kind"], imported["joined_by"]) == ("curriculum", "pair_id")
    assert (made_by["run"], made_by["model"], made_by["key"]) == ("weak", "model", before.facts["key"])
    own = Curriculum.load(root).facts["provenance"]["inputs"]["model"]
    assert made_by["model_sha256"] == before.facts["provenance"]["inputs"]["model"] != own
    assert "from the curriculum `weak`, measured with `model`" in (root / "policy" / "README.md").read_text()
    assert str(tmp_path) not in json.dumps(imported)
    assert not verify_run(root).problems
    # The table alone, by its path, is the same content.
    table = read_outside(tmp_path / "runs" / "weak" / "curriculum.parquet")
    assert {name: imported[name] for name in table.facts} == table.facts


def test_a_file_with_other_content_is_another_input(tmp_path: Path) -> None:
    recipe, _ = toy_recipe(tmp_path)
    first = verbs.curriculum(verbs.open_run(recipe, say=lambda line: None))
    toy_file(tmp_path / "toy_learning_order.csv", extra=False)
    with pytest.raises(RunChangedError, match="curriculum "):
        verbs.curriculum(verbs.open_run(recipe, say=lambda line: None))
    second = verbs.curriculum(verbs.open_run(recipe, say=lambda line: None, fresh=True))
    assert first.facts["key"] != second.facts["key"] and first.order == second.order


def test_verify_finds_a_difficulty_that_is_not_the_files(tmp_path: Path) -> None:
    recipe, _ = toy_recipe(tmp_path)
    verbs.curriculum(verbs.open_run(recipe, say=lambda line: None))
    root = tmp_path / "runs" / "tiny"
    curriculum = Curriculum.load(root)
    values = curriculum.table["difficulty"].to_pylist()
    row = curriculum.table["rank"].to_pylist().index(0)
    values[row] -= 0.01
    place = curriculum.table.column_names.index("difficulty")
    Curriculum(curriculum.table.set_column(place, "difficulty", pa.array(values)), curriculum.facts).save(
        root
    )
    (problem,) = verify_run(root).problems
    assert "difficulty is not what the stored inputs give" in problem and curriculum.pair_ids[row] in problem
    # Without the file nothing can be compared, and that is said.
    (tmp_path / "toy_learning_order.csv").unlink()
    verification = verify_run(root)
    assert not verification.problems
    assert "toy_learning_order.csv is not here to compare" in verification.text()


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"score": {"protocol": "paper"}}, r"score\.protocol has no effect beside curriculum"),
        ({"score": {"trainer": {"beta": 0.1}}}, "score.trainer has no effect"),
        ({"score": {"keep_scorers": True}}, "score.keep_scorers has no effect"),
        ({"select": {"aggregate": "final"}}, r"select\.aggregate has no effect"),
        ({"select": {"allow_partial": True}}, r"select\.allow_partial has no effect"),
        (
            {"evaluate": {"controls": {"x": {"aggregate": "median"}}}},
            r"evaluate\.controls\.x\.aggregate has no effect",
        ),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, blocks: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_recipe(tmp_path, curriculum="somewhere.csv", **blocks)


def test_a_resolved_recipe_is_read_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, curriculum="somewhere.csv")
    assert make_recipe(dump_config(recipe)) == recipe


def test_there_is_nothing_to_score(tmp_path: Path) -> None:
    recipe, _ = toy_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"nothing to score: the difficulty comes from .*use `run`"):
        verbs.score(verbs.open_run(recipe, say=lambda line: None))


def test_ids_that_name_no_pair_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("prompt_id,learning_order\nelsewhere,0.5\n")
    recipe, _ = toy_recipe(tmp_path, curriculum=str(other))
    with pytest.raises(
        IdentityError,
        match=r"none of 20 pairs has a difficulty in other\.csv: .*elsewhere, are no prompt_id.*prompt-0",
    ):
        run_all(recipe)
    assert not (tmp_path / "runs" / "tiny" / "reference").exists()


def test_selected_pairs_without_a_finite_reference_stop_the_training(tmp_path: Path) -> None:
    entry = {"pair_id": "a" * 32, "prompt_id": "p", "not_finite": []}
    write_quarantine(tmp_path, [entry], pairs=1)
    with pytest.raises(
        RecordsError, match=f"of 1 selected pairs .*{'a' * 32}; leave them out with data.exclude"
    ):
        require_finite_reference(tmp_path)


def test_a_relative_path_is_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    recipe, _ = toy_recipe(tmp_path)
    raw = dump_config(recipe) | {"curriculum": "toy_learning_order.csv"}
    assert make_recipe(raw, folder=tmp_path).curriculum == str(tmp_path / "toy_learning_order.csv")
