"""Pairs to read: by difficulty, by id, safe to print."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from selective_dpo.cli import main
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import ArtifactError, ConfigError, IdentityError
from selective_dpo.report.inspect import ExampleGroup, ExamplePair, Wanted, find_ids, group_text, look_at
from selective_dpo.storage.artifacts import publish_folder
from tests.fixtures.run_folder import HOSTILE, make_run_folder

PAIRS = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with 40 scored pairs, the easiest 20 selected, and a published folder of pairs."""
    folder = make_run_folder(tmp_path_factory.mktemp("made") / "run", pairs=PAIRS)
    (folder / "pairs").rename(folder / "unpublished")
    with publish_folder(folder / "pairs", kind="pairs", key="k") as partial:
        shutil.copytree(folder / "unpublished", partial, dirs_exist_ok=True)
    return folder


def ranks(folder: Path, wanted: Wanted) -> dict[str, list[int]]:
    return {group.title: [pair.rank for pair in group.pairs] for group in look_at(folder, wanted)[0]}


def test_regions_are_those_of_the_ranks(made: Path) -> None:
    groups, total = look_at(made, Wanted(easiest=2, borderline=4, median=3, hardest=2))
    assert total == PAIRS
    assert {group.title: [pair.rank for pair in group.pairs] for group in groups} == {
        "Easiest pairs": [0, 1],
        "Borderline pairs, around the edge of the selection": [18, 19, 20, 21],
        "Pairs of median difficulty": [18, 19, 20],
        "Hardest pairs": [39, 38],
    }
    assert [pair.selected for pair in groups[1].pairs] == [True, True, False, False]


def test_more_than_there_are_is_all(made: Path) -> None:
    every = list(range(PAIRS))
    assert ranks(made, Wanted(easiest=99, median=99)) == {
        "Easiest pairs": every,
        "Pairs of median difficulty": every,
    }


def test_pairs_by_id(made: Path) -> None:
    ids = Curriculum.load(made).pair_ids
    wanted = Wanted(pair_ids=(ids[3], ids[7][:31].upper(), ids[3]))
    (group,), _ = look_at(made, wanted)
    assert [pair.pair_id for pair in group.pairs] == [ids[3], ids[7]]
    measured = {row["pair_id"]: row for row in Curriculum.load(made).table.to_pylist()}
    for pair in group.pairs:
        row = measured[pair.pair_id]
        assert (pair.rank, pair.difficulty, pair.reason) == (row["rank"], row["difficulty"], row["reason"])


def test_ids_that_are_not_one_pair() -> None:
    ids = ["aa11", "aa12", "bb11"]
    assert find_ids(["b", "aa11"], ids) == ["bb11", "aa11"]
    with pytest.raises(IdentityError, match=r"pair 'aa' may be any of 2: aa11, aa12; give more of the id"):
        find_ids(["aa"], ids)
    with pytest.raises(IdentityError, match=r"no pair 'aa2' among the 3 of .*; the column pair_id of"):
        find_ids(["aa2"], ids)


def test_what_cannot_be_shown(made: Path, tmp_path: Path) -> None:
    for wanted in (Wanted(), Wanted(easiest=-1, hardest=2)):
        with pytest.raises(ConfigError, match="nothing to show"):
            look_at(made, wanted)
    with pytest.raises(ArtifactError, match="no curriculum at"):
        look_at(tmp_path, Wanted(easiest=1))
    for name in ("curriculum.parquet", "curriculum.json"):
        shutil.copy(made / name, tmp_path / name)
    with pytest.raises(ArtifactError, match=r"no pairs at .*give the run's pairs folder with --pairs"):
        look_at(tmp_path / "curriculum.parquet", Wanted(easiest=1))
    assert look_at(tmp_path / "curriculum.parquet", Wanted(easiest=1), made / "pairs")[1] == PAIRS
    with pytest.raises(ArtifactError, match="not complete"):
        look_at(made, Wanted(easiest=1), made / "unpublished")
    other = make_run_folder(tmp_path / "other", pairs=10, seed=3)
    with publish_folder(tmp_path / "pairs", kind="pairs", key="k") as partial:
        shutil.copytree(other / "pairs", partial, dirs_exist_ok=True)
    with pytest.raises(IdentityError, match="is not of this curriculum's data: it does not hold"):
        look_at(made, Wanted(median=2), tmp_path / "pairs")


def example(prompt: str, spread: float = 0.25) -> ExampleGroup:
    answer = [{"role": "assistant", "content": "two\nlines"}]
    pair = ExamplePair("ab" * 16, 4, 0.5, spread, False, "harder", prompt, answer, answer)
    return ExampleGroup("Named pairs", (pair,))


def test_a_pair_as_text() -> None:
    assert group_text(example("Why?"), 1200).splitlines() == [
        "Named pairs (1)",
        "",
        f"{'ab' * 16}  difficulty 0.5000, spread 0.2500, rank 5 of 1,200, not selected: harder",
        "  prompt",
        "    Why?",
        "  chosen",
        "    assistant: two",
        "    lines",
        "  rejected",
        "    assistant: two",
        "    lines",
    ]
    assert "difficulty 0.5000, rank 5" in group_text(example("Why?", math.nan), 1200)


def test_long_texts_are_cut_unless_asked_for() -> None:
    long = example("x" * 700)
    assert f"    {'x' * 600} … (100 more characters)" in group_text(long, 10).splitlines()
    assert f"    {'x' * 700}" in group_text(long, 10, longest=None).splitlines()


def test_no_control_character_reaches_the_terminal() -> None:
    hostile = "\x1b]0;owned\x07\x1b[31m red \u202e reversed \r\x9b2J \ud800 \x00"
    shown = group_text(example(hostile), 10)
    assert "\ufffd]0;owned\ufffd\ufffd[31m red \ufffd reversed \ufffd\ufffd2J \ufffd \ufffd" in shown
    assert all(character == "\n" or character.isprintable() for character in shown)


def test_the_verb(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    titles = [line for line in out.splitlines() if line.endswith("(3)")]
    assert titles == ["Easiest pairs (3)", "Pairs of median difficulty (3)", "Hardest pairs (3)"]
    assert HOSTILE in out
    assert "\x07" not in out
    assert "more characters" in out

    assert main(["inspect", str(made / "curriculum.parquet"), "--hardest", "1", "--full"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("Hardest pairs (1)")
    assert "more characters" not in out

    assert main(["inspect", str(made), "--pair", "xyz"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "no pair 'xyz' among the 40" in captured.err
    assert main(["inspect", str(made), "--select.fraction", "0.5"]) == 2
    assert "would have no effect" in capfd.readouterr().err
