"""Whatever stands in a recipe or on the command line: it is read, or refused in one line, at once."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz.corpus import ODD_VALUES, PIECES, RECIPE
from fuzz.run import mutated
from fuzz.targets import override, recipe
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from trl import DPOConfig

from selective_dpo.cli import VERBS
from selective_dpo.config import Recipe, ScoreConfig, SelectConfig, SourceConfig
from selective_dpo.config.load import MAX_BYTES, dump_config, load_recipe, make_recipe
from selective_dpo.config.messages import dotted_keys, inlined
from selective_dpo.config.trainer_options import check_recipe_options, library_options
from selective_dpo.errors import ConfigError, SelectiveDPOError
from tests.fixtures.bad_input import CASES, bounded, command, generated

VALID: dict[str, Any] = yaml.safe_load(RECIPE)
MINIMAL = "name: a\nmodel: {path: org/model}\ndata: {train: [{path: org/pairs, split: train}]}\n"
KEYS = dotted_keys(inlined(Recipe.model_json_schema()))

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(ODD_VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def laughs(levels: int, times: int) -> str:
    """Anchors that name each other: times ** levels values."""
    lines = ["x0: &x0 [1]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * times)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def merges(levels: int, times: int) -> str:
    """The same with merge keys, which are followed before anything is made."""
    lines = ["x0: &x0 {a: 1, b: 2}"]
    lines += [f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * times)}]}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def test_each_property_makes_the_cases_that_docs_reliability_counts() -> None:
    text = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_bad_*.py"))
    for name in CASES:
        assert text.count(f'generated("{name}")') == 1, name
        assert text.count(f'trials=CASES["{name}"]') == 1, name


# --- what a recipe's file holds --------------------------------------------------------------------------


@pytest.mark.fault(row=14, trials=CASES["recipe text"])
@generated("recipe text")
@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from([*PIECES]), max_size=6).map(lambda parts: b"".join(parts))
)
@example(laughs(9, 10))
@example(merges(9, 10))
@example(merges(3, 200))
@example("a: &a [*a]\n")
@example("a: &a {b: *a}\n")
@example(MINIMAL + "x: !!timestamp x")
@example(MINIMAL + "x: !!bool x")
@example(MINIMAL + "x: !!int ''")
@example(MINIMAL + "x: !!float ''")
@example(MINIMAL + 'x: "\\UFFFFFFFF"')
@example(MINIMAL + "x: =")
@example(MINIMAL + "x: " + "1:" * 400 + "1.5")
@example(MINIMAL + "x: " + "1:" * 20_000 + "1")
@example(MINIMAL + "output_dir: 0x" + "f" * 5_000)
@example(MINIMAL + "0x" + "f" * 5_000 + ": 1")
@example(MINIMAL + "x: " + "1" * 100_000 + "x")
@example(MINIMAL + "x: " + "[" * 5_000)
@example(MINIMAL + "x: " + "{a: " * 200 + "}" * 200)
@example(MINIMAL + "x: " + "- " * 3_000)
@example("k" * 100_000 + ": 1\n")
@example("- " * 200_000)
@example("model: {path: ~nobody-of-this-name/x}\n" + MINIMAL.replace("model: {path: org/model}\n", ""))
@example(MINIMAL.replace("org/model", "a" * 300))
@example(MINIMAL.replace("org/model", '"a\\0b"'))
@example(MINIMAL.replace("org/model", '"\\ud800"'))
def test_any_text(text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    with bounded():
        recipe(data)


@pytest.mark.fault(row=14, trials=CASES["recipe bytes"])
@generated("recipe bytes")
@given(st.randoms(use_true_random=False))
def test_a_mutated_recipe(generator: Any) -> None:
    with bounded():
        recipe(mutated(RECIPE.encode(), generator))


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a recipe."""
    items: Sequence[tuple[Any, Any]] = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    for name, item in items:
        yield (*above, name)
        yield from places(item, (*above, name))


PLACES = list(places(VALID))


@pytest.mark.fault(row=14, trials=CASES["recipe values"])
@generated("recipe values")
@given(st.sampled_from(PLACES), json_values | st.sampled_from(ODD_VALUES))
@example(("data", "train", 0, "path"), "a" * 5_000)
@example(("score", "seeds"), [2**32])
@example(("score", "seeds"), [-1])
@example(("score", "protocol"), [])
@example(("score", "trainer"), {"learning_rate": 10**400})
@example(("evaluate", "controls"), {"../../etc": {"rule": "all"}})
def test_one_value_of_another_kind(place: tuple[Any, ...], value: Any) -> None:
    raw = copy.deepcopy(VALID)
    block: Any = raw
    for step in place[:-1]:
        block = block[step]
    block[place[-1]] = value
    check(raw)


@pytest.mark.fault(row=14, trials=CASES["recipe blocks"])
@generated("recipe blocks")
@given(st.dictionaries(st.sampled_from([*VALID, "x", "", "Model"]), json_values, max_size=8))
def test_blocks_of_anything(raw: dict[str, Any]) -> None:
    check({**VALID, **raw})


def check(raw: dict[str, Any]) -> None:
    """Read a recipe, dump it, and read it back; or be refused with a line."""
    with bounded():
        try:
            made = make_recipe(raw)
        except ConfigError as error:
            assert 0 < len(str(error)) < 2_000
            return
        dumped = json.loads(json.dumps(dump_config(made), allow_nan=False))
        assert make_recipe(dumped) == made


@pytest.mark.fault(row=14, trials=CASES["trainer options"])
@pytest.mark.filterwarnings("ignore")  # TRL's, on options that are refused in the end
@generated("trainer options")
@given(
    st.sampled_from(["score", "train"]),
    st.sampled_from(["trainer", "lora"]),
    st.dictionaries(
        st.sampled_from(
            [
                "seed",
                "beta",
                "loss_type",
                "loss_weights",
                "learning_rate",
                "num_train_epochs",
                "per_device_train_batch_size",
                "optim",
                "optim_args",
                "lr_scheduler_type",
                "lr_scheduler_kwargs",
                "warmup_steps",
                "logging_steps",
                "report_to",
                "f_divergence_type",
                "use_liger_kernel",
                "eval_strategy",
                "eval_steps",
                "r",
                "lora_alpha",
                "target_modules",
                "bias",
                "init_lora_weights",
                "loftq_config",
                "layers_pattern",
                "layers_to_transform",
                "rank_pattern",
                "use_dora",
                "use_rslora",
                "x",
            ]
        ),
        json_values,
        min_size=1,
        max_size=4,
    ),
)
@example("train", "trainer", {"seed": -1})
@example("train", "trainer", {"seed": 2**32})
def test_options_of_other_libraries(stage: str, block: str, options: dict[str, Any]) -> None:
    raw = copy.deepcopy(VALID)
    raw[stage] = {**raw[stage], block: options}
    library_options(DPOConfig if block == "trainer" else LoraConfig)  # imported before the clock runs
    with bounded():
        try:
            check_recipe_options(make_recipe(raw))
        except ConfigError as error:
            assert str(error)


# --- the command line ------------------------------------------------------------------------------------


@pytest.mark.fault(row=14, trials=CASES["override"])
@generated("override")
@given(
    st.sampled_from(KEYS)
    | st.text(max_size=30)
    | st.lists(st.sampled_from([*KEYS, "0", "²", ""]), max_size=4).map(".".join),
    st.text(max_size=30) | st.sampled_from(PIECES).map(lambda piece: piece.decode("utf-8", "replace")),
)
@example("data.train." + "1" * 5_000 + ".path", "x")
@example(".".join(["a"] * 500), "x")
@example("name", "\udcff")
@example("model.path", "\udcff")
@example("model.path", "a\0b")
@example("select.seed", "0x" + "f" * 5_000)
@example("train.trainer.x", laughs(9, 10))
def test_any_override(key: str, value: str) -> None:
    with bounded():
        override(f"{key}={value}".encode("utf-8", "surrogateescape"))


command_options = (
    st.sampled_from(
        [*VERBS, "--help", "--version", "--out", "--fresh", "--only", "--format", "csv", "--", "-x", "--json"]
    )
    | st.sampled_from([f"--{key}" for key in KEYS])
    | st.text(st.characters(exclude_characters="\0"), max_size=12)
)
SHORT = (
    "plan",
    "doctor",
    "export",
    "inspect",
    "import-records",
    "report",
    "curriculum",
    "score",
    "train",
    "evaluate",
)


@pytest.mark.fault(row=14, trials=CASES["recipe command line"])
@generated("recipe command line")
@given(st.sampled_from(SHORT), st.lists(command_options, max_size=4), st.randoms(use_true_random=False))
@example("plan", [], None)
@example("plan", ["--select.fraction"], None)
@example("plan", ["--select.fraction=2"], None)
def test_any_command_line(tmp_path_factory: Any, verb: str, others: list[str], generator: Any) -> None:
    folder = tmp_path_factory.mktemp("command")
    text = RECIPE.encode() if generator is None else mutated(RECIPE.encode(), generator)
    (folder / "recipe.yaml").write_bytes(text)
    here = Path.cwd()
    os.chdir(folder)
    try:
        command([verb, "recipe.yaml", *others], inside=folder, may_write=("runs",))
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["plan", "--help"], ["x"], ["plan"], ["plan", "\0"], ["plan", "a" * 9_999]]
)
def test_command_lines_without_a_recipe(arguments: list[str], tmp_path: Path) -> None:
    answer = command(arguments, inside=tmp_path)
    assert answer.code == (0 if not arguments or "--help" in arguments else 2)


# --- bugs that were found this way ------------------------------------------------------------------------


def refused(folder: Path, text: str | bytes) -> str:
    file = folder / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with bounded(), pytest.raises(ConfigError) as caught:
        load_recipe(file)
    return str(caught.value).removeprefix(str(file))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (laughs(9, 10), ", line 5: the recipe holds more than 10,000 values; are its anchors meant?"),
        (merges(9, 10), ", line 5: the recipe holds more than 10,000 values; are its anchors meant?"),
        (MINIMAL + "x: 0x" + "f" * 60, ": x is a whole number of more than 64 bits"),
        (MINIMAL + "x: " + "1:" * 5_000 + "1", ", line 4: a value of 10,001 characters; 4,096 are the most"),
        (MINIMAL + "output_dir: 99999999999999999999", ": output_dir is a whole number of more than 64 bits"),
        (MINIMAL + "x: !!bool maybe", " is not YAML: a value cannot be read ('maybe')"),
        (MINIMAL + "x: " + "[" * 40 + "]" * 40, ": x.0.0.0"),
        (
            MINIMAL.replace("org/model", '"\\ud800"'),
            ": model.path holds the character U+D800, which is not",
        ),
        (
            MINIMAL.replace("org/model", "~nobody-here/x"),
            ": model.path: begins with ~ and the name of",
        ),
        (
            MINIMAL.replace("org/model", "a" * 300),
            ": model.path: is no path or name: it is longer",
        ),
        (MINIMAL + "score: {protocol: custom, seeds: [-1]}", ": score.seeds.0 is -1, but must be"),
        (b"#" * (MAX_BYTES + 1), " has more than 256 KB, which no recipe needs; is it one?"),
    ],
)
def test_what_used_to_crash_or_hang(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert refused(tmp_path, text).startswith(expected)


def test_a_long_run_of_digits_is_read_in_linear_time(tmp_path: Path) -> None:
    # The pattern of numbers with an exponent used to try every split of the digits: minutes for 256 KB.
    with bounded(5.0):
        assert "a value of 250,001 characters" in refused(tmp_path, MINIMAL + "x: " + "1" * 250_000 + "x")


@pytest.mark.parametrize(
    ("block", "options"),
    [
        (ScoreConfig, {"protocol": "custom", "seeds": (2**32,)}),
        (SelectConfig, {"rule": "random", "seed": -1}),
        (SourceConfig, {"path": "a" * 300}),
        (SourceConfig, {"path": "\0"}),
        (SourceConfig, {"path": "\ud800"}),
    ],
)
def test_the_types_refuse_it_too(block: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        block(**options)


def test_an_index_out_of_range_is_named() -> None:
    with pytest.raises(SelectiveDPOError, match="is not an index"):
        make_recipe(VALID, [("data.train.99999999999.path", "x")])
