"""python -m fuzz.run TARGET [--seconds N] [--seed S] [--crashes FOLDER]

Mutates the valid inputs of a target (`corpus`) at random and runs it on them, without looking at coverage.
An input on which something else than a `SelectiveDPOError` escapes is saved, named by its digest, and so is
one that takes longer than `--slow` seconds. `all` runs each target in turn. Exit status 1 if any was saved.
`atheris`, where it is installed, finds more: `atheris.Setup(sys.argv, fuzz.targets.TARGETS["recipe"])`.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fuzz.corpus import PIECES, seeds_of
from fuzz.targets import TARGETS, Target

MAX_BYTES = 1 << 16


class Outcome(NamedTuple):
    """What a number of inputs came to."""

    inputs: int
    crashes: int
    slowest: float
    """Seconds."""


def mutated(seed: bytes, generator: random.Random) -> bytes:
    """`seed` after one to eight random changes."""
    data = bytearray(seed)
    for _ in range(generator.randint(1, 8)):
        place, length = generator.randint(0, len(data)), generator.randint(0, 32)
        match generator.randrange(7):
            case 0 if data:
                data[place % len(data)] ^= 1 << generator.randrange(8)
            case 1:
                data[place:place] = generator.randbytes(length)
            case 2:
                del data[place : place + length]
            case 3:
                data[place : place + generator.randint(0, 8)] = generator.choice(PIECES)
            case 4:
                data[place:place] = data[place : place + 8 * length]
            case 5 if generator.random() < 0.2:
                del data[place:]
            case 6 if data:
                data[place % len(data)] = generator.choice(b"\0\n\r\t ,:;\"'[]{}&*!<>-0129.eE\\\xff")
    return bytes(data[:MAX_BYTES])


def fuzz(
    target: Target,
    seeds: Sequence[bytes],
    *,
    seed: int,
    crashes: Path,
    inputs: int | None = None,
    seconds: float | None = None,
    slow: float = 10.0,
) -> Outcome:
    """Run `target` on mutations of `seeds`, so many or so long; the seeds themselves come first."""
    generator = random.Random(seed)
    end = None if seconds is None else time.monotonic() + seconds
    number = found = 0
    slowest = 0.0
    while (inputs is None or number < inputs) and (end is None or time.monotonic() < end):
        data = seeds[number] if number < len(seeds) else mutated(generator.choice(seeds), generator)
        number += 1
        begun = time.monotonic()
        fault = _fault(target, data)
        spent = time.monotonic() - begun
        slowest = max(slowest, spent)
        if fault or spent > slow:
            found += 1
            crashes.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(data).hexdigest()[:16]
            (crashes / f"{name}.bin").write_bytes(data)
            (crashes / f"{name}.txt").write_text(
                fault or f"{spent:.1f} seconds\n", "utf-8", "backslashreplace"
            )
    return Outcome(number, found, slowest)


def _fault(target: Target, data: bytes) -> str:
    try:
        target(data)
    except Exception:
        return traceback.format_exc()
    return ""


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__.splitlines()[2])
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crashes", type=Path, default=Path("crashes"), help="where such inputs are saved")
    parser.add_argument("--slow", type=float, default=10.0, help="seconds that an input may take")
    options = parser.parse_args(arguments)
    total = 0
    for name in TARGETS if options.target == "all" else [options.target]:
        outcome = fuzz(
            TARGETS[name],
            seeds_of(name),
            seed=options.seed,
            crashes=options.crashes / name,
            seconds=options.seconds,
            slow=options.slow,
        )
        total += outcome.crashes
        sys.stdout.write(
            f"{name}: {outcome.inputs:,} inputs, {outcome.crashes} saved, slowest {outcome.slowest:.2f} s\n"
        )
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
