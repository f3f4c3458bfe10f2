"""Reading recipes: YAML, overrides, relative paths, the resolved config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selective_dpo.config import Recipe
from selective_dpo.config.load import diff_config, dump_config, load_recipe, make_recipe, recipe_schema
from selective_dpo.errors import ConfigError

MINIMAL = "name: a\nmodel: {path: org/model}\ndata: {train: [{path: org/pairs, split: train}]}\n"


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def message(folder: Path, text: str | bytes, *overrides: tuple[str, str]) -> str:
    """The one line that a bad recipe ends with, without the file's own path."""
    file = written(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(file)), line
    return line.removeprefix(str(file)).removeprefix(": ")


def test_defaults_fill_in(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL))
    assert (recipe.name, recipe.model.path, recipe.score.protocol) == ("a", "org/model", "one-step")
    assert load_recipe(written(tmp_path, b"\xef\xbb\xbf" + MINIMAL.encode())) == recipe  # a byte-order mark


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-6", 6e-6),
        ("1e-4", 1e-4),
        ("3E5", 3e5),
        ("-2e3", -2e3),
        ("+1.5e+2", 150.0),
        (".5e-3", 5e-4),
        ("1.e4", 1e4),
        ("1.5", 1.5),
        ("12", 12),
        ("'6e-6'", "6e-6"),
        ("12e", "12e"),
        ("e-6", "e-6"),
        ("1e4x", "1e4x"),
    ],
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str, value: object) -> None:
    file = written(tmp_path, MINIMAL + f"score: {{trainer: {{x: {text}}}}}\n")
    for found in (load_recipe(file), load_recipe(file, [("score.trainer.x", text)])):
        read = found.score.trainer["x"]
        assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nmodel:\n  path: b\n  path: c\n", ", line 4: key 'path' stands twice"),
        ("name: a\nmodel: {path: [}\n", ", line 2: "),
        ("name: a\n\tb: 1\n", ", line 2: "),
        ("name: \x01\n", ", line 1: a character that YAML does not allow"),
        (b"name: a\n# caf\xe9\n", " is not UTF-8 text (line 2); save it as UTF-8"),
        ("- name: a\n", " holds a list, not a recipe's keys; `selective-dpo init` writes one"),
        ("", " holds nothing, not a recipe's keys; `selective-dpo init` writes one"),
        ("a: &a [*a]\n", ", line 1: the recipe holds itself through a YAML anchor"),
        ("yes: 1\n", "True: keys must be text; put it in quotes"),
        (MINIMAL + "train: {trainer: {learning_rate: .nan}}", "train.trainer.learning_rate is nan, but must"),
        (
            MINIMAL + "train: {trainer: {run_name: 2024-01-01}}",
            "train.trainer.run_name is a date (2024-01-01)",
        ),
        (MINIMAL + "train: {trainer: {run_name: 2024-13-01}}", " is not YAML: "),
        (MINIMAL + "x: !!python/object/apply:os.getcwd []", ", line 4: could not determine a constructor"),
    ],
)
def test_what_is_not_a_recipe_is_named_with_its_line(
    tmp_path: Path, text: str | bytes, expected: str
) -> None:
    assert message(tmp_path, text).startswith(expected)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^no recipe at .*absent\.yaml$"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*: Is a directory"):
        load_recipe(tmp_path)


def test_overrides_are_yaml_and_keep_text_where_text_is_wanted(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, MINIMAL),
        [
            ("select.fraction", "0.6"),
            ("select.rule", "hardest"),
            ("score.protocol", "custom"),
            ("score.seeds", "[1, 2]"),
            ("train.lora", "{r: 8}"),
            ("train.lora.lora_alpha", "4"),
            ("model.revision", "1234567"),  # a commit of digits only
            ("model.tokenizer", ""),
            ("data.train.0.split", "test"),
            ("data.test", "[{path: held-out.jsonl}]"),
            ("data.train.0.columns.prompt", "1"),  # a column's name
            ("evaluate.controls.other.rule", "random"),
            ("evaluate.controls.other.criterion", "my_module:largest_loss"),
            ("select.fraction", "0.7"),  # the last one wins
        ],
    )
    assert recipe.select.fraction == 0.7
    assert recipe.select.rule == "hardest"
    assert recipe.score.seeds == (1, 2)
    assert recipe.train.lora == {"r": 8, "lora_alpha": 4}
    assert (recipe.model.revision, recipe.model.tokenizer) == ("1234567", "")
    assert recipe.data.train[0].split == "test"
    assert recipe.data.test[0].path == "held-out.jsonl"
    assert recipe.data.train[0].columns == {"prompt": "1"}
    assert recipe.evaluate.controls["other"].rule == "random"
    assert recipe.evaluate.controls["other"].aggregate == "my_module:largest_loss"


def test_an_override_of_one_lora_setting_keeps_the_other_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, MINIMAL)
    default = load_recipe(file).score.lora
    assert default is not None
    assert load_recipe(file, [("score.lora.r", "8")]).score.lora == {**default, "r": 8}
    assert load_recipe(file).score.lora == default  # the types' default itself was not touched
    assert load_recipe(file, [("score.lora", "null")]).score.lora is None


def test_blocks_shared_through_an_anchor_are_overridden_apart(tmp_path: Path) -> None:
    text = MINIMAL + "score: {trainer: &shared {beta: 0.1}}\ntrain: {trainer: *shared}\n"
    recipe = load_recipe(written(tmp_path, text), [("train.trainer.beta", "0.5")])
    assert (recipe.score.trainer["beta"], recipe.train.trainer["beta"]) == (0.1, 0.5)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("select.fractoin", "0.6", "select.fractoin: unknown key (given 0.6); did you mean 'fraction'?"),
        ("select.fraction", "1.7", "select.fraction is 1.7, but must be above 0 and at most 1"),
        ("select.fraction", "[", "--select.fraction, line 1: "),
        ("select..fraction", "1", "--select..fraction: not a dotted key such as select.fraction"),
        ("model.path.x", "1", '--model.path.x: model.path is "org/model", which has no keys below it'),
        ("data.train.1.path", "x", "--data.train.1.path: '1' is not an index of a list of 1"),
        ("data.train.x", "1", "--data.train.x: 'x' is not an index of a list of 1"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, key: str, text: str, expected: str) -> None:
    assert message(tmp_path, MINIMAL, (key, text)).startswith(expected)


def test_relative_paths_mean_the_recipes_folder_where_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    for name in ("pairs.jsonl", "chat.jinja", "chatml", "prompts.jsonl"):
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "model").mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", "/home/someone")
    text = """
name: a
model: {path: model, tokenizer: org/tokenizer, chat_template: chat.jinja}
data:
  train: [{path: pairs.jsonl}, {path: org/pairs, split: train}, {path: ~/pairs.jsonl}, {path: /data/x.jsonl}]
  test: [{path: absent.jsonl}]
evaluate: {generation: {prompts: 1, source: prompts.jsonl}}
"""
    recipe = load_recipe(written(folder, text))
    assert recipe.model.path == str(folder / "model")
    assert recipe.model.tokenizer == "org/tokenizer"
    assert recipe.model.chat_template == str(folder / "chat.jinja")
    assert [source.path for source in recipe.data.train] == [
        str(folder / "pairs.jsonl"),
        "org/pairs",
        "/home/someone/pairs.jsonl",
        "/data/x.jsonl",
    ]
    assert recipe.data.test[0].path == "absent.jsonl"
    assert recipe.evaluate.generation.source == str(folder / "prompts.jsonl")
    # Names that this package gives a meaning to, and what is typed on the command line, stay as they are.
    typed = load_recipe(
        written(folder, text), [("data.train.0.path", "pairs.jsonl"), ("model.chat_template", "chatml")]
    )
    assert (typed.data.train[0].path, typed.model.chat_template) == ("pairs.jsonl", "chatml")
    built_in = load_recipe(written(folder, text.replace("chat.jinja", "chatml")))
    assert built_in.model.chat_template == "chatml"


def test_the_dumped_config_is_json_and_makes_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL + "train: {trainer: {learning_rate: 6e-6}}\n"))
    dumped = dump_config(recipe)
    assert make_recipe(json.loads(json.dumps(dumped))) == recipe
    assert dumped["select"]["order"] == "easy-to-hard"


def test_make_recipe_leaves_what_it_is_given_alone() -> None:
    raw = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "x"}]}}
    before = json.dumps(raw)
    make_recipe(raw, [("model.path", "other"), ("select.fraction", "0.3")])
    assert json.dumps(raw) == before


def test_recipes_differ_by_named_fields(tmp_path: Path) -> None:
    file = written(tmp_path, MINIMAL)
    old = dump_config(load_recipe(file, [("select.fraction", "0.5"), ("train.trainer.beta", "0.1")]))
    new = dump_config(
        load_recipe(
            file,
            [
                ("select.fraction", "0.6"),
                ("score.protocol", "custom"),
                ("score.seeds", "[7]"),
                ("score.evaluations", "1"),
                ("data.train", "[{path: org/pairs, split: test}, {path: x.csv}]"),
            ],
        )
    )
    assert diff_config(old, old) == []
    assert diff_config(old, new) == [
        'data.train.0.split: "train" -> "test"',
        'data.train.1: (absent) -> {"path": "x.csv", "split": "", "subset": "", "revision": "", '
        '"fraction": 1.0, "columns": {}, "adapter": ""}',
        'score.protocol: "one-step" -> "custom"',
        "score.seeds: [41] -> [7]",
        "select.fraction: 0.5 -> 0.6",
        "train.trainer.beta: 0.1 -> (absent)",
    ]


def test_the_schema_describes_every_key() -> None:
    schema = recipe_schema()
    blocks = [schema, *schema["$defs"].values()]
    for block in blocks:
        assert block["additionalProperties"] is False
        assert all(field.get("description") for field in block["properties"].values()), block["title"]
    assert set(schema["properties"]) == set(Recipe.model_fields)
