"""Several pieces of work timed in turn, and how much work each of them is.

Tokens and FLOPs are for the GPU's figures only; ratios are of times. N weights, of which LoRA trains
next to none: a token costs 2 N forwards, and as much again for the gradient's way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from datasets import Dataset

from harness import seconds_of
from on_gpu import OnGPU, Work, matrix_rate, measure_on_gpu

FORWARD, TRAINING = 2, 4
"""FLOPs a weight and token."""


class Task(NamedTuple):
    """Something to time."""

    run: Callable[[], object]
    work: Work


class Times(NamedTuple):
    """What was measured of a task, round by round."""

    seconds: list[float]
    on_gpu: list[OnGPU]
    """Empty on a CPU."""


class Amounts(NamedTuple):
    """What the work of any protocol follows from."""

    weights: int
    plain: int
    """Tokens of all pairs, prompts counted twice."""
    shared: int
    """The same with each pair's prompt once."""

    @classmethod
    def of(cls, pairs: Dataset, weights: int) -> Amounts:
        """Those of tokenized pairs."""
        prompts, chosen, rejected = (
            sum(len(ids) for ids in pairs[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        return cls(weights, 2 * prompts + chosen + rejected, prompts + chosen + rejected)

    def original(self, seeds: int, evaluations: int) -> Work:
        """Two scorers a seed, the reference live: each trains on a half, and measures the other half."""
        passes = seeds * (1 + evaluations)
        cost = seeds * (TRAINING + FORWARD + evaluations * 2 * FORWARD)
        return Work(passes * self.plain, cost * self.weights * self.plain)

    def protocol(self, seeds: int, evaluations: int) -> Work:
        """The same with the reference once."""
        passes = seeds * (1 + evaluations)
        cost = FORWARD + seeds * (TRAINING + evaluations * FORWARD)
        return Work(passes * self.plain, cost * self.weights * self.shared)

    def one_step(self) -> Work:
        """One pass with gradients, which is the reference, too, and one forward pass."""
        return Work(2 * self.shared, (TRAINING + FORWARD) * self.weights * self.shared)

    def epoch(self) -> Work:
        """Training on all pairs, the reference live; of adapters."""
        return Work(self.plain, (TRAINING + FORWARD) * self.weights * self.plain)

    def selective(self, scoring: Work) -> Work:
        """A protocol, and training on half of the pairs: on half of the tokens, since which half is open."""
        training = TRAINING * self.weights * self.shared // 2
        return Work(scoring.tokens + self.plain // 2, scoring.flops + training)


def in_turn(tasks: Mapping[str, Task], *, rounds: int, device: str) -> dict[str, Times]:
    """All tasks one after the other, `rounds` times.

    On a shared machine speed drifts; runs side by side in time see the same drift, so their ratio holds
    where neither absolute time does.
    """
    rate = matrix_rate() if device == "cuda" else None
    times = {name: Times([], []) for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            if device == "cuda":
                times[name].on_gpu.append(measure_on_gpu(task.run, task.work, rate))
                times[name].seconds.append(times[name].on_gpu[-1].seconds)
            else:
                times[name].seconds.append(seconds_of(task.run, device))
    return times
