"""A command's output: terminals of few letters, readers that leave, full and closed streams; and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selective_dpo.cli import main
from tests.fixtures.fork_server import REPOSITORY
from tests.fixtures.models import recipe_file, tiny_recipe
from tests.fixtures.process_tree import descendants, wait_until_gone

WORDS = "é ← 中 😀"
"""In every prompt: letters that ASCII does not have."""
ESCAPED = r"\xe9 \u2190 \u4e2d \U0001f600"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its run up to the curriculum; a damaged copy of its facts beside it."""
    folder = tmp_path_factory.mktemp("place")
    rows = [{"prompt": f"{n} {WORDS}", "chosen": f"+{n}", "rejected": f"-{n}"} for n in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe_file(tiny_recipe(folder, score={"evaluations": 1}), folder / "recipe.yaml")
    assert main(["curriculum", str(folder / "recipe.yaml")]) == 0
    return folder


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`command` in bash, `selective-dpo` being this Python's; the code is the last one that is not 0."""
    text = f"set -o pipefail; {command.replace('selective-dpo', f'{sys.executable} -m selective_dpo')}"
    return subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="strict",
        check=False,
        env={**os.environ, **environment},
        cwd=REPOSITORY,
    )


# --- letters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, ESCAPED),
        ({"LC_ALL": "C"}, WORDS),  # which Python takes for UTF-8, if it may
    ],
)
def test_letters_that_cannot_be_written_are_escaped(
    place: Path, environment: dict[str, str], shown: str
) -> None:
    done = shell(f"selective-dpo inspect {place / 'runs' / 'tiny'} --easiest 12", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^    \d+ (.*)$", done.stdout, re.MULTILINE) == 12 * [shown]


def test_an_error_is_escaped_too(tmp_path: Path) -> None:
    done = shell(f"selective-dpo verify {tmp_path}/é", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and rf"{tmp_path}/\xe9 is not a run's folder" in done.stderr


# --- readers ---------------------------------------------------------------------------------------------

LONG = """
import sys
from selective_dpo import cli

def print_much(options, overrides):
    for number in range(100_000):  # far more than a pipe holds
        print("line", number)

cli.VERBS["verify"] = cli.VERBS["verify"]._replace(execute=print_much)
sys.argv = ["selective-dpo", "verify", "x"]
cli.entry_point()
"""


def test_a_command_whose_reader_has_gone_ends_quietly(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(LONG)
    done = shell(f"{sys.executable} {program} | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (141, "line 0\n", "")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no device that is always full")
def test_a_full_output_is_one_line(place: Path, tmp_path: Path) -> None:
    export = f"selective-dpo export {place / 'runs' / 'tiny'} --format csv --out {tmp_path / 'x.csv'}"
    done = shell(f"{export} > /dev/full")
    assert done.returncode == 2
    assert done.stderr == (
        "selective-dpo: error: No space left on device; check the path, its permissions and the room on the "
        "disk\n"
    )


def test_closed_streams_change_nothing(place: Path, tmp_path: Path) -> None:
    done = shell(f"selective-dpo score {place / 'recipe.yaml'} --output_dir {tmp_path} <&- >&- 2>&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "tiny" / "scores").iterdir()) == [
        "seed41-fold0",
        "seed41-fold1",
    ]


# --- Ctrl-C ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(("key", "many"), [("workers", 2), ("processes", 2)])
def test_ctrl_c_is_one_line_and_takes_the_others_along(
    place: Path, tmp_path: Path, key: str, many: int
) -> None:
    """As a terminal sends it, to the command and to its children: exit code 130, one line, nobody is left,
    and the repeated command goes on from a checkpoint of each scorer that had one."""
    words = [
        "score",
        str(place / "recipe.yaml"),
        "--output_dir",
        str(tmp_path),
        "--launch.checkpoint_steps",
        "1",
    ]
    words += [f"--launch.{key}", str(many), "--score.trainer.num_train_epochs", "200"]
    trainings = many if key == "workers" else 1
    command = subprocess.Popen(
        [sys.executable, "-m", "selective_dpo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # In a shell's background a test session ignores it, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoints = tmp_path / "tiny" / "checkpoints"
    until = time.monotonic() + 100
    while len({path.parent.name for path in checkpoints.glob("*/step-*")}) < trainings:
        assert command.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    children = descendants(command.pid)
    assert len(children) >= many - 1
    os.killpg(command.pid, signal.SIGINT)
    output, errors = command.communicate(timeout=60)
    assert command.returncode == 130, errors
    *others, last = errors.splitlines()
    assert last == "selective-dpo: interrupted by Ctrl-C: run the same command to go on"
    if key == "workers":  # PyTorch's launcher has words of its own
        assert all(line.startswith("log-probs: ") for line in others), errors
    else:
        assert any("interrupted by SIGTERM at step" in line for line in others), errors
    assert "Traceback" not in output
    wait_until_gone(children, seconds=5.0)
    # What was done is there to go on from.
    assert len(list(checkpoints.glob("*/step-*"))) >= trainings
