"""The folder of a run: where each stage's result lies, and which recipe it belongs to."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from selective_dpo.config import Recipe
from selective_dpo.config.load import diff_config, dump_config
from selective_dpo.distributed.processes import held_by_main, this_process
from selective_dpo.errors import RunChangedError, name_some
from selective_dpo.storage.artifacts import read_json, write_atomic
from selective_dpo.storage.locks import run_lock

if TYPE_CHECKING:
    from selective_dpo.difficulty.protocols import ScorerRun

RECIPE, CONFIG = "recipe.yaml", "config.json"

# They decide where and how fast, not what comes out.
_WITHOUT_EFFECT_ON_RESULTS = ("launch", "output_dir", "name")


class RunDirectory:
    """Paths below a run's root. Nothing is created by asking for a path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Every input row with its status, and the tokens of the kept ones; `test_` is of `data.test`.
        self.pairs, self.test_pairs = root / "pairs", root / "test-pairs"
        # Log-probs of the pairs under the starting policy.
        self.reference, self.test_reference = root / "reference", root / "test-reference"
        # Of `score.check`: a run of its own, with the scorers that one-step is compared with.
        self.check = root / "check"
        # Protocol `certified`: how many seeds it took, and what was predicted from them.
        self.certificate = root / "scores" / "certificate.json"
        # The folder that holds `curriculum.parquet` and `.json`: the run's own root.
        self.curriculum = root
        self.policy = root / "policy"
        # Generations, verdicts and `results.json`.
        self.evaluation = root / "evaluation"
        self.report = root / "report.html"
        # Local files of trackers (`report_to`), a folder a training; there only if they write any.
        self.tracking = root / "tracking"

    @classmethod
    def of(cls, recipe: Recipe) -> RunDirectory:
        """The folder that `recipe` names."""
        return cls(Path(recipe.output_dir) / recipe.name)

    def checkpoints(self, name: str) -> Path:
        """Those of an unfinished training, a scorer's or an arm's; gone once it is trained."""
        return self.root / "checkpoints" / name

    def scores(self, run: ScorerRun) -> Path:
        """One scorer's records."""
        return self.root / "scores" / run.name

    def control(self, name: str) -> Path:
        """A control arm: its `curriculum.parquet` and its `policy` folder."""
        return self.root / "controls" / name

    def benchmark(self, name: str, arm: str) -> Path:
        """An arm's answers to a benchmark's questions, as the official program reads them."""
        return self.root / "benchmarks" / name / arm

    def guard(self, arm: str) -> Path:
        """An arm's scores of the tasks of `evaluate.guard`."""
        return self.root / "guard" / arm

    def repeat(self, seed: int) -> Path:
        """The run's own training with another seed: its `policy` folder."""
        return self.root / "training-seeds" / str(seed)

    @property
    def is_claimed(self) -> bool:
        """Whether a run has made its first result here (see `claim`)."""
        return (self.root / CONFIG).exists()

    def require_same_recipe(self, recipe: Recipe) -> None:
        """Refuse a recipe that differs from the one this folder was claimed for; nothing is written.

        Raises:
            RunChangedError: it differs; the differences are named.
        """
        if not self.is_claimed:
            return
        changes = [
            change
            for change in diff_config(_with_defaults(read_json(self.root / CONFIG)), dump_config(recipe))
            if re.split(r"[.:]", change)[0] not in _WITHOUT_EFFECT_ON_RESULTS
        ]
        if changes:
            raise RunChangedError(
                f"{self.root} was made with another recipe ({name_some(changes, limit=8)}): give this "
                "one another name, or pass --fresh to redo the stages that the change touches"
            )

    def claim(self, recipe: Recipe) -> None:
        """Write down whose folder this is: the recipe as it was given, and with all its defaults.

        To be called with the first result: a recipe that never came so far leaves nothing, and its
        mended form is not a changed one. Files that say so already are left alone.
        """
        given = recipe.model_dump(mode="json", exclude_unset=True)
        contents = {
            RECIPE: yaml.safe_dump(given, sort_keys=False, allow_unicode=True),
            CONFIG: json.dumps(dump_config(recipe), indent=2) + "\n",
        }
        for name, content in contents.items():
            path = self.root / name
            if not path.is_file() or path.read_bytes() != content.encode("utf-8"):
                write_atomic(path, content)


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A dumped recipe, with the defaults of keys that came after it was written."""
    try:
        return dump_config(Recipe.model_validate(config))
    except ValidationError:  # a key has gone: it is named as a difference
        return config


@contextlib.contextmanager
def alone(root: Path, *, but_for_scorers: bool = False) -> Iterator[None]:
    """The run in `root` belongs to this command (in a distributed run: to all its processes).

    With `but_for_scorers`, other commands that ask the same may work on it, too: `score --only` on other
    scorers. Each artifact has a lock of its own besides; see docs/cluster.md.

    Raises:
        BusyError: another command is at work on it.
    """
    with held_by_main(run_lock(root), what=f"the run {root}", shared=but_for_scorers):
        if this_process().is_main_process and not but_for_scorers:
            # Single files that a killed process was writing. Folders have locks of their own.
            for pattern in (".partial-*", "scores/.partial-*", "controls/*/.partial-*"):
                for path in filter(Path.is_file, root.glob(pattern)):
                    path.unlink(missing_ok=True)
        yield
