"""`select.action` on pairs made by hand: what is dropped, turned round, sent to SFT, and weighted down."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from selective_dpo.config import FLAGS, Recipe, SelectConfig
from selective_dpo.curriculum.actions import exchanged, treat
from selective_dpo.curriculum.balance import Attributes, residual
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.export import export_curriculum, write_sft
from selective_dpo.curriculum.import_ import read_outside
from selective_dpo.curriculum.issues import SCHEMA
from selective_dpo.curriculum.records import LossTable
from selective_dpo.errors import ConfigError, IdentityError
from selective_dpo.losses import LN_2
from selective_dpo.report.tables import label_for
from tests.unit.test_issues import pair_row, pairs_file

NAMES = list("abcdef")
MARGINS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]
"""From the easiest to the hardest; log(1 + e^3) = 3.0486 becomes log(1 + e^-3) = 0.0486 when f is flipped."""


def losses_of(margins: list[float] = MARGINS, **others: list[float]) -> LossTable:
    def column(values: list[float]) -> Any:
        return np.array(values).reshape(-1, 1, 1)

    names = np.array(NAMES[: len(margins)])
    loss = np.logaddexp(0.0, -np.array(margins)).reshape(-1, 1, 1)
    columns = {"margin": column(margins), **{name: column(values) for name, values in others.items()}}
    return LossTable(names, names, (41,), (1,), loss, columns)


def issues_of(p_wrong: list[float], **flags: str) -> pa.Table:
    """The pairs named in `flags` have that flag; rows come in another order than the losses."""
    rows = [
        {
            "pair_id": name,
            "prompt_id": name,
            "p_wrong": p,
            **{flag: name in flags.get(flag, "") for flag in FLAGS},
        }
        for name, p in zip(NAMES, p_wrong, strict=False)
    ]
    return pa.Table.from_pylist(rows[::-1], schema=SCHEMA)


P_WRONG = [0.1, 0.2, 0.3, 0.5, 0.7, 0.9]


def made(action: dict[str, str], issues: pa.Table, **select: Any) -> dict[str, dict[str, Any]]:
    curriculum = build_curriculum(losses_of(), {"action": action, **select}, issues=issues)
    return {row["pair_id"]: row for row in curriculum.table.to_pylist()}


def test_a_flipped_pair_competes_with_the_loss_of_its_new_label() -> None:
    rows = made({"suspected_flip": "flip"}, issues_of(P_WRONG, suspected_flip="f"), fraction=0.5)
    assert rows["f"]["difficulty"] == pytest.approx(np.log1p(np.exp(-3.0)))
    assert rows["f"]["loss_seed41_evaluation1"] == rows["f"]["difficulty"]
    assert rows["f"]["rank"] == rows["f"]["position"] == 0
    assert [name for name in NAMES if rows[name]["selected"]] == ["a", "b", "f"]
    assert [rows[name]["flipped"] for name in NAMES] == [False] * 5 + [True]
    assert rows["f"]["action"] == "flip"
    assert rows["f"]["p_wrong"] == pytest.approx(0.1)  # of the label that it is trained on with
    assert rows["f"]["suspected_flip"] is True  # of the label that the data have
    assert rows["e"]["p_wrong"] == 0.7
    assert {row["weight"] for row in rows.values()} == {1.0}


def test_dropped_pairs_and_those_for_sft_are_not_among_those_that_the_rule_chooses_from() -> None:
    issues = issues_of(P_WRONG, degenerate="a", tie="d")
    rows = made({"degenerate": "drop", "tie": "sft"}, issues, fraction=0.5)
    # Half of the four that are left.
    assert [name for name in NAMES if rows[name]["selected"]] == ["b", "c"]
    assert rows["a"]["reason"] == "dropped: degenerate"
    assert rows["d"]["reason"] == "chosen answer to SFT: tie"
    assert rows["e"]["reason"] == "harder than the easiest 50%"
    assert [rows[name]["rank"] for name in NAMES] == list(range(6))
    assert [rows[name]["position"] for name in NAMES] == [-1, 0, 1, -1, -1, -1]


def test_pairs_weighted_down_weigh_the_probability_that_they_are_right() -> None:
    rows = made({"too_hard": "down-weight"}, issues_of(P_WRONG, too_hard="e"), rule="all")
    assert rows["e"]["weight"] == pytest.approx(0.3)
    assert [rows[name]["weight"] for name in "abcdf"] == [1.0] * 5
    assert all(row["selected"] for row in rows.values())


def test_of_several_flags_the_first_one_of_the_recipe_decides() -> None:
    issues = issues_of(P_WRONG, suspected_flip="f", truncated="f")
    found = treat(losses_of(), issues, {"truncated": "drop", "suspected_flip": "flip"})
    assert (found.action_P[5], found.flag_P[5]) == ("drop", "truncated")
    found = treat(losses_of(), issues, {"suspected_flip": "flip", "truncated": "drop"})
    assert (found.action_P[5], found.flag_P[5]) == ("flip", "suspected_flip")


def test_log_probs_change_places_and_no_other_pair_is_touched() -> None:
    table = losses_of(
        [2.0, -1.0],
        policy_chosen_logp=[-1.0, -2.0],
        policy_rejected_logp=[-3.0, -4.0],
    )
    found = exchanged(table, np.array([False, True]))
    assert found.others["policy_chosen_logp"].ravel().tolist() == [-1.0, -4.0]
    assert found.others["policy_rejected_logp"].ravel().tolist() == [-3.0, -2.0]
    assert found.others["margin"].ravel().tolist() == [2.0, 1.0]
    assert found.losses_PSE[0] == table.losses_PSE[0]
    assert table.others["margin"].ravel().tolist() == [2.0, -1.0]
    with pytest.raises(ConfigError, match="reads one of them only"):
        exchanged(losses_of([2.0, -1.0], policy_chosen_logp=[-1.0, -2.0]), np.array([False, True]))


def test_what_cannot_be_done_is_refused() -> None:
    issues = issues_of(P_WRONG, suspected_flip="f")
    own = losses_of()
    hinge = dataclasses.replace(own, losses_PSE=np.maximum(0.0, 1.0 - own.others["margin"]))
    with pytest.raises(ConfigError, match="a pair can be flipped only where difficulty is DPO's own loss"):
        treat(hinge, issues, {"suspected_flip": "flip"})
    assert treat(hinge, issues, {"suspected_flip": "drop"}).stays_P.sum() == 5
    with pytest.raises(ConfigError, match="leaves no pair"):
        treat(losses_of(), issues_of(P_WRONG, tie="abcdef"), {"tie": "drop"})
    with pytest.raises(IdentityError, match="flags: 1 of 6 ids are missing: a"):
        treat(losses_of(), issues.slice(0, 5), {"tie": "drop"})
    with pytest.raises(ConfigError, match=r"select.action needs the pairs' flags"):
        build_curriculum(losses_of(), {"action": {"tie": "drop"}})


def test_a_flipped_pair_is_balanced_by_the_length_of_its_new_label() -> None:
    # Chosen answers are longer by 1 to 5 tokens, and that of f is shorter by 6: flipped, it is longer by 6.
    lengths = np.array([1, 2, 3, 4, 5, -6])

    def attributes(ids: Sequence[str]) -> Attributes:
        assert list(ids) == NAMES
        return Attributes(lengths, np.array(["x"] * 6), np.full(6, np.nan))

    issues = issues_of(P_WRONG, suspected_flip="f", degenerate="a")
    action = {"suspected_flip": "flip", "degenerate": "drop"}
    select = {"action": action, "residual": "length", "rule": "all"}
    made = build_curriculum(losses_of(), select, issues=issues, attributes=attributes)
    difficulty = np.logaddexp(0.0, -np.array([*MARGINS[:-1], 3.0]))
    expected = residual(difficulty, np.array([1, 2, 3, 4, 5, 6]))
    np.testing.assert_allclose(made.difficulty_P, expected)
    assert [row["selected"] for row in made.table.to_pylist()] == [False] + [True] * 5


def test_the_label_of_a_selection_names_its_actions() -> None:
    label = label_for(SelectConfig(action={"suspected_flip": "flip", "tie": "drop"}))
    assert label == "easiest 50%, easy to hard, suspected flip: flip, tie: drop"


def test_without_an_action_nothing_about_a_selection_changes() -> None:
    assert "action" not in SelectConfig().identity()
    assert SelectConfig(action={"tie": "drop"}).identity()["action"] == {"tie": "drop"}
    columns = build_curriculum(losses_of()).table.column_names
    assert not {"action", "weight", "flipped", *FLAGS} & set(columns)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"score": {"protocol": "certified"}},
            "select.action selects otherwise than what protocol certified certifies",
        ),
        ({"curriculum": "there.csv"}, "select.action has no effect on the difficulty of curriculum"),
    ],
)
def test_recipes_in_which_an_action_has_no_meaning_are_refused(blocks: dict[str, Any], message: str) -> None:
    recipe = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "x.jsonl"}]}}
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({**recipe, "select": {"action": {"tie": "drop"}}, **blocks})


def test_the_chosen_answers_for_sft_come_once_each(tmp_path: Path) -> None:
    curriculum = build_curriculum(
        losses_of(), {"action": {"tie": "sft"}}, issues=issues_of(P_WRONG, tie="bde")
    )
    messages = [{"role": "assistant", "content": "é"}]
    shared = {"prompt": json.dumps("Why?"), "chosen": json.dumps("Because.")}
    rows = [
        *[pair_row(name) for name in "ac"],
        pair_row("b", **shared),
        pair_row("d", chosen=json.dumps(messages)),
        pair_row("e", **shared),
        pair_row("f"),
    ]
    assert write_sft(curriculum, pairs_file(tmp_path / "pairs.parquet", rows), tmp_path / "sft.jsonl") == 2
    lines = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text("utf-8").splitlines()]
    assert lines == [
        {"pair_id": "b", "prompt_id": "p-b", "prompt": "Why?", "completion": "Because."},
        {"pair_id": "d", "prompt_id": "p-d", "prompt": "Question d?", "completion": messages},
    ]


def test_exported_pairs_have_their_new_label_and_their_weight(tmp_path: Path) -> None:
    issues = issues_of(P_WRONG, suspected_flip="f", too_hard="a")
    action = {"suspected_flip": "flip", "too_hard": "down-weight"}
    curriculum = build_curriculum(losses_of(), {"action": action, "count": 2}, issues=issues)
    pairs = pairs_file(tmp_path / "pairs.parquet", [pair_row(name) for name in NAMES])
    path = export_curriculum(curriculum, tmp_path / "out.jsonl", "jsonl", pairs=pairs)
    first, second = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    assert (first["pair_id"], first["chosen"], first["rejected"]) == ("f", "Bad f.", "Good f.")
    assert (first["flipped"], first["weight"]) == (True, 1.0)
    assert (second["pair_id"], second["chosen"], second["weight"]) == ("a", "Good a.", 0.9)


def test_difficulties_of_new_labels_are_not_imported_for_the_old_ones(tmp_path: Path) -> None:
    issues = issues_of(P_WRONG, suspected_flip="f", tie="d")
    build_curriculum(losses_of(), {"action": {"tie": "drop"}}, issues=issues).save(tmp_path / "dropped")
    assert len(read_outside(tmp_path / "dropped").ids) == 6
    build_curriculum(losses_of(), {"action": {"suspected_flip": "flip"}}, issues=issues).save(
        tmp_path / "flipped"
    )
    with pytest.raises(ConfigError, match="difficulty is of another label than the data have"):
        read_outside(tmp_path / "flipped")


def test_ln_2_is_the_loss_of_either_label_of_a_pair_that_nobody_can_tell() -> None:
    table = losses_of()
    assert exchanged(table, np.array([False] * 3 + [True] + [False] * 2)).losses_PSE[3] == pytest.approx(LN_2)
