"""Difficulty scoring on tiny models, in this process: what is trained on, what is measured, what is kept."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
from transformers import AutoModelForCausalLM

from selective_dpo.config import Recipe
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.records import Records, read_records, write_records
from selective_dpo.data.store import load_tokens
from selective_dpo.difficulty import scorer as scorer_module
from selective_dpo.difficulty.scorer import RECORDS, ScorerJob, collect_records, run_scorer
from selective_dpo.errors import ConfigError, NotFiniteError, RecordsError
from selective_dpo.run import stages
from selective_dpo.run.keys import Run
from selective_dpo.run.run import curriculum, open_run, score
from selective_dpo.run.verify import verify_run
from selective_dpo.storage.artifacts import read_json, verify_folder
from selective_dpo.training.batching import PAIRS as BATCH
from tests.fixtures.by_hand import dpo_loss, dpo_margin, sequence_logp
from tests.fixtures.fork_server import FORKED_WORKERS, ForkServer
from tests.fixtures.models import recipe_file, tiny_model_folder, tiny_pairs_file, tiny_recipe
from tests.fixtures.tokenizers import END

pytestmark = pytest.mark.slow

PAIRS = 24
PROMPTS = 16
FULL = {"lora": None, "trainer": {"learning_rate": 1e-3}}


class Consumed(NamedTuple):
    """One trainer, and the pairs in each batch that its loss was computed on while training."""

    seed: int
    batches: list[list[str]]

    @property
    def pairs(self) -> list[str]:
        return [pair for batch in self.batches for pair in batch]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and ragged pairs, some of one token, some sharing their prompt."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model_folder(folder / "model")
    pairs = tiny_pairs_file(folder / "pairs.jsonl", PAIRS - 2, PROMPTS)
    one_token = [
        {"prompt": "one?", "chosen": END, "rejected": "more than one token"},
        {"prompt": "two?", "chosen": "a longer answer than the other one", "rejected": END},
    ]
    with pairs.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in one_token)
    return folder


def scored(inputs: Path, output: Path, **score_block: Any) -> Run:
    """A scored run of the inputs in `output`."""
    run = open_run(recipe_for(inputs, output, **score_block), say=lambda line: None)
    score(run)
    return run


def recipe_for(inputs: Path, output: Path, **score_block: Any) -> Recipe:
    return tiny_recipe(inputs, output_dir=str(output), score=score_block)


def records_of(run: Run) -> Records:
    return collect_records([run.folder.scores(scorer) for scorer in run.scorer_runs])


def files_of(run: Run) -> dict[str, bytes]:
    return {scorer.name: (run.folder.scores(scorer) / RECORDS).read_bytes() for scorer in run.scorer_runs}


@pytest.fixture
def consumed(monkeypatch: pytest.MonkeyPatch, inputs: Path) -> list[Consumed]:
    """Filled with what each scorer's trainer consumes, read off the batches that the loss is computed on."""
    pair_of: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    trainings: list[Consumed] = []

    class Spy(scorer_module._Scorer):
        def __init__(self, *args: Any, **others: Any) -> None:
            super().__init__(*args, **others)
            for row in self.train_dataset:
                pair_of[tuple(row["prompt_ids"]), tuple(row["chosen_ids"])] = row["pair_id"]
            self.consumed = Consumed(self.args.seed, [])
            trainings.append(self.consumed)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **others: Any) -> Any:
            assert model.training
            tokens = [pair.tokens for pair in inputs[BATCH].pairs]
            names = [pair_of[tuple(prompt), tuple(chosen)] for prompt, chosen, _ in tokens]
            self.consumed.batches.append(names)
            return super().compute_loss(model, inputs, *args, **others)

    monkeypatch.setattr(scorer_module, "_Scorer", Spy)
    return trainings


class TestWhatIsTrainedOn:
    def test_no_scored_pair_nor_one_of_its_prompt_is_in_its_scorers_training(
        self, inputs: Path, tmp_path: Path, consumed: list[Consumed]
    ) -> None:
        run = scored(inputs, tmp_path, seeds=[41, 42], trainer={"num_train_epochs": 2})
        tokens = load_tokens(run.folder.pairs)
        prompt_of = dict(zip(tokens["pair_id"], tokens["prompt_id"], strict=True))
        assert len(prompt_of) == PAIRS and len(set(prompt_of.values())) == PROMPTS + 2
        assert [training.seed for training in consumed] == [41, 41, 42, 42]
        for scorer, training in zip(run.scorer_runs, consumed, strict=True):
            records = read_records(run.folder.scores(scorer) / RECORDS)
            held_out, trained = set(records.pair_id.tolist()), set(training.pairs)
            assert not held_out & trained
            assert not {prompt_of[pair] for pair in held_out} & {prompt_of[pair] for pair in trained}
            assert held_out | trained == set(prompt_of)
            # Each pair of the training half once an epoch, in another order each time.
            half = len(training.pairs) // 2
            first, second = training.pairs[:half], training.pairs[half:]
            assert len(first) == len(trained) and set(first) == set(second) == trained
            assert first != second

    def test_a_scorer_trains_in_random_order(
        self, inputs: Path, tmp_path: Path, consumed: list[Consumed]
    ) -> None:
        run = scored(inputs, tmp_path)
        in_file = list(load_tokens(run.folder.pairs)["pair_id"])
        for training in consumed:
            assert training.pairs != [pair for pair in in_file if pair in set(training.pairs)]


class TestWhichRecordsThereAre:
    def test_each_pair_once_per_seed_and_evaluation_by_the_other_halfs_scorer(
        self, inputs: Path, tmp_path: Path
    ) -> None:
        run = scored(inputs, tmp_path, seeds=[41, 7], evaluations=3)
        records = records_of(run)
        keys = list(
            zip(records.pair_id.tolist(), records.seed.tolist(), records.evaluation.tolist(), strict=True)
        )
        pairs = list(load_tokens(run.folder.pairs)["pair_id"])
        assert sorted(keys) == sorted(
            (pair, seed, e) for pair in pairs for seed in (41, 7) for e in (1, 2, 3)
        )
        # A pair's fold is a property of its seed: all evaluations agree, and each fold is about half.
        folds = {(pair, seed): set() for pair in pairs for seed in (41, 7)}
        for pair, seed, fold in zip(records.pair_id, records.seed, records.fold, strict=True):
            folds[pair, seed].add(int(fold))
        assert all(len(each) == 1 for each in folds.values())
        assert abs(sum(folds[pair, 41] == {0} for pair in pairs) - PAIRS / 2) <= 1

    @pytest.mark.parametrize(
        ("batch", "evaluations", "steps"),
        [
            # 12 training pairs: 6 updates of 2, so every second one.
            (2, 3, [2, 4, 6]),
            # 12 updates of 1; 12 * k / 5 = 2.4, 4.8, 7.2, 9.6, 12.
            (1, 5, [2, 5, 7, 10, 12]),
            # 3 updates of 4: one evaluation is after the last.
            (4, 1, [3]),
        ],
    )
    def test_evaluations_are_evenly_spaced_and_the_last_is_after_the_last_update(
        self, inputs: Path, tmp_path: Path, batch: int, evaluations: int, steps: list[int]
    ) -> None:
        recipe = recipe_for(
            inputs, tmp_path, evaluations=evaluations, trainer={"per_device_train_batch_size": batch}
        )
        run = open_run(recipe, say=lambda line: None)
        score(run)
        records = records_of(run)
        assert sorted(set(records.step.tolist())) == steps
        step_of = set(zip(records.evaluation.tolist(), records.step.tolist(), strict=True))
        assert step_of == set(enumerate(steps, start=1))
        for scorer in run.scorer_runs:
            assert read_json(run.folder.scores(scorer) / "cost.json")["optimizer_steps"] == steps[-1]

    def test_more_evaluations_than_updates_are_refused_before_anything_is_published(
        self, inputs: Path, tmp_path: Path
    ) -> None:
        run = open_run(recipe_for(inputs, tmp_path, evaluations=4), say=lambda line: None)
        with pytest.raises(
            ConfigError, match=r"3 optimizer steps have no room for 4 evaluations: lower score"
        ):
            score(run)
        assert not list((run.folder.root / "scores").glob("*"))


class TestTheNumbers:
    @pytest.mark.parametrize("kind", ["lora", "full"])
    def test_records_equal_what_the_published_scorer_says_one_sequence_at_a_time(
        self, inputs: Path, tmp_path: Path, kind: str
    ) -> None:
        settings: dict[str, Any] = FULL if kind == "full" else {}
        # One pair a batch and updates that change the weights visibly.
        run = scored(inputs, tmp_path, keep_scorers=True, tokens_per_batch=1, **settings)
        tokens = {row["pair_id"]: row for row in load_tokens(run.folder.pairs)}
        base = AutoModelForCausalLM.from_pretrained(run.recipe.model.path).double()
        lengths = {len(row[side]) for row in tokens.values() for side in ("chosen_ids", "rejected_ids")}
        assert 1 in lengths and len(lengths) > 8
        moved = 0.0
        for scorer in run.scorer_runs:
            folder = run.folder.scores(scorer)
            if kind == "lora":
                start = AutoModelForCausalLM.from_pretrained(run.recipe.model.path)
                policy = peft.PeftModel.from_pretrained(start, folder / "scorer").double()
            else:
                policy = AutoModelForCausalLM.from_pretrained(folder / "scorer").double()
            policy.eval()
            records = read_records(folder / RECORDS)
            for row in np.flatnonzero(records.evaluation == run.recipe.score.evaluations):
                pair = tokens[records.pair_id[row]]
                logps = [
                    sequence_logp(model, pair["prompt_ids"], pair[side])
                    for model in (policy, base)
                    for side in ("chosen_ids", "rejected_ids")
                ]
                found = [
                    records.policy_chosen_logp[row],
                    records.policy_rejected_logp[row],
                    records.reference_chosen_logp[row],
                    records.reference_rejected_logp[row],
                ]
                # float32 sums of up to 160 nats carry 7 digits.
                np.testing.assert_allclose(found, logps, rtol=3e-7, atol=1e-5)
                margin = dpo_margin(*logps, beta=0.1)
                assert records.margin[row] == pytest.approx(margin, abs=1e-5)
                assert records.loss[row] == pytest.approx(dpo_loss(margin), abs=1e-5)
                # The records' own columns agree with each other to float64.
                assert records.margin[row] == pytest.approx(dpo_margin(*found, beta=0.1), rel=1e-12)
                assert records.loss[row] == pytest.approx(dpo_loss(records.margin[row]), rel=1e-12)
                moved = max(moved, abs(margin))
        assert moved > 0.01

    def test_the_difficulty_is_the_loss_that_the_scorer_is_trained_with(
        self, inputs: Path, tmp_path: Path
    ) -> None:
        losses = {"loss_type": ["ipo", "hinge"], "loss_weights": [0.5, 2.0]}
        settings = {"learning_rate": 1e-3, "beta": 0.1, **losses}
        run = open_run(recipe_for(inputs, tmp_path, lora=None, trainer=settings), say=lambda line: None)
        made = curriculum(run)
        tokens = {row["pair_id"]: row for row in load_tokens(run.folder.pairs)}
        records = records_of(run)
        for row, pair_id in enumerate(records.pair_id):
            pair = tokens[pair_id]
            chosen, rejected = (
                getattr(records, f"policy_{side}_logp")[row] - getattr(records, f"reference_{side}_logp")[row]
                for side in ("chosen", "rejected")
            )
            per_token = chosen / len(pair["chosen_ids"]) - rejected / len(pair["rejected_ids"])
            # IPO: (difference per token - 1 / (2 beta))^2, halved; hinge: max(0, 1 - margin), doubled.
            expected = 0.5 * (per_token - 5.0) ** 2 + 2.0 * max(0.0, 1.0 - 0.1 * (chosen - rejected))
            assert records.loss[row] == pytest.approx(expected, rel=1e-12)
        assert np.abs(records.margin).max() > 0.01
        # A policy that has not moved: half of 25, and two.
        agreement = made.facts["agreement"]
        assert agreement["chance_loss"] == pytest.approx(14.5)
        above = (made.difficulty_P > 14.5).mean()
        assert 0.0 < above < 1.0 and agreement["above_chance"]["value"] == pytest.approx(above)
        # Without the run nobody knows what the loss of such records is at chance.
        assert build_curriculum(records).facts["agreement"]["above_chance"] is None
        assert verify_run(run.folder.root).problems == []
        path = run.folder.scores(run.scorer_runs[0]) / RECORDS
        as_dpos = dataclasses.replace(read_records(path), loss=np.logaddexp(0, -read_records(path).margin))
        write_records(as_dpos, path)
        assert any(
            f"{RECORDS}: loss is not what the stored inputs give" in problem
            for problem in verify_run(run.folder.root).problems
        )

    def test_how_pairs_are_batched_does_not_matter(self, inputs: Path, tmp_path: Path) -> None:
        small = records_of(scored(inputs, tmp_path / "small", tokens_per_batch=1))
        large = records_of(scored(inputs, tmp_path / "large", tokens_per_batch=100_000))
        for field in dataclasses.fields(Records):
            one, other = getattr(small, field.name), getattr(large, field.name)
            if field.name.endswith("_logp") or field.name in ("margin", "loss"):
                np.testing.assert_allclose(one, other, rtol=3e-7, atol=1e-5)
            else:
                assert (one == other).all()

    def test_evaluating_more_often_does_not_change_training(self, inputs: Path, tmp_path: Path) -> None:
        last = []
        for evaluations in (1, 3):
            records = records_of(scored(inputs, tmp_path / str(evaluations), evaluations=evaluations))
            final = records.evaluation == evaluations
            last.append((records.pair_id[final], records.policy_chosen_logp[final], records.loss[final]))
        for one, other in zip(*last, strict=True):
            assert (one == other).all()

    def test_the_same_recipe_gives_the_same_bytes_and_another_seed_another_split(
        self, inputs: Path, tmp_path: Path
    ) -> None:
        once, again = scored(inputs, tmp_path / "a"), scored(inputs, tmp_path / "b")
        assert files_of(once) == files_of(again)
        other = records_of(scored(inputs, tmp_path / "c", seeds=[42]))
        records = records_of(once)
        assert (other.pair_id == records.pair_id).all()
        assert (other.fold != records.fold).any()
        assert not np.isclose(other.loss, records.loss).all()


class TestWorkers:
    def test_two_workers_give_the_same_bytes(self, inputs: Path, tmp_path: Path, server: ForkServer) -> None:
        alone = scored(inputs, tmp_path / "alone")
        recipe = tiny_recipe(inputs, output_dir=str(tmp_path / "together"), launch={"workers": 2})
        path = recipe_file(recipe, tmp_path / "recipe.yaml")
        started = server.start("score", path, environment=FORKED_WORKERS)
        assert started.wait() == 0, started.communicate()
        together = open_run(recipe, say=lambda line: None)
        assert files_of(together) == files_of(alone)

    def test_a_failing_scorer_names_itself_and_does_not_undo_the_others(
        self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails_on_fold_0(job: ScorerJob) -> None:
            if job.run.fold == 0:
                raise RecordsError("the held-out loss of 2 pairs is not finite")
            run_scorer(job)

        monkeypatch.setattr(stages, "run_scorer", fails_on_fold_0)
        run = open_run(recipe_for(inputs, tmp_path), say=lambda line: None)
        with pytest.raises(RecordsError, match=r"^seed41-fold0: the held-out loss of 2 pairs is not finite$"):
            score(run)
        first, second = (run.folder.scores(scorer) for scorer in run.scorer_runs)
        assert not first.exists()
        before = _state(second)
        verify_folder(second)
        monkeypatch.undo()
        score(run)
        assert len(records_of(run)) == 2 * PAIRS
        assert _state(second) == before

    def test_a_training_that_diverges_is_stopped_and_names_pairs(self, inputs: Path, tmp_path: Path) -> None:
        # A learning rate that sends the weights to infinity, after a first update at 0.
        settings = {**FULL, "trainer": {"learning_rate": 1e38, "max_grad_norm": 0.0}}
        run = open_run(recipe_for(inputs, tmp_path, **settings), say=lambda line: None)
        with pytest.raises(
            NotFiniteError,
            match=r"^seed41-fold0: the loss of 4 of 4 pairs is not finite.* before update 3 .*: [0-9a-f]{32}",
        ):
            score(run)
        assert not [path for path in (run.folder.root / "scores").glob("*") if path.is_dir()]


class TestResume:
    def test_a_second_score_does_nothing(
        self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = scored(inputs, tmp_path)
        before = _states(run)
        monkeypatch.setattr(stages, "run_scorer", _must_not_run)
        score(open_run(run.recipe, say=lambda line: None))
        assert _states(run) == before

    def test_only_what_is_missing_or_damaged_is_run_again(
        self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = scored(inputs, tmp_path)
        wanted, before = files_of(run), _states(run)
        ran = _log_scorers(monkeypatch)
        records = run.folder.scores(run.scorer_runs[1]) / RECORDS
        content = bytearray(records.read_bytes())
        content[len(content) // 2] ^= 1
        records.write_bytes(content)
        score(open_run(run.recipe, say=lambda line: None))
        assert ran == ["seed41-fold1"]
        for path in run.folder.scores(run.scorer_runs[0]).iterdir():
            path.unlink()
        run.folder.scores(run.scorer_runs[0]).rmdir()
        score(open_run(run.recipe, say=lambda line: None))
        assert ran == ["seed41-fold1", "seed41-fold0"]
        assert files_of(run) == wanted
        for stage in ("pairs", "reference"):
            assert _states(run)[stage] == before[stage]

    def test_only_runs_the_scorers_it_names(self, inputs: Path, tmp_path: Path) -> None:
        run = open_run(recipe_for(inputs, tmp_path), say=lambda line: None)
        score(run, only=("seed41-fold0",))
        assert [folder.name for folder in (run.folder.root / "scores").iterdir()] == ["seed41-fold0"]
        with pytest.raises(
            ConfigError, match="no scorer named seed41-fold2; this recipe has seed41-fold0, seed41-fold1"
        ):
            score(run, only=("seed41-fold2",))

    def test_another_seed_keeps_the_records_there_are(
        self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = scored(inputs, tmp_path)
        before = _states(run)
        ran = _log_scorers(monkeypatch)
        more = open_run(recipe_for(inputs, tmp_path, seeds=[41, 43]), fresh=True, say=lambda line: None)
        score(more)
        assert ran == ["seed43-fold0", "seed43-fold1"]
        after = _states(more)
        assert {name: after[name] for name in before} == before
        assert len(records_of(more)) == 2 * 2 * PAIRS

    def test_another_training_setting_measures_anew(
        self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scored(inputs, tmp_path)
        ran = _log_scorers(monkeypatch)
        changed = recipe_for(inputs, tmp_path, trainer={"learning_rate": 5e-3})
        score(open_run(changed, fresh=True, say=lambda line: None))
        assert ran == ["seed41-fold0", "seed41-fold1"]


def _must_not_run(job: ScorerJob) -> None:
    raise AssertionError(f"{job.run.name} was run")


def _log_scorers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the scorers that are run from now on."""
    ran: list[str] = []

    def logged(job: ScorerJob) -> None:
        ran.append(job.run.name)
        run_scorer(job)

    monkeypatch.setattr(stages, "run_scorer", logged)
    return ran


def _state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.iterdir())}


def _states(run: Run) -> dict[str, dict[str, tuple[int, bytes]]]:
    folders = [run.folder.pairs, run.folder.reference, *map(run.folder.scores, run.scorer_runs)]
    return {folder.name: _state(folder) for folder in folders}


def test_each_scorer_that_is_done_tells_the_time_that_the_others_will_take(
    inputs: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    score(open_run(recipe_for(inputs, tmp_path, evaluations=1), say=lines.append))
    first, last = (line for line in lines if "pairs trained" in line)
    assert re.search(r" s \(1 of 2, about \d+ s left\)$", first)
    assert "left" not in last
