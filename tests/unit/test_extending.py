"""The examples of docs/extending.md run, from a file in the folder that the command is started in."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from selective_dpo.config import EvaluateConfig
from selective_dpo.config.load import make_recipe
from selective_dpo.criteria import CRITERIA, criterion, criterion_source
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.records import SCHEMA, Records, read_loss_table, write_records
from selective_dpo.errors import ConfigError
from selective_dpo.evaluation.judges import JUDGES, judge, judge_for
from selective_dpo.extensions import import_named, source_digest
from selective_dpo.losses import LOSSES, is_pairwise, pair_losses
from selective_dpo.report.tables import label_for
from selective_dpo.run.keys import curriculum_key
from selective_dpo.storage.artifacts import file_digest

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text("utf-8")
RECIPE: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "x"}]}}


def example(heading: str) -> tuple[str, dict[str, Any]]:
    """The Python of a section and its piece of a recipe."""
    section = re.split(r"^## ", PAGE.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    return code, yaml.safe_load(recipe)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; what its files register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    tables: list[dict[str, Any]] = [CRITERIA, JUDGES, LOSSES]
    before, modules = [dict(table) for table in tables], set(sys.modules)
    yield tmp_path
    for table, earlier in zip(tables, before, strict=True):
        table.clear()
        table.update(earlier)
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def records_with_margins() -> Records:
    """Pairs a, b, c of one seed and two evaluations: margins fall by 1, rise by 2, fall by 3."""
    margin = np.array([2.0, 0.0, 4.0, 1.0, 2.0, 1.0])
    six = {"seed": 41, "fold": 0, "step": 10}
    columns: dict[str, Any] = {name: np.zeros(6) for name in SCHEMA.names}
    columns |= {name: np.full(6, value) for name, value in six.items()}
    names = np.array(["a", "b", "c"] * 2)
    columns |= {"pair_id": names, "prompt_id": names, "evaluation": np.repeat([1, 2], 3)}
    return Records(**{**columns, "margin": margin, "loss": np.logaddexp(0.0, -margin)})


def test_a_criterion_of_an_own_file_selects_by_any_record_column(own_folder: Path) -> None:
    code, recipe = example("A difficulty criterion")
    file = own_folder / "my_criteria.py"
    file.write_text(code)
    select = make_recipe({**RECIPE, **recipe}).select
    records = records_with_margins()
    made = build_curriculum(records, select)
    assert made.difficulty_P.tolist() == [1.0, -2.0, 3.0]
    assert made.order == ["b", "a"]
    # From files, the column that it reads is read as well.
    write_records(records, own_folder / "records.parquet")
    reads = CRITERIA[select.aggregate].reads
    again = build_curriculum(read_loss_table([own_folder / "records.parquet"], columns=reads), select)
    assert again.table.equals(made.table)
    # What was said at the registration holds, and so does the registered name.
    assert label_for(select).endswith("by lost margin")
    assert build_curriculum(records, {"aggregate": "unlearned"}).order == ["b", "a"]
    losses_only = read_loss_table([own_folder / "records.parquet"])
    with pytest.raises(ConfigError, match="reads margin, which these losses come without: build"):
        build_curriculum(losses_only, select)


def test_an_edited_criterion_makes_another_curriculum(own_folder: Path) -> None:
    code, recipe = example("A difficulty criterion")
    file = own_folder / "my_criteria.py"
    file.write_text(code)
    select = make_recipe({**RECIPE, **recipe}).select
    assert criterion_source(select.aggregate) == {"criterion": file_digest(file)}
    first = curriculum_key({}, select)
    assert curriculum_key({}, select) == first
    file.write_text(code.replace("nanmean", "nanmax"))
    assert curriculum_key({}, select) != first
    # Those of the package have no digest: keys of earlier runs stay valid.
    assert criterion_source("mean") == {}


def test_a_judge_of_an_own_file_is_asked(own_folder: Path) -> None:
    code, recipe = example("A judge")
    (own_folder / "my_judges.py").write_text(code)
    config = make_recipe({**RECIPE, **recipe}).evaluate
    made = judge_for(config)
    assert made is not None and made.name == "my_judges:Shorter"
    assert made.fingerprint() == file_digest(own_folder / "my_judges.py")
    assert made.compare(["p"] * 3, ["a", "abc", "ab"], ["ab", "a", "cd"]).tolist() == [1.0, 0.0, 0.5]


def test_a_registered_loss_is_that_of_the_pairs(own_folder: Path) -> None:
    code, recipe = example("A pairwise loss")
    exec(code, {})
    settings = {"beta": 0.5, **recipe["score"]["trainer"]}
    assert is_pairwise(settings)
    # Log-ratios 3 and 1, so a margin of 0.5 * 2 = 1; log(1 + e^-1) = 0.31326, log(1 + e) = 1.31326.
    losses = pair_losses([[-7.0, -9.0]], [[-10.0, -10.0]], [[5, 5]], settings)
    assert losses.margin_P.tolist() == [1.0]
    assert losses.loss_P[0] == pytest.approx(0.9 * 0.31326 + 0.1 * 1.31326, abs=1e-5)


def test_another_process_finds_it_in_its_folder(own_folder: Path) -> None:
    (own_folder / "my_criteria.py").write_text(example("A difficulty criterion")[0])
    # As the command does: a script elsewhere, so that the current folder is not searched by itself.
    script = own_folder / "bin" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "from selective_dpo.criteria import CRITERIA\nprint(CRITERIA['my_criteria:unlearned'].reads)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=own_folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "('margin',)"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"my_own:score cannot be imported \(ModuleNotFoundError: .*\): start in the folder of my_own"),
        ("x = 1", "AttributeError: module 'my_own' has no attribute 'score'"),
        ("def score(:", "SyntaxError"),
        ("score = 3", "criterion 'my_own:score' is no function"),
        ("def score(losses_PSE): ...", r"reads losses_PSE: its parameters must be record columns \(policy"),
        ("def score(): ...", "reads nothing"),
        ("def score(loss): return loss", r"returned shape \(3, 1, 2\) for 3 pairs"),
    ],
)
def test_what_cannot_be_used_is_one_line(own_folder: Path, content: str | None, words: str) -> None:
    if content is not None:
        (own_folder / "my_own.py").write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        build_curriculum(records_with_margins(), {"aggregate": "my_own:score"})
    assert "\n" not in str(caught.value)


def test_judges_without_a_method_or_unknown_are_refused(own_folder: Path) -> None:
    @judge("half")
    class _Half:
        def compare(self) -> None: ...

    with pytest.raises(ConfigError, match="judge 'half' has no method fingerprint"):
        judge_for(EvaluateConfig.model_construct(judge="half"))
    with pytest.raises(
        ConfigError, match="no judge is called 'x'; use embedded-world, constraints, endpoint, local"
    ):
        judge_for(EvaluateConfig.model_construct(judge="x"))


def test_what_has_no_source_cannot_be_told_apart() -> None:
    namespace: dict[str, Any] = {}
    exec("def score(loss): return loss[:, 0, 0]", namespace)
    with pytest.raises(ConfigError, match="define it in a file"):
        source_digest(namespace["score"])
    criterion("made-up")(namespace["score"])
    try:
        with pytest.raises(ConfigError, match="define it in a file"):
            criterion_source("made-up")
    finally:
        del CRITERIA["made-up"]
    assert import_named("selective_dpo.criteria:by_record").__name__ == "by_record"
