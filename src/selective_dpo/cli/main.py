"""`selective-dpo VERB`: finds the verb, and turns a user's mistakes into one line and exit code 2.

SIGTERM, a scheduler's warning, ends it with one line and exit code 75, Ctrl-C with 130: the same command goes
on later.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from selective_dpo import __version__
from selective_dpo.distributed.progress import settle_streams
from selective_dpo.distributed.signals import REMEDY, end_without_supervisor, stopping_at_once
from selective_dpo.errors import BusyError, ConfigError, Interrupted, SelectiveDPOError, disk_fault

# One module a verb, imported only when used: `--help` must not wait for torch.
VERBS = {
    "demo": "the whole method on a small synthetic world, on a CPU, in minutes",
    "run": "all stages of a recipe: score, curriculum, train, evaluate, report",
    "score": "measure the difficulty of every pair",
    "curriculum": "difficulty, agreement, selection and order from the records",
    "train": "DPO along the curriculum",
    "evaluate": "held-out pairs, sampled answers, win rates",
    "report": "write report.html",
    "plan": "what a run would do and cost; nothing is trained",
    "doctor": "check the environment and a recipe before any money is spent",
    "import-curriculum": "difficulties from a file, another run, or the original repository",
    "import-records": "the same, by its older name",
    "export": "a curriculum as CSV, Parquet, JSON Lines or a datasets folder",
    "inspect": "show the easiest, median, hardest or named pairs",
    "verify": "re-check every digest of a run, and every id from input to policy",
}
_MODULES = {
    **dict.fromkeys(("run", "score", "curriculum", "train", "evaluate", "report"), "stages"),
    **dict.fromkeys(("import-curriculum", "import-records"), "import_curriculum"),
}
# Recipe keys that would otherwise look like a verb's own options.
_KEYS_WITHOUT_A_BLOCK = ("name", "output_dir", "curriculum")
_BY_CTRL_C = 130
"""As shells say it: 128 and the number of the signal."""


def main(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit code: 0 done, 2 the user's to mend, 75 interrupted
    by SIGTERM, 130 by Ctrl-C."""
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes, the main one
    try:
        with stopping_at_once(forgetting=True):
            code = _dispatch(list(arguments))
            print(end="", flush=True)  # what cannot be written shows here, and not when Python ends
            return code
    except Interrupted as stop:
        if speaks:
            print(f"selective-dpo: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        if speaks:
            print(f"selective-dpo: interrupted by Ctrl-C: {REMEDY}", file=sys.stderr)
        return _BY_CTRL_C
    except SelectiveDPOError as error:
        if isinstance(error, BusyError) and not speaks:
            return 2  # all processes know
        message, code = " ".join(str(error).split()), error.exit_code
    except Exception as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        message, code = fault, 2
    print(f"selective-dpo: error: {_printable(message)}", file=sys.stderr)
    return code


def _printable(message: str) -> str:
    # Names and values come from files of others; on a terminal, some characters are commands.
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in message)


def entry_point() -> None:
    """The installed command."""
    end_without_supervisor()
    settle_streams()
    sys.exit(main(sys.argv[1:]))


class _Parser(argparse.ArgumentParser):
    """Argument errors as this package's own: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog.split(' VERB')[0]} --help")


def _dispatch(arguments: list[str]) -> int:
    try:
        return _execute(arguments)
    except SystemExit as shown:  # argparse, after --help or --version
        return int(shown.code or 0)


def _execute(arguments: list[str]) -> int:
    parser = _Parser(
        prog="selective-dpo",
        description="How difficult is each preference pair for your model? Train DPO on the easier ones.",
        epilog="verbs:\n" + "\n".join(f"  {verb:<18}{text}" for verb, text in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="selective-dpo VERB ...   (selective-dpo VERB --help for its options)",
    )
    parser.add_argument("--version", action="version", version=f"selective-dpo {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="see below")
    verb = parser.parse_args(arguments[:1] or ["--help"]).verb
    module = import_module(f"selective_dpo.cli.{_MODULES.get(verb, verb)}")
    verb_parser = _Parser(
        prog=f"selective-dpo {verb}",
        description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_options(verb_parser, verb)
    # As given, for a verb that starts itself again in several processes.
    verb_parser.set_defaults(command_line=arguments)
    overrides, others = _split_overrides(arguments[1:])
    if overrides and not module.TAKES_OVERRIDES:
        raise ConfigError(f"{verb} takes no recipe keys, so --{overrides[0][0]} would have no effect")
    result = module.execute(verb, verb_parser.parse_args(others), overrides)
    return int(result or 0)


def _split_overrides(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Recipe keys (`--select.fraction 0.6` or `--select.fraction=0.6`) as pairs; and the other arguments."""
    overrides, others = [], []
    words = iter(arguments)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or ("." not in key and key not in _KEYS_WITHOUT_A_BLOCK):
            others.append(word)
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key} VALUE or --{key}=VALUE")
        overrides.append((key, value))
    return overrides, others
