"""The package as a TRL user takes it from Python: the README's example as it stands, and its parts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from selective_dpo import Curriculum, build_curriculum, score_difficulty
from selective_dpo.errors import ConfigError
from selective_dpo.identity import ids_digest
from tests.fixtures.models import LORA, TRAINER, tiny_model_folder, tiny_pairs_file
from tests.fixtures.training import pair_of

REPOSITORY = Path(__file__).resolve().parents[2]
SCORE: dict[str, Any] = {
    "protocol": "custom",
    "seeds": [1],
    "evaluations": 2,
    "lora": LORA,
    "trainer": TRAINER,
}


# TRL uses names that transformers has deprecated.
@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config = tiny_model_folder(tmp_path / "my-sft-model") / "config.json"
    # Positions enough for the default of `data.max_length`.
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    return tmp_path


@pytest.mark.slow
def test_the_readmes_example_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    blocks: list[str] = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (example,) = [block for block in blocks if "from_json" in block]
    # Half of them in batches of 8 make the protocol's five evaluations.
    tiny_pairs_file(workplace / "pairs.jsonl", 84, seed=2, chat=True)
    variables: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), variables)
    curriculum, trainer = variables["curriculum"], variables["trainer"]
    assert capsys.readouterr().out.strip().splitlines()[-1] == "True"
    assert isinstance(curriculum, Curriculum)
    assert len(curriculum.pair_ids) == 84 and len(curriculum.order) == 42
    assert np.isfinite(curriculum.difficulty_P).all()
    # DPOConfig's default is three epochs.
    assert trainer.consumed_order.consumed_digest == ids_digest(3 * curriculum.order)


@pytest.mark.slow
def test_the_readmes_first_example_runs_with_a_data_set_and_a_model_from_here(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    blocks: list[str] = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    example = next(block for block in blocks if "load_dataset" in block)
    assert len([line for line in example.splitlines() if line.strip()]) <= 8
    tiny_pairs_file(workplace / "pairs.jsonl", 40, seed=2, chat=True)
    local = Dataset.from_json(str(workplace / "pairs.jsonl"))
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: local)
    example = example.replace("Qwen/Qwen2.5-0.5B-Instruct", "my-sft-model")
    variables: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), variables)
    assert len(variables["curriculum"].order) == 20


def test_scoring_keeps_what_is_measured_and_raw_rows_can_be_trained_on(workplace: Path) -> None:
    rows = [json.loads(line) for line in tiny_pairs_file(workplace / "p", 24).read_text().splitlines()]
    too_long = {"prompt": "p", "chosen": "c" * 100, "rejected": "no"}
    pairs = Dataset.from_list([*rows, too_long, rows[0]])
    settings: dict[str, Any] = {
        "output_dir": workplace / "runs" / "mine",
        "score": SCORE,
        "data": {"max_length": 64, "max_prompt_length": 32},
        "dtype": "float32",
    }
    records = score_difficulty(workplace / "my-sft-model", pairs, **settings)
    # 24 usable pairs, one seed, two evaluations.
    assert len(records) == 48
    assert set(records.pair_id) == {pair_of(row).pair_id for row in rows}
    files = [workplace / "runs" / "mine" / "scores" / f"seed1-fold{fold}" for fold in (0, 1)]
    written = [(folder / "manifest.json").stat().st_mtime_ns for folder in files]
    again = score_difficulty(workplace / "my-sft-model", pairs, **settings)
    assert [(folder / "manifest.json").stat().st_mtime_ns for folder in files] == written
    np.testing.assert_array_equal(again.loss, records.loss)

    curriculum = build_curriculum(records, {"rule": "all", "order": "hard-to-easy"})
    applied = curriculum.apply(pairs, allow_unscored=True)
    assert applied["pair_id"][:] == curriculum.order
    assert np.all(np.diff(applied["difficulty"][:]) <= 0)


def test_what_is_no_data_set_is_refused(workplace: Path) -> None:
    with pytest.raises(ConfigError, match=r"the pairs are a list: pass a datasets\.Dataset$"):
        score_difficulty("my-sft-model", [1, 2], output_dir="runs/a")  # type: ignore[arg-type]
    splits = DatasetDict(test=Dataset.from_list([]))
    with pytest.raises(ConfigError, match=r"are a DatasetDict: .* such as its split 'test'$"):
        score_difficulty("my-sft-model", splits, output_dir="runs/a")
