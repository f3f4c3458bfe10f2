"""The pairs and prompts of a run, as far as they can be had here: nothing is written into its folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selective_dpo.config import ModelConfig, SourceConfig
from selective_dpo.curriculum.import_ import outside_curriculum
from selective_dpo.data.sources import open_source
from selective_dpo.data.store import PairsSummary, load_summary, load_tokens
from selective_dpo.errors import DataError, ModelError
from selective_dpo.evaluation.generate import choose_prompts, encode_prompt
from selective_dpo.identity import positions_of
from selective_dpo.logprobs.packed import shared_lengths
from selective_dpo.logprobs.padded import PartLengths, part_lengths
from selective_dpo.models import load_tokenizer
from selective_dpo.run.folder import RunDirectory
from selective_dpo.run.keys import Run, prompts_to_answer
from selective_dpo.run.stages import prepare


class Unknown(NamedTuple):
    """Stands for what cannot be found out here."""

    reason: str


class KeptPairs(NamedTuple):
    """The prepared pairs of one folder; columns of equal length P."""

    summary: PairsSummary
    pair_ids: list[str]
    prompt_ids: list[str]
    parts: PartLengths
    """Tokens of prompt, chosen and rejected."""

    @property
    def lengths_P(self) -> NDArray[np.int64]:
        """Tokens of the longer of prompt + chosen and prompt + rejected."""
        return self.parts.prompt_P + np.maximum(self.parts.chosen_P, self.parts.rejected_P)

    @property
    def shared_lengths_P(self) -> NDArray[np.int64]:
        """Tokens of prompt, chosen and rejected in one row (see `engine.shared_rows`)."""
        return shared_lengths(*self.parts)

    def longest_row(self, rows_per_pair: int) -> int:
        """Tokens of the longest row, where a pair takes one row or two."""
        return int((self.shared_lengths_P if rows_per_pair == 1 else self.lengths_P).max())

    def rows(self, rows_N: NDArray[np.int64]) -> KeptPairs:
        """Some of the pairs, by row number."""
        return self._replace(
            pair_ids=[self.pair_ids[row] for row in rows_N],
            prompt_ids=[self.prompt_ids[row] for row in rows_N],
            parts=PartLengths(*(counts_P[rows_N] for counts_P in self.parts)),
        )


class Inputs(NamedTuple):
    """What a run would work on."""

    pairs: KeptPairs
    test: KeptPairs | None
    prompt_lengths_G: NDArray[np.int64]
    """Tokens of each prompt that would be answered."""
    orders: Mapping[str, list[str]] = MappingProxyType({})
    """Where difficulty is imported: the pairs that each arm trains on, in order."""

    @property
    def referenced(self) -> KeptPairs:
        """The training pairs whose reference is computed: all, or those of the known `orders`."""
        if not self.orders:
            return self.pairs
        trained = sorted({pair_id for order in self.orders.values() for pair_id in order})
        return self.pairs.rows(positions_of(trained, self.pairs.pair_ids, what="plan"))


def read_inputs(run: Run, *, use_published: bool) -> Inputs | Unknown:
    """Prepared pairs, published ones where `use_published`, else made in a temporary folder.

    Raises:
        DataError, TemplateError, ConfigError: the data are there, and cannot be used as the recipe says.
    """
    reason = why_unreachable(run)
    if reason:
        return Unknown(reason)
    if use_published:
        return _read(run)
    with tempfile.TemporaryDirectory() as scratch:
        elsewhere = Run(run.recipe, RunDirectory(Path(scratch) / "run"), say=lambda line: None)
        prepare(elsewhere)
        return _read(elsewhere)


def why_unreachable(run: Run) -> str:
    """Why tokenizer or data cannot be had here; "" if they can.

    What is found and does not work is an error; what is not found may be somewhere else.
    """
    try:
        load_tokenizer(run.recipe.model)
    except ModelError as error:
        if is_local(run.recipe.model):
            raise
        return str(error)
    if run.recipe.curriculum and not Path(run.recipe.curriculum).exists():
        return f"{run.recipe.curriculum}, the recipe's curriculum, is not here"
    for source in (*run.recipe.data.train, *run.recipe.data.test):
        try:
            open_source(source)
        except DataError as error:
            if _exists(source):
                raise
            return str(error)
    return ""


def is_local(config: ModelConfig) -> bool:
    """Whether the model (and its tokenizer) are folders of this machine."""
    return all(Path(path).is_dir() for path in (config.path, config.tokenizer or config.path))


def _exists(source: SourceConfig) -> bool:
    return Path(source.path).expanduser().exists()


def _read(run: Run) -> Inputs:
    test = _kept(run.folder.test_pairs) if run.recipe.data.test else None
    pairs = _kept(run.folder.pairs)
    return Inputs(pairs, test, _prompt_lengths(run), _orders(run, pairs))


def _orders(run: Run, pairs: KeptPairs) -> dict[str, list[str]]:
    if run.outside is None:
        return {}
    ids, prompt_ids = (pa.chunked_array([names]) for names in (pairs.pair_ids, pairs.prompt_ids))
    return {
        name: outside_curriculum(run.outside, ids, prompt_ids, select).order
        for name, (select, _) in run.arms.items()
    }


def _kept(folder: Path) -> KeptPairs:
    tokens = load_tokens(folder)
    ids = tokens.select_columns(["pair_id", "prompt_id"]).with_format("arrow")[:]
    pair_ids, prompt_ids = (ids[name].to_pylist() for name in ("pair_id", "prompt_id"))
    return KeptPairs(load_summary(folder), pair_ids, prompt_ids, part_lengths(tokens))


def _prompt_lengths(run: Run) -> NDArray[np.int64]:
    if run.recipe.evaluate.generation.prompts == 0:
        return np.zeros(0, dtype=np.int64)
    empty_system_message = run.recipe.data.empty_system_message
    lengths = [
        len(encode_prompt(run.tokenizer, prompt.text, empty_system_message=empty_system_message))
        for prompt in choose_prompts(prompts_to_answer(run), run.recipe.evaluate.generation)
    ]
    return np.array(lengths, dtype=np.int64)
