"""docs/tutorial.md word for word: its commands, in their order, on a small model and a CSV file."""

from __future__ import annotations

import csv
import json
import re
import shlex
import webbrowser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from selective_dpo.cli import main
from selective_dpo.storage.artifacts import read_json
from tests.fixtures.models import tiny_model_folder, tiny_pairs_file

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"


def test_its_commands_run_from_a_csv_to_issues_curriculum_policy_report_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    tiny_model_folder(tmp_path / "my-sft-model")
    rows = [json.loads(line) for line in tiny_pairs_file(tmp_path / "raw", 120).read_text().splitlines()]
    with (tmp_path / "pairs.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "chosen", "rejected"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "raw").unlink()

    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) >= 10 and all(line.startswith("selective-dpo ") for line in commands)
    for line in commands:
        assert main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)

    run = tmp_path / "runs" / "mine"
    assert {"pair_id", "p_wrong", "suspected_flip"} <= set(pq.read_schema(run / "issues.parquet").names)
    assert read_json(run / "policy" / "order.json")["matches"] is True
    with safe_open(run / "policy" / "adapter_model.safetensors", "pt") as weights:
        assert len(list(weights.keys())) > 0
    assert opened == [(run / "report.html").as_uri()]
    assert len((tmp_path / "for-trl" / "pairs.jsonl").read_text().splitlines()) == 60
    assert len((tmp_path / "difficulty.csv").read_text().splitlines()) == 121
