"""Checkpoints with replaced files and manifests rewritten to match: one line, and nothing runs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from selective_dpo.cli import main
from selective_dpo.errors import CheckpointError
from selective_dpo.storage.artifacts import folder_digests
from selective_dpo.training import checkpointing as loading
from selective_dpo.training.checkpointing import reading
from selective_dpo.training.trainer import PairTrainer
from tests.fixtures.fork_server import ForkServer, Moment
from tests.fixtures.interrupted import Killed, killed, killed_runs  # noqa: F401  (fixtures)
from tests.fixtures.models import tiny_model_folder
from tests.fixtures.results import differences
from tests.fixtures.resuming import SETTINGS, resuming_recipe
from tests.fixtures.training import load_model

NEWEST, BEFORE = "step-000004", "step-000002"
TRAINER = "trainer/checkpoint-4"
Forgery = Callable[[Path], object]


class Payload:
    """Makes a file when a reader that runs code unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def replaced(name: str, content: str | bytes) -> Forgery:
    data = content.encode() if isinstance(content, str) else content
    return lambda checkpoint: (checkpoint / name).write_bytes(data)


def json_with(name: str, **values: Any) -> Forgery:
    def forge(checkpoint: Path) -> None:
        path = checkpoint / name
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")

    return forge


def state_with(name: str, change: Callable[[Any], Any]) -> Forgery:
    """The torch file `name` with another content: what `change` makes of it."""

    def forge(checkpoint: Path) -> None:
        path = checkpoint / TRAINER / name
        # Its own file, as the test has just had it written; read as anything.
        torch.save(change(torch.load(path, weights_only=False)), path)

    return forge


def weights_with(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Forgery:
    def forge(checkpoint: Path) -> None:
        path = checkpoint / TRAINER / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return forge


def without(name: str) -> Forgery:
    return lambda checkpoint: (checkpoint / name).unlink()


def other_moments(optimizer: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    for state in optimizer["state"].values():
        change(state)
    return optimizer


def group_with(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, "param_groups": [{**group, **values} for group in state["param_groups"]]}


def less(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {name: value for name, value in state.items() if name not in names}


FORGERIES: dict[str, tuple[Forgery, str]] = {
    "progress: a list": (replaced("progress.json", "[]"), "holds list"),
    "progress: not JSON": (replaced("progress.json", "{"), "is not JSON"),
    "progress: no text at all": (replaced("progress.json", b"\xff\xfe"), "is not JSON"),
    "progress: empty": (replaced("progress.json", "{}"), "progress.json: step, steps"),
    "progress: step is text": (json_with("progress.json", step="4"), "progress.json: step)"),
    "progress: a layout of text": (
        json_with("progress.json", layout={"processes": "1", "pairs_per_update": 4, "kind": "NO"}),
        "progress.json: layout)",
    ),
    "progress: another layout's losses": (
        json_with("progress.json", loss_since_log=[1.0, 2.0]),
        "progress.json: loss_since_log)",
    ),
    "progress: metrics of text": (
        json_with("progress.json", metrics={"x": ["y"]}),
        "progress.json: metrics)",
    ),
    "progress: another step": (json_with("progress.json", step=3), "trainer_state.json does not exist"),
    "state: a list": (replaced(f"{TRAINER}/trainer_state.json", "[]"), "holds list"),
    "state: empty": (replaced(f"{TRAINER}/trainer_state.json", "{}"), "trainer_state.json: "),
    "state: absent": (without(f"{TRAINER}/trainer_state.json"), "does not exist"),
    "state: more than there is": (
        json_with(f"{TRAINER}/trainer_state.json", unheard_of=1),
        "trainer_state.json: unheard_of)",
    ),
    "state: step is text": (json_with(f"{TRAINER}/trainer_state.json", global_step="4"), "global_step)"),
    "state: a step far away": (json_with(f"{TRAINER}/trainer_state.json", global_step=10**9), "global_step)"),
    "state: a log of text": (json_with(f"{TRAINER}/trainer_state.json", log_history="x"), "log_history)"),
    "state: a log of numbers": (json_with(f"{TRAINER}/trainer_state.json", log_history=[1]), "log_history)"),
    "state: no batch size": (
        json_with(f"{TRAINER}/trainer_state.json", train_batch_size="x"),
        "TypeError",
    ),
    "weights: text": (replaced(f"{TRAINER}/adapter_model.safetensors", "weights"), "SafetensorError"),
    "weights: absent": (without(f"{TRAINER}/adapter_model.safetensors"), "model.safetensors"),
    "weights: other shapes": (
        weights_with(lambda weights: {name: each[:, :1].clone() for name, each in weights.items()}),
        "weights that do not fit the model: ",
    ),
    "weights: one missing": (
        weights_with(lambda weights: less(min(weights))(weights)),
        "lora_A.weight missing",
    ),
    "weights: of another model": (
        weights_with(lambda weights: {f"x.{name}": each for name, each in weights.items()}),
        "missing",
    ),
    "optimizer: text": (replaced(f"{TRAINER}/optimizer.pt", "optimizer"), "UnpicklingError"),
    "optimizer: empty": (replaced(f"{TRAINER}/optimizer.pt", b""), "Error"),
    "optimizer: a list": (state_with("optimizer.pt", lambda state: [state]), "TypeError"),
    "optimizer: without groups": (state_with("optimizer.pt", less("param_groups")), "KeyError"),
    "optimizer: without states": (state_with("optimizer.pt", lambda s: {**s, "state": {}}), "no moments"),
    "optimizer: other shapes": (
        state_with(
            "optimizer.pt",
            lambda state: other_moments(state, lambda each: each.update(exp_avg=torch.zeros(3))),
        ),
        "optimizer.pt: exp_avg of a weight of shape",
    ),
    "optimizer: half of the moments": (
        state_with("optimizer.pt", lambda state: other_moments(state, lambda each: each.pop("exp_avg_sq"))),
        "optimizer.pt: exp_avg_sq of a weight of shape",
    ),
    "optimizer: a rate of text": (state_with("optimizer.pt", group_with(lr="x")), "optimizer.pt: lr)"),
    "optimizer: absent": (without(f"{TRAINER}/optimizer.pt"), "without optimizer.pt)"),
    "schedule: empty": (state_with("scheduler.pt", lambda state: {}), "KeyError: 'lr_lambdas'"),
    "schedule: a list": (state_with("scheduler.pt", lambda state: []), "Error"),
    "schedule: without its step": (
        state_with("scheduler.pt", less("last_epoch")),
        "scheduler.pt: last_epoch)",
    ),
    "schedule: a step of text": (
        state_with("scheduler.pt", lambda state: {**state, "last_epoch": "4"}),
        "scheduler.pt: last_epoch)",
    ),
    "schedule: absent": (without(f"{TRAINER}/scheduler.pt"), "without scheduler.pt)"),
    "random: empty": (state_with("rng_state.pth", lambda state: {}), "KeyError: 'python'"),
    "random: other shapes": (
        state_with("rng_state.pth", lambda state: {**state, "cpu": torch.zeros(3, dtype=torch.uint8)}),
        "RuntimeError: ",
    ),
    "random: other types": (state_with("rng_state.pth", lambda state: {**state, "python": "x"}), "Error"),
    "random: absent": (without(f"{TRAINER}/rng_state.pth"), "without rng_state.pth)"),
    "order: text": (replaced("curriculum_order.json", "order"), "is not JSON"),
    "order: a list": (replaced("curriculum_order.json", "[]"), "holds list"),
    "order: another curriculum's": (
        json_with("curriculum_order.json", curriculum="0" * 64),
        "curriculum_order.json is of a training on another curriculum",
    ),
    "order: a pair that is not there": (
        json_with("curriculum_order.json", positions=[0, 99]),
        "curriculum_order.json is of a training on another curriculum",
    ),
    "order: no numbers": (
        json_with("curriculum_order.json", positions=["a"]),
        "does not hold what a training",
    ),
    "order: half of it": (json_with("curriculum_order.json", repeated_to_fill=None), "does not hold what"),
}


def seal_again(checkpoint: Path) -> None:
    """Have the manifest say that all is well."""
    manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    manifest["files"] = folder_digests(checkpoint)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), "utf-8")


@pytest.mark.slow
@pytest.mark.fault(row=4)
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_checkpoint_is_one_line(killed: Killed, name: str) -> None:  # noqa: F811
    """Row 4. A file of the newest checkpoint is replaced and its digests are forged: exit code 2 and one line
    with the folder, what is wrong with it and the remedy; no update is made on it, nothing is published."""
    forge, expected = FORGERIES[name]
    checkpoint = killed.checkpoints / NEWEST
    forge(checkpoint)
    seal_again(checkpoint)
    outcome = killed.go_on()
    assert outcome.code == 2 and "Traceback" not in outcome.output, outcome.output
    (line,) = [line for line in outcome.output.splitlines() if line.startswith("selective-dpo: ")]
    assert line.startswith(f"selective-dpo: error: selected: {checkpoint} is not what this training wrote"), (
        line
    )
    assert expected in line
    assert line.endswith(
        "delete that folder, and the same command goes on from the checkpoint before it, if there is one"
    )
    assert "step" not in outcome.events  # no update
    assert sorted(path.name for path in killed.checkpoints.iterdir()) == [BEFORE, NEWEST]
    assert not (killed.run / "policy").exists()


@pytest.mark.slow
@pytest.mark.fault(row=4)
def test_the_remedy_helps(killed: Killed) -> None:  # noqa: F811
    """Row 4. The forged checkpoint deleted, as the line says: the one before is gone on from, to the same
    end."""
    checkpoint = killed.checkpoints / NEWEST
    FORGERIES["optimizer: other shapes"][0](checkpoint)
    seal_again(checkpoint)
    assert killed.go_on().code == 2
    shutil.rmtree(checkpoint)
    outcome = killed.go_on()
    assert outcome.code == 0, outcome.output
    assert f"going on from {killed.checkpoints / BEFORE}, step 2 of 8" in outcome.output
    assert not differences(killed.run, killed.results)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_state_does_not_run(killed: Killed, tmp_path: Path, name: str) -> None:  # noqa: F811
    """A pickle that makes a file when it is read by a reader that runs code: it is refused, with one line."""
    proof, checkpoint = tmp_path / "has run", killed.checkpoints / NEWEST
    torch.save({"state": Payload(proof)}, checkpoint / TRAINER / name)
    seal_again(checkpoint)
    outcome = killed.go_on()
    assert outcome.code == 2 and str(checkpoint) in outcome.output
    assert "(UnpicklingError: Weights only load failed)" in outcome.output
    assert not proof.exists()


@pytest.mark.slow
def test_a_training_with_full_weights_is_checked_as_well(server: ForkServer, tmp_path: Path) -> None:
    """Without an adapter the checkpoint holds the model; here one of its weights is missing."""
    recipe = resuming_recipe(tmp_path, train={"lora": None, "trainer": SETTINGS})
    run = tmp_path / "runs" / "tiny"
    assert server.run(["curriculum", recipe]).code == 0
    assert server.run(["train", recipe], Moment("step", 6)).code < 0
    checkpoint = run / "checkpoints" / "selected" / NEWEST
    path = checkpoint / TRAINER / "model.safetensors"
    weights = load_file(path)
    whole = path.read_bytes()
    save_file(less("model.norm.weight")(weights), path, metadata={"format": "pt"})
    seal_again(checkpoint)
    outcome = server.run(["train", recipe])
    assert (
        outcome.code == 2
        and "(weights that do not fit the model: model.norm.weight missing)" in outcome.output
    )
    path.write_bytes(whole)
    seal_again(checkpoint)
    outcome = server.run(["train", recipe])
    assert outcome.code == 0 and f"going on from {checkpoint}" in outcome.output


@pytest.mark.slow
@pytest.mark.fault(row=4)
def test_all_processes_end_for_a_file_of_one_of_them(server: ForkServer, tmp_path: Path) -> None:
    """Row 4. Of two processes, the second one's random state is forged: both end with 2 and the same reason,
    and neither is left waiting for the other."""
    recipe = resuming_recipe(tmp_path, launch={"processes": 2, "checkpoint_steps": 1})
    command = ("score", recipe, "--only", "seed41-fold0", "--score.trainer.num_train_epochs", "40")
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints" / "seed41-fold0"
    ranks = server.start_ranks(2, *command)
    until = time.monotonic() + 90
    while len(list(checkpoints.glob("step-*"))) < 2:
        assert all(each.poll() is None for each in ranks) and time.monotonic() < until
        time.sleep(0.01)
    for each in ranks:
        each.kill()
        each.wait()
    newest = sorted(checkpoints.glob("step-*"))[-1]
    (state,) = newest.rglob("rng_state_1.pth")
    torch.save({}, state)
    seal_again(newest)
    ranks = server.start_ranks(2, *command)
    written = ["".join(each.communicate(60)) for each in ranks]
    assert [each.returncode for each in ranks] == [2, 2], written
    for text in written:
        assert "Traceback" not in text
        assert f"{newest} is not what this training wrote" in text and "(KeyError: 'python')" in text


@pytest.mark.parametrize("tied", [False, True])
def test_of_weights_that_are_tied_one_is_enough(tmp_path: Path, tied: bool) -> None:
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model: Any = Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != tied
    loading._require_weights(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(less("model.embed_tokens.weight")(weights), tmp_path / "model.safetensors")
    with pytest.raises(loading._UnfitError, match=r"weights that do not fit.*embed_tokens.weight missing"):
        loading._require_weights(tmp_path, model)


def test_weights_in_several_files_are_one_set(tmp_path: Path) -> None:
    model: Any = load_model(tiny_model_folder(tmp_path / "model"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 2
    loading._require_weights(tmp_path / "parts", model)
    parts[0].unlink()
    with pytest.raises(FileNotFoundError, match=parts[0].name):
        loading._require_weights(tmp_path / "parts", model)


# --- what is not the checkpoint's ------------------------------------------------------------------------


@pytest.mark.slow
def test_an_error_of_the_training_stays_what_it_is(
    killed: Killed,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A RuntimeError in the first step after the checkpoint was read: ours, with its traceback."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("size mismatch, of our own making")

    monkeypatch.setattr(PairTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="of our own making") as caught:
        main(["train", str(killed.recipe)])
    assert not isinstance(caught.value.__cause__, CheckpointError)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        PermissionError(13, "Permission denied", "optimizer.pt"),
        MemoryError(),
    ],
)
def test_memory_and_the_disk_are_not_taken_for_a_forgery(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), reading(tmp_path):
        raise error


def test_a_process_is_told_of_another_ones_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "gather_object", lambda own: [*own, "KeyError: 'python'"])
    with (
        pytest.raises(CheckpointError, match=rf"^{tmp_path} is not what .*KeyError: 'python'"),
        reading(tmp_path),
    ):
        pass
