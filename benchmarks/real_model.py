"""The method on a real language model: SmolLM2-135M-Instruct, with LoRA adapters, on a CPU or a GPU.

    python benchmarks/real_model.py --json benchmarks/results/real_model.json

Part "judged" (it needs ../shared/data/alpaca_pairs_*.jsonl.gz, and is left out without it): real pairs of two
models' answers, ordered by a GPT-4-turbo judge, at most `LONGEST` characters each. Three trained seeds and
`one-step`: how they agree, what difficulty goes with, and the accuracy on held-out pairs of policies trained
on all pairs, a random half, the hardest half and each easiest half.

Part "checked": pairs that anyone can rebuild, of the model's own answers to instructions that a program
checks (`selective_dpo/worlds/constraints.py`), labelled with noise. The wrong labels that `one-step` and
`fast` find, and policies judged by the checker on other instructions, as in the demo; several worlds.

Everything lies in --work and is kept: an interrupted benchmark continues. The seconds of a part are those of
the work that was done, on whatever else the machine did.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from harness import mean_over_worlds
from one_step_world import _auc as auc
from one_step_world import _easiest_half as easiest_half
from selective_dpo import __version__
from selective_dpo.config import Recipe
from selective_dpo.curriculum.records import LossTable
from selective_dpo.data.store import load_tokens
from selective_dpo.difficulty.scorer import collect_losses, collect_records
from selective_dpo.distributed.progress import quieten_libraries
from selective_dpo.evaluation.results import EvaluationResults, from_json
from selective_dpo.identity import positions_of
from selective_dpo.logprobs.rows import part_lengths
from selective_dpo.run.demo import sample_texts
from selective_dpo.run.keys import Run
from selective_dpo.run.run import open_run, score
from selective_dpo.run.stages import bring_up
from selective_dpo.stats.estimates import Estimate
from selective_dpo.stats.rank_correlation import clustered_spearman
from selective_dpo.storage.artifacts import read_json, write_atomic, write_json
from selective_dpo.worlds.real import RealConfig, build_real_world, make_model, real_recipe
from selective_dpo.worlds.world import World

DATA = Path(__file__).parents[2] / "shared" / "data"
LONGEST = 600
"""Characters of a judged pair's prompt and answers together: the shortest eighth."""
JUDGED_PAIRS = 480
TEST_PAIRS = 100
PROTOCOLS = {"judged": ("three-seeds", "one-step"), "checked": ("fast", "one-step")}
"""Trained scorers, and what stands for them."""
THREE_SEEDS = {"protocol": "custom", "seeds": [41, 42, 43], "evaluations": 2}
"""Like `paper`, with two evaluations instead of five, which would cost as much again."""


def main() -> None:
    options = _options()
    quieten_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    seconds = _Seconds(options.work / "seconds.json")
    model = seconds.of("model", lambda: make_model(options.work / "model"))
    summary: dict[str, Any] = {"name": "real-model", "version": __version__, "machine": platform.machine()}
    if "judged" in options.parts:
        if DATA.is_dir():
            summary["judged"] = Judged(model, options.work, options.orders, seconds).measure()
        else:
            print(f"part judged is left out: there is no {DATA}")
    if "checked" in options.parts:
        worlds = [
            Checked(model, options.work, seed, options.orders, seconds).measure()
            for seed in range(options.worlds)
        ]
        summary["checked"] = {"mean": _means(worlds), "worlds": worlds}
    summary["seconds"] = seconds.known
    print(json.dumps({key: value for key, value in summary.items() if key != "worlds"}, indent=1))
    if options.json:
        write_json(options.json, summary)


class _Seconds:
    """Seconds of each piece of work, kept over interruptions; what was complete before adds nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[str, float] = read_json(path) if path.is_file() else {}

    def of(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.known[name] = round(self.known.get(name, 0.0) + time.perf_counter() - started, 1)
            write_json(self._path, self.known)


class Part:
    """Runs of one set of pairs, a folder for each protocol, and the policies of all of them."""

    def __init__(self, name: str, folder: Path, orders: int, seconds: _Seconds) -> None:
        self.name, self.folder, self.orders, self.seconds = name, folder, orders, seconds
        self.folder.mkdir(parents=True, exist_ok=True)

    def recipe(self, protocol: str, controls: dict[str, dict[str, Any]]) -> Recipe:
        raise NotImplementedError

    def scored(self, protocol: str) -> Run:
        run = open_run(self.recipe(protocol, {}), fresh=True, say=print)
        self.seconds.of(f"{self.name}: score {protocol}", lambda: score(run))
        return run

    def policies(self, protocol: str, *, others: bool) -> EvaluationResults:
        """Policies of the easiest half in random orders, and of all pairs, a random and the hardest half."""
        shuffled = {f"order-{seed}": {"order": "shuffled", "seed": seed} for seed in range(self.orders)}
        arms = {f"easiest-{name}": {"fraction": 0.5, **given} for name, given in shuffled.items()}
        if others:
            arms |= {f"all-{name}": {"rule": "all", **given} for name, given in shuffled.items()}
            arms |= {
                f"{rule}-{name}": {"rule": rule, "fraction": 0.5, **given}
                for rule in ("random", "hardest")
                for name, given in shuffled.items()
            }
        run = open_run(self.recipe(protocol, arms), fresh=True, say=print)
        self.seconds.of(f"{self.name}: policies {protocol}", lambda: bring_up(run, "evaluation"))
        return from_json(read_json(run.folder.evaluation / "results.json"))

    def arms(self, figure: Callable[[Any], Estimate | None]) -> dict[str, list[Estimate]]:
        """Every kind of arm, and its figure order by order."""
        first, second = PROTOCOLS[self.name]
        found: dict[str, list[Estimate]] = {}
        for protocol in (second, first):
            for arm in self.policies(protocol, others=protocol == second).arms:
                kind = arm.name.split("-")[0]
                label = {"selected": f"{protocol}, easy to hard", "easiest": f"{protocol}, shuffled"}
                value = figure(arm)
                if value is not None and not (kind == "reference" and protocol == first):
                    found.setdefault(label.get(kind, kind), []).append(value)
        return found


class Judged(Part):
    """Real pairs with a judge's verdicts."""

    def __init__(self, model: Path, work: Path, orders: int, seconds: _Seconds) -> None:
        super().__init__("judged", work / "judged", orders, seconds)
        self._model = model
        for split, most in (("train", JUDGED_PAIRS), ("test", TEST_PAIRS)):
            with gzip.open(DATA / f"alpaca_pairs_{split}.jsonl.gz", "rt") as lines:
                short = [line for line in lines if _characters(json.loads(line)) <= LONGEST]
            kept = np.random.default_rng(0).permutation(len(short))[:most]
            write_atomic(self.folder / f"{split}.jsonl", "".join(short[at] for at in sorted(kept)))

    def recipe(self, protocol: str, controls: dict[str, dict[str, Any]]) -> Recipe:
        pairs = self.folder / "train.jsonl"
        facts = {"config": RealConfig().model_dump()}
        world = World(self.folder, self._model, pairs, pairs, pairs, pairs, facts)
        named = protocol if protocol == "one-step" else "fast"
        base = real_recipe(world, name=protocol, output_dir=self.folder / "runs", protocol=named)
        raw = base.model_dump(mode="json")
        if protocol != named:
            raw["score"] |= THREE_SEEDS
        raw["data"] |= {
            "train": [{"path": str(self.folder / "train.jsonl")}],
            "test": [{"path": str(self.folder / "test.jsonl")}],
            "max_length": 512,
            "max_prompt_length": 256,
        }
        raw["train"]["trainer"]["num_train_epochs"] = 1
        raw["evaluate"] = {"controls": controls}
        return Recipe.model_validate(raw)

    def measure(self) -> dict[str, Any]:
        """Agreement, what difficulty goes with, and the policies' accuracy on held-out pairs."""
        trained, one_step = (self.scored(name) for name in PROTOCOLS["judged"])
        table = _losses(trained)
        ids = table.pair_ids_P.tolist()
        by_seed = dict(zip(table.seeds_S, table.losses_PSE.mean(axis=2).T, strict=True))
        own = _losses(one_step)
        cheap_P = own.losses_PSE.mean(axis=(1, 2))[
            positions_of(ids, own.pair_ids_P.tolist(), what="one-step")
        ]
        seeds_P = table.losses_PSE.mean(axis=(1, 2))
        columns = self._columns(one_step, ids)
        prompts_P = columns.pop("prompt_id")
        pair = _Agreement(prompts_P)
        seeds = sorted(by_seed)
        rest = {seed: np.mean([by_seed[other] for other in seeds if other != seed], axis=0) for seed in seeds}
        return {
            "pairs": len(ids),
            "prompts": len(set(prompts_P.tolist())),
            "one-step with the mean of three seeds": pair(cheap_P, seeds_P),
            "one-step with each seed": [pair(cheap_P, by_seed[seed]) for seed in seeds],
            "two seeds' mean with the third": [pair(rest[seed], by_seed[seed]) for seed in seeds],
            "two seeds": [
                pair(by_seed[one], by_seed[other]) for one in seeds for other in seeds if one < other
            ],
            "goes with": {
                protocol: {
                    name: clustered_spearman(values_P, column_P, prompts_P).as_json()
                    for name, column_P in columns.items()
                }
                for protocol, values_P in (("three-seeds", seeds_P), ("one-step", cheap_P))
            },
            "held-out accuracy": {
                name: [value.as_json() for value in values]
                for name, values in self.arms(lambda arm: arm.held_out and arm.held_out.accuracy).items()
            },
        }

    def _columns(self, run: Run, ids: Sequence[str]) -> dict[str, NDArray[Any]]:
        """What difficulty may go with, in the order of `ids`."""
        tokens = load_tokens(run.folder.pairs)
        at = positions_of(ids, tokens["pair_id"], what="tokens")
        lengths = part_lengths(tokens)
        chosen_P, rejected_P = (each[at] for each in lengths[1:])
        records = collect_records([run.folder.scores(scorer) for scorer in run.scorer_runs])
        row = positions_of(ids, records.pair_id.tolist(), what="records")
        chosen_logp, rejected_logp = records.reference_chosen_logp[row], records.reference_rejected_logp[row]
        rows = pq.read_table(run.folder.pairs / "pairs.parquet").to_pylist()
        gap = {row["pair_id"]: row["score_chosen"] - row["score_rejected"] for row in rows if row["pair_id"]}
        return {
            "prompt_id": records.prompt_id[row],
            "tokens of chosen minus rejected": chosen_P - rejected_P,
            "tokens of both answers": chosen_P + rejected_P,
            "reference margin": chosen_logp - rejected_logp,
            "perplexity of chosen": np.exp(-chosen_logp / chosen_P),
            "judge's score gap": np.array([gap[each] for each in ids]),
        }


class Checked(Part):
    """A world of the model's own answers that a program checks."""

    def __init__(self, model: Path, work: Path, seed: int, orders: int, seconds: _Seconds) -> None:
        super().__init__("checked", work / f"checked{seed}", orders, seconds)
        self._world: World = seconds.of(
            "checked: pairs",
            lambda: build_real_world(self.folder / "world", model=model, seed=seed, sample=sample_texts),
        )

    def recipe(self, protocol: str, controls: dict[str, dict[str, Any]]) -> Recipe:
        return real_recipe(
            self._world,
            name=protocol,
            output_dir=self.folder / "runs",
            protocol=protocol,
            controls=controls,
        )

    def measure(self) -> dict[str, Any]:
        """Wrong labels found, what is kept of them, win rates by the checker, and lengths of answers."""
        truth = pq.read_table(self._world.truth)
        labels: dict[str, dict[str, float]] = {}
        for protocol in PROTOCOLS[self.name]:
            table = _losses(self.scored(protocol))
            at = positions_of(table.pair_ids_P.tolist(), truth["pair_id"].to_pylist(), what="truth")
            flipped_P, tie_P = (truth[name].to_numpy(zero_copy_only=False)[at] for name in ("flipped", "tie"))
            values_P = table.losses_PSE.mean(axis=(1, 2))
            easy_P = easiest_half(values_P)
            labels[protocol] = {
                "auc_flipped": auc(values_P, flipped_P, ~(flipped_P | tie_P)),
                "flipped_in_easiest_half": float(flipped_P[easy_P].mean()),
                "flipped_in_hardest_half": float(flipped_P[~easy_P].mean()),
            }
        facts = self._world.facts["pairs"]
        return {
            "pairs": facts["pairs"],
            "flipped": facts["flip_share"],
            "ties": facts["tie_share"],
            "labels": labels,
            "win_rate": _values(self.arms(lambda arm: arm.win_rate)),
            "answer_tokens": _values(self.arms(lambda arm: arm.answer_tokens)),
        }


class _Agreement:
    """Spearman's correlation, clustered by prompt, and the overlap of the easiest halves."""

    def __init__(self, prompts_P: NDArray[Any]) -> None:
        self._prompts_P = prompts_P

    def __call__(self, one_P: NDArray[np.float64], other_P: NDArray[np.float64]) -> dict[str, Any]:
        overlap = float(np.mean(easiest_half(other_P)[easiest_half(one_P)]))
        return {
            "spearman": clustered_spearman(one_P, other_P, self._prompts_P).as_json(),
            "overlap": overlap,
        }


def _values(arms: Mapping[str, Iterable[Estimate]]) -> dict[str, list[float]]:
    return {name: [each.value for each in values] for name, values in arms.items()}


def _means(worlds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over worlds of the means over orders, with their standard errors."""
    found: dict[str, Any] = {}
    for figure in ("win_rate", "answer_tokens"):
        found[figure] = {
            name: mean_over_worlds(float(np.mean(world[figure][name])) for world in worlds)
            for name in worlds[0][figure]
        }
    rates = [{name: np.mean(values) for name, values in world["win_rate"].items()} for world in worlds]
    found["win_rate_minus_all"] = {
        name: mean_over_worlds(float(rate[name] - rate["all"]) for rate in rates)
        for name in rates[0]
        if name != "all"
    }
    found["labels"] = {
        protocol: {
            name: mean_over_worlds(world["labels"][protocol][name] for world in worlds) for name in figures
        }
        for protocol, figures in worlds[0]["labels"].items()
    }
    return found


def _losses(run: Run) -> LossTable:
    return collect_losses([run.folder.scores(scorer) for scorer in run.scorer_runs])


def _characters(row: Mapping[str, Any]) -> int:
    return len(row["prompt"]) + sum(len(row[part][-1]["content"]) for part in ("chosen", "rejected"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--worlds", type=int, default=3, help="of part checked")
    parser.add_argument("--orders", type=int, default=3, help="training orders of each arm")
    parser.add_argument("--threads", type=int, default=0, help="0: as PyTorch chooses")
    parser.add_argument("--work", type=Path, default=Path("runs/real-model"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
