"""What comes from others is data: YAML builds no objects, templates reach nothing, no code is run unasked."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selective_dpo import models
from selective_dpo.cli import main
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.storage.artifacts import read_json
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_pairs_file, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "selective_dpo"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("selective-dpo: error: ") and errors.count("\n") == 1, errors
    return errors


# --- YAML -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "node",
    [
        "!!python/object/apply:os.mkdir [TARGET]",
        "!!python/object/new:os.mkdir [TARGET]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "!!python/object:selective_dpo.config.Recipe {}",
        "!!python/tuple [1]",
        "!custom {a: 1}",
    ],
)
@pytest.mark.parametrize("place", ["name", "data", "option"])
def test_yaml_builds_no_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], node: str, place: str
) -> None:
    target = tmp_path / "made"
    value = node.replace("TARGET", str(target))
    path = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    option = ["--score.seeds", value] if place == "option" else []
    if place != "option":
        path.write_text(f"{place}: {value}\n")
    refused(capsys, "score", path, *option)
    assert not target.exists()


def test_only_the_safe_loaders_of_yaml_are_used() -> None:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("yaml."):
                found.add(f"{ast.unparse(node.func)}({', '.join(map(ast.unparse, node.args))}")
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                assert not [base for base in bases if base.startswith("yaml.") and base != "yaml.SafeLoader"]
    loads = [call for call in found if ".load" in call or ".unsafe" in call or ".full" in call]
    assert loads and all("RecipeLoader" in call for call in loads), loads


# --- templates --------------------------------------------------------------------------------------------

SYSTEM = "().__class__.__mro__[1].__subclasses__()"
ESCAPES = [
    f"{{{{ {SYSTEM} }}}}",
    "{{ cycler.__init__.__globals__.os.mkdir('TARGET') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('TARGET') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('TARGET', 'w') }}",
    "{{ tojson.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{% set x = messages.append(messages) %}",
    "{% set x = messages[0].update({'role': 'x'}) %}",
    "{{ '%s' | format(messages.__class__) }}{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{% import 'os' as os %}{{ os.mkdir('TARGET') }}",
    "{% include '/etc/passwd' %}",
    "{{ lipsum.__globals__['os'].popen('touch TARGET').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ range(1000000000) | list }}",
]


@pytest.mark.parametrize(
    ("where", "template"),
    [*(("recipe", escape) for escape in ESCAPES), ("model", ESCAPES[0]), ("model", ESCAPES[2])],
)
def test_a_template_reaches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, where: str
) -> None:
    target = tmp_path / "made"
    text = template.replace("TARGET", str(target)) + "{{ messages[-1].content }}"
    tiny_pairs_file(tmp_path / "pairs.jsonl", chat=True)
    tiny_model_folder(tmp_path / "model", template=text if where == "model" else None)
    (tmp_path / "template.jinja").write_text(text)
    chosen = {"chat_template": str(tmp_path / "template.jinja")} if where == "recipe" else {}
    path = recipe_file(tiny_recipe(tmp_path, model=chosen), tmp_path / "recipe.yaml")
    message = refused(capsys, "score", path)
    assert "template" in message
    assert not target.exists()
    assert not (tmp_path / "runs").exists()


# --- code that comes with a model -------------------------------------------------------------------------

MODEL_CODE = """
import os
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM
Path({target!r}).mkdir(exist_ok=True)
class OwnConfig(Qwen2Config):
    model_type = "own"
class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A recipe whose model brings its own Python code, which leaves the folder `ran`."""
    recipe = tiny_recipe(tmp_path, score={"evaluations": 1})
    config_path = tmp_path / "model" / "config.json"
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads(config_path.read_text()) | {"model_type": "own", "auto_map": auto}
    config_path.write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(MODEL_CODE.format(target=str(tmp_path / "ran")))
    return recipe_file(recipe, tmp_path / "recipe.yaml")


@pytest.mark.parametrize("verb", ["doctor", "plan", "score", "run"])
def test_a_models_code_is_not_run_unasked(
    with_code: Path, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # transformers would otherwise ask, and take a y for a yes.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 4))
    assert main([verb, str(with_code)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (with_code.parent / "ran").exists()


@pytest.mark.slow
def test_where_it_is_asked_for_it_is_loud_and_written_down(with_code: Path, tmp_path: Path) -> None:
    command = ["curriculum", str(with_code), "--model.trust_remote_code", "true"]
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-m", "selective_dpo", *command],
        cwd=ROOT,
        env={**os.environ, **cache},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").is_dir()
    loud = [line for line in done.stderr.splitlines() if "trust_remote_code is on" in line]
    assert loud and str(tmp_path / "model") in loud[0] and "runs with all your rights" in loud[0]
    origin = Curriculum.load(tmp_path / "runs" / "tiny").facts["provenance"]
    assert origin["trust_remote_code"] is True
    assert list(origin["remote_code"]) == ["own.py"]
    assert read_json(tmp_path / "runs" / "tiny" / "config.json")["model"]["trust_remote_code"] is True


def test_changed_code_is_another_model(with_code: Path) -> None:
    config = tiny_recipe(with_code.parent).model
    trusting = config.model_copy(update={"trust_remote_code": True})
    before = models.model_digest(trusting)
    plain = models.model_digest(config)
    (with_code.parent / "model" / "own.py").write_text("# other")
    assert models.model_digest(trusting) != before
    assert models.model_digest(config) == plain
    assert models.remote_code(config) is None


def test_a_data_set_brings_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A folder with a loading script, as data sets of the hub once had.
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"from pathlib import Path; Path({str(tmp_path / 'ran')!r}).mkdir()")
    shutil.copy(folder / "data.py", folder / "__init__.py")
    recipe = tiny_recipe(tmp_path).model_dump(mode="json")
    recipe["data"]["train"] = [{"path": str(folder)}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    refused(capsys, "score", tmp_path / "recipe.yaml")
    assert not (tmp_path / "ran").exists()


# --- the terminal -----------------------------------------------------------------------------------------


def test_an_error_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe_file(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    raw = json.loads(json.dumps({"\x1b]0;title\x07\x1b[2J\u202e": 1}))
    path.write_text(json.dumps(raw))
    errors = refused(capsys, "score", path)
    assert all(each.isprintable() for each in errors.rstrip("\n"))
