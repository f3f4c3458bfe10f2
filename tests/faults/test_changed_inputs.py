"""Going on with other settings, or with inputs whose content has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from selective_dpo.cli import main
from selective_dpo.storage.artifacts import folder_digests
from tests.fixtures.interrupted import Killed, killed, killed_runs  # noqa: F401  (fixtures)
from tests.fixtures.results import differences

CHANGES = {
    "batch": ("train.trainer.per_device_train_batch_size", "4", "2 -> 4"),
    "accumulation": ("score.trainer.gradient_accumulation_steps", "1", "2 -> 1"),
    "seed": ("score.seeds", "[43]", "[41] -> [43]"),
    "training's seed": ("train.trainer.seed", "7", "(absent) -> 7"),
    "learning rate": ("train.trainer.learning_rate", "0.02", "0.01 -> 0.02"),
    "beta": ("train.trainer.beta", "0.2", "0.1 -> 0.2"),
    "model's revision": ("model.revision", "v2", 'main" -> "v2'),
    "tokenizer": ("model.tokenizer", "elsewhere", '"" -> "elsewhere"'),
    "template": ("model.chat_template", "chatml", '"" -> "chatml"'),
    "data's revision": ("data.train.0.revision", "v2", '"" -> "v2"'),
    "lengths": ("data.max_length", "48", "64 -> 48"),
}


def contents(run: Path) -> dict[str, str]:
    return {name: digest for name, digest in folder_digests(run).items() if not name.endswith(".lock")}


@pytest.mark.fault(row=9)
@pytest.mark.parametrize("what", CHANGES)
def test_changed_settings_are_refused_field_by_field(
    killed: Killed,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    """Row 9. The repeated command with another batch, seed, learning rate, beta, model, tokenizer, template
    or data revision: refused with the field, its value before and now, and nothing of the run is touched."""
    key, value, difference = CHANGES[what]
    before = contents(killed.run)
    assert main(["train", str(killed.recipe), f"--{key}", value]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "was made with another recipe" in lines[0] and "--fresh" in lines[0]
    assert key in lines[0] and difference in lines[0]
    assert contents(killed.run) == before


def other_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, path, metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["added_tokens"][-1]["content"] = "<|another|>"
    path.write_text(json.dumps(content), "utf-8")


def other_template(folder: Path) -> None:
    path = folder / "model" / "chat_template.jinja"
    path.write_text(path.read_text("utf-8") + "{# as before, but for this #}", "utf-8")


def other_data(folder: Path) -> None:
    path = folder / "pairs.jsonl"
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([lines[0].replace("+0", "+00"), *lines[1:]]) + "\n", "utf-8")


@pytest.mark.fault(row=9)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "model "),
        (other_tokenizer, "tokenizer "),
        (other_template, "chat template of the tokenizer"),
        (other_data, "data.train.0 "),
    ],
)
def test_changed_contents_are_refused_with_both_digests(
    killed: Killed,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    named: str,
) -> None:
    """Row 9. The recipe is the same, but a file that it names is not: refused with that input and its digest
    before and now, nothing of the run is touched; with the file back, the run comes to the same end."""
    folder = killed.recipe.parent
    for name in ("model", "pairs.jsonl"):
        (shutil.copytree if name == "model" else shutil.copy)(folder / name, folder / f"kept-{name}")
    before = contents(killed.run)
    try:
        change(folder)
        assert main(["train", str(killed.recipe)]) == 2
    finally:
        shutil.rmtree(folder / "model")
        for name in ("model", "pairs.jsonl"):
            (folder / f"kept-{name}").rename(folder / name)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "was made from other inputs" in lines[0] and "--fresh" in lines[0]
    started = json.loads((killed.run / "inputs.json").read_text("utf-8"))
    digest = next(digest for name, digest in started.items() if name.startswith(named))
    assert named in lines[0] and f"SHA-256 {digest[:12]} -> " in lines[0]
    assert contents(killed.run) == before
    assert killed.go_on().code == 0
    assert not differences(killed.run, killed.results)


@pytest.mark.fault(row=9)
def test_a_changed_setting_that_is_accepted_passes_its_checkpoints_over(killed: Killed) -> None:  # noqa: F811
    """Row 9. With --fresh another learning rate is accepted: the training begins anew, and none of the old
    checkpoints is read."""
    outcome = killed.go_on("--fresh", "--train.trainer.learning_rate", "0.02")
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("made with other settings, inputs or library versions") == 2
    assert "going on from" not in outcome.output
    assert not (killed.run / "checkpoints").exists()


@pytest.mark.fault(row=15)
def test_a_run_that_was_copied_elsewhere_goes_on_there(killed: Killed, tmp_path: Path) -> None:  # noqa: F811
    """Row 15. The killed run, its model and its data under other paths and with other times: it goes on from
    its checkpoint, to the same weights."""
    shutil.copytree(killed.run, tmp_path / "runs" / "tiny", copy_function=shutil.copy)
    raw = yaml.safe_load(killed.recipe.read_text("utf-8"))
    outcome = killed.go_on("--output_dir", str(tmp_path / "runs"))
    assert outcome.code == 0, outcome.output
    assert "going on from" in outcome.output and str(tmp_path) in outcome.output
    assert raw["output_dir"] not in outcome.output
    assert not differences(tmp_path / "runs" / "tiny", killed.results)
