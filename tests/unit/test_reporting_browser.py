"""What the report's browser of pairs is given: every measured pair, or an even sample, as data."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import webbrowser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selective_dpo.cli import main
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.report.browser import pack_pairs
from selective_dpo.report.page import write_report
from tests.fixtures.run_folder import make_run_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("packed") / "run", pairs=60)


def unpacked(data: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(data)))
    return content


def test_each_pair_has_its_numbers_and_texts(run: Path) -> None:
    curriculum = Curriculum.load(run)
    packed = pack_pairs(curriculum, run)
    assert packed.shown == packed.measured == len(curriculum.measured.table)
    content = unpacked(packed.data)
    rows = {row["pair_id"]: row for row in curriculum.measured.table.to_pylist()}
    for pair in content["pairs"]:
        row = rows[pair["id"]]
        assert (pair["rank"], pair["selected"]) == (row["rank"], row["selected"])
        assert pair["difficulty"] == pytest.approx(row["difficulty"], abs=1e-6)
        assert all(isinstance(text, list) and len(turn) == 3 for text in [pair["prompt"]] for turn in text)
    assert pack_pairs(curriculum, run).data == packed.data  # equal runs, equal pages


def test_too_many_are_sampled_evenly_over_the_ranks_with_both_ends(run: Path) -> None:
    curriculum = Curriculum.load(run)
    last = len(curriculum.measured.table) - 1
    few = pack_pairs(curriculum, run, max_pairs=5)
    ranks = sorted(pair["rank"] for pair in unpacked(few.data)["pairs"])
    assert ranks == [round(last * place / 4) for place in range(5)] and few.measured == last + 1
    size = len(pack_pairs(curriculum, run).data)
    small = pack_pairs(curriculum, run, max_bytes=size // 2)
    assert 1 < small.shown < last and len(small.data) <= size // 2
    assert len(pack_pairs(curriculum, run, max_bytes=1).data) > 1  # one pair at least


def test_flags_come_from_the_runs_issues(run: Path, tmp_path: Path) -> None:
    curriculum = Curriculum.load(run)
    ids = curriculum.measured.pair_ids
    table = pa.table(
        {
            "pair_id": ids,
            "p_wrong": [0.25] * len(ids),
            "tie": [name == ids[3] for name in ids],
            "too_hard": [name in ids[3:5] for name in ids],
        }
    )
    pq.write_table(table, run / "issues.parquet")
    try:
        content = unpacked(pack_pairs(curriculum, run).data)
    finally:
        (run / "issues.parquet").unlink()
    assert content["flags"] == ["tie", "too_hard"]
    bits = {pair["id"]: pair["flags"] for pair in content["pairs"]}
    assert (bits[ids[3]], bits[ids[4]], bits[ids[5]]) == (3, 2, 0)
    assert {pair["p_wrong"] for pair in content["pairs"]} == {0.25}


def test_only_the_pages_own_script_may_run(run: Path) -> None:
    page = write_report(run).read_text("utf-8")
    assert page.count("<script>") == 1 and "script-src 'sha256-" in page
    assert "default-src 'none'" in page and "unsafe" not in page
    script = page.split("<script>")[1].split("</script>")[0]
    assert "http" not in script.replace("http://www.w3.org/2000/svg", "")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_inspect_web_opens_the_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    report = write_report(run)
    pair = Curriculum.load(run).measured.pair_ids[0]
    assert main(["inspect", str(run), "--web", "--pair", pair]) == 0
    assert opened == [f"{report.absolute().as_uri()}#pair={pair}"]
    assert main(["inspect", str(run), "--web", "--easiest", "2"]) == 2
    report.unlink()
    assert main(["inspect", str(run), "--web"]) == 2
    assert "write it with `selective-dpo report RECIPE`" in capsys.readouterr().err
