"""Flags, probabilities and planted labels of pairs made by hand; the forms that cleanlab takes and gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selective_dpo import find_issues
from selective_dpo.cli import main
from selective_dpo.config import FLAGS, IssuesConfig
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.issues import (
    SCHEMA,
    cleanlab_inputs,
    find_label_issues,
    flag_pairs,
    label_quality,
    length_driven,
    load_issues,
)
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.store import PAIRS, PAIRS_SCHEMA
from selective_dpo.errors import ArtifactError, ConfigError, IdentityError
from selective_dpo.losses import negative_log_sigmoid
from selective_dpo.report.page import write_report
from selective_dpo.run.issues import plant_in
from selective_dpo.storage.artifacts import publish_folder

LOOP = "again and " * 40


def pair_row(name: str, **changes: Any) -> dict[str, Any]:
    row = {
        "row": 0,
        "source": "pairs.jsonl",
        "pair_id": name,
        "prompt_id": f"p-{name}",
        "prompt": json.dumps(f"Question {name}?"),
        "chosen": json.dumps(f"Good {name}."),
        "rejected": json.dumps(f"Bad {name}."),
        "prompt_tokens": 5,
        "chosen_tokens": 10,
        "rejected_tokens": 10,
        "truncated": False,
        "boundary_mismatch": False,
        "status": "kept",
    }
    return row | changes


def pairs_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS_SCHEMA), path)
    return path


def flags_of(
    path: Path, rows: list[dict[str, Any]], p_wrong: list[float], **config: Any
) -> dict[str, set[str]]:
    """The flags of each pair."""
    ids = pa.table({name: [row[name] for row in rows] for name in ("pair_id", "prompt_id")})
    table = flag_pairs(ids, np.array(p_wrong), pairs_file(path / "pairs.parquet", rows), config)
    assert table.schema == SCHEMA
    return {row["pair_id"]: {flag for flag in FLAGS if row[flag]} for row in table.to_pylist()}


def test_p_wrong_decides_between_tie_too_hard_and_suspected_flip(tmp_path: Path) -> None:
    names = ["sure", "right", "half", "leaning", "wrong"]
    found = flags_of(tmp_path, [pair_row(name) for name in names], [0.02, 0.44, 0.46, 0.56, 0.65])
    assert list(found.values()) == [set(), set(), {"tie"}, {"too_hard"}, {"suspected_flip"}]
    found = flags_of(
        tmp_path,
        [pair_row(name) for name in names],
        [0.02, 0.44, 0.46, 0.56, 0.65],
        tie=0.0,
        suspected_flip=0.6,
    )
    assert list(found.values()) == [set(), set(), set(), {"too_hard"}, {"suspected_flip"}]


def test_equal_scores_are_a_tie_and_texts_and_lengths_are_looked_at(tmp_path: Path) -> None:
    rows = [
        pair_row("a", score_chosen=7.0, score_rejected=7.0),
        pair_row("b", score_chosen=7.0, score_rejected=6.0),
        pair_row("c", truncated=True),
        pair_row("d", chosen=json.dumps(LOOP)),
        pair_row("e", prompt=json.dumps("Same?"), chosen=json.dumps("x"), rejected=json.dumps("y")),
        pair_row("f", prompt=json.dumps("same"), chosen=json.dumps("Y"), rejected=json.dumps("x ")),
        pair_row("dropped", status="duplicate pair", prompt=None, chosen=None, rejected=None),
    ]
    found = flags_of(tmp_path, rows[:-1], [0.1] * 6)
    assert found == {
        "a": {"tie"},
        "b": set(),
        "c": {"truncated"},
        "d": {"degenerate"},
        "e": {"contradicting"},
        "f": {"contradicting"},
    }
    ids = pa.table({"pair_id": ["a", "b"], "prompt_id": ["p", "q"]})
    whole = flag_pairs(ids, np.array([0.1, 0.1]), pairs_file(tmp_path / "whole.parquet", rows))
    assert whole["pair_id"].to_pylist() == ["a", "b"]
    with pytest.raises(IdentityError, match="flagged pairs: 1 of 1 ids are missing"):
        flag_pairs(
            ids.slice(0, 1).set_column(0, "pair_id", [["gone"]]), np.array([0.1]), tmp_path / "whole.parquet"
        )


def test_a_verdict_that_length_alone_makes_is_driven_by_length() -> None:
    # In units of log(2), answers are longer by 1, 1, -1, 1, 1 and have margins of 2, 2, -2, 2 and 0.1: the
    # slope is 8.1 / 5 = 1.62. Without 1.62 of its 0.1 the last verdict turns; the others keep 0.38.
    margin = np.log(2) * np.array([2.0, 2.0, -2.0, 2.0, 0.1])
    p_wrong = 1 / (1 + np.exp(margin))
    chosen, rejected = np.array([20, 40, 10, 20, 20]), np.array([10, 20, 20, 10, 10])
    expected = [False, False, False, False, True]
    assert length_driven(p_wrong, chosen, rejected).tolist() == expected
    # Exchanged answers are driven by length as before.
    assert length_driven(1 - p_wrong, rejected, chosen).tolist() == expected
    assert not length_driven(p_wrong, chosen, chosen).any()


def test_thresholds_that_cross_are_refused() -> None:
    with pytest.raises(ValueError, match=r"suspected_flip must be above 0\.5 \+ tie"):
        IssuesConfig(suspected_flip=0.6, tie=0.1)


# --- a run -------------------------------------------------------------------------------------------------


def run_folder(path: Path, pairs: int = 300) -> Path:
    """A run with records of one-step's form: large margins agree with nine labels in ten."""
    generator = np.random.default_rng(0)
    names = sorted(f"{generator.integers(16**8):08x}{number:024x}" for number in range(pairs))
    size = generator.uniform(0.0, 2.0, pairs)
    agrees = generator.random(pairs) < 0.5 + 0.2 * size
    margin_PSE = np.where(agrees, size, -size).reshape(-1, 1, 1)
    prompts = np.array([f"p-{name}" for name in names])
    losses = LossTable(
        np.array(names), prompts, (41,), (1,), negative_log_sigmoid(margin_PSE), {"margin": margin_PSE}
    )
    build_curriculum(losses).save(path)
    with publish_folder(path / "pairs", kind="pairs", key="0") as partial:
        pairs_file(partial / PAIRS, [pair_row(name) for name in names])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("run"))


def test_the_table_lies_beside_the_curriculum_until_that_changes(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", pairs=60)
    found = find_issues(folder)
    loaded = load_issues(folder)
    assert loaded is not None
    assert loaded.table.equals(found.table)
    curriculum = Curriculum.load(folder)
    assert found.table["pair_id"].to_pylist() == curriculum.pair_ids
    assert found.table["p_wrong"].equals(curriculum.table["p_wrong"])
    counts = found.facts["flags"]
    assert counts["suspected_flip"]["pairs"] == (found.table["p_wrong"].to_numpy() >= 0.65).sum()
    assert "0.65" in counts["suspected_flip"]["meaning"]
    # Another curriculum: what is said of the old one is not shown beside it.
    Curriculum(curriculum.table, {**curriculum.facts, "key": "2"}).save(folder)
    assert load_issues(folder) is not None  # the same table
    Curriculum(curriculum.table.drop_columns(["p_wrong"]), curriculum.facts).save(folder)
    assert load_issues(folder) is None
    with pytest.raises(ArtifactError, match="the curriculum has no p_wrong"):
        find_issues(folder)


def test_a_table_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", pairs=60)
    assert load_issues(folder) is None
    find_issues(folder)
    pq.write_table(pq.read_table(folder / "issues.parquet").slice(1), folder / "issues.parquet")
    with pytest.raises(ArtifactError, match=r"run `selective-dpo issues` again"):
        load_issues(folder)


def test_planted_labels_are_the_exchanged_records(run: Path) -> None:
    table = find_issues(run).table
    found = plant_in(table, 0.2, seed=0, bound=0.7)
    assert found["planted"] == 60
    assert list(found["precision"]) == ["15", "30", "60"]
    assert found["auroc"]["low"] > 0.55
    assert found["limit"]["upper"] <= 0.7
    assert found["limit"]["own_flagged"] == (table["p_wrong"].to_numpy() >= found["limit"]["threshold"]).sum()
    assert plant_in(table, 0.2, seed=0, bound=0.01)["limit"] is None
    assert plant_in(table, 0.2, seed=0, bound=0.7) == found
    with pytest.raises(ConfigError, match="3 planted labels, too few"):
        plant_in(table, 0.01, seed=0, bound=0.2)


def test_the_verb_prints_counts_thresholds_and_what_planting_does_not_show(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = tmp_path / "issues.json"
    arguments = [
        "issues",
        str(run),
        "--plant",
        "0.2",
        "--issues.suspected_flip",
        "0.6",
        "--json",
        str(written),
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for part in (
        "300 pairs, 150 of them selected",
        "p_wrong of 0.6 or more",
        "AUROC",
        "easier to find than real",
    ):
        assert part in text
    facts = json.loads(written.read_text())
    assert facts["thresholds"]["suspected_flip"] == 0.6
    assert facts["plant"]["share"] == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "--seed has no effect without --plant"),
        (["--plant", "0.7"], "give a share of the pairs of at most 0.5"),
        (["--plant", "0.1", "--false-alarms", "2"], "2 is no share"),
        (["--select.fraction", "0.4"], "only --issues.* keys work here"),
    ],
)
def test_options_that_would_say_nothing_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["issues", str(run), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_report_and_exports_show_the_flags(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", pairs=60)
    assert "Which pairs look wrong" not in write_report(folder).read_text("utf-8")
    table = find_issues(folder, plant=0.2).table
    html = write_report(folder).read_text("utf-8")
    assert "Which pairs look wrong" in html
    assert "p_wrong of 0.65 or more" in html
    assert "easier to find than real ones" in html
    for form in ("csv", "jsonl"):
        out = tmp_path / f"out.{form}"
        assert main(["export", str(folder), "--format", form, "--out", str(out)]) == 0
    header, *lines = (tmp_path / "out.csv").read_text("utf-8").splitlines()
    assert header.split(",")[-len(FLAGS) - 1 :] == ["p_wrong", *FLAGS]
    assert len(lines) == 60
    flags = {row["pair_id"]: row for row in table.to_pylist()}
    for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        assert {flag: row[flag] for flag in FLAGS} == {flag: flags[row["pair_id"]][flag] for flag in FLAGS}


# --- cleanlab ----------------------------------------------------------------------------------------------


def test_labels_in_cleanlabs_form_do_not_all_say_the_same(run: Path) -> None:
    table = find_issues(run).table
    labels, probabilities = cleanlab_inputs(table)
    assert 100 < labels.sum() < 200
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
    given = probabilities[np.arange(len(labels)), labels]
    np.testing.assert_allclose(given, 1.0 - table["p_wrong"].to_numpy())
    mask, ranked = find_label_issues(table), find_label_issues(table, ranked=True)
    assert sorted(ranked) == np.flatnonzero(mask).tolist()
    assert (np.diff(label_quality(table)[ranked]) >= 0).all()


def test_cleanlab_itself_reads_them(run: Path) -> None:
    pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    from cleanlab.filter import find_label_issues as of_cleanlab
    from cleanlab.rank import get_label_quality_scores

    table = find_issues(run, config=IssuesConfig(suspected_flip=0.500001, tie=0.0)).table
    labels, probabilities = cleanlab_inputs(table)
    scores = get_label_quality_scores(labels, probabilities, method="self_confidence")
    np.testing.assert_allclose(scores, label_quality(table))
    # Where every label that the scorers lean against is suspected, that is cleanlab's simplest filter.
    filters: dict[str, Any] = {"filter_by": "predicted_neq_given", "n_jobs": 1}
    assert (of_cleanlab(labels, probabilities, **filters) == find_label_issues(table)).all()
    ranked = of_cleanlab(labels, probabilities, return_indices_ranked_by="self_confidence", **filters)
    np.testing.assert_allclose(scores[ranked], scores[find_label_issues(table, ranked=True)])
    # And its own method, confident learning, finds some of them.
    found = of_cleanlab(labels, probabilities, n_jobs=1)
    assert 0 < (found & find_label_issues(table)).sum() <= found.sum()
