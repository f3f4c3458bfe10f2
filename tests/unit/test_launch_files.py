"""The launch files that come with the package: accelerate reads them, and they mean what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

from selective_dpo.config.load import SHIPPED

FOLDER = SHIPPED / "launch"
NAMES = ("multi-gpu", "zero2", "zero3", "fsdp2", "fsdp2-qlora", "two-nodes")
ROOT = Path(__file__).resolve().parents[2]


def test_these_are_all() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it_and_takes_a_launch_with_it(name: str) -> None:
    path = str(FOLDER / f"{name}.yaml")
    config = load_config_from_file(path)
    nodes = 2 if name == "two-nodes" else 1
    assert (config.num_machines, config.num_processes) == (nodes, 8 * nodes)
    # Keys that accelerate does not know would be an error only when it is launched.
    known = {action.dest for action in launch_command_parser()._actions}
    given = yaml.safe_load(Path(path).read_text())
    nested = [key for block in ("deepspeed_config", "fsdp_config") for key in given.get(block, {})]
    assert [key for key in nested if key not in known] == []
    words = ["--config_file", path, "-m", "selective_dpo", "run", "r.yaml"]
    assert launch_command_parser().parse_args(words).module


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_the_stages_of_zero(name: str, stage: int) -> None:
    given = load_config_from_file(str(FOLDER / f"{name}.yaml")).deepspeed_config
    pytest.importorskip("deepspeed")
    plugin = DeepSpeedPlugin(zero_stage=given["zero_stage"], zero3_init_flag=given["zero3_init_flag"])
    assert plugin.zero_stage == stage


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-qlora", "two-nodes"])
def test_the_settings_of_fsdp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = load_config_from_file(str(FOLDER / f"{name}.yaml")).fsdp_config
    for key, value in given.items():  # as `accelerate launch` hands them to the processes
        monkeypatch.setenv(key.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is (name != "fsdp2-qlora")


def test_the_page_on_clusters_names_only_files_that_are_there() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text("utf-8")
    named = set(re.findall(r"([\w\-/.]+\.yaml)", page)) - {"my-recipe.yaml"}
    assert named
    for name in named:
        places = [ROOT / "docs" / name, FOLDER / Path(name).name]
        assert any(place.is_file() for place in places), name
