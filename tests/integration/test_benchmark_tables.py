"""`benchmarks/tables.py` is one command; here with a few pairs, so that it stays one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "tables.py"


def test_the_command_measures_checks_and_cleans_up(tmp_path: Path) -> None:
    out, scratch = tmp_path / "tables.json", tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["--pairs", "3001", "--json", str(out), "--folder", str(scratch)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True
    )
    (result,) = json.loads(out.read_text())["results"]
    details = result["details"]
    assert result["name"] == "tables"
    assert details["records"] == 3001 * 15
    assert {"read records", "aggregation", "agreement", "selection", "save", "export csv"} <= set(
        details["seconds"]
    )
    assert details["gigabytes"]["export csv"] <= details["peak_gigabytes"] < 6
    assert result["max_abs_diff"] <= 1e-12
    assert "peak memory" in done.stdout
    assert list(scratch.iterdir()) == []
