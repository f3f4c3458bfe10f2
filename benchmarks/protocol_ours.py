"""This package's side of `protocol.py`: what `selective-dpo score` and `selective-dpo train` run.

A run's pairs are prepared beforehand, since both sides get tokens. Everything else is made anew each time:
the reference, the scorers, their records, the certificate, the curriculum, the policy.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from datasets import Dataset

import selective_dpo.difficulty.scorer
import selective_dpo.difficulty.step_scorers
import selective_dpo.run.stages
import selective_dpo.training.train
from protocol_pairs import Start
from selective_dpo.config.load import make_recipe
from selective_dpo.config.schema import ONE_STEP_OPTIONS
from selective_dpo.curriculum.records import LossTable, Records
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.store import load_tokens
from selective_dpo.difficulty.scorer import collect_losses, collect_records
from selective_dpo.logprobs.compute import PairLogps
from selective_dpo.logprobs.reference import load_reference
from selective_dpo.logprobs.rows import TOKEN_COLUMNS
from selective_dpo.run import run as verbs
from selective_dpo.run.keys import Run
from selective_dpo.run.stages import bring_up
from selective_dpo.storage.artifacts import read_json
from workload import MAX_LENGTH

PROTOCOLS = ("paper", "certified", "fast", "one-step")
CHEAP = ("fast", "one-step")
"""Protocols whose whole Selective DPO is compared with an epoch on all pairs."""
LOADERS = (
    selective_dpo.run.stages,
    selective_dpo.difficulty.scorer,
    selective_dpo.difficulty.step_scorers,
    selective_dpo.training.train,
)
"""Modules that load the starting policy."""


class Ours:
    """A run folder for each protocol, and for each way of training on the easy half."""

    def __init__(self, start: Start, scratch: Path, settings: dict[str, Any], lora: dict[str, Any]) -> None:
        self.trainings: dict[str, dict[str, Any] | None] = {"lora": lora}
        """LoRA settings of each way of training a policy; None: all weights."""
        if not start.in_memory:
            self.trainings["full"] = None
        self._start = start
        everything = {
            "output_dir": str(scratch / "runs"),
            "model": {"path": str(start.model), "dtype": "bfloat16" if start.in_memory else "float32"},
            "data": {"train": [{"path": str(start.pairs)}], "max_length": MAX_LENGTH},
            # Nor does the other side save any.
            "launch": {"checkpoint_minutes": 0},
        }
        scoring = {name: {"protocol": name, "trainer": settings, "lora": lora} for name in PROTOCOLS}
        one_step = {name: value for name, value in settings.items() if name in ONE_STEP_OPTIONS}
        scoring["one-step"]["trainer"] = one_step
        recipes: dict[str, dict[str, Any]] = {name: {"score": scoring[name]} for name in PROTOCOLS}
        # Of so few pairs the interval is wide, and more seeds would be asked for than of thousands.
        recipes["certified"]["score"]["seeds"] = [41, 42]
        for name, train_lora in self.trainings.items():
            train = {"trainer": settings, "lora": train_lora}
            for protocol in CHEAP:
                recipes[training_name(protocol, name)] = {"score": scoring[protocol], "train": train}
        self._recipes = {
            name: make_recipe({"name": name, **everything, **given}) for name, given in recipes.items()
        }
        self._prepared = {name: self._prepare(name) for name in recipes}

    @property
    def pairs(self) -> Dataset:
        """The tokenized pairs, as all runs have them."""
        return load_tokens(self.run("paper").folder.pairs)

    def score(self, name: str) -> None:
        """The reference and all scorers of a protocol."""
        with self._anew(name) as run:
            verbs.score(run)

    def train(self, protocol: str, name: str) -> None:
        """The reference, the scorers of a protocol, the curriculum, and the policy on the easy half."""
        with self._anew(training_name(protocol, name)) as run:
            verbs.train(run)

    def run(self, name: str) -> Run:
        """The run as its folder has it."""
        return verbs.open_run(self._recipes[name], say=lambda line: None)

    def records(self, name: str) -> Records:
        """What the scorers of a protocol measured."""
        run = self.run(name)
        return collect_records([run.folder.scores(scorer) for scorer in run.scorer_runs])

    def losses(self, name: str) -> LossTable:
        """The same, by pair, seed and evaluation."""
        run = self.run(name)
        return collect_losses([run.folder.scores(scorer) for scorer in run.scorer_runs])

    def reference(self, name: str) -> PairLogps:
        """The reference's log-probs."""
        return load_reference(self.run(name).folder.reference)

    def certificate(self) -> dict[str, Any]:
        """How many seeds `certified` took, and what was predicted."""
        found = read_json(self.run("certified").folder.certificate)
        return {name: found[name] for name in ("seeds", "target", "reached", "prediction")}

    def selected_tokens(self, protocol: str, name: str) -> float:
        """Share of all tokens that the pairs hold on which the policy was trained."""
        run = self.run(training_name(protocol, name))
        table = Curriculum.load(run.folder.curriculum).table
        selected = set(table.filter(table["selected"])["pair_id"].to_pylist())
        tokens = {
            row["pair_id"]: sum(len(row[part]) for part in TOKEN_COLUMNS)
            for row in load_tokens(run.folder.pairs)
        }
        return sum(tokens[pair] for pair in selected) / sum(tokens.values())

    def _prepare(self, name: str) -> frozenset[Path]:
        run = self.run(name)
        bring_up(run, "pairs")
        return frozenset(run.folder.root.iterdir())

    @contextlib.contextmanager
    def _anew(self, name: str) -> Iterator[Run]:
        run = self.run(name)
        for path in set(run.folder.root.iterdir()) - self._prepared[name]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with contextlib.ExitStack() as patches:
            if self._start.in_memory:
                for module in LOADERS:
                    patches.enter_context(
                        mock.patch.object(module, "load_policy", lambda config: self._start.load())
                    )
            yield run


def training_name(protocol: str, name: str) -> str:
    """The run that trains a policy on the easy half of a protocol."""
    return f"selective-{protocol}-{name}"
