"""Row 7 of the fault matrix: one of six scorers fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selective_dpo.cli import main
from selective_dpo.curriculum.table import Curriculum, curriculum_losses
from selective_dpo.difficulty import scorer as scorer_module
from selective_dpo.errors import ModelError, RecordsError
from selective_dpo.report.content import load_report_content
from selective_dpo.report.page import headline
from selective_dpo.run import stages
from selective_dpo.run.run import open_run
from selective_dpo.run.run import score as score_run
from selective_dpo.run.stages import build_curricula
from selective_dpo.storage.artifacts import verify_folder
from tests.fixtures.models import recipe_file, tiny_recipe

pytestmark = pytest.mark.slow

FAILING = "seed42-fold1"
SCORERS = [f"seed{seed}-fold{fold}" for seed in (41, 42, 43) for fold in (0, 1)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["curriculum", str(recipe_of(folder))]) == 0
    return folder / "runs" / "tiny"


def recipe_of(folder: Path, **blocks: Any) -> Path:
    score = {"seeds": [41, 42, 43], "evaluations": 2, **blocks}
    return recipe_file(tiny_recipe(folder, score=score), folder / "recipe.yaml")


def fail_in(monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]) -> None:
    """The scorer FAILING stops at its second evaluation."""
    measure = scorer_module.pair_logps
    calls: list[str] = []

    def pair_logps(model: Any, tokens: Any, **others: Any) -> Any:
        calls.append(others["what"])
        if calls.count(others["what"]) == 2 and FAILING in others["what"]:
            raise error()
        return measure(model, tokens, **others)

    monkeypatch.setattr(scorer_module, "pair_logps", pair_logps)


def made_in(run: Path) -> list[str]:
    """Scorers whose folder is complete; nothing else may be there."""
    names = sorted(path.name for path in (run / "scores").iterdir() if path.is_dir())
    for name in names:
        verify_folder(run / "scores" / name)
    return names


@pytest.mark.fault(row=7)
def test_five_are_kept_the_curriculum_is_refused_and_made_from_them_when_asked(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = recipe_of(tmp_path), tmp_path / "runs" / "tiny"
    others = [name for name in SCORERS if name != FAILING]
    with monkeypatch.context() as broken:
        fail_in(broken, lambda: ModelError("out of memory in a batch of 1 pairs: lower data.max_length"))
        assert main(["curriculum", str(recipe)]) == 2
        assert f"{FAILING}: out of memory" in capsys.readouterr().err.strip().splitlines()[-1]
        assert made_in(run) == others
        # Also the seed after it was scored; and each as if nothing had failed.
        assert same_records(run, undisturbed, others)
        assert not (run / "curriculum.parquet").exists()

    with pytest.raises(RecordsError, match=f"records are missing of {FAILING}: score them, or pass"):
        build_curricula(open_run(tiny_recipe(tmp_path, score=scores()), say=lambda line: None))
    assert not (run / "curriculum.parquet").exists()

    assert main(["curriculum", str(recipe), "--allow-partial", "--fresh"]) == 0
    assert f"; WITHOUT the records of {FAILING}" in capsys.readouterr().out
    assert made_in(run) == others  # it was not scored on the way
    partial, whole = Curriculum.load(run), Curriculum.load(undisturbed)
    assert partial.facts["missing_scorers"] == [FAILING] and whole.facts["missing_scorers"] == []
    table, complete = curriculum_losses(partial), curriculum_losses(whole)
    lacking_P = np.isnan(table.losses_PSE).any(axis=(1, 2))
    assert partial.facts["partial"] == lacking_P.sum() == (table.counts_P == 4).sum() > 0
    # What there is, is what the undisturbed run has; nothing was made up for the rest.
    there = np.isfinite(table.losses_PSE)
    assert (table.losses_PSE[there] == complete.losses_PSE[there]).all() and not there[lacking_P][:, 1].any()
    sentences = " ".join(headline(load_report_content(run)))
    assert f"Records are missing of {FAILING}." in sentences and "lack some of their records" in sentences

    # Mended, only the one that failed is scored, and everything is as it should have been.
    scored: list[str] = []
    monkeypatch.setattr(stages, "run_scorer", noted(stages.run_scorer, scored))
    assert main(["curriculum", str(recipe), "--fresh"]) == 0
    assert scored == [FAILING] and same_records(run, undisturbed, SCORERS)
    mended = Curriculum.load(run)
    assert mended.table.equals(whole.table) and mended.order_digest == whole.order_digest
    assert (mended.facts["partial"], mended.facts["missing_scorers"]) == (0, [])


def scores() -> dict[str, Any]:
    return {"seeds": [41, 42, 43], "evaluations": 2}


def same_records(run: Path, other: Path, names: list[str]) -> bool:
    return all(
        (run / "scores" / name / "records.parquet").read_bytes()
        == (other / "scores" / name / "records.parquet").read_bytes()
        for name in names
    )


def noted(run_scorer: Callable[[Any], None], into: list[str]) -> Callable[[Any], None]:
    def run(job: Any) -> None:
        into.append(job.run.name)
        run_scorer(job)

    return run


@pytest.mark.fault(row=7)
def test_an_unforeseen_error_keeps_the_others_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in(monkeypatch, lambda: ZeroDivisionError("by nobody"))
    run = open_run(tiny_recipe(tmp_path, score=scores()), say=lambda line: None)
    with pytest.raises(RuntimeError, match=f"{FAILING} failed: by nobody"):
        score_run(run)
    assert made_in(run.folder.root) == [name for name in SCORERS if name != FAILING]


@pytest.mark.fault(row=7)
def test_half_the_pairs_without_any_record_are_not_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # With one seed a pair is held out once: those of the failing scorer have no record at all.
    recipe, run = recipe_of(tmp_path, seeds=[42]), tmp_path / "runs" / "tiny"
    fail_in(monkeypatch, lambda: ModelError("lost"))
    assert main(["curriculum", str(recipe)]) == 2
    assert main(["curriculum", str(recipe), "--allow-partial", "--fresh"]) == 0
    assert f"WITHOUT the records of {FAILING}" in capsys.readouterr().out
    made = Curriculum.load(run)
    assert made.facts["missing_scorers"] == [FAILING] and made.facts["pairs"] < 24
    assert f"Records are missing of {FAILING}." in " ".join(headline(load_report_content(run)))
