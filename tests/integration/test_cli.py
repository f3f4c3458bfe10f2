"""The command line: quick help, overrides anywhere, bad input that ends in one line and leaves nothing."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from selective_dpo import __version__
from selective_dpo.cli import VERBS, main
from selective_dpo.config.load import load_recipe
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.run import run as verbs
from selective_dpo.storage import artifacts
from selective_dpo.storage.artifacts import MANIFEST
from tests.fixtures.fork_server import FORKED_WORKERS, ForkServer
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_pairs_file, tiny_recipe

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "pyarrow")
ERROR = "selective-dpo: error: "


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe that works, its model and its pairs, and things that do not."""
    folder = tmp_path_factory.mktemp("things")
    recipe_file(tiny_recipe(folder), folder / "recipe.yaml")
    tiny_model_folder(folder / "no-template", template=None)
    tiny_pairs_file(folder / "chat.jsonl", chat=True)
    lines = (folder / "pairs.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "one.jsonl").write_text(lines[0])
    (folder / "wrong.csv").write_text("question,answer\na,b\n")
    (folder / "empty.jsonl").touch()
    (folder / "pairs.txt").write_text("a")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:20])
    (folder / "file").write_text("not a folder")
    (folder / "no-records").mkdir()
    (folder / "twice.yaml").write_text("name: a\nselect:\n  fraction: 0.5\n  fraction: 0.6\n")
    (folder / "list.yaml").write_text("- name: a\n")
    (folder / "not.yaml").write_text("name: [a\n")
    return folder


def recipe_in(things: Path, folder: Path) -> list[str]:
    """The arguments that run the working recipe into `folder`."""
    return [str(things / "recipe.yaml"), "--output_dir", str(folder / "runs")]


def one_line(capsys: pytest.CaptureFixture[str], arguments: Sequence[object]) -> str:
    """Run the command line, require exit code 2 and exactly one line on stderr, and give its text."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    errors = capsys.readouterr().err
    assert code == 2
    assert errors.startswith(ERROR)
    assert errors.endswith("\n")
    assert errors.count("\n") == 1
    return errors.removeprefix(ERROR).strip()


def require_nothing_half_written(folder: Path) -> None:
    assert not list(folder.rglob(".partial-*"))
    for below in [path for path in folder.rglob("*") if path.is_dir()]:
        # Folders of folders hold stages; whatever holds files is a run's root or a published stage.
        files = [path for path in below.iterdir() if path.is_file()]
        is_run = (below / "config.json").is_file() and (below / "recipe.yaml").is_file()
        is_within_stage = any((above / MANIFEST).is_file() for above in below.parents)
        assert not files or is_run or is_within_stage or (below / MANIFEST).is_file(), below


# --- help and version -------------------------------------------------------------------------------------

ASK_ALL = f"""
import json, sys
from selective_dpo.cli import VERBS, main
loaded = {{}}
asked = [["--help"], ["--version"], [], *([verb, "--help"] for verb in VERBS), ["verify", "/nowhere"]]
for arguments in asked:
    code = main(arguments)
    loaded[" ".join(arguments)] = [code, [name for name in {HEAVY!r} if name in sys.modules]]
print(json.dumps(loaded), file=sys.stderr)
"""


def test_help_and_a_missing_run_load_no_large_library() -> None:
    done = subprocess.run([sys.executable, "-c", ASK_ALL], capture_output=True, text=True, check=True)
    error, facts = done.stderr.splitlines()
    assert error == f"{ERROR}/nowhere is not a run's folder: there is no such folder"
    loaded = json.loads(facts)
    assert loaded.pop("verify /nowhere") == [2, []]
    assert len(loaded) == 3 + len(VERBS)
    assert set(map(str, loaded.values())) == {"[0, []]"}
    assert f"selective-dpo {__version__}\n" in done.stdout
    assert all(f"usage: selective-dpo {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_is_quick(arguments: list[str]) -> None:
    process = subprocess.Popen([sys.executable, "-m", "selective_dpo", *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    # The processor's time, which a busy machine does not stretch.
    assert used.ru_utime + used.ru_stime < 2.0


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)


# --- overrides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "RECIPE", "--select.fraction", "0.25", "--fresh"],
        ["run", "--select.fraction", "0.25", "RECIPE", "--fresh"],
        ["run", "--fresh", "--select.fraction=0.25", "RECIPE"],
        ["run", "--select.fraction=0.9", "--fresh", "RECIPE", "--select.fraction=0.25"],
    ],
)
def test_overrides_stand_before_or_after_the_recipe(
    things: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    calls: list[Any] = []

    def record(verb: str, recipe: Any, **options: Any) -> int:
        calls.append((verb, recipe, options))
        return 0

    monkeypatch.setattr(verbs, "run_verb", record)
    given = [str(things / "recipe.yaml") if word == "RECIPE" else word for word in arguments]
    assert main(given) == 0
    ((verb, recipe, options),) = calls
    assert (verb, recipe.select.fraction) == ("run", 0.25)
    # What several processes are started with is the command as it was given, whatever `sys.argv` is.
    assert options == {"fresh": True, "only": (), "command_line": given}


def test_flags_of_single_stages(things: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(verbs, "run_verb", lambda verb, recipe, **options: calls.append((recipe, options)))
    recipe = str(things / "recipe.yaml")
    assert main(["score", recipe, "--only", "seed41-fold1,seed41-fold0"]) == 0
    assert main(["curriculum", recipe, "--allow-partial", "--name=other", "--output_dir", "x"]) == 0
    assert calls[0][1]["only"] == ("seed41-fold1", "seed41-fold0")
    partial = calls[1][0]
    assert (partial.select.allow_partial, partial.name, partial.output_dir) == (True, "other", "x")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu"], "argument VERB: invalid choice: 'rnu' (choose from 'demo', 'init',"),
        (["run"], "the following arguments are required: RECIPE; see selective-dpo run --help"),
        (["run", "RECIPE", "--bogus"], "unrecognized arguments: --bogus; see selective-dpo run --help"),
        (["run", "RECIPE", "--fres"], "unrecognized arguments: --fres;"),  # no abbreviations
        (["run", "RECIPE", "--only", "x"], "unrecognized arguments: --only x;"),  # of another verb
        (["run", "RECIPE", "--select.fraction"], "--select.fraction needs a value"),
        (["run", "RECIPE", "--model.path", "--fresh"], "--model.path needs a value"),
        (["demo", "--seed", "x"], "argument --seed: invalid int value: 'x'; see selective-dpo demo --help"),
        (["demo", "--select.fraction", "1"], "demo takes no recipe keys, so --select.fraction would have no"),
        (["export", "x", "--out", "y"], "the following arguments are required: --format;"),
        (["export", "x", "--out", "y", "--format", "xml"], "argument --format: invalid choice: 'xml'"),
        (
            ["export", "x", "--out", "y", "--format", "csv", "--pairs", "z"],
            "--pairs has no effect with --format csv; leave it out",
        ),
        (["import-records", "x", "--out", "y", "--data.seed", "1"], "unknown option --data.seed; only --sel"),
    ],
)
def test_a_mistyped_command_is_named(
    things: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    given = [str(things / "recipe.yaml") if word == "RECIPE" else word for word in arguments]
    assert one_line(capsys, given).startswith(expected)


# --- bad input: the recipe, or what it names --------------------------------------------------------------


def data(name: str) -> Callable[[Path], list[object]]:
    return lambda things: ["--data.train.0.path", things / name]


def words(*given: str) -> Callable[[Path], list[object]]:
    return lambda things: list(given)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (words("--select.fraction", "1.7"), "select.fraction is 1.7, but must be above 0 and at most 1"),
        (
            words("--select.fractoin", "0.5"),
            "select.fractoin: unknown key (given 0.5); did you mean 'fraction'",
        ),
        (words("--trainer.beta", "0.5"), "trainer: unknown key"),
        (words("--select.threshold", "0.7"), "select: threshold works only with rule 'below'"),
        (words("--score.trainer.learning_rat", "1"), "did you mean 'learning_rate'?"),
        (words("--score.trainer.seed", "1"), "score.trainer.seed cannot be set: score.seeds decides"),
        (words("--data.train.0.split", "train"), "is a plain file: split would have no effect; remove it"),
        (
            words("--data.empty_system_message", "true"),
            "empty_system_message has no effect: the data are plain",
        ),
        (words("--train.trainer.eval_steps", "5"), "eval_steps has no effect without"),
        (words("--evaluate.generation.prompts", "3"), "there are no prompts: give data.test or"),
        (
            words("--evaluate.generation.source", "x.jsonl"),
            "has no effect without evaluate.generation.prompts",
        ),
        (
            words("--evaluate.generation", "{prompts: 3, source: nowhere.jsonl}"),
            "evaluate.generation.source: no file nowhere.jsonl",
        ),
        (
            words("--evaluate.generation", "{prompts: 3, source: x, temperature: 0, samples: 2}"),
            "generation.samples above 1 has no effect at temperature 0",
        ),
        (words("--evaluate.controls.selected.rule", "all"), "the name 'selected' is taken; choose another"),
        (words("--evaluate.controls", "{'../x': {rule: all}}"), "'../x' cannot be a name; use letters"),
        (
            words("--model.path", "/nowhere/model"),
            "'/nowhere/model': there is no such folder; check the path",
        ),
        (
            words("--model.path", "nobody/nothing"),
            "check the name, your access and the network, or name a local",
        ),
        (
            lambda things: ["--model.path", things / "no-records"],
            "the folder needs config.json, the tokenizer",
        ),
        (
            words("--model.chat_template", "chatlm"),
            "chat_template 'chatlm' is none of chatml, gemma-system",
        ),
        (data("absent.jsonl"), "no file or folder"),
        (
            data("wrong.csv"),
            "no row has the columns of a pair; found are question, answer; wanted are chosen",
        ),
        (data("empty.jsonl"), "has no rows"),
        (data("pairs.txt"), "cannot tell its format; the name has to end in .jsonl,"),
        (data("cut.jsonl.gz"), "cannot be read"),
        (data("no-records"), "is not a folder of datasets' save_to_disk; name a file in it instead"),
        (data("one.jsonl"), "1 pairs of 1 prompts are left of 1 rows, and at least 2 of each are needed"),
        (words("--data.max_pairs", "1"), "at least 2 of each are needed (1 kept, 23 not sampled); mend"),
        (
            lambda things: [*data("chat.jsonl")(things), "--model.path", things / "no-template"],
            "the tokenizer has no chat template; set model.chat_template to chatml",
        ),
        (words("--name", "a/b"), 'name is "a/b", but must fit its meaning: Name of the run\'s folder'),
    ],
)
def test_a_mistake_in_the_recipe_leaves_no_folder(
    things: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: Callable[[Path], list[object]],
    expected: str,
) -> None:
    assert expected in one_line(capsys, ["run", *recipe_in(things, tmp_path), *extra(things)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompts", ["ab", "abc", "a" * 60 + "bc"], ids=["two", "three", "lopsided"])
def test_folds_of_next_to_no_prompts_are_refused_unless_the_recipe_allows_them(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompts: str
) -> None:
    rows = [{"prompt": p, "chosen": f"+{n}", "rejected": f"-{n}"} for n, p in enumerate(prompts)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = [*recipe_in(things, tmp_path / "runs"), "--data.train.0.path", tmp_path / "few.jsonl"]
    for verb in ("plan", "run"):
        message = one_line(capsys, [verb, *recipe])
        assert "seed41-fold0: its fold has" in message
        assert "fewer than score.min_fold_prompts = 5" in message
    allowed = ["--score.min_fold_prompts", "1", "--score.evaluations", "1"]
    assert main([str(word) for word in ["plan", *recipe, *allowed]]) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent.yaml", "no recipe at"),
        ("twice.yaml", "twice.yaml, line 4: key 'fraction' stands twice"),
        ("list.yaml", "holds a list, not a recipe's keys"),
        ("not.yaml", "not.yaml, line 2: "),
        ("no-records", "cannot read the recipe"),
        ("pairs.jsonl", "pairs.jsonl, line 2: "),
    ],
)
@pytest.mark.parametrize("verb", ["run", "score", "curriculum", "train", "evaluate", "report", "plan"])
def test_what_is_no_recipe_is_named_by_every_verb(
    things: Path, capsys: pytest.CaptureFixture[str], verb: str, name: str, expected: str
) -> None:
    assert expected in one_line(capsys, [verb, things / name])
    assert not (things / "runs").exists()


@pytest.mark.parametrize("output_dir", ["file", "file/deeper"])
def test_where_no_folder_can_be_made(
    things: Path, capsys: pytest.CaptureFixture[str], output_dir: str
) -> None:
    message = one_line(capsys, ["run", things / "recipe.yaml", "--output_dir", things / output_dir])
    assert message.startswith(str(things / "file"))
    assert "check the path, its permissions and the room on the disk" in message
    assert (things / "file").read_text() == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    message = one_line(capsys, ["run", *recipe_in(things, tmp_path)])
    tmp_path.chmod(0o700)
    assert "Permission denied" in message
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, manifest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(artifacts, "_write_manifest", full)
    assert "No space left on device" in one_line(capsys, ["run", *recipe_in(things, tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_stages_without_those_before_them(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_in(things, tmp_path)
    assert one_line(capsys, ["report", *recipe]).startswith("no curriculum at ")
    assert "run `selective-dpo score` first" in one_line(capsys, ["curriculum", *recipe, "--allow-partial"])
    unknown = one_line(capsys, ["score", *recipe, "--only", "seed41-fold0,seed7-fold0"])
    assert unknown == "no scorer named seed7-fold0; this recipe has seed41-fold0, seed41-fold1"
    assert list(tmp_path.iterdir()) == []


def test_export_and_import_of_nothing(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    for arguments, expected in (
        (["export", tmp_path, "--format", "csv", "--out", out], "no curriculum at "),
        (
            ["import-records", things / "no-records", "--out", out],
            "holds no seed41_step00.csv or learning_rec",
        ),
        (["import-records", things / "nowhere", "--out", out], "does not exist: give a CSV or Parquet file"),
        (
            ["import-records", things, "--out", out, "--select.fraction=1.7"],
            "select.fraction is 1.7, but must",
        ),
    ):
        assert expected in one_line(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_set_of_records_is_refused_or_accepted_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "records", tmp_path / "out"
    folder.mkdir()
    for seed, step in ((41, 0), (41, 1), (42, 0)):
        rows = "".join(f"id{number},0.{number}\n" for number in range(1, 5))
        (folder / f"seed{seed}_step{step:02d}.csv").write_text(rows)
    refused = one_line(capsys, ["import-records", folder, "--out", out])
    assert "lacks seed 42 step 1; add it, or accept this with --allow-partial" in refused
    assert not out.exists()
    assert main(["import-records", str(folder), "--out", str(out), "--allow-partial"]) == 0
    assert len(Curriculum.load(out).order) == 2  # the easier half of four


# --- a run that is there ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(things: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `runs/tiny` has been trained; copied for each test that changes it."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", *recipe_in(things, folder)]) == 0
    return folder


@pytest.fixture
def trained(things: Path, finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert main(["train", *recipe_in(things, tmp_path)]) == 0  # it is done, and knows where it lies now
    return tmp_path


def written_at(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_mistake_that_was_mended_is_no_changed_recipe(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_in(things, tmp_path)
    # 24 pairs, halves of 12, batches of 4: three steps. Seen when the pairs are prepared, which stay.
    message = one_line(capsys, ["score", *recipe, "--score.evaluations", "4"])
    assert "3 optimizer steps have no room for 4 evaluations: lower score.evaluations or" in message
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["pairs"]
    require_nothing_half_written(tmp_path)
    one_line(capsys, ["score", *recipe, "--data.train.0.path", things / "wrong.csv"])
    assert main(["score", *recipe, "--only", "seed41-fold0"]) == 0
    assert one_line(capsys, ["score", *recipe, "--score.evaluations", "3"]).startswith(str(tmp_path))


def test_a_changed_recipe_is_refused_and_fresh_redoes_only_what_it_touches(
    things: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, recipe = trained / "runs" / "tiny", recipe_in(things, trained)
    before = written_at(root)
    changed = ["train", *recipe, "--select.fraction", "0.25", "--train.trainer.learning_rate=0.02"]
    message = one_line(capsys, changed)
    assert "select.fraction: null -> 0.25" in message
    assert "train.trainer.learning_rate: 0.01 -> 0.02" in message
    assert "--fresh" in message
    assert written_at(root) == before
    assert main([*changed, "--fresh"]) == 0
    after = written_at(root)
    redone = {name.split("/")[0] for name in after if after[name] != before.get(name)}
    assert redone == {"config.json", "recipe.yaml", "curriculum.json", "curriculum.parquet", "policy"}
    assert len(Curriculum.load(root).order) == 6  # a quarter of 24
    assert load_recipe(root / "recipe.yaml").select.fraction == 0.25
    require_nothing_half_written(trained)


def test_the_same_recipe_again_does_nothing(things: Path, trained: Path) -> None:
    before = written_at(trained)
    assert main(["train", *recipe_in(things, trained)]) == 0
    assert written_at(trained) == before


def test_a_curriculum_for_other_data_is_refused(
    things: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--name", "other", "--data.train.0.path", things / "chat.jsonl"]
    recipe = [str(word) for word in (*recipe_in(things, trained), *other)]
    assert main(["score", *recipe]) == 0
    root, out = trained / "runs" / "tiny", trained / "out.jsonl"
    export = [
        "export",
        root,
        "--format",
        "jsonl",
        "--out",
        out,
        "--pairs",
        trained / "runs" / "other" / "pairs",
    ]
    message = one_line(capsys, export)
    assert message.startswith("12 of 12 pairs of the curriculum are not among these pairs: ")
    assert message.endswith("pass the pairs that it was made from")
    # Laid into the other run, it is not taken for that run's own, and no page is made of the two.
    for name in ("curriculum.parquet", "curriculum.json"):
        shutil.copy(root / name, trained / "runs" / "other" / name)
    assert "curriculum and pairs.parquet: 24 of 24 ids are missing" in one_line(capsys, ["report", *recipe])
    assert main(["curriculum", *recipe]) == 0
    assert set(Curriculum.load(trained / "runs" / "other").pair_ids).isdisjoint(
        Curriculum.load(root).pair_ids
    )
    assert not out.exists()
    require_nothing_half_written(trained)


def test_damage_is_found_and_made_good(things: Path, trained: Path) -> None:
    records = trained / "runs" / "tiny" / "scores" / "seed41-fold0" / "records.parquet"
    whole = records.read_bytes()
    records.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    before = written_at(trained)
    assert main(["curriculum", *recipe_in(things, trained)]) == 0
    after = written_at(trained)
    assert records.read_bytes() == whole  # the same numbers: the curriculum's key is that of before
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name.rsplit("/", maxsplit=1)[0] for name in changed} == {"runs/tiny/scores/seed41-fold0"}


def test_export_refuses_what_is_there_and_texts_that_are_not(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = trained / "runs" / "tiny", trained / "out.csv"
    export = ["export", root, "--format", "csv", "--out", out]
    assert main([str(word) for word in export]) == 0
    assert "12 selected of 24 pairs" in capsys.readouterr().out
    assert "exists: choose another path, or pass --overwrite" in one_line(capsys, export)
    assert main([str(word) for word in [*export, "--overwrite"]]) == 0
    bare = Curriculum.load(root).save(trained / "bare.parquet")
    for kind in ("jsonl", "datasets"):
        arguments = ["export", bare, "--format", kind, "--out", trained / kind]
        assert "needs the pairs' texts: pass --pairs" in one_line(capsys, arguments)
        assert not (trained / kind).exists()
    assert "is not complete" in one_line(capsys, [*arguments, "--pairs", trained / "nowhere"])
    beneath = ["export", root, "--format", "parquet", "--out", out / "deeper.parquet"]
    assert one_line(capsys, beneath).startswith(str(out))


# --- as a program -----------------------------------------------------------------------------------------


def run_program(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selective_dpo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_program_ends_with_code_2_and_one_line(things: Path) -> None:
    done = run_program("run", things / "recipe.yaml", "--select.fraction", "1.7")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(ERROR)
    assert done.stderr.count("\n") == 1


def test_a_failure_in_a_worker_process_is_one_line(things: Path, tmp_path: Path, server: ForkServer) -> None:
    # A step so large that weights, and with them the losses, overflow.
    extra = [
        "--score.trainer.learning_rate",
        "1e30",
        "--score.trainer.max_grad_norm",
        "0",
        "--launch.workers",
        "2",
    ]
    started = server.start("score", *recipe_in(things, tmp_path), *extra, environment=FORKED_WORKERS)
    _, errors = started.communicate()
    assert started.returncode == 2
    # By then a scorer may have said something about its work: the error is the last line, and the only one.
    last = errors.splitlines()[-1]
    assert last.startswith(ERROR + "seed41-fold")
    assert "is not finite" in last
    assert errors.count("error") == 1
    assert "Traceback" not in errors
    assert "Warning" not in errors
    require_nothing_half_written(tmp_path)
    # The folder itself may stay: neither of two workers that fail at once sees that it is the last in it.
    assert not list((tmp_path / "runs" / "tiny").glob("scores/*"))


BROKEN = """
import sys
from selective_dpo import cli

def broken(*_):
    raise {error}

cli.read_recipe = broken
sys.argv = ["selective-dpo", "run", "x"]
cli.entry_point()
"""


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        ("KeyError('ours')", 1, "KeyError: 'ours'"),
        ("FileNotFoundError(2, 'No such file', 'x')", 1, "FileNotFoundError: [Errno 2] No such file: 'x'"),
        ("KeyboardInterrupt", 130, "selective-dpo: interrupted by Ctrl-C: run the same command to go on"),
    ],
)
def test_what_is_our_fault_shows_its_traceback(error: str, code: int, last: str) -> None:
    program = BROKEN.format(error=error)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.strip().rpartition("\n")[2] == last
    assert ("Traceback" in done.stderr) == (code == 1)


def test_a_plan_as_json(things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(things, tmp_path)
    assert main(["plan", *recipe, "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(["plan", *recipe, "--json", str(tmp_path / "plan.json")]) == 0
    assert not capsys.readouterr().out.startswith("{")
    assert set(json.loads((tmp_path / "plan.json").read_text("utf-8"))) == set(printed)
