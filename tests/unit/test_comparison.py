"""`compare`: what is read of each kind of source, and numbers of tiny tables found by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selective_dpo.cli import main
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.import_ import import_curriculum
from selective_dpo.curriculum.measured import read_measured
from selective_dpo.curriculum.records import Records, write_records
from selective_dpo.data.store import PAIRS, PAIRS_SCHEMA
from selective_dpo.errors import DataError
from selective_dpo.losses import LN_2, negative_log_sigmoid
from selective_dpo.report.comparison import Comparison, compare
from selective_dpo.report.comparison_page import comparison_text, render_comparison
from selective_dpo.storage.artifacts import file_digest, publish_folder

# Margins of four pairs by two seeds at two evaluations.
MARGINS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "a": ((0.1, 0.5), (0.3, 0.6)),  # learned at 2 by both, above 0 from the first on
    "b": ((0.5, 0.6), (0.2, -0.1)),  # learned at 1 by the first; forgotten by the second
    "c": ((-0.1, 0.1), (-0.2, 0.2)),  # above 0 at the end
    "d": ((-0.3, -0.4), (-0.5, -0.6)),  # wrong in every record
}


def losses_of(margins: dict[str, Any] = MARGINS) -> dict[str, np.ndarray]:
    return {name: negative_log_sigmoid(np.array(found)) for name, found in margins.items()}


def record_folder(path: Path, losses: dict[str, np.ndarray]) -> Path:
    path.mkdir(parents=True)
    seeds, evaluations = next(iter(losses.values())).shape
    for s in range(seeds):
        for e in range(evaluations):
            rows = [
                f"{name},{float(found[s, e])!r}" for name, found in losses.items() if np.isfinite(found[s, e])
            ]
            (path / f"seed{41 + s}_step{e:02d}.csv").write_text("\n".join(rows) + "\n")
    return path


def quick(*paths: Path, **options: Any) -> Comparison:
    return compare(paths, replicates=20, **options)


def test_numbers_of_four_pairs_by_hand(tmp_path: Path) -> None:
    (found,) = quick(record_folder(tmp_path / "records", losses_of()), deltas=(0.4,)).sources
    means = [np.mean(found) for found in losses_of().values()]
    assert found.mean_loss is not None
    assert found.mean_loss.value == pytest.approx(np.mean(means))
    # The mean loss is below ln 2 for a and b. Of c: margins -.1, .1, -.2, .2, and the loss is convex.
    assert found.below_chance is not None
    assert found.below_chance.value == 0.5
    assert (found.pairs, found.clusters, found.seeds, found.evaluations) == (4, 4, (41, 42), (1, 2))
    dynamics = found.dynamics
    assert dynamics is not None
    assert dynamics.wrong_always.value == 1 / 4
    # Above .4 at the last: a twice, b once, of 8. Above 0: a twice, b once, c twice.
    learned = [(each.delta, each.share.value) for each in dynamics.learned]
    assert learned == [(0.4, 3 / 8), (0.0, 5 / 8)]
    # b's second seed is the one that forgets: 1 of 8, by pair 0, 1/2, 0, 0.
    assert dynamics.forgetting is not None
    assert dynamics.forgetting.value == 1 / 8
    # Learned steps at 0.4 by seed: a 2 2, b 1 3, c 3 3, d 3 3; means 2, 2, 3, 3. Difficulty ranks a b c d:
    # mid-ranks 1.5 1.5 3.5 3.5 against 1 2 3 4, both with mean 2.5: products 1.5 + .5 + .5 + 1.5 = 4 over
    # the root of (1 + 1 + 1 + 1) * (2.25 + .25 + .25 + 2.25) = 4 * 5.
    assert means[0] < means[1] < means[2] < means[3]
    assert dynamics.learned[0].spearman is not None
    assert dynamics.learned[0].spearman.value == pytest.approx(4 / math.sqrt(20))
    # Above .4 at the first evaluation: b by one seed, of 8; at the last 3 of 8.
    assert [each.value for each in dynamics.learned[0].above] == [1 / 8, 3 / 8]


def test_seeds_and_evaluations_by_hand(tmp_path: Path) -> None:
    (found,) = quick(record_folder(tmp_path / "records", losses_of())).sources
    # The first seed ranks b a c d, the second a b c d: halves {a, b} both.
    (alike,) = found.seeds_alike
    assert (alike.a, alike.b) == ("seed 41", "seed 42")
    assert alike.of_half("jaccard").value == 1.0
    # d^2 = 1 + 1; 1 - 6 * 2 / (4 * 15).
    assert alike.spearman.value == pytest.approx(1 - 12 / 60)
    assert found.least_alike == alike.of_half("jaccard")
    assert found.scorers is not None
    assert found.scorers.one_one.value == found.scorers.one_others.value == 1.0
    # First evaluation, means over seeds: b < a < c < d; last: a < b < c < d.
    first, last = ({name: losses[:, e].mean() for name, losses in losses_of().items()} for e in (0, 1))
    assert sorted(first, key=first.__getitem__) == ["b", "a", "c", "d"]
    assert sorted(last, key=last.__getitem__) == ["a", "b", "c", "d"]
    assert found.first_last is not None
    assert found.first_last.of_half("overlap").value == 1.0
    assert found.first_last.spearman.value == pytest.approx(1 - 12 / 60)


def test_two_sources_by_hand(tmp_path: Path) -> None:
    # The other scores: a d b c from easy to hard. Halves {a, b} and {a, d}: 1 of 3.
    margins = dict(zip("adbc", MARGINS.values(), strict=True))
    one = record_folder(tmp_path / "one", losses_of())
    other = record_folder(tmp_path / "other", losses_of(margins))
    found = quick(one, other)
    (alike,) = found.alike
    assert (alike.a, alike.b, found.common) == ("one", "other", 4)
    assert alike.of_half("jaccard").value == pytest.approx(1 / 3)
    assert alike.of_half("overlap").value == 1 / 2
    # Ranks 1 2 3 4 and a 1, b 3, c 4, d 2: d^2 = 0 + 1 + 1 + 4; 1 - 36 / 60.
    assert alike.spearman.value == pytest.approx(1 - 36 / 60)
    # d is always wrong in the one, c in the other.
    assert found.wrong_everywhere is not None
    assert found.wrong_everywhere.value == 0.0
    assert found.jaccard_by_chance[4] == pytest.approx(1 / 3)


def test_a_released_file_is_read_as_its_records(tmp_path: Path) -> None:
    folder = record_folder(tmp_path / "records", losses_of())
    header = (
        "prompt_id,loss_step01_seed42,loss_step00_seed41,loss_step01_seed41,loss_step00_seed42,learning_order"
    )
    rows = [
        ",".join([name, *(repr(float(x)) for x in (f[1, 1], f[0, 0], f[0, 1], f[1, 0], f.mean()))])
        for name, f in reversed(losses_of().items())
    ]
    released = tmp_path / "x_learning_order.csv"
    released.write_text("\n".join([header, *rows]) + "\n")
    file, records = read_measured(released), read_measured(folder)
    assert (file.name, file.kind, file.knows_prompts) == ("x_learning_order", "file", True)
    assert file.losses.pair_ids_P.tolist() == list("abcd")
    np.testing.assert_array_equal(file.losses.losses_PSE, records.losses.losses_PSE)
    np.testing.assert_allclose(file.difficulty_P, records.difficulty_P, rtol=1e-15)
    assert file.margins_PSE is not None
    np.testing.assert_allclose(file.margins_PSE, np.array(list(MARGINS.values())), atol=1e-12)


def test_a_file_of_difficulties_alone_has_no_dynamics(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("pair_id,prompt_id,difficulty\np1,q1,3\np2,q1,1\np3,q2,2\n")
    (found,) = quick(path).sources
    assert (found.mean_loss, found.below_chance, found.dynamics, found.scorers) == (None,) * 4
    assert (found.clusters, found.knows_prompts) == (2, True)
    path.write_text("pair_id,difficulty\np1,3\np2,1\np3,2\n")
    found = quick(path)
    assert not found.sources[0].knows_prompts
    assert "own: prompts are not known, so each id counts as one." in comparison_text(found)
    # Imported, ids stand for both: what they name is known from where they came.
    import_curriculum(path).save(tmp_path / "imported")
    assert not read_measured(tmp_path / "imported").knows_prompts


def test_a_prompts_difficulty_is_that_of_its_pairs(tmp_path: Path) -> None:
    pairs, prompts = tmp_path / "pairs.csv", tmp_path / "prompts.csv"
    pairs.write_text("pair_id,prompt_id,difficulty\np1,q1,1\np2,q1,2\np3,q2,3\np4,q9,4\n")
    prompts.write_text("prompt_id,difficulty\nq1,2\nq2,1\nq3,5\n")
    found = quick(prompts, pairs)
    # p1 p2 p3 are in both: 2 2 1 against 1 2 3. Mid-ranks 2.5 2.5 1 and 1 2 3, both with mean 2:
    # .5 * -1 + .5 * 0 - 1 * 1 = -1.5 over the root of 1.5 * 2.
    assert found.common == 3
    assert found.alike[0].spearman.value == pytest.approx(-1.5 / math.sqrt(3))


def test_sources_without_a_common_pair_are_refused_by_name(tmp_path: Path) -> None:
    one = record_folder(tmp_path / "one", losses_of())
    other = record_folder(
        tmp_path / "other", losses_of({f"x{name}": found for name, found in MARGINS.items()})
    )
    with pytest.raises(DataError, match=r"ids of one 4 such as a, other 4 such as xa; measure the same"):
        quick(one, other)
    with pytest.raises(DataError, match="does not exist: give a run's folder"):
        quick(tmp_path / "nothing")


def test_pairs_with_gaps_are_left_out_and_counted(tmp_path: Path) -> None:
    losses = losses_of()
    losses["b"][1, 0] = np.nan
    (found,) = quick(record_folder(tmp_path / "records", losses)).sources
    assert found.pairs == 3
    assert found.notes[0] == "1 pair(s) lack some of their records and are left out"


def test_losses_that_are_not_dpos_give_no_margins(tmp_path: Path) -> None:
    losses = {name: found - 0.6 for name, found in losses_of().items()}
    (found,) = quick(record_folder(tmp_path / "records", losses)).sources
    assert found.dynamics is None
    assert found.notes == ("no margins: its loss is not DPO's own",)


def run_folder(folder: Path) -> Path:
    """A run with one scorer's records of three pairs, two of them of one prompt, and its pairs."""
    records = Records(
        pair_id=np.array(["p1", "p2", "p3"]),
        prompt_id=np.array(["q1", "q1", "q2"]),
        seed=np.array([41] * 3),
        fold=np.array([0, 0, 1]),
        evaluation=np.array([1] * 3),
        step=np.array([7] * 3),
        policy_chosen_logp=np.array([-10.0, -10.0, -10.0]),
        policy_rejected_logp=np.array([-10.0, -10.0, -10.0]),
        reference_chosen_logp=np.array([-10.0, -8.0, -30.0]),
        reference_rejected_logp=np.array([-12.0, -4.0, -20.0]),
        margin=np.array([0.5, 0.1, -0.5]),
        loss=negative_log_sigmoid(np.array([0.5, 0.1, -0.5])),
    )
    scorer = folder / "scores" / "seed41-fold0"
    with publish_folder(scorer, kind="records", key="k") as partial:
        write_records(records, partial / "records.parquet")
    digest = file_digest(scorer / "records.parquet")
    build_curriculum(records, provenance={"inputs": {"model": "m", "seed41-fold0": digest}}).save(folder)
    rows = [
        {"pair_id": name, "status": "kept", "chosen_tokens": c, "rejected_tokens": r, "score_chosen": score}
        | {"score_rejected": 1.0}
        for name, c, r, score in (("p1", 5, 4, 3.0), ("p2", 2, 4, None), ("p3", 10, 5, 2.0))
    ]
    with publish_folder(folder / "pairs", kind="pairs", key="k") as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS_SCHEMA), partial / PAIRS)
    return folder


def test_criteria_of_a_run_by_hand(tmp_path: Path) -> None:
    found = read_measured(run_folder(tmp_path / "run"))
    assert (found.kind, found.notes, found.chance_loss) == ("run", (), LN_2)
    assert found.margins_PSE is not None
    assert found.margins_PSE[:, 0, 0].tolist() == [0.5, 0.1, -0.5]
    of = {name: values_P.tolist() for name, values_P in found.criteria.items()}
    assert of["reference margin"] == [-2.0, 4.0, 10.0]
    assert of["length difference"] == [1.0, -2.0, 5.0]
    # Log-perplexities, chosen minus rejected: 10/5 - 12/4; 8/2 - 4/4; 30/10 - 20/5.
    assert of["perplexity gap"] == [-1.0, 3.0, -1.0]
    assert of["reward gap"][::2] == [-2.0, -1.0]
    assert math.isnan(of["reward gap"][1])
    (findings,) = quick(tmp_path / "run").sources
    likeness = {each.a: each for each in findings.criteria}
    # The reference margin ranks the three as the difficulty does; two pairs have a reward gap.
    assert likeness["reference margin"].spearman.value == pytest.approx(1.0)
    assert (likeness["reward gap"].pairs, likeness["length difference"].pairs) == (2, 3)
    assert findings.clusters == 2
    # With a single evaluation nothing is learned later or forgotten.
    assert findings.dynamics is not None
    assert findings.dynamics.forgetting is findings.dynamics.learned[0].spearman is None
    assert "forgotten" not in comparison_text(quick(tmp_path / "run"))


def test_records_of_another_curriculum_are_not_read(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    scorer = folder / "scores" / "seed41-fold0"
    (scorer / "manifest.json").write_text(
        (scorer / "manifest.json").read_text().replace("records.parquet", "r.parquet")
    )
    (scorer / "records.parquet").rename(scorer / "r.parquet")
    assert read_measured(folder).criteria  # by content, not by name
    records = pq.read_table(scorer / "r.parquet")
    with publish_folder(scorer, kind="records", key="other") as partial:
        pq.write_table(records.slice(1), partial / "records.parquet")
    found = read_measured(folder)
    assert not found.criteria
    assert found.notes[0].startswith("its records are not those of its curriculum")
    assert found.margins_PSE is not None  # solved from the curriculum's losses
    np.testing.assert_allclose(found.margins_PSE[:, 0, 0], [0.5, 0.1, -0.5])


def test_the_page_is_complete_and_its_texts_are_text(tmp_path: Path) -> None:
    hostile = record_folder(tmp_path / "<script>alert(1)<", losses_of())
    found = quick(hostile, record_folder(tmp_path / "one", losses_of()))
    page = render_comparison(found)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page
    assert page.count("<svg") == 2
    assert "default-src 'none'" in page
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999", "")
    assert "times forgotten, of a pair by a seed" in page


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = record_folder(tmp_path / "records", losses_of())
    answer, page = tmp_path / "c.json", tmp_path / "c.html"
    arguments = [str(folder), str(folder), "--delta", "0.45", "--json", str(answer), "--page", str(page)]
    assert main(["compare", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "learned by the end, delta 0.45" in printed
    assert "learned by the end, delta 0 " in printed
    assert "records (1) and records (2)" in printed
    assert "The share below ln 2 is no fraction to train on" in printed
    read = json.loads(answer.read_text())
    assert read["sources"][0]["dynamics"]["learned"][0]["delta"] == 0.45
    assert read["alike"][0]["jaccard"][4]["value"] == 1.0
    assert page.read_text().startswith("<!doctype html>")
    assert main(["compare", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("selective-dpo: error: ")
