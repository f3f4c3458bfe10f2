"""`selective-dpo train`: what it publishes, what it logs, where it pushes, and what it refuses."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch.utils.data import RandomSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_dpo.cli import main
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import IdentityError
from selective_dpo.storage.artifacts import is_complete, read_json, read_manifest, verify_folder
from selective_dpo.training import publish
from selective_dpo.training.selective_trainer import SelectiveDPOTrainer
from selective_dpo.training.train import _require_same_pairs
from tests.fixtures.models import recipe_file, tiny_pairs_file, tiny_recipe
from tests.fixtures.training import curriculum_of, text_rows

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
SELECTED = 10
BATCH = 4


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its run, up to the curriculum of 10 of 24 pairs."""
    folder = tmp_path_factory.mktemp("scored")
    write_recipe(folder)
    assert main(["curriculum", str(folder / "recipe.yaml")]) == 0
    return folder


def write_recipe(folder: Path, **train: Any) -> Path:
    test = folder / "test.jsonl"
    if not test.exists():
        tiny_pairs_file(test, 6, seed=9)
    recipe = tiny_recipe(
        folder,
        data={"test": [{"path": str(test)}]},
        score={"evaluations": 1, "trainer": {"per_device_train_batch_size": BATCH}},
        select={"count": SELECTED},
        train={"trainer": {"per_device_train_batch_size": BATCH}, **train},
    )
    return recipe_file(recipe, folder / "recipe.yaml")


@pytest.fixture
def workplace(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the scored run, in the working folder of the test."""
    shutil.copytree(scored, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def train(workplace: Path, *options: str) -> int:
    out = ["--output_dir", str(workplace / "runs")]
    return main(["train", str(workplace / "recipe.yaml"), *out, "--fresh", *options])


def policy_of(workplace: Path) -> Path:
    return workplace / "runs" / "tiny" / "policy"


@pytest.mark.fault(row=13, trials=2)
def test_a_curriculum_that_lacks_prepared_pairs_or_knows_others_is_refused() -> None:
    """The trainer alone would leave out rows that the curriculum does not know; this stage may not."""
    curriculum = curriculum_of(text_rows(4), [0.1, 0.2, 0.3, 0.4], count=2)
    ids = curriculum.table["pair_id"].to_pylist()
    _require_same_pairs(curriculum, list(reversed(ids)))
    with pytest.raises(IdentityError, match=r"lacks 1 of 5 prepared pairs \(0{32}\), and 0 of its 4"):
        _require_same_pairs(curriculum, [*ids, "0" * 32])
    with pytest.raises(IdentityError, match=rf"lacks 0 of 3 .* 1 of its 4 are not among them \({ids[1]}\)"):
        _require_same_pairs(curriculum, [ids[0], *ids[2:]])


# --- what is published ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_the_policy_is_complete_and_loads_back(workplace: Path, lora: bool) -> None:
    assert train(workplace, *([] if lora else ["--train.lora", "null"])) == 0
    policy = policy_of(workplace)
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    expected = {
        weights,
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "order.json",
        "trainer_log.json",
        "cost.json",
        "manifest.json",
        "adapter_config.json" if lora else "config.json",
    }
    assert expected <= {path.name for path in policy.iterdir()}
    assert not list(workplace.rglob("training_args*")) and not list(workplace.rglob("checkpoint*"))
    assert not [path for path in policy.rglob("*") if path.suffix in PICKLES]
    for path in policy.iterdir():
        # A pickle begins with its protocol, a zip (torch's own format) with PK.
        assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"), path.name
    verify_folder(policy)

    start = AutoModelForCausalLM.from_pretrained(workplace / "model", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(start, policy) if lora else None
    model: Any = loaded or AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(policy)("0: a?", return_tensors="pt")["input_ids"]
    before = AutoModelForCausalLM.from_pretrained(workplace / "model", dtype=torch.float32)
    with torch.no_grad():
        moved = (model(ids).logits - before(ids).logits).abs().max().item()
    assert moved > 1e-3
    for weight in load_file(policy / weights).values():
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("lora", [False, True])
def test_no_path_of_this_machine_is_in_what_is_pushed(workplace: Path, lora: bool) -> None:
    """All of `policy/` goes to the hub. Its adapter still finds a base that lies beside. So do scorers."""
    options = ["--score.keep_scorers", "true"] if lora else ["--train.lora", "null"]
    assert train(workplace, *options, "--model.path", str(workplace / "model")) == 0
    policy = policy_of(workplace)
    scorers = list((policy.parent / "scores").glob("*/scorer/*"))
    assert bool(scorers) == lora
    for path in [*policy.rglob("*"), *scorers]:
        content = path.read_bytes()
        assert str(workplace).encode() not in content and str(Path.home()).encode() not in content, path.name
        assert sys.executable.encode() not in content and b"selective-dpo train" not in content, path.name
    if lora:
        assert read_json(policy / "adapter_config.json")["base_model_name_or_path"] == "./model"
        assert AutoPeftModelForCausalLM.from_pretrained(policy).active_adapter == "default"


def test_order_log_cost_and_card_say_what_was_done(workplace: Path) -> None:
    assert train(workplace, "--train.trainer.num_train_epochs", "2") == 0
    policy = policy_of(workplace)
    curriculum = Curriculum.load(workplace / "runs" / "tiny")
    order = read_json(policy / "order.json")
    assert order["matches"] and order["pairs"] == SELECTED and order["consumed"] == 2 * SELECTED
    history = read_json(policy / "trainer_log.json")["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    # 10 pairs in batches of 4, 4 and 2, twice.
    difficulty = dict(zip(curriculum.pair_ids, curriculum.difficulty_P, strict=True))
    in_order = np.array([difficulty[pair] for pair in curriculum.order])
    epoch = [in_order[:4].mean(), in_order[4:8].mean(), in_order[8:].mean()]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert [entry["difficulty"] for entry in steps] == pytest.approx([*epoch, *epoch], abs=1e-12)
    cost = read_json(policy / "cost.json")
    assert cost["optimizer_steps"] == 6 and cost["epochs"] == 2.0 and cost["processes"] == 1
    card = (policy / "README.md").read_text("utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    # The hub refuses a card whose base model is no name on the hub; this one is a folder.
    assert header["library_name"] == "peft" and "base_model" not in header
    for fact in (order["consumed_digest"], read_manifest(policy).key, "recipe_sha256", "transformers"):
        assert fact in card
    assert "10 of 24 scored preference pairs" in " ".join(card.split())


def test_held_out_loss_is_logged_by_step(workplace: Path) -> None:
    settings = ["--train.trainer.eval_strategy", "steps", "--train.trainer.eval_steps", "1"]
    assert train(workplace, *settings) == 0
    history = read_json(policy_of(workplace) / "trainer_log.json")["log_history"]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    assert [step for step, _ in held_out] == [1, 2, 3]
    assert all(np.isfinite(loss) for _, loss in held_out)
    assert len({loss for _, loss in held_out}) == 3
    # An evaluation leaves the training's own log alone.
    assert [entry["step"] for entry in history if "difficulty" in entry] == [1, 2, 3]


def test_controls_are_trained_beside_the_selection(workplace: Path) -> None:
    recipe = yaml.safe_load((workplace / "recipe.yaml").read_text("utf-8"))
    recipe["evaluate"] = {"controls": {"hard": {"rule": "hardest", "count": 3}}}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    assert train(workplace) == 0
    control = workplace / "runs" / "tiny" / "controls" / "hard"
    verify_folder(control / "policy")
    curriculum = Curriculum.load(control)
    assert read_json(control / "policy" / "order.json")["consumed_digest"] == curriculum.order_digest


# --- what must not happen ------------------------------------------------------------------------------


def test_another_order_is_found_out_and_nothing_is_published(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        SelectiveDPOTrainer,
        "_get_train_sampler",
        lambda self, dataset=None: RandomSampler(dataset or self.train_dataset),
    )
    assert train(workplace) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "selected: the pairs consumed are not the curriculum's order: 10 rows" in error
    assert not policy_of(workplace).exists()
    assert not list(workplace.rglob(".partial-*"))


def test_a_diverged_training_is_not_published(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trains = SelectiveDPOTrainer.train

    def diverge(self: Any, **others: Any) -> Any:
        result = trains(self, **others)
        weight = next(weight for weight in self.model.parameters() if weight.requires_grad)
        weight.data[0] = torch.nan
        return result

    monkeypatch.setattr(SelectiveDPOTrainer, "train", diverge)
    assert train(workplace) == 2
    assert "the training diverged: weights are not finite after 3 updates" in capsys.readouterr().err
    assert not policy_of(workplace).exists()


def test_weights_that_were_not_gathered_are_not_published_and_the_checkpoints_stay(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []
    note = SelectiveDPOTrainer._note_update
    monkeypatch.setattr(
        SelectiveDPOTrainer, "_note_update", lambda self, given: (steps.append(1), note(self, given))[1]
    )
    with monkeypatch.context() as sharded:
        gathered = publish._gathered
        sharded.setattr(
            publish, "_gathered", lambda *args, **others: dict(list(gathered(*args, **others).items())[1:])
        )
        assert train(workplace, "--train.lora", "null") == 2
    assert "the trained weights could not be saved whole" in capsys.readouterr().err
    assert not policy_of(workplace).exists()
    assert list((workplace / "runs" / "tiny" / "checkpoints" / "selected").glob("step-*"))
    before = len(steps)
    assert train(workplace, "--train.lora", "null") == 0
    assert len(steps) == before  # nothing was trained again
    verify_folder(policy_of(workplace))


# --- trackers ------------------------------------------------------------------------------------------


def test_tensorboard_files_stay_and_the_user_is_told_where(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    assert train(workplace, "--train.trainer.report_to", "tensorboard") == 0
    tracking = workplace / "runs" / "tiny" / "tracking"
    assert f"trackers' files: {tracking}" in capsys.readouterr().out
    (events,) = list((tracking / "selected").rglob("events.out.tfevents.*"))
    assert b"train/difficulty" in events.read_bytes()
    verify_folder(policy_of(workplace))


def test_without_a_tracker_nothing_is_left_beside_the_policy(workplace: Path) -> None:
    before = {path.name for path in (workplace / "runs" / "tiny").iterdir()}
    assert train(workplace) == 0
    assert {path.name for path in (workplace / "runs" / "tiny").iterdir()} - before == {"policy"}


@pytest.mark.parametrize(
    ("tracker", "expected"),
    [("wandb", "wandb is not installed"), ("tensorbord", "did you mean 'tensorboard'?")],
)
def test_a_tracker_that_is_not_there_is_refused_before_any_training(
    workplace: Path, capsys: pytest.CaptureFixture[str], tracker: str, expected: str
) -> None:
    if tracker == "wandb" and shutil.which("wandb"):
        pytest.skip("wandb is installed here")
    assert train(workplace, "--train.trainer.report_to", tracker) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "train.trainer.report_to" in line and expected in line
    assert not policy_of(workplace).exists()


# --- the hub -------------------------------------------------------------------------------------------


class FakeHub:
    """huggingface_hub's `HfApi`, with a network that fails until told otherwise."""

    uploads: tuple[tuple[str, tuple[str, ...]], ...] = ()
    created: tuple[tuple[str, bool], ...] = ()
    is_down = False

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok and repo_type == "model"
        if FakeHub.is_down:
            raise ConnectionError("the hub cannot be reached\nmore of it")
        FakeHub.created += ((repo_id, private),)

    def upload_folder(self, *, repo_id: str, folder_path: Path, repo_type: str) -> None:
        assert repo_type == "model"
        names = tuple(sorted(path.name for path in Path(folder_path).iterdir()))
        FakeHub.uploads += ((repo_id, names),)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    for name, value in (("uploads", ()), ("created", ()), ("is_down", False)):
        monkeypatch.setattr(FakeHub, name, value)
    return FakeHub


def test_a_finished_policy_is_pushed_once(
    workplace: Path, hub: type[FakeHub], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert train(workplace, "--train.hub_id", "someone/policy") == 0
    assert hub.created == (("someone/policy", True),)
    ((repository, names),) = hub.uploads
    assert repository == "someone/policy"
    assert {"adapter_model.safetensors", "README.md", "order.json"} <= set(names)
    assert read_json(workplace / "runs" / "tiny" / "hub.json")["hub_id"] == "someone/policy"
    assert capsys.readouterr().out.count("policy: pushed to someone/policy") == 1


def test_a_failed_push_keeps_the_policy_and_is_all_that_is_done_again(
    workplace: Path, hub: type[FakeHub], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.is_down = True
    assert train(workplace, "--train.hub_id", "someone/policy") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was not pushed to someone/policy (the hub cannot be reached); run the same command again" in error
    policy = policy_of(workplace)
    assert is_complete(policy, key=read_manifest(policy).key)
    assert not (workplace / "runs" / "tiny" / "hub.json").exists()
    written = (policy / "manifest.json").stat().st_mtime_ns

    hub.is_down = False
    monkeypatch.setattr(SelectiveDPOTrainer, "train", lambda self: pytest.fail("trained again"))
    assert train(workplace, "--train.hub_id", "someone/policy") == 0
    assert len(hub.uploads) == 1
    assert (policy / "manifest.json").stat().st_mtime_ns == written
