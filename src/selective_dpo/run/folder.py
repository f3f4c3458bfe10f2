"""The folder of a run: where each stage's result lies, and which recipe it belongs to."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RunDirectory:
    """Paths below a run's root. Nothing is created by asking for a path."""

    root: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunDirectory:
        """The folder that `recipe` names."""
        return cls(Path(recipe.output_dir) / recipe.name)

    @property
    def pairs(self) -> Path:
        """Every input row with its status; tokens of the kept ones."""
        return self.root / "pairs"

    @property
    def test_pairs(self) -> Path:
        """The same for `data.test`."""
        return self.root / "test-pairs"

    @property
    def reference(self) -> Path:
        """Log-probs of the pairs under the starting policy."""
        return self.root / "reference"

    @property
    def test_reference(self) -> Path:
        """The same for the held-out pairs."""
        return self.root / "test-reference"

    @property
    def curriculum(self) -> Path:
        """The folder that holds `curriculum.parquet` and `.json`: the run's own root."""
        return self.root

    @property
    def policy(self) -> Path:
        """The trained model."""
        return self.root / "policy"

    @property
    def evaluation(self) -> Path:
        """Generations, verdicts and `results.json`."""
        return self.root / "evaluation"

    @property
    def report(self) -> Path:
        """One self-contained page."""
        return self.root / "report.html"

    @property
    def tracking(self) -> Path:
        """Local files of trackers (`report_to`), a folder a training; there only if they write any."""
        return self.root / "tracking"

    @property
    def certificate(self) -> Path:
        """Protocol `certified`: how many seeds it took, and what was predicted from them."""
        return self.root / "scores" / "certificate.json"

    @property
    def all_checkpoints(self) -> Path:
        """Checkpoints of unfinished trainings; private to the run, and gone once it is trained."""
        return self.root / "checkpoints"

    def checkpoints(self, name: str) -> Path:
        """Those of one training: a scorer's, or an arm's."""
        return self.all_checkpoints / name

    def scores(self, run: ScorerRun) -> Path:
        """One scorer's records."""
        return self.root / "scores" / run.name

    def control(self, name: str) -> Path:
        """A control arm: its `curriculum.parquet` and its `policy` folder."""
        return self.root / "controls" / name

    @property
    def is_claimed(self) -> bool:
        """Whether a run has made its first result here (see `claim`)."""
        return (self.root / CONFIG).exists()

    def repeat(self, seed: int) -> Path:
        """The run's own training with another seed: its `policy` folder."""
        return self.root / "training-seeds" / str(seed)

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


_LEFTOVERS = (".partial-*", "scores/.partial-*", "controls/*/.partial-*")
"""Where single files of a run are written, other than within published folders."""

# --- who may work on a run at the same time: one command alone, or several `score --only` ---
# Each artifact has a lock of its own besides (`distributed.processes.making`); see docs/cluster.md.


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """The run in `root` belongs to this command (in a distributed run: to all its processes).

    Raises:
        BusyError: another command is at work on it.
    """
    with held_by_main(run_lock(root), what=f"the run {root}"):
        if this_process().is_main_process:
            _remove_leftovers(root)
        yield


@contextlib.contextmanager
def beside_others(root: Path) -> Iterator[None]:
    """As `alone`, but other commands of this kind may work on the run, too: `score --only` on other scorers.

    Raises:
        BusyError: a command that needs the run for itself is at work on it.
    """
    with held_by_main(run_lock(root), what=f"the run {root}", shared=True):
        yield


def _remove_leftovers(root: Path) -> None:
    """Single files that a killed process was writing. Folders have their own locks, and are left alone."""
    for path in [path for pattern in _LEFTOVERS for path in root.glob(pattern)]:
        if path.is_file():
            path.unlink(missing_ok=True)
