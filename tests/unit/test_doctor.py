"""`doctor` finds what would stop a run, one line each, and says what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from selective_dpo import score_difficulty
from selective_dpo.cli import main
from selective_dpo.config import Recipe
from selective_dpo.config.load import make_recipe
from selective_dpo.data import prepare
from selective_dpo.data.adapters import Pair, parse_row
from selective_dpo.errors import ConfigError
from selective_dpo.run import doctor, stages
from selective_dpo.run import run as verbs
from selective_dpo.run.costs import Device, Disk
from selective_dpo.run.doctor import Check, diagnose
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import Run
from tests.fixtures.models import TRAINER, recipe_file, tiny_model_folder, tiny_pairs_file, tiny_recipe

CPU = Device("cpu", "CPU", 1, 1 << 30)
RECIPES = Path(__file__).resolve().parents[2] / "src" / "selective_dpo" / "recipes"


@pytest.fixture(autouse=True)
def _without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and pairs."""
    folder = tmp_path_factory.mktemp("things")
    tiny_recipe(folder)
    return folder


def by_name(checks: Iterable[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def found(recipe: Recipe) -> dict[str, Check]:
    return by_name(diagnose(recipe))


def failures(recipe: Recipe) -> dict[str, str]:
    return {name: check.line() for name, check in found(recipe).items() if check.status == "FAIL"}


def test_a_sound_recipe(things: Path) -> None:
    checks = found(tiny_recipe(things))
    assert not [check for check in checks.values() if check.status == "FAIL"]
    # transformers' class for Qwen2 brings a token of its own, <|endoftext|>.
    assert checks["tokenizer"].found == (
        "261 tokens, pad '<pad>', bos None, eos '<|im_end|>'; the model embeds 260"
    )
    assert checks["boundary"].found == "prompt is no token prefix in 0 of 24 pairs"
    assert checks[f"data {things / 'pairs.jsonl'}"].found == "first 24 rows: 24 kept"
    assert checks["attention"].status == checks["disk"].status == checks["memory"].status == "ok"
    assert checks["score.trainer"].found == "accepted on this machine"
    assert not (things / "runs").exists()


def test_every_line_is_one_line_and_a_fault_has_a_remedy(things: Path) -> None:
    for check in diagnose(tiny_recipe(things)):
        assert len(check.line().splitlines()) == 1
        assert check.line().startswith(("ok    ", "warn  ", "FAIL  "))
        assert bool(check.remedy) == (check.status != "ok")


@pytest.mark.parametrize(
    ("blocks", "name", "expected"),
    [
        ({"score": {"lora": {"target_modules": ["nope"]}}}, "score.lora", "Target modules"),
        (
            {"model": {"attention": "flash_attention_2"}},
            "attention",
            "flash_attention_2 is not available here; install its package",
        ),
        (
            {"model": {"attention": "kernels-community/flash-attn2"}},
            "attention",
            "kernels-community/flash-attn2 is not available here; install the package kernels",
        ),
        (
            {"train": {"trainer": {"optim": "paged_adamw_32bit"}}},
            "train.trainer.optim paged_adamw_32bit",
            "bitsandbytes is not installed; install the gpu extra",
        ),
        (
            {"train": {"trainer": {"report_to": "mlflow"}}},
            "train.trainer.report_to mlflow",
            "mlflow is not installed",
        ),
        (
            {"data": {"max_length": 600}},
            "length",
            "sequences of up to 600 tokens, the model has 512 positions; lower data.max_length",
        ),
        (
            {"evaluate": {"generation": {"prompts": 1}, "judge": "reward-model", "reward_model": "/nope"}},
            "judge",
            "/nope",
        ),
        ({"data": {"empty_system_message": True}}, "data.train", "no effect"),
    ],
)
def test_faults_of_a_recipe(things: Path, blocks: dict[str, Any], name: str, expected: str) -> None:
    if "empty_system_message" in blocks.get("data", {}):
        tiny_model_folder(things / "no-system", template="{{ messages[-1]['content'] }}")
        tiny_pairs_file(things / "chat.jsonl", chat=True)
        blocks["data"]["train"] = [{"path": str(things / "chat.jsonl")}]
        blocks["model"] = {"path": str(things / "no-system")}
    faults = failures(tiny_recipe(things, **blocks))
    assert expected in faults[name]


def test_a_model_that_is_not_whole(things: Path, tmp_path: Path) -> None:
    shutil.copytree(things / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert ".safetensors" in failures(tiny_recipe(tmp_path))["model"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 257}))
    faults = failures(tiny_recipe(tmp_path))
    assert "the model embeds 257, none for <|im_end|>" in faults["tokenizer"]
    assert faults["token ids"].startswith("FAIL  token ids: up to 259, the model embeds 257 tokens; use")
    (tmp_path / "model" / "config.json").unlink()
    assert "cannot load model" in failures(tiny_recipe(tmp_path))["model"]


def test_the_shipped_template_with_too_few_pairs(things: Path, tmp_path: Path) -> None:
    """One-step works on 48 pairs. Trained scorers do not: halves of 24 are one update of its 32 pairs."""
    pairs = str(tiny_pairs_file(tmp_path / "pairs.jsonl", 48, prompts=48))
    raw = yaml.safe_load((RECIPES / "local-small.yaml").read_text("utf-8"))
    raw["model"]["path"], raw["data"]["train"] = str(things / "model"), [{"path": pairs}]
    raw["data"] |= {"max_length": 128, "max_prompt_length": 64}
    line = found(make_recipe(raw))["pairs"].line()
    assert line == "ok    pairs: 48 of 48 rows kept, enough for one-step"
    raw["score"] = {"protocol": "fast", "lora": raw["score"]["lora"], "trainer": raw["train"]["trainer"]}
    faults = failures(make_recipe(raw))
    assert list(faults) == ["pairs"]
    assert "seed41-fold0: 1 optimizer steps have no room for 2 evaluations: lower" in faults["pairs"]
    raw["data"]["train"] = [{"path": str(tiny_pairs_file(tmp_path / "more.jsonl", 66, prompts=66))}]
    assert found(make_recipe(raw))["pairs"].line() == "ok    pairs: 66 of 66 rows kept, enough for fast"


def test_all_of_few_rows_are_prepared(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hundred rows may be sound, and the share of them that a recipe takes too small."""
    pairs = {"train": [{"path": str(tiny_pairs_file(tmp_path / "p.jsonl", 300)), "fraction": 0.02}]}
    assert (
        "no room for"
        in failures(tiny_recipe(things, data=pairs, score={"evaluations": 4, "min_fold_prompts": 1}))["pairs"]
    )
    monkeypatch.setattr(doctor, "FIRST_ROWS", 299)
    assert "pairs" not in found(tiny_recipe(things, data=pairs))


def spoilt(things: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, Any]:
    """The recipe's `model` block for a copy of the model with other weights."""
    shutil.copytree(things / "model", to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return {"path": str(to)}


def test_weights_of_nan_are_found_by_a_forward_pass(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert found(tiny_recipe(things))["forward pass"].found == "log-probabilities of 4 pairs are finite"

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan

    recipe = tiny_recipe(things, model=spoilt(things, tmp_path / "nan", spoil), output_dir=str(tmp_path))
    faults = failures(recipe)
    assert list(faults) == ["forward pass"]
    assert (
        "none of the first 4 pairs a finite log-probability: check its weights for NaN"
        in faults["forward pass"]
    )
    assert main(["run", str(recipe_file(recipe, tmp_path / "recipe.yaml"))]) == 2
    assert "none of the first 4 pairs a finite log-probability" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "reference").exists()


def test_missing_weights_are_found_before_anything_is_tokenized(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = spoilt(things, tmp_path / "lacking", lambda weights: weights.pop(name))
    recipe = tiny_recipe(things, model=model, output_dir=str(tmp_path))
    faults = failures(recipe)
    assert list(faults) == ["model"] and f"lack {name}, which would be random numbers" in faults["model"]
    monkeypatch.setattr(stages, "prepare_pairs", lambda *_, **__: pytest.fail("tokenized"))
    assert main(["run", str(recipe_file(recipe, tmp_path / "recipe.yaml"))]) == 2
    assert f"lack {name}" in capsys.readouterr().err


def test_a_token_without_a_row_in_the_model(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers' class for Qwen2 brings a token of its own, number 260, beyond the model's."""
    rows = (things / "pairs.jsonl").read_text("utf-8").splitlines()
    rows[20] = rows[20].replace('"chosen": "', '"chosen": "<|endoftext|>')
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows), "utf-8")
    shutil.copytree(things / "model", tmp_path / "model")
    recipe = tiny_recipe(tmp_path)
    assert failures(recipe)["token ids"].startswith("FAIL  token ids: up to 260, the model embeds 260 tokens")
    assert main(["run", str(recipe_file(recipe, tmp_path / "recipe.yaml"))]) == 2
    pair = parse_row(json.loads(rows[20]))
    assert isinstance(pair, Pair)
    expected = (
        f"1 pair(s) hold tokens beyond the 260 that the model embeds ({pair.pair_id}): use the tokenizer"
    )
    assert expected in capsys.readouterr().err


def test_updates_are_as_large_on_any_number_of_processes(things: Path) -> None:
    blocks: dict[str, Any] = {
        "score": {"trainer": {"per_device_train_batch_size": 4, "pairs_per_update": 256}},
        "train": {"trainer": {"per_device_train_batch_size": 4, "pairs_per_update": 128}},
    }
    for processes, expected in (
        (8, "score 4 x 8 x 8 process(es) = 256 pairs, train 4 x 4 x 8 process(es) = 128 pairs"),
        (1, "score 4 x 64 x 1 process(es) = 256 pairs, train 4 x 32 x 1 process(es) = 128 pairs"),
    ):
        recipe = tiny_recipe(things, **blocks, launch={"processes": processes})
        assert doctor.check_updates(recipe, ("score", "train")).found == expected


def test_kernels_of_the_hub_are_accepted_where_their_package_is(
    things: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand in for FlashAttention's own packages, too. Nothing is downloaded to say so."""
    monkeypatch.setattr(doctor.import_utils, "is_kernels_available", lambda: True)
    for name in ("kernels-community/flash-attn2", "kernels-community/flash-attn3@v1:f", "flash_attention_2"):
        recipe = tiny_recipe(things, model={"attention": name})
        (check,) = doctor.check_optional_packages(recipe)
        assert (check.status, check.found) == ("ok", name)
        assert doctor.check_weights(recipe).status == "ok"
    with pytest.raises(ConfigError, match=r"model\.attention"):
        tiny_recipe(things, model={"attention": "somebody/else"})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data": {"max_length": 600}}, "length: sequences of up to 600 tokens, the model has 512 positions"),
    ({"train": {"lora": {"target_modules": ["nope"]}}}, "train.lora does not fit the model"),
    ({"model": {"attention": "flash_attention_3"}}, "attention: flash_attention_3 is not available here"),
    ({"train": {"trainer": {"optim": "paged_adamw_32bit"}}}, "bitsandbytes is not installed"),
]


@pytest.mark.parametrize(("blocks", "expected"), REFUSED)
def test_what_doctor_refuses_all_that_spends_refuses(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], blocks: dict[str, Any], expected: str
) -> None:
    """With the same words, before anything is written."""
    recipe = tiny_recipe(things, output_dir=str(tmp_path / "runs"), **blocks)
    (line,) = failures(recipe).values()
    assert expected in line
    path = str(recipe_file(recipe, tmp_path / "recipe.yaml"))
    for verb in ("run", "score", "train", "evaluate", "curriculum"):
        assert main([verb, path]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1].removeprefix("selective-dpo: error: ")
        assert line.endswith(error)
    assert not (tmp_path / "runs").exists()


def test_score_difficulty_refuses_it_too(things: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="length: sequences of up to 1,024 tokens, the model has 512 positi"
    ):
        score_difficulty(
            things / "model", things / "pairs.jsonl", output_dir=tmp_path / "out", dtype="float32"
        )
    assert not (tmp_path / "out").exists()


def test_the_checks_are_made_once_before_the_first_result(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(things, output_dir=str(tmp_path / "runs"), score={"evaluations": 1})
    path = str(recipe_file(recipe, tmp_path / "recipe.yaml"))
    checked: list[Path] = []
    monkeypatch.setattr(verbs, "require_sound", lambda run: checked.append(run.folder.pairs))
    assert main(["curriculum", path]) == 0
    assert checked == [tmp_path / "runs" / "tiny" / "pairs"]
    # What is complete is not asked about: a machine without the run's GPU may select again.
    assert main(["curriculum", path, "--fresh", "--select.fraction", "0.2"]) == 0
    assert len(checked) == 1


def test_a_full_disk_is_refused_before_a_run_and_not_in_the_middle(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(things, output_dir=str(tmp_path))
    monkeypatch.setattr(doctor, "disk_need", lambda *_: Disk(1.0, 900.0 * (1 << 40)))
    with pytest.raises(ConfigError, match=r"disk: .* the run needs about 900 TiB .*; free some"):
        doctor.require_sound(Run(recipe, RunDirectory.of(recipe)))
    RunDirectory.of(recipe).claim(recipe)
    doctor.require_sound(Run(recipe, RunDirectory.of(recipe)))


def test_a_prompt_that_runs_into_the_answer(tmp_path: Path) -> None:
    # The template writes a prompt otherwise when it stands alone.
    template = "{% if messages | length == 1 %}alone {% endif %}{{ messages[-1]['content'] }}"
    tiny_model_folder(tmp_path / "model", template=template)
    tiny_pairs_file(tmp_path / "chat.jsonl", chat=True)
    faults = failures(tiny_recipe(tmp_path, data={"train": [{"path": str(tmp_path / "chat.jsonl")}]}))
    assert "in 100.0% of 24 pairs" in faults["data.train"]


def test_the_first_rows_of_sources(things: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": prompt, "chosen": "b", "rejected": "c"} for prompt in "xy"]
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3 + pairs
    (tmp_path / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    (tmp_path / "wrong.jsonl").write_text('{"question": "a", "answer": "b"}\n')

    def checks(path: str) -> dict[str, Check]:
        return found(tiny_recipe(things, data={"train": [{"path": path}]}))

    half = checks(path := str(tmp_path / "half.jsonl"))[f"data {path}"]
    assert half.status == "warn"
    assert half.found == "first 6 rows: 2 kept, 1 malformed, 3 identical"
    wrong = checks(str(tmp_path / "wrong.jsonl"))["data.train"]
    assert "no row has the columns of a pair; found are question, answer; wanted are chosen" in wrong.line()
    gone = tiny_recipe(things, data={"train": [{"path": path}]})
    (tmp_path / "half.jsonl").unlink()
    assert "no file or folder" in failures(gone)["data.train"]


def test_a_template_that_does_not_end_is_named(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tiny_model_folder(tmp_path / "model", template=forever)
    pairs = {"train": [{"path": str(tiny_pairs_file(tmp_path / "chat.jsonl", chat=True))}]}
    monkeypatch.setattr(prepare, "MAX_CHUNK_SECONDS", 0.5)
    monkeypatch.setattr(prepare, "MAX_PAIR_SECONDS", 0.5)
    assert "row 0 of " in failures(tiny_recipe(tmp_path, data=pairs))["data.train"]


def test_disk(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(things)
    assert doctor.check_disk(recipe, None).status == "warn"
    assert doctor.check_disk(recipe, Disk(1.0, 0.0)).status == "ok"
    lacking = doctor.check_disk(recipe, Disk(1.0, 900.0 * (1 << 40)))
    assert "the run needs about 900 TiB (900 TiB of it for checkpoints, while it trains)" in lacking.found
    assert (lacking.status, lacking.remedy) == ("FAIL", "free some, or choose another output_dir")
    (tmp_path / "file").touch()
    blocked = recipe.model_copy(update={"output_dir": str(tmp_path / "file" / "runs")})
    assert "cannot write below" in doctor.check_disk(blocked, Disk(1.0, 0.0)).found


def test_launch_and_precision(things: Path) -> None:
    recipe = tiny_recipe(things)
    four = Device("cuda", "GPU", 4, 80 << 30)
    assert doctor.check_launch(recipe, CPU).status == "ok"
    alone = doctor.check_launch(recipe, four)
    assert alone.status == "warn"
    assert "set launch.processes or launch.workers to 4" in alone.remedy
    eight = tiny_recipe(things, launch={"processes": 8})
    assert doctor.check_launch(eight, four).status == "FAIL"
    assert doctor.check_launch(tiny_recipe(things, launch={"processes": 4}), four).status == "ok"
    assert doctor.check_launch(tiny_recipe(things, launch={"workers": 5}), four).status == "warn"
    assert doctor.check_precision(recipe, CPU).status == "ok"
    half = tiny_recipe(things, model={"dtype": "bfloat16"})
    assert doctor.check_precision(half, CPU).status == "warn"
    pure = tiny_recipe(things, model={"dtype": "bfloat16", "master_weights": False}, train={"lora": None})
    check = doctor.check_precision(pure, four)
    assert check.status == "warn" and "pure bfloat16 loses the updates" in check.found


def test_the_verb(things: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert f"torch {metadata.version('torch')}" in out
    assert out.splitlines()[-1].endswith(", 0 to mend")

    path = recipe_file(tiny_recipe(things), tmp_path / "recipe.yaml")
    capfd.readouterr()
    assert main(["doctor", str(path)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert all(line.startswith(("ok ", "warn ")) for line in out.splitlines()[:-1])

    assert main(["doctor", str(path), "--model.attention", "flash_attention_3"]) == 2
    out, err = capfd.readouterr()
    assert "FAIL  attention: flash_attention_3" in out
    assert out.splitlines()[-1].endswith(", 1 to mend")

    assert main(["doctor", str(path), "--select.fraction", "1.7"]) == 2
    assert capfd.readouterr().out == ""
    assert main(["doctor", "--select.fraction", "0.7"]) == 2
    assert "no effect without a recipe" in capfd.readouterr().err


def test_a_recipe_of_the_hub_while_offline(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(RECIPES / "qwen2.5-7b-dpo-mix-7k.yaml")]) == 2
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert sum(line.startswith("FAIL  data argilla/dpo-mix-7k (split ") for line in lines) == 2
    assert any(line.startswith("FAIL  model: cannot load model") for line in lines)
    assert any(line.startswith("FAIL  tokenizer: cannot load tokenizer") for line in lines)


def test_trainer_settings_this_machine_refuses(things: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU may take it")
    recipe = tiny_recipe(things, score={"trainer": {**TRAINER, "tf32": True}})
    assert "tf32" in failures(recipe)["score.trainer"]
