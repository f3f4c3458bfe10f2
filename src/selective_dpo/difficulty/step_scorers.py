"""One-step scorers: a gradient pass over the pairs, a step for each fold, a forward pass (see `one_step`).

The gradient pass leaves the sums of each fold on disk, and the reference's log-probs with them. The scorer of
a fold steps along the other folds' sums; the fold's own are not even read. A kill costs at most the work on
one fold.

Dimension suffixes: P pairs, B pairs of a batch, 2 chosen and rejected, W weights that a scorer may change.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import reduce
from datasets import Dataset
from numpy.typing import NDArray
from peft import get_peft_model
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.config import Recipe
from selective_dpo.curriculum.records import sift, write_records
from selective_dpo.data.store import load_tokens
from selective_dpo.difficulty import one_step
from selective_dpo.difficulty.folds import assign_folds
from selective_dpo.difficulty.held_out import Measurement
from selective_dpo.difficulty.one_step import GradientSums
from selective_dpo.difficulty.protocols import ScorerRun
from selective_dpo.difficulty.scorer import COST, RECORDS, to_records
from selective_dpo.distributed.processes import (
    combine_by_position,
    on_any_process,
    publish_from_main,
    this_process,
    whole_on_each_process,
)
from selective_dpo.distributed.progress import Progress
from selective_dpo.errors import ConfigError, NotFiniteError, name_some
from selective_dpo.identity import positions_of
from selective_dpo.logprobs.compute import PairLogps, pair_logps
from selective_dpo.logprobs.memory import Budget, bounded_batches, budget_for, run_within_memory
from selective_dpo.logprobs.nonfinite import require_few, write_quarantine
from selective_dpo.logprobs.packing_support import RowCollator, RowPlan, plan_rows
from selective_dpo.logprobs.reference import (
    load_reference,
    require_embedded,
    require_finite_start,
    without_quarantined,
)
from selective_dpo.logprobs.rows import forward_logps, log_probs_only, part_lengths
from selective_dpo.models import load_policy, load_tokenizer, spread_frozen
from selective_dpo.storage.artifacts import content_key, is_complete, read_json, write_json
from selective_dpo.training.arguments import (
    ORIGINAL_DEFAULTS,
    autocast_dtype,
    lora_config,
    mixed_precision,
    passes_spread,
    weights_dtype,
)
from selective_dpo.training.batching import disable_dropout

_SUMS, _LOGPS, _FACTS, _SCORER = "sums.safetensors", "logps.parquet", "facts.json", "scorer"

_FIRST_SIZE = 1e-3
"""Of the step that is tried first: rather too large, since a small one drowns in bfloat16's rounding."""

_TRIED_PAIRS, _MAX_TRIES = 32, 10


class Part(NamedTuple):
    """A folder of work in progress."""

    folder: Path
    key: str

    def is_complete(self) -> bool:
        """Whether it is published, and made from the same inputs."""
        return is_complete(self.folder, key=self.key)


class GradientJob(NamedTuple):
    """What the gradient pass of one split needs."""

    recipe: Recipe
    seed: int
    """Decides the folds, the adapter's first weights and the pairs of `score.gradient_pairs`."""
    pairs: Path
    """Folder of the prepared pairs."""
    work: Path
    """Where sums and measurements wait until the split's records are published."""
    key: str
    """Digest of what decides the sums."""

    def parts(self, name: str) -> list[Part]:
        """The folders in `work` for what `name` says of each fold."""
        return [
            Part(self.work / f"{name}-{fold}", content_key(part=name, key=self.key, fold=fold))
            for fold in range(one_step.FOLDS)
        ]


class OneStepJob(NamedTuple):
    """What one fold's one-step scorer needs."""

    gradients: GradientJob
    run: ScorerRun
    reference: Path
    """Folder of the reference's log-probs."""
    folder: Path
    """Where to publish the fold's records."""
    key: str


# --- the model ----------------------------------------------------------------------------------------------


class GradientPass(NamedTuple):
    """What a gradient pass over some pairs gives."""

    sums: GradientSums
    logps_P2: NDArray[np.float64]
    """Of each pair, under the starting policy."""


class StepScorer:
    """The starting policy, with the weights that a step moves: an adapter's, or all of its own.

    Args:
        tokens: the tokenized pairs that are measured.
        seed: decides an adapter's first weights.

    Raises:
        ConfigError: a loss whose gradient at the starting policy does not prefer chosen to rejected.
    """

    def __init__(self, recipe: Recipe, tokens: Dataset, seed: int) -> None:
        self.tokens = tokens
        self._config = recipe.score
        self._settings = {**ORIGINAL_DEFAULTS, **recipe.score.trainer}
        self._pad_token_id = load_tokenizer(recipe.model).pad_token_id
        self._autocast_dtype = autocast_dtype(recipe.score.trainer, recipe.model)
        # No more at a time than a training with this adapter holds.
        self._max_pairs = int(self._settings.get("per_device_train_batch_size", 8))
        with whole_on_each_process():
            policy = load_policy(recipe.model)
        if weights_dtype(recipe.model, recipe.score.lora, recipe.score.trainer) == "float32":
            policy.float()
        add_fused_lm_head(policy)
        if self._settings.get("gradient_checkpointing", self._settings.get("activation_checkpointing", True)):
            policy.activation_checkpointing_enable({"use_reentrant": False})
        adapter = lora_config(recipe.score.lora, recipe.model.revision)
        if adapter is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                policy = get_peft_model(policy, adapter)
        disable_dropout(policy)
        # With an adapter only: without one each process changes all weights.
        self._is_spread = adapter is not None and passes_spread(recipe.model, recipe.score.trainer)
        self.model: Any = spread_frozen(policy) if self._is_spread else policy.to(this_process().device)
        for name, weight in self.model.named_parameters():
            # Of an adapter's two matrices one is zero, so that the other one's gradient is.
            if ".lora_A." in name or ".lora_embedding_B." in name:
                weight.requires_grad_(False)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.start_W = self._flat([weight.detach() for weight in self.weights])
        slopes_P2 = one_step.loss_slopes(self.tokens_P2, self._settings)
        if not (slopes_P2 * (-1, 1) > 0).all():
            raise ConfigError(
                f"score.trainer.loss_type {self._settings.get('loss_type')} does not prefer chosen to "
                "rejected where a policy has not moved yet, and one step goes no further: use protocol 'fast'"
            )
        self._slopes_P2 = torch.from_numpy(slopes_P2).float()

    def require_computable(self) -> None:
        """Raise `ModelError` where the model has no row for a token, or gives the first pairs no numbers."""
        require_embedded(self.model, self.tokens)
        require_finite_start(
            self.model, self.tokens, pad_token_id=self._pad_token_id, autocast_dtype=self._autocast_dtype
        )

    @property
    def tokens_P2(self) -> NDArray[np.int64]:
        """Tokens of each pair's completions, chosen and rejected: [P, 2]."""
        return np.stack(part_lengths(self.tokens)[1:], axis=1)

    def accumulate(self, rows: NDArray[np.int64], progress: Progress) -> GradientPass:
        """Gradient sums and log-probs of the pairs in `rows`, over all processes.

        A pair whose log-probs are not finite gives no gradient.

        Raises:
            NotFiniteError: the gradient of some pairs is not finite though their log-probs are.
        """
        process, ids = this_process(), np.asarray(self.tokens["pair_id"])
        logps_P2, done_P = np.zeros((len(ids), 2)), np.zeros(len(ids), dtype=np.bool_)
        sums = GradientSums(torch.zeros_like(self.start_W), torch.zeros_like(self.start_W), 0, 0)
        dtype = self._autocast_dtype
        autocast = torch.autocast(process.device.type, dtype, enabled=dtype is not None)
        with log_probs_only(self.model), autocast:
            self.model.eval()
            with torch.no_grad():
                plan = plan_rows(self.model, self.tokens, self._pad_token_id, "auto")
                budget = budget_for(self.model, self._config.tokens_per_batch)
            collate = RowCollator(self.model, pad_token_id=self._pad_token_id, kind=plan.kind)
            batches = one_step.micro_batches(ids[rows].tolist(), plan.lengths_P[rows])
            self.model.train()
            for batch in batches[process.process_index :: process.num_processes]:
                pairs = rows[batch]
                gradient_W = self._gradient(plan, collate, budget, pairs, logps_P2)
                done_P[pairs] = True
                finite = np.isfinite(logps_P2[pairs]).all(axis=1)
                if not bool(gradient_W.isfinite().all()):
                    raise NotFiniteError(
                        f"the gradient of these pairs is not finite: {name_some(ids[pairs])}; use bfloat16 "
                        "or float32 instead of float16, or leave those at fault out (data.exclude)"
                    )
                if finite.any():
                    sums = sums.plus(gradient_W, int(finite.sum()))
                progress.advance(len(batch) * process.num_processes)
            while self._next_pass(has_work=False):
                self._pass_gradient(collate, rows[:1])
            self.model.eval()
        names = ids[rows].tolist()
        logps_P2 = combine_by_position(logps_P2[rows], done_P[rows], names, what="gradients")
        return GradientPass(_over_processes(sums), logps_P2)

    def _gradient(
        self,
        plan: RowPlan,
        collate: RowCollator,
        budget: Budget,
        pairs: NDArray[np.int64],
        logps_P2: NDArray[np.float64],
    ) -> Tensor:
        """Sum of the gradients of the pairs' losses: [W]."""
        total_W = torch.zeros_like(self.start_W)

        def add(batch: NDArray[np.int64]) -> None:
            rows = pairs[batch]
            self._next_pass(has_work=True)
            logps_P2[rows], gradient_W = self._pass_gradient(collate, rows)
            is_finite = np.isfinite(logps_P2[rows]).all(axis=1)
            if is_finite.all():
                total_W.add_(gradient_W)
            elif is_finite.any():
                add(batch[is_finite])

        lengths_P = plan.lengths_P[pairs]
        batches = bounded_batches(lengths_P, budget, rows_per_pair=plan.rows_per_pair)
        pieces = [
            batch[start : start + self._max_pairs]
            for batch in batches
            for start in range(0, len(batch), self._max_pairs)
        ]
        run_within_memory(
            add, pieces, lengths_P, budget, rows_per_pair=plan.rows_per_pair, recover=not self._is_spread
        )
        return total_W

    def _pass_gradient(
        self, collate: RowCollator, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], Tensor]:
        """One forward and backward pass: log-probs [B, 2], and the gradient of the summed losses [W]."""
        logps_B2 = forward_logps(self.model, collate(self.tokens[rows]).to(self.start_W.device))
        loss = (logps_B2 * self._slopes_P2[rows].to(logps_B2.device)).sum()
        found = torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)
        return logps_B2.detach().double().cpu().numpy(), self._flat(found)

    def _next_pass(self, *, has_work: bool) -> bool:
        """Whether there is another pass. Processes that divide the weights gather them together, so one that
        has no work left runs on while another has some."""
        return on_any_process(has_work) if self._is_spread else has_work

    def measure(self, rows: NDArray[np.int64], what: str) -> NDArray[np.float64]:
        """Log-probs of the pairs in `rows` under the model as it is: [P, 2]."""
        logps = pair_logps(
            self.model,
            self.tokens.select(rows),
            tokens_per_batch=self._config.tokens_per_batch,
            pad_token_id=self._pad_token_id,
            autocast_dtype=self._autocast_dtype,
            what=what,
        )
        return np.stack([logps.chosen_P, logps.rejected_P], axis=1)

    @contextlib.contextmanager
    def moved(self, step_W: NDArray[np.float32]) -> Iterator[None]:
        """Inside, the model's weights are moved by `step_W`."""
        self._set(self.start_W + torch.from_numpy(step_W).to(self.start_W.device))
        try:
            yield
        finally:
            self._set(self.start_W)

    def _set(self, values_W: Tensor) -> None:
        with torch.no_grad():
            parts = torch.split(values_W, [weight.numel() for weight in self.weights])
            for weight, part in zip(self.weights, parts, strict=True):
                weight.copy_(part.view_as(weight))

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.float().flatten() for part in parts])


def _over_processes(sums: GradientSums) -> GradientSums:
    if this_process().num_processes == 1:
        return sums
    counts = torch.tensor([sums.pairs, sums.micro_batches], device=sums.gradient_W.device)
    gradient_W, squares_W, counts = (
        reduce(each, "sum") for each in (sums.gradient_W, sums.squares_W, counts)
    )
    return GradientSums(gradient_W, squares_W, *map(int, counts.tolist()))


# --- 1. the gradient pass -----------------------------------------------------------------------------------


def gradient_pass(job: GradientJob) -> PairLogps:
    """Accumulate the gradients of those folds of the job's split that are not there yet.

    Returns the log-probs of all pairs under the starting policy, from the same forward passes.

    Raises:
        NotFiniteError: the gradient of some pairs is not finite though their log-probs are; they are named.
    """
    tokens = load_tokens(job.pairs)
    parts = job.parts("gradient")
    missing = [fold for fold, part in enumerate(parts) if not part.is_complete()]
    if missing:
        sampled_P = _sample(tokens["pair_id"], job.recipe.score.gradient_pairs, job.seed)
        scorer = StepScorer(job.recipe, tokens, job.seed)
        scorer.require_computable()
        fold_P = _folds(tokens, job.seed)
        with Progress(int(np.isin(fold_P, missing).sum()), "gradients") as progress:
            for fold in missing:
                started = time.monotonic()
                rows, others = (
                    np.flatnonzero((fold_P == fold) & (sampled_P == is_in)) for is_in in (True, False)
                )
                sums, logps_P2 = scorer.accumulate(rows, progress)
                if len(others):
                    logps_P2 = np.concatenate([logps_P2, scorer.measure(others, "reference")])
                    progress.advance(len(others))
                pair_ids = tokens.select([*rows, *others])["pair_id"]
                seconds = time.monotonic() - started
                with publish_from_main(parts[fold].folder, kind="gradient", key=parts[fold].key) as partial:
                    arrays = {"gradient": sums.gradient_W.cpu(), "squares": sums.squares_W.cpu()}
                    save_file(arrays, partial / _SUMS)
                    facts = {"pairs": sums.pairs, "micro_batches": sums.micro_batches, "seconds": seconds}
                    write_json(partial / _FACTS, facts)
                    _write_logps(partial, pair_ids, logps_P2)
    return _read_logps([part.folder for part in parts], list(tokens["pair_id"]))


def _folds(tokens: Dataset, seed: int) -> NDArray[np.int64]:
    return assign_folds(tokens["prompt_id"], seed=seed, folds=one_step.FOLDS)


def _sample(pair_ids_P: Sequence[str], count: int, seed: int) -> NDArray[np.bool_]:
    """Which pairs give gradients: `count` of them at random, whatever the order of the rows; 0: all."""
    if not 0 < count < len(pair_ids_P):
        return np.ones(len(pair_ids_P), dtype=np.bool_)
    by_id = np.argsort(np.asarray(pair_ids_P, dtype=np.str_))
    sampled_P = np.zeros(len(pair_ids_P), dtype=np.bool_)
    sampled_P[by_id[np.random.default_rng(seed).permutation(len(by_id))[:count]]] = True
    return sampled_P


def _read_sums(part: Part) -> GradientSums:
    arrays, facts = load_file(part.folder / _SUMS), read_json(part.folder / _FACTS)
    return GradientSums(arrays["gradient"], arrays["squares"], facts["pairs"], facts["micro_batches"])


def _write_logps(folder: Path, pair_ids: Sequence[str], logps_P2: NDArray[np.float64]) -> None:
    columns = {
        "pair_id": pa.array(pair_ids, pa.string()),
        "chosen": logps_P2[:, 0],
        "rejected": logps_P2[:, 1],
    }
    pq.write_table(pa.table(columns), folder / _LOGPS)


def _read_logps(folders: Sequence[Path], pair_ids: list[str]) -> PairLogps:
    table = pa.concat_tables([pq.read_table(folder / _LOGPS) for folder in folders])
    at = positions_of(pair_ids, table["pair_id"].to_pylist(), what="one-step log-probs")
    return PairLogps(pair_ids, *(table[name].to_numpy()[at] for name in ("chosen", "rejected")))


# --- 2. steps and measurements ------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """All pairs of a split under the one-step scorers of their folds; columns in the order of `tokens`."""

    tokens: Dataset
    reference: PairLogps
    policy_P2: NDArray[np.float64]
    reference_P2: NDArray[np.float64]
    fold_P: NDArray[np.int64]


def _measure_folds(job: OneStepJob) -> _Measured:
    """Measure those folds of the job's split that are not measured yet."""
    reference = load_reference(job.reference)
    gradients = job.gradients
    tokens = load_tokens(gradients.pairs)
    fold_of = dict(zip(tokens["pair_id"], _folds(tokens, gradients.seed).tolist(), strict=True))
    tokens = without_quarantined(tokens, job.reference)
    pair_ids = list(tokens["pair_id"])
    fold_P = np.array([fold_of[name] for name in pair_ids])
    at = positions_of(pair_ids, reference.pair_ids, what="reference log-probs")
    reference_P2 = np.stack([reference.chosen_P[at], reference.rejected_P[at]], axis=1)
    parts = gradients.parts("measured")
    missing = [fold for fold, part in enumerate(parts) if not part.is_complete()]
    if missing:
        gradient_pass(gradients)
        scorer = StepScorer(gradients.recipe, tokens, gradients.seed)
        size = _step_size(gradients, scorer, np.flatnonzero(fold_P == 0), reference_P2)
        for fold in missing:
            started = time.monotonic()
            rows = np.flatnonzero(fold_P == fold)
            with scorer.moved(size * _direction(gradients, fold)):
                logps_P2 = scorer.measure(rows, f"held-out fold {fold + 1} of {len(parts)}")
                with publish_from_main(parts[fold].folder, kind="measured", key=parts[fold].key) as partial:
                    _write_logps(partial, tokens.select(rows)["pair_id"], logps_P2)
                    write_json(partial / _FACTS, {"size": size, "seconds": time.monotonic() - started})
                    if gradients.recipe.score.keep_scorers:
                        scorer.model.save_pretrained(partial / _SCORER)
    policy = _read_logps([part.folder for part in parts], pair_ids)
    policy_P2 = np.stack([policy.chosen_P, policy.rejected_P], axis=1)
    return _Measured(tokens, reference, policy_P2, reference_P2, fold_P)


def _direction(job: GradientJob, fold: int) -> NDArray[np.float32]:
    """The direction of the fold's scorer: only the other folds' sums are read."""
    others = (_read_sums(part) for other, part in enumerate(job.parts("gradient")) if other != fold)
    try:
        return one_step.step_direction(one_step.add_sums(others))
    except ValueError as error:
        raise ConfigError(
            f"{error}: there is nothing to learn from these pairs under score.trainer"
        ) from error


def target_delta(recipe: Recipe) -> float:
    """How far a step moves the pairs' log-ratio differences, in nats a token (root mean square)."""
    score = recipe.score
    computed_in = mixed_precision(score.trainer, recipe.model) or weights_dtype(
        recipe.model, score.lora, score.trainer
    )
    return one_step.TARGET_DELTA if computed_in == "float32" else one_step.ROUNDED_TARGET_DELTA


def _step_size(
    job: GradientJob, scorer: StepScorer, rows: NDArray[np.int64], reference_P2: NDArray[np.float64]
) -> float:
    """The size of the split's steps, found with the first fold's scorer on some of its pairs."""
    place, key = job.work / "size.json", job.parts("measured")[0].key
    if place.is_file() and (found := read_json(place))["key"] == key:
        return float(found["size"])
    rows = rows[:: max(1, len(rows) // _TRIED_PAIRS)][:_TRIED_PAIRS]
    direction_W, tokens_P = _direction(job, 0), scorer.tokens_P2[rows].sum(axis=1)
    size, target = _FIRST_SIZE, target_delta(job.recipe)
    for _ in range(_MAX_TRIES):
        with scorer.moved(size * direction_W):
            ratios_P2 = scorer.measure(rows, "step size") - reference_P2[rows]
        tried, size = size, one_step.better_size(size, ratios_P2[:, 0] - ratios_P2[:, 1], tokens_P, target)
        if 0.5 < size / tried < 2.0:
            if this_process().is_main_process:
                write_json(place, {"key": key, "size": size})
            return size
    raise ConfigError(
        f"no size of step was found after {_MAX_TRIES} tries, the last of {tried:.3g}: use protocol 'fast'"
    )


def run_step_scorer(job: OneStepJob) -> None:
    """Publish the records of one fold: measure all folds, put the losses on their scale, keep this fold's.

    Raises:
        ConfigError: no step changes the log-probs.
        NotFiniteError: as `gradient_pass`.
        RecordsError: the held-out losses of more than 1% of the fold's pairs are not finite.
    """
    tokens, reference, policy_P2, reference_P2, fold_P = _measure_folds(job)
    score = job.gradients.recipe.score
    settings = {**ORIGINAL_DEFAULTS, **score.trainer}
    tokens_P2 = np.stack(part_lengths(tokens)[1:], axis=1)
    finite = np.isfinite(policy_P2).all(axis=1)
    scale = one_step.cross_fitted_scale(
        policy_P2[finite], reference_P2[finite], tokens_P2[finite], fold_P[finite] == job.run.fold, settings
    )
    rows = np.flatnonzero(fold_P == job.run.fold)
    logps_P2 = one_step.scaled_logps(policy_P2[rows], reference_P2[rows], scale)
    held_out = tokens.select(rows)
    measured = Measurement(1, 1, PairLogps(list(held_out["pair_id"]), logps_P2[:, 0], logps_P2[:, 1]))
    records, quarantined = sift(to_records(job.run, held_out, reference, [measured], settings))
    require_few(
        quarantined,
        len(held_out),
        what="the held-out loss",
        remedy="use bfloat16 or float32 instead of float16",
    )
    gradient, forward = (job.gradients.parts(name)[job.run.fold].folder for name in ("gradient", "measured"))
    gradient_facts, facts = read_json(gradient / _FACTS), read_json(forward / _FACTS)
    with publish_from_main(job.folder, kind="records", key=job.key) as partial:
        write_records(records, partial / RECORDS)
        write_quarantine(partial, quarantined, pairs=len(held_out))
        cost = {
            "optimizer_steps": 1,
            "processes": this_process().num_processes,
            "device": this_process().device.type,
            "train_pairs": int((fold_P != job.run.fold).sum()),
            "held_out_pairs": len(held_out),
            "quarantined_pairs": len(quarantined),
            "evaluations": 1,
            "gradient_pairs": gradient_facts["pairs"],
            "step_size": facts["size"],
            "scale": scale,
            "seconds": gradient_facts["seconds"] + facts["seconds"],
        }
        write_json(partial / COST, cost)
        if score.keep_scorers:
            shutil.copytree(forward / _SCORER, partial / _SCORER)
