"""The command line: `selective-dpo VERB ...` parses its options, calls one function and prints the result.

From top to bottom: the entry point and its exit codes, how a command line is parsed, each verb, and the table
of verbs. Each verb imports what it needs when it is called: `--help` must not wait for torch.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from selective_dpo import __version__
from selective_dpo.distributed.signals import (
    REMEDY,
    ask_to_be_repeated,
    end_without_supervisor,
    stopping_at_once,
)
from selective_dpo.errors import (
    ArtifactError,
    BusyError,
    ConfigError,
    Interrupted,
    SelectiveDPOError,
    disk_fault,
)

if TYPE_CHECKING:
    from selective_dpo.config import Recipe
    from selective_dpo.report.inspect import Wanted
    from selective_dpo.run.folder import RunDirectory

Overrides = Sequence[tuple[str, str]]
"""Recipe keys given as options, with their values as text."""

CTRL_C, CLOSED_PIPE = 130, 141
"""Exit codes as shells have them: 128 and the number of SIGINT and of SIGPIPE."""


def entry_point() -> None:
    """The installed command."""
    end_without_supervisor()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python has it for standard error
    code = main(sys.argv[1:])
    try:
        print(end="", flush=True)
    except OSError:  # `main` has met it; Python would print it again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def main(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit code.

    0: done. 2: a mistake that the user can mend, named in one line. 75: stopped by SIGTERM, and 130: by
    Ctrl-C; the same command goes on later. 141: whoever read the output has closed the pipe. An error of this
    package is raised.
    """
    is_main_process = os.environ.get("RANK", "0") == "0"
    try:
        with stopping_at_once(forgetting=True):
            try:
                code = _execute(list(arguments))
            except SystemExit as shown:  # by argparse, after --help or --version
                code = int(shown.code or 0)
            print(end="", flush=True)  # an output that cannot be written is an error of this command
            return code
    except BrokenPipeError:
        return CLOSED_PIPE
    except Interrupted as stop:
        ask_to_be_repeated()
        if is_main_process:
            print(f"selective-dpo: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        if is_main_process:
            print(f"selective-dpo: interrupted by Ctrl-C: {REMEDY}", file=sys.stderr)
        return CTRL_C
    except SelectiveDPOError as error:
        if isinstance(error, BusyError) and not is_main_process:
            return 2  # all processes know; the main one says it
        message, code = " ".join(str(error).split()), error.exit_code
    except Exception as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        message, code = fault, 2
    # Names and values come from other people's files, and some characters are commands to a terminal.
    escaped = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in message)
    print(f"selective-dpo: error: {escaped}", file=sys.stderr)
    return code


# --- parsing ----------------------------------------------------------------------------------------------

KEYS_WITHOUT_A_BLOCK = ("name", "output_dir", "curriculum")
"""Recipe keys that have no dot, by which the others are told from a verb's own options."""


class Parser(argparse.ArgumentParser):
    """Argument errors are this package's own: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError`."""
        raise ConfigError(f"{message}; see {self.prog.split(' VERB')[0]} --help")


def _execute(arguments: list[str]) -> int:
    parser = Parser(
        prog="selective-dpo",
        description="How difficult is each preference pair for your model? Train DPO on the easier ones.",
        epilog="verbs:\n" + "\n".join(f"  {name:<18}{verb.help}" for name, verb in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="selective-dpo VERB ...   (selective-dpo VERB --help for its options)",
    )
    parser.add_argument("--version", action="version", version=f"selective-dpo {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="see below")
    name = parser.parse_args(arguments[:1] or ["--help"]).verb
    without_a_block = KEYS_WITHOUT_A_BLOCK if VERBS[name].takes_recipe_keys else ()
    overrides, others = _split_overrides(arguments[1:], without_a_block)
    if overrides and not VERBS[name].takes_recipe_keys:
        raise ConfigError(f"{name} takes no recipe keys, so --{overrides[0][0]} would have no effect")
    options = verb_parser(name).parse_args(others)
    if getattr(options, "allow_partial", False):
        overrides = [*overrides, ("select.allow_partial", "true")]
    options.command_line = arguments  # for a verb that starts itself again in several processes
    return VERBS[name].execute(options, overrides) or 0


def verb_parser(name: str) -> Parser:
    """The parser of one verb's own options; it also gives the verb's name, as `verb`."""
    verb = VERBS[name]
    parser = Parser(
        prog=f"selective-dpo {name}",
        description=f"{verb.help[0].upper()}{verb.help[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(verb=name)
    verb.add_options(parser)
    return parser


def _split_overrides(arguments: Sequence[str], without_a_block: Sequence[str]) -> tuple[Overrides, list[str]]:
    """Recipe keys (`--select.fraction 0.6` or `--select.fraction=0.6`), and the other arguments."""
    overrides, others = [], []
    remaining = iter(arguments)
    for argument in remaining:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or ("." not in key and key not in without_a_block):
            others.append(argument)
            continue
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key} VALUE or --{key}=VALUE")
        overrides.append((key, value))
    return overrides, others


def path(text: str) -> str:
    """For `add_argument(type=path)`: `text`, if it can be a path. The rest only the system can say."""
    if "\0" in text:
        raise argparse.ArgumentTypeError("is no path: it holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is no path: it cannot be written as UTF-8") from None
    return text


# Options that several verbs have.


def _recipe_options(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("recipe", metavar="RECIPE", nargs=nargs, default="", help="a recipe's YAML file")
    parser.epilog = (
        "Any recipe key can be given as an option: --select.fraction 0.6, --score.seeds '[41, 42]', "
        "--train.trainer.beta 0.05. Keys: docs/recipe.md."
    )


def _allow_partial_option(parser: argparse.ArgumentParser, what: str) -> None:
    meaning = f"{what}; short for --select.allow_partial true"
    parser.add_argument("--allow-partial", action="store_true", help=meaning)


def _curriculum_argument(parser: argparse.ArgumentParser) -> None:
    meaning = "a curriculum.parquet, or a run's folder"
    parser.add_argument("curriculum", type=path, metavar="CURRICULUM", help=meaning)


def _pairs_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--pairs", type=path, default="", metavar="FOLDER", help=what)


def _json_option(parser: argparse.ArgumentParser) -> None:
    meaning = "also write the answer as JSON; -: print it, and no table"
    parser.add_argument("--json", type=path, default="", metavar="PATH", help=meaning)


def _show(text: str, answer: dict[str, Any], path: str) -> None:
    """Print an answer, and write it where `--json` says."""
    from selective_dpo.storage.artifacts import write_json

    print(json.dumps(answer, indent=2) if path == "-" else text, flush=True)
    if path not in ("", "-"):
        write_json(Path(path), answer)


def read_recipe(options: argparse.Namespace, overrides: Overrides) -> Recipe:
    """The recipe with its overrides, fully checked, by libraries that are silenced first."""
    from selective_dpo.config.load import load_recipe
    from selective_dpo.config.trainer_options import check_recipe_options

    recipe = load_recipe(options.recipe, overrides)
    _quieten_libraries()
    check_recipe_options(recipe)
    return recipe


def _quieten_libraries() -> None:
    from selective_dpo.distributed.progress import quieten_libraries

    quieten_libraries()


# --- init ---------------------------------------------------------------------------------------------------


def _init_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=path, metavar="PATH", help="the recipe's .yaml file to write")
    for name, meaning in (("model", "a folder"), ("data", "pairs: a file, a folder")):
        help = f"{meaning}, or a name on the hub"
        parser.add_argument(f"--{name}", type=path, default="", metavar="PATH", help=help)
    parser.add_argument("--split", default="", metavar="NAME", help="of a data set of the hub")
    shipped = "instead a copy of a recipe that comes with the package; a wrong name lists them"
    parser.add_argument("--from", dest="source", default="", metavar="NAME", help=shipped)
    parser.add_argument("--overwrite", action="store_true", help="replace what is at RECIPE")


def _init(options: argparse.Namespace, overrides: Overrides) -> None:
    target = Path(options.recipe)
    if options.source and (options.model or options.data or options.split):
        raise ConfigError("--from copies a recipe as it is: leave out --model, --data and --split")
    if options.source:
        _copy_shipped(options.source, target, overwrite=options.overwrite)
    elif not (options.model and options.data):
        raise ConfigError("init needs --model and --data, or --from NAME for a copy of a shipped recipe")
    else:
        _quieten_libraries()
        from selective_dpo.report.tables import printable
        from selective_dpo.run.init import write_first_recipe

        found = write_first_recipe(
            target, options.model, options.data, split=options.split, overwrite=options.overwrite
        )
        print(printable(found.describe()))
    print(f"{target}\nnext: selective-dpo plan {target}")


def _copy_shipped(name: str, target: Path, *, overwrite: bool) -> None:
    from selective_dpo.config.load import SHIPPED
    from selective_dpo.storage.artifacts import write_atomic

    names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    if name not in names:
        raise ConfigError(f"there is no shipped recipe {name!r}; there are {', '.join(names)}")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists: choose another name, or pass --overwrite to replace it")
    write_atomic(target, (SHIPPED / f"{name}.yaml").read_bytes())


# --- run, score, curriculum, train, evaluate, report --------------------------------------------------------


def _stage_options(parser: argparse.ArgumentParser) -> None:
    _recipe_options(parser)
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="accept a recipe that differs from the one the run folder was made with; stages that the "
        "change does not touch are kept",
    )
    _wait_option(parser)


def _wait_option(parser: argparse.ArgumentParser) -> None:
    meaning = "wait while another command is at work on this run, instead of ending with exit code 2"
    parser.add_argument("--wait", action="store_true", help=meaning)


def _score_options(parser: argparse.ArgumentParser) -> None:
    _stage_options(parser)
    meaning = "some scorers, as seed41-fold0,seed41-fold1"
    parser.add_argument("--only", default="", metavar="NAMES", help=meaning)


def _curriculum_options(parser: argparse.ArgumentParser) -> None:
    _stage_options(parser)
    _allow_partial_option(parser, "build it from the records that are there")


def _stage(options: argparse.Namespace, overrides: Overrides) -> int:
    recipe = read_recipe(options, overrides)
    from selective_dpo.run import run

    only = tuple(name for name in getattr(options, "only", "").split(",") if name)
    while True:
        try:
            return run.run_verb(
                options.verb, recipe, fresh=options.fresh, only=only, command_line=options.command_line
            )
        except BusyError as busy:
            from selective_dpo.distributed.launch import under_a_launcher

            # Processes under a launcher meet in a group, which cannot be left and joined again.
            if not options.wait or under_a_launcher():
                raise
            print(f"waiting: {busy}", flush=True)
            time.sleep(SECONDS_BETWEEN_TRIES)


SECONDS_BETWEEN_TRIES = 10.0
"""Of `--wait`."""


def _submit_options(parser: argparse.ArgumentParser) -> None:
    _recipe_options(parser)
    meaning = "only write the scripts, and show them"
    parser.add_argument("--dry-run", action="store_true", help=meaning)


def _submit(options: argparse.Namespace, overrides: Overrides) -> None:
    recipe = read_recipe(options, overrides)
    from selective_dpo.run.run import open_run
    from selective_dpo.run.submit import submit, write_scripts

    run = open_run(recipe)
    command = [str(Path(options.recipe).absolute()) if Path(options.recipe).exists() else options.recipe]
    command += [f"--{key}={value}" for key, value in overrides]
    if options.dry_run:
        print("\n".join(script.text for script in write_scripts(run, command)))
        return
    for what, number in submit(run, command).items():
        print(f"{what}: job {number}")
    print(f"next: selective-dpo status {run.folder.root}")


def _status_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder")


def _status(options: argparse.Namespace, overrides: Overrides) -> None:
    from selective_dpo.report.tables import printable
    from selective_dpo.run.submit import status_text

    print(printable(status_text(_run_folder(options.run))))


def _cancel(options: argparse.Namespace, overrides: Overrides) -> None:
    from selective_dpo.run.submit import cancel

    cancelled = cancel(_run_folder(options.run))
    print(f"cancelled: {', '.join(cancelled)}" if cancelled else "nothing was queued or running")


def _run_folder(name: str) -> RunDirectory:
    from selective_dpo.run.folder import RunDirectory

    if not Path(name).is_dir():
        raise ArtifactError(f"{name} is not a run's folder: there is no such folder")
    return RunDirectory(Path(name))


def _study_options(parser: argparse.ArgumentParser) -> None:
    _stage_options(parser)
    meaning = "only print what it would do and cost, as `plan` does"
    parser.add_argument("--dry-run", action="store_true", help=meaning)


def _study(options: argparse.Namespace, overrides: Overrides) -> int:
    if options.dry_run and options.fresh:
        raise ConfigError("--fresh has no effect with --dry-run: leave it out")
    if not options.dry_run:
        return _stage(options, overrides)
    options.json = ""
    _plan(options, overrides)
    return 0


# --- demo, plan, doctor, verify -----------------------------------------------------------------------------


def _demo_options(parser: argparse.ArgumentParser) -> None:
    meaning = "where the run folder is made"
    parser.add_argument("--out", type=path, default="runs", metavar="FOLDER", help=meaning)
    parser.add_argument("--seed", type=int, default=0, help="of the world (default 0)")
    meaning = "with a real language model of 135 million parameters (its package: docs/real-model.md)"
    parser.add_argument("--real", action="store_true", help=meaning)


def _demo(options: argparse.Namespace, overrides: Overrides) -> None:
    _quieten_libraries()
    from selective_dpo.run.demo import demo, demo_real

    (demo_real if options.real else demo)(Path(options.out), seed=options.seed)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    _recipe_options(parser)
    _json_option(parser)


def _plan(options: argparse.Namespace, overrides: Overrides) -> None:
    recipe = read_recipe(options, overrides)
    from selective_dpo.run.plan import make_plan, plan_text

    plan = make_plan(recipe)
    _show(plan_text(plan), plan.to_json(), options.json)


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    _recipe_options(parser, nargs="?")


def _doctor(options: argparse.Namespace, overrides: Overrides) -> int:
    if not options.recipe and overrides:
        raise ConfigError(f"--{overrides[0][0]} would have no effect without a recipe")
    _quieten_libraries()
    recipe = read_recipe(options, overrides) if options.recipe else None
    from selective_dpo.report.tables import printable
    from selective_dpo.run.doctor import diagnose

    counts = {"ok": 0, "warn": 0, "FAIL": 0}
    for check in diagnose(recipe):
        print(printable(check.line()), flush=True)
        counts[check.status] += 1
    print(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['FAIL']} to mend")
    return 2 if counts["FAIL"] else 0


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder, finished or not")
    _json_option(parser)


def _verify(options: argparse.Namespace, overrides: Overrides) -> int:
    if not Path(options.run).is_dir():  # said before seconds are spent on imports
        raise ArtifactError(f"{options.run} is not a run's folder: there is no such folder")
    _quieten_libraries()
    from selective_dpo.report.tables import printable
    from selective_dpo.run.verify import verify_run

    found = verify_run(Path(options.run))
    _show(found.text(), found.to_json(), options.json)
    for problem in found.problems:
        print(f"selective-dpo: {printable(problem)}", file=sys.stderr)
    return 2 if found.problems else 0


# --- import-curriculum, export, inspect ---------------------------------------------------------------------


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=path,
        metavar="PATH",
        help="a CSV or Parquet file of ids and difficulties, such as NAME_learning_order.csv[.gz]; a folder "
        "of the original's seed41_step00.csv[.gz] and the like; another run's folder or curriculum.parquet",
    )
    parser.add_argument(
        "--out", type=path, required=True, metavar="CURRICULUM", help="a .parquet file, or a folder"
    )
    _pairs_option(parser, "a run's pairs, which are given these difficulties; default: ids stand for pairs")
    for name, usual in (("id", "pair_id, else prompt_id"), ("difficulty", "learning_order, else difficulty")):
        meaning = f"of a file; default: {usual}"
        parser.add_argument(f"--{name}-column", default="", metavar="NAME", help=meaning)
    named = "what the ids of a file name; default: as their column says"
    parser.add_argument("--names", choices=("pair_id", "prompt_id"), default=None, help=named)
    _allow_partial_option(parser, "accept missing records and ids")
    parser.epilog = "Selection keys: --select.rule, --select.fraction, --select.order ... (docs/recipe.md)."


def _import(options: argparse.Namespace, overrides: Overrides) -> None:
    from selective_dpo.curriculum.import_ import (
        import_curriculum,
        import_records,
        imported_in_words,
        is_records,
    )
    from selective_dpo.report.tables import printable

    select = _read_block("select", overrides).select
    columns = {name: getattr(options, name) for name in ("id_column", "difficulty_column", "names")}
    if is_records(Path(options.source)) and not options.pairs and not any(columns.values()):
        imported = import_records(options.source, select)
        curriculum, summary = imported.curriculum, imported.describe()
    else:
        curriculum = import_curriculum(options.source, options.pairs or None, select, **columns)
        facts = curriculum.facts
        summary = f"{imported_in_words(facts['provenance']['imported'])}; {facts['selected']:,} selected"
    saved = curriculum.save(options.out)
    print(printable(summary))
    print(printable(str(saved)))


def _read_block(block: str, overrides: Overrides, known: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe of which only `block` means something, so that values are read as in any recipe."""
    from selective_dpo.config.load import make_recipe

    for key, _ in overrides:
        if not key.startswith(f"{block}."):
            raise ConfigError(f"unknown option --{key}; only --{block}.* keys work here")
    anything = {"name": "selection", "model": {"path": "-"}, "data": {"train": [{"path": "-"}]}}
    return make_recipe({**anything, **(known or {})}, overrides)


LIBRARIES = ("trl", "axolotl", "llama-factory", "openrlhf", "argilla", "cleanlab")
"""Programs that a curriculum is exported for (`curriculum.handoff`)."""

FORMATS_WITH_TEXTS = ("jsonl", "datasets", *LIBRARIES)
"""Export formats that need the pairs' texts, and not only their ids."""


def _export_options(parser: argparse.ArgumentParser) -> None:
    _curriculum_argument(parser)
    parser.add_argument("--format", required=True, choices=("csv", "parquet", *FORMATS_WITH_TEXTS))
    parser.add_argument(
        "--out", type=path, required=True, metavar="PATH", help="a file; for datasets and programs a folder"
    )
    _pairs_option(parser, "the run's pairs folder, but for csv and parquet; default: beside the curriculum")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at PATH")


def _export(options: argparse.Namespace, overrides: Overrides) -> None:
    from selective_dpo.curriculum.export import export_curriculum
    from selective_dpo.curriculum.handoff import hand_on
    from selective_dpo.curriculum.issues import load_issues, with_flags
    from selective_dpo.curriculum.table import Curriculum
    from selective_dpo.data.store import pairs_file
    from selective_dpo.report.tables import printable
    from selective_dpo.storage.artifacts import verify_folder

    has_texts = options.format in FORMATS_WITH_TEXTS
    if options.pairs and not has_texts:
        raise ConfigError(f"--pairs has no effect with --format {options.format}; leave it out")
    source = Path(options.curriculum)
    curriculum, run = Curriculum.load(source), source.parent if source.suffix == ".parquet" else source
    if source in (run, run / "curriculum.parquet") and (issues := load_issues(run)):
        curriculum = with_flags(curriculum, issues.table)
    folder = Path(options.pairs) if options.pairs else run / "pairs"
    pairs = None
    if has_texts and (options.pairs or folder.is_dir()):
        pairs = pairs_file(folder)
        verify_folder(folder)
    write = hand_on if options.format in LIBRARIES else export_curriculum
    out = Path(options.out)
    written = write(curriculum, out, options.format, pairs=pairs, overwrite=options.overwrite)
    counts = f"{len(curriculum.order):,} selected of {len(curriculum.table):,} pairs"
    print(f"{printable(str(written))}: {counts}")


def _push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="the repository on the hub")
    parser.add_argument(
        "--curriculum", action="store_true", help="a data set of ids, difficulties and order, not the policy"
    )
    parser.add_argument("--with-text", action="store_true", help="with the selected pairs' texts")
    parser.add_argument("--license", default="", metavar="NAME", help="of the source, such as apache-2.0")
    parser.add_argument("--public", action="store_true", help="for everyone; else private")


def _push(options: argparse.Namespace, overrides: Overrides) -> None:
    if not options.curriculum and (options.with_text or options.license):
        raise ConfigError("--with-text and --license have no effect without --curriculum; leave them out")
    from selective_dpo.run.folder import RunDirectory
    from selective_dpo.run.hub import push_curriculum, push_policy

    run, private = RunDirectory(Path(options.run)), not options.public
    if options.curriculum:
        is_new = push_curriculum(
            run, options.to, private=private, with_text=options.with_text, licence=options.license
        )
    else:
        is_new = push_policy(run, options.to, private=private)
    print(f"pushed to {options.to}" if is_new else f"{options.to} has it already")


REGIONS = {
    "easiest": "of the smallest difficulty",
    "borderline": "around the edge of the selection",
    "median": "of median difficulty",
    "hardest": "of the largest difficulty",
}
"""Options of `inspect`, and which pairs they show."""


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    _curriculum_argument(parser)
    for name, meaning in REGIONS.items():
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N", help=f"N pairs {meaning}")
    shown = "these pairs, by id or its beginning"
    parser.add_argument("--pair", nargs="+", action="extend", default=[], metavar="ID", help=shown)
    _pairs_option(parser, "the run's pairs folder; default: beside the curriculum")
    parser.add_argument("--full", action="store_true", help="whole texts, not only their beginnings")
    parser.add_argument(
        "--web", action="store_true", help="open the run's report, at the pair of --pair, in a browser"
    )
    parser.epilog = "Without any of these: three of the easiest, three of the median, three of the hardest."


def _inspect(options: argparse.Namespace, overrides: Overrides) -> None:
    from selective_dpo.report.inspect import DEFAULT, LONGEST, Wanted, group_text, look_at

    asked = Wanted(**{name: getattr(options, name) for name in REGIONS}, pair_ids=tuple(options.pair))
    if options.web:
        print(_open_report(options, asked))
        return
    pairs = Path(options.pairs) if options.pairs else None
    groups, total = look_at(Path(options.curriculum), DEFAULT if asked == Wanted() else asked, pairs)
    longest = None if options.full else LONGEST
    print("\n\n\n".join(group_text(group, total, longest=longest) for group in groups))


def _open_report(options: argparse.Namespace, asked: Wanted) -> str:
    """The address of the report's file, at the first named pair; a browser is told to open it."""
    import webbrowser

    from selective_dpo.curriculum.table import Curriculum
    from selective_dpo.report.inspect import find_ids

    if any(asked[:4]) or options.pairs or options.full or len(asked.pair_ids) > 1:
        raise ConfigError("--web opens the whole report: of the other options only one --pair has an effect")
    source = Path(options.curriculum)
    report = (source.parent if source.suffix == ".parquet" else source) / "report.html"
    if not report.is_file():
        raise ArtifactError(f"there is no {report}: write it with `selective-dpo report RECIPE`")
    (pair,) = find_ids(asked.pair_ids, Curriculum.load(source).pair_ids) or [""]
    address = report.absolute().as_uri() + (f"#pair={pair}" if pair else "")
    webbrowser.open(address)
    return address


# --- issues -------------------------------------------------------------------------------------------------


def _issues_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder, with a curriculum")
    meaning = "turn this share of the labels round on purpose, and count how well they are found"
    parser.add_argument("--plant", type=float, default=0.0, metavar="SHARE", help=meaning)
    meaning = "decides which labels are planted (default 0)"
    parser.add_argument("--seed", type=int, default=None, help=meaning)
    meaning = "bound on the share of false alarms among flagged pairs (default 0.2); with --plant"
    parser.add_argument("--false-alarms", type=float, default=None, metavar="SHARE", help=meaning)
    _json_option(parser)
    parser.epilog = "Thresholds: --issues.suspected_flip 0.9, --issues.tie 0.02 ... (docs/issues.md)."


def _issues(options: argparse.Namespace, overrides: Overrides) -> None:
    given = {"seed": options.seed, "false_alarms": options.false_alarms}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not options.plant:
        raise ConfigError(f"--{min(given).replace('_', '-')} has no effect without --plant: leave it out")
    from selective_dpo.report.issues import issues_text
    from selective_dpo.run.issues import find_issues, recipe_issues

    known = recipe_issues(Path(options.run)).model_dump(mode="json")
    config = _read_block("issues", overrides, {"issues": known}).issues
    found = find_issues(options.run, config=config, plant=options.plant, **given)
    _show(issues_text(found.facts, Path(options.run)), found.facts, options.json)


# --- compare ------------------------------------------------------------------------------------------------


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        type=path,
        nargs="+",
        metavar="PATH",
        help="a run's folder, a curriculum, a folder of the original's records, a file of difficulties",
    )
    meaning = "margins above which a pair counts as learned (default 0.4 0.1); 0 is always shown"
    parser.add_argument("--delta", type=float, nargs="+", default=None, metavar="MARGIN", help=meaning)
    meaning = "also write a page with figures, such as c.html"
    parser.add_argument("--page", type=path, default="", metavar="PATH", help=meaning)
    _json_option(parser)
    parser.epilog = (
        "Give the paths before --delta, or end its values with another option. Nothing is trained."
    )


def _compare(options: argparse.Namespace, overrides: Overrides) -> None:
    from selective_dpo.report.comparison import DELTAS, compare
    from selective_dpo.report.comparison_page import comparison_text, write_comparison

    found = compare(options.sources, deltas=DELTAS if options.delta is None else options.delta)
    _show(comparison_text(found), found.as_json(), options.json)
    if options.page:
        write_comparison(found, Path(options.page))


# --- read-judgments, table ----------------------------------------------------------------------------------


def _judgments_options(parser: argparse.ArgumentParser) -> None:
    from typing import get_args

    from selective_dpo.config.schema import BenchmarkName

    parser.add_argument("benchmark", choices=get_args(BenchmarkName), metavar="BENCHMARK")
    meaning = "the official program's judgments: files, or folders of them"
    parser.add_argument("judgments", type=path, nargs="+", metavar="PATH", help=meaning)
    meaning = "the models to show, the one that others are compared with first; default: all"
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help=meaning)
    meaning = "alpaca-eval: a CSV file of the instructions' difficulties, such as AlpacaEval's df_gamed.csv"
    parser.add_argument("--difficulties", type=path, default="", metavar="PATH", help=meaning)
    meaning = "alpaca-eval: the question file, where the difficulties go by position"
    parser.add_argument("--questions", type=path, default="", metavar="PATH", help=meaning)
    meaning = "arena-hard: answers with their metadata, for style control"
    parser.add_argument("--answers", type=path, default="", metavar="FOLDER", help=meaning)
    _json_option(parser)
    parser.epilog = f"BENCHMARK: {', '.join(get_args(BenchmarkName))}. See docs/evaluation.md."


def _judgments(options: argparse.Namespace, overrides: Overrides) -> None:
    from selective_dpo.evaluation.judgments import read_judgments
    from selective_dpo.report.judgments import judgments_text

    names = ("models", "difficulties", "questions", "answers")
    given = {name: getattr(options, name) for name in names}
    found = read_judgments(options.benchmark, options.judgments, **given)
    _show(judgments_text(found), found.as_json(), options.json)


def _table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="folders of evaluated runs")
    meaning = "what `read-judgments --json` wrote"
    parser.add_argument("--judgments", type=path, nargs="+", default=[], metavar="PATH", help=meaning)
    parser.add_argument("--format", choices=("markdown", "latex"), default="markdown")


def _table(options: argparse.Namespace, overrides: Overrides) -> None:
    from selective_dpo.report.results_table import results_table

    found = results_table([Path(run) for run in options.runs], [Path(each) for each in options.judgments])
    print(found.text(options.format))


# --- the table ----------------------------------------------------------------------------------------------


class Verb(NamedTuple):
    """One verb of the command line."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    execute: Callable[[argparse.Namespace, Overrides], int | None]
    """Returns the exit code; None is 0."""
    takes_recipe_keys: bool = False
    """Whether recipe keys can be given as options; else they are refused."""


VERBS = {
    "demo": Verb("the whole method on a small synthetic world, on a CPU, in minutes", _demo_options, _demo),
    "init": Verb("write a first recipe for a model and a file of pairs", _init_options, _init),
    "run": Verb(
        "all stages of a recipe: score, curriculum, train, evaluate, report", _stage_options, _stage, True
    ),
    "prepare": Verb("pairs and the starting model's log-probabilities", _stage_options, _stage, True),
    "score": Verb("measure the difficulty of every pair", _score_options, _stage, True),
    "curriculum": Verb(
        "difficulty, agreement, selection and order from the records", _curriculum_options, _stage, True
    ),
    "train": Verb("DPO along the curriculum", _stage_options, _stage, True),
    "evaluate": Verb("held-out pairs, sampled answers, win rates", _stage_options, _stage, True),
    "report": Verb("write report.html", _stage_options, _stage, True),
    "study": Verb(
        "a run with the arms of its study block, beside random controls", _study_options, _study, True
    ),
    "submit": Verb("a run as Slurm jobs, each after the one before", _submit_options, _submit, True),
    "status": Verb("what a run's folder holds, and what its Slurm jobs do", _status_options, _status),
    "cancel": Verb("cancel a run's Slurm jobs", _status_options, _cancel),
    "plan": Verb("what a run would do and cost; nothing is trained", _plan_options, _plan, True),
    "doctor": Verb(
        "check the environment and a recipe before any money is spent", _doctor_options, _doctor, True
    ),
    "import-curriculum": Verb(
        "difficulties from a file, another run, or the original repository", _import_options, _import, True
    ),
    "import-records": Verb("the same, by its older name", _import_options, _import, True),
    "export": Verb("a curriculum as a file, or ready for TRL, axolotl and others", _export_options, _export),
    "push": Verb("a run's policy or curriculum to the Hugging Face hub", _push_options, _push),
    "inspect": Verb("show the easiest, median, hardest or named pairs", _inspect_options, _inspect),
    "issues": Verb(
        "which pairs look wrong, with flags and p_wrong; writes issues.parquet",
        _issues_options,
        _issues,
        True,
    ),
    "compare": Verb(
        "runs, curricula, record folders and released files, side by side; nothing is trained",
        _compare_options,
        _compare,
    ),
    "read-judgments": Verb(
        "official judgments of AlpacaEval, Arena-Hard or MT-Bench: scores, intervals, differences",
        _judgments_options,
        _judgments,
    ),
    "table": Verb("results of several runs for a paper, as Markdown or LaTeX", _table_options, _table),
    "verify": Verb(
        "re-check every digest of a run, and every id from input to policy", _verify_options, _verify
    ),
}
