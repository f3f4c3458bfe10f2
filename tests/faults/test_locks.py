"""Row 12 of the fault matrix: two launches on one run directory, two writers of one artifact, two ranks.

All of it with real processes. One that has to be caught in the act is stopped (SIGSTOP) while it holds what
it holds, and goes on when the others have had their answer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selective_dpo.errors import BusyError
from selective_dpo.storage.artifacts import publish_folder, verify_folder
from selective_dpo.storage.locks import holding, lock_beside, run_lock
from tests.fixtures import confined
from tests.fixtures.fork_server import Forked, ForkServer
from tests.fixtures.models import recipe_file, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0
"""Seconds for a process to do what is waited for, on a busy machine."""

Process = subprocess.Popen[str] | Forked


def wait_for(condition: Callable[[], bool], process: Process | None = None) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.005)


class Started:
    """Processes that are killed at the end, whatever happened."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self._all: list[Process] = []

    def python(self, code: str, *arguments: object) -> subprocess.Popen[str]:
        return self.start(["-c", textwrap.dedent(code), *map(str, arguments)])

    def command(self, *arguments: str | Path) -> Forked:
        process = self._server.start(*arguments)
        self._all.append(process)
        return process

    def start(self, arguments: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._all.append(process)
        return process

    def end(self) -> None:
        for process in self._all:
            process.kill()
            process.communicate()


@pytest.fixture
def started(server: ForkServer) -> Iterator[Started]:
    processes = Started(server)
    yield processes
    processes.end()


HOLD = """
    import sys
    from pathlib import Path
    from selective_dpo.storage.locks import holding
    with holding(Path(sys.argv[1]), what="it", shared="shared" in sys.argv[2:]):
        print("held", flush=True)
        sys.stdin.readline()
"""


def holder(started: Started, lock: Path, *how: str) -> subprocess.Popen[str]:
    process = started.python(HOLD, lock, *how)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def let_go(process: subprocess.Popen[str]) -> None:
    process.communicate("\n")
    assert process.returncode == 0


# --- one lock ---------------------------------------------------------------------------------------------


@pytest.mark.fault(row=12)
def test_the_second_is_told_who_holds_it_since_when_and_with_which_command(
    started: Started, tmp_path: Path
) -> None:
    lock = tmp_path / "runs" / "x" / ".lock"
    first = holder(started, lock)
    with pytest.raises(BusyError) as refused, holding(lock, what="the run x"):
        pass
    message = str(refused.value)
    assert message.startswith(
        f"the run x is in use by process {first.pid} on {socket.gethostname()} since 20"
    )
    assert f"(-c {lock})" in message, "the command as it was given"
    assert "\n" not in message
    let_go(first)
    assert list(tmp_path.iterdir()) == [], "the lock file goes, and the folders that were made for it"
    with holding(lock, what="the run x"):
        assert lock.read_text().startswith(f"process {os.getpid()} on {socket.gethostname()} since 20")


FORKING = """
    import os, sys, time
    from pathlib import Path
    from selective_dpo.storage.locks import holding
    with holding(Path(sys.argv[1]), what="it"):
        child = os.fork()
        if child == 0:
            time.sleep(600)
        print(child, flush=True)
        time.sleep(600)
"""


@pytest.mark.fault(row=12)
def test_the_lock_of_a_killed_process_is_free_at_once(started: Started, tmp_path: Path) -> None:
    # Also where a child outlives it, as the workers of a data loader do for some seconds.
    first = started.python(FORKING, tmp_path / ".lock")
    assert first.stdout is not None
    child = int(first.stdout.readline())
    try:
        first.kill()
        first.wait()
        os.kill(child, 0)  # it is alive
        with holding(tmp_path / ".lock", what="it"):
            written = (tmp_path / ".lock").read_text()
        assert written.startswith(f"process {os.getpid()} "), "in place of the killed process's"
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.fault(row=12)
@pytest.mark.parametrize(
    ("first", "second", "is_let_in"),
    [
        ("alone", "alone", False),
        ("alone", "shared", False),
        ("shared", "alone", False),
        ("shared", "shared", True),
    ],
)
def test_who_may_be_in_beside_whom(
    started: Started, tmp_path: Path, first: str, second: str, is_let_in: bool
) -> None:
    lock = tmp_path / "x" / ".lock"
    other = holder(started, lock, first)
    if is_let_in:
        with holding(lock, what="it", shared=True):
            let_go(other)
            third = started.python(HOLD, lock)
            _, errors = third.communicate(timeout=PATIENCE)
            assert f"it is in use by process {os.getpid()} " in errors, "it is still shared"
    else:
        with (
            pytest.raises(BusyError, match=f"process {other.pid} "),
            holding(lock, what="it", shared=second == "shared"),
        ):
            pass
        other.kill()
        other.wait()
    with holding(lock, what="it"):
        pass
    assert list(tmp_path.glob("x/.*")) == []


CONTEND = """
    import random, sys, time
    from pathlib import Path
    from selective_dpo.errors import BusyError
    from selective_dpo.storage.locks import holding
    lock, counter, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    random.seed(sys.argv[4])
    done = 0
    while done < times:
        try:
            with holding(lock, what="it"):
                count = int(counter.read_text())
                time.sleep(random.random() * 1e-3)
                counter.write_text(str(count + 1))
                done += 1
        except BusyError:
            time.sleep(random.random() * 1e-3)
"""


@pytest.mark.fault(row=12, trials=90)
def test_never_two_at_a_time_though_the_file_comes_and_goes(started: Started, tmp_path: Path) -> None:
    # A counter that is read, and written a little later: two at a time would lose some of the 3 x 30.
    counter = tmp_path / "counter"
    counter.write_text("0")
    lock = tmp_path / "made" / "for" / "it" / ".lock"
    others = [started.python(CONTEND, lock, counter, 30, seed) for seed in range(3)]
    for other in others:
        _, errors = other.communicate(timeout=PATIENCE)
        assert other.returncode == 0, errors
    assert counter.read_text() == "90"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["counter"]


def test_what_a_thread_holds_it_may_enter_again_and_another_thread_may_not(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    refused: list[str] = []

    def other_thread() -> None:
        try:
            with holding(lock, what="it"):
                pass
        except BusyError as error:
            refused.append(str(error))

    with holding(lock, what="it"):
        with holding(lock, what="it"):
            pass
        assert lock.is_file()
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()} " in refused[0]


def test_one_folder_by_two_names_is_one(started: Started, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    holder(started, tmp_path / "real" / ".lock")
    with pytest.raises(BusyError), holding(tmp_path / "link" / ".lock", what="it"):
        pass


def test_a_holder_that_is_not_written_down_yet_is_another_process(started: Started, tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    holder(started, lock)
    lock.write_text("")
    with pytest.raises(BusyError, match="it is in use by another process: wait"), holding(lock, what="it"):
        pass


def test_a_file_system_without_locks_is_said_to_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    told = pytest.warns(RuntimeWarning, match="has no locks.*would not be noticed")
    with told, holding(tmp_path / ".lock", what="it"):
        entered = True
    assert entered


def test_where_nothing_can_be_written_nothing_needs_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may always write
    with holding(tmp_path / ".lock", what="it"):
        assert list(tmp_path.iterdir()) == []


# --- one artifact -----------------------------------------------------------------------------------------

PUBLISH = """
    import sys
    from pathlib import Path
    from selective_dpo.storage.artifacts import publish_folder
    with publish_folder(Path(sys.argv[1]), kind="test", key="first") as partial:
        (partial / "a").write_text("by the first")
        print(partial, flush=True)
        sys.stdin.readline()
"""


@pytest.mark.fault(row=12)
@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_a_second_writer_is_refused_and_the_first_ones_files_stay(
    started: Started, tmp_path: Path, end: str
) -> None:
    folder = tmp_path / "scores" / "seed41-fold0"
    first = started.python(PUBLISH, folder)
    assert first.stdout is not None
    partial = Path(first.stdout.readline().strip())
    refused = pytest.raises(BusyError, match=f"seed41-fold0 is in use by process {first.pid} ")
    with refused, publish_folder(folder, kind="test", key="second") as mine:
        (mine / "a").write_text("by the second")
    assert (partial / "a").read_text() == "by the first"
    if end == "finishes":
        let_go(first)
        assert verify_folder(folder).key == "first"
    else:
        first.kill()
        first.wait()
        assert partial.is_dir()
        with publish_folder(folder, kind="test", key="second") as mine:
            (mine / "a").write_text("by the second")
        assert verify_folder(folder).key == "second"
    assert not partial.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["seed41-fold0"]


# --- one run, through the command line --------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pairs, and a run with its pairs and reference made."""
    from selective_dpo.run.run import open_run
    from selective_dpo.run.stages import bring_up

    folder = tmp_path_factory.mktemp("locks")
    bring_up(open_run(recipe_of(folder, folder / "runs"), say=lambda line: None), "reference")
    return folder


def recipe_of(inputs: Path, runs: Path) -> object:
    data = {"train": [{"path": str(inputs / "pairs.jsonl")}]}
    return tiny_recipe(inputs, output_dir=str(runs), data=data)


class TinyRun:
    """A run of its own, with pairs and reference already there."""

    def __init__(self, prepared: Path, folder: Path) -> None:
        shutil.copytree(prepared / "runs", folder / "runs")
        self.recipe = recipe_file(recipe_of(prepared, folder / "runs"), folder / "recipe.yaml")  # type: ignore[arg-type]
        self.root = folder / "runs" / "tiny"
        self.scorers = [self.root / "scores" / f"seed41-fold{fold}" for fold in (0, 1)]


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> TinyRun:
    return TinyRun(prepared, tmp_path)


def stopped(process: Process, lock: Path) -> None:
    """Stop the process as soon as it holds the lock file."""
    wait_for(lambda: lock.is_file() and lock.read_text().endswith("\n"), process)
    process.send_signal(signal.SIGSTOP)
    assert lock.is_file()


def require_one_line(process: Process, *words: str, after: str = "") -> None:
    """Exit code 2 and one line on stderr; `after` what it had to say on its way there, if anything."""
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, errors
    *others, error = errors.splitlines()
    assert all(after and line.startswith(after) for line in others), errors
    assert error.startswith("selective-dpo: error: ")
    for word in words:
        assert word in error


def require_done(process: Process) -> None:
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.fault(row=12)
@pytest.mark.parametrize("second", [["run"], ["score", "--only", "seed41-fold1"]], ids=" ".join)
def test_the_second_launch_leaves_with_one_line(started: Started, run: TinyRun, second: list[str]) -> None:
    first = started.command("score", run.recipe)
    stopped(first, run_lock(run.root))
    before = sorted(run.root.rglob("*"))
    verb, *options = second
    require_one_line(
        started.command(verb, run.recipe, *options),
        f"the run {run.root} is in use by process {first.pid} on {socket.gethostname()} since ",
        f"score {run.recipe}): wait until that ends, or end it, and run this again",
    )
    assert sorted(run.root.rglob("*")) == before, "it touched nothing"
    require_done(first)
    assert all((scorer / "manifest.json").is_file() for scorer in run.scorers)
    assert not list(run.root.rglob(".lock*"))


@pytest.mark.slow
@pytest.mark.fault(row=12, trials=4)
def test_jobs_of_an_array_work_side_by_side_and_only_one_on_each_scorer(
    started: Started, run: TinyRun
) -> None:
    first = started.command("score", run.recipe, "--only", "seed41-fold0")
    stopped(first, lock_beside(run.scorers[0]))
    held = f"process {first.pid} "
    require_one_line(
        started.command("score", run.recipe, "--only", "seed41-fold0"), str(run.scorers[0]), held
    )
    require_one_line(started.command("run", run.recipe), f"the run {run.root} is in use by {held}")
    beside = started.command("score", run.recipe, "--only", "seed41-fold1")
    require_done(beside)
    assert not run.scorers[0].exists(), "the first is still stopped"
    require_done(first)
    for scorer in run.scorers:
        verify_folder(scorer)
    require_done(started.command("curriculum", run.recipe))


@pytest.mark.slow
@pytest.mark.fault(row=12)
def test_a_worker_that_outlived_its_command_keeps_its_scorer_and_the_others_are_measured(
    started: Started, run: TinyRun
) -> None:
    left = holder(started, lock_beside(run.scorers[0]))
    named = f"is in use by process {left.pid} "
    require_one_line(started.command("score", run.recipe), "seed41-fold0: ", named, after="log-probs: ")
    assert not run.scorers[0].exists()
    verify_folder(run.scorers[1])
    let_go(left)
    require_done(started.command("score", run.recipe))


def test_files_that_a_killed_command_was_writing_are_removed_by_the_next(run: TinyRun) -> None:
    from selective_dpo.run.folder import alone

    leftovers = [
        run.root / ".partial-config.json-01234567",
        run.root / "controls" / "a" / ".partial-x-0123abcd",
    ]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (run.root / ".partial-policy-01234567").mkdir()  # somebody may be filling it: under a lock of its own
    with alone(run.root):
        pass
    assert not any(path.exists() for path in leftovers)
    assert (run.root / ".partial-policy-01234567").is_dir()


# --- several processes of one command ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault(row=12)
def test_two_processes_are_refused_together(started: Started, run: TinyRun, server: ForkServer) -> None:
    first = holder(started, run_lock(run.root))
    ended = server.run_ranks(2, "score", run.recipe)  # neither waits for the other for ever
    assert [each.code for each in ended] == [2, 2], ended
    own_lines = [
        line for each in ended for line in each.errors.splitlines() if "selective-dpo: error:" in line
    ]
    assert len(own_lines) == 1 and f"is in use by process {first.pid} " in own_lines[0]
    assert not any(scorer.exists() for scorer in run.scorers)


@pytest.mark.slow
@pytest.mark.fault(row=12)
def test_only_the_main_process_writes(run: TinyRun, server: ForkServer) -> None:
    # From the pairs to the report: for the second process the run's folder is read-only.
    shutil.rmtree(run.root)
    run.root.mkdir()
    command = ("-m", confined.MODULE, "only-the-main-process-writes", "run", run.recipe)
    ended = server.run_ranks(2, *command, environment={confined.READ_ONLY: str(run.root)})
    if ended[1].code == confined.NOT_HERE:
        pytest.skip("no mount namespaces here, in which the run could be read-only for one process")
    assert [each.code for each in ended] == [0, 0], ended
    for name in ("pairs", "reference", "scores/seed41-fold0", "scores/seed41-fold1", "policy", "evaluation"):
        verify_folder(run.root / name)
    assert (run.root / "report.html").is_file()
    assert not list(run.root.rglob(".*"))
