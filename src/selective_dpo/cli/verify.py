"""`verify RUN`: a table of checks; exit code 2 and a line a problem if something is wrong."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from selective_dpo.cli.paths import path_text

TAKES_OVERRIDES = False


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """RUN, and where the answer may go as JSON."""
    parser.add_argument("run", type=path_text, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument(
        "--json",
        type=path_text,
        default="",
        metavar="PATH",
        help="also write the answer as JSON; -: print it, and no table",
    )


def execute(verb: str, options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Check everything, print the table, then each problem on a line of its own."""
    from selective_dpo.distributed.progress import quieten_libraries

    quieten_libraries()
    from selective_dpo.report.tables import printable
    from selective_dpo.run.verify import verify_run
    from selective_dpo.storage.artifacts import write_json

    found = verify_run(Path(options.run))
    if options.json == "-":
        print(json.dumps(found.to_json(), indent=2))
    else:
        print(found.text(), flush=True)
        if options.json:
            write_json(Path(options.json), found.to_json())
    for problem in found.problems:
        print(f"selective-dpo: {printable(problem)}", file=sys.stderr)
    return 2 if found.problems else 0
