"""Shared rows give the log-probs, losses and gradients of plain padded rows."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers.integrations import flex_attention

from selective_dpo.logprobs.compute import PairLogps, pair_logps
from selective_dpo.logprobs.packing_support import RowCollator
from selective_dpo.logprobs.rows import forward_logps, log_probs_only
from selective_dpo.losses import pair_losses
from tests.fixtures.families import FAMILIES, VOCABULARY, tiny_family

# Of third parties: PEFT asks transformers by an old name; compiling loads an old part of torch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

TOLERANCE = 1e-4
"""Nats, of a completion's log-prob and of a pair's loss, in float32."""
TOLERANCE_BF16 = 0.05
"""Nats a token between the two ways in bfloat16, which rounds to 3 significant digits; measured: 0.014
at most, and no further from float32 than plain rows are."""
BETA = 0.1


def _pairs() -> list[dict[str, Any]]:
    draw = random.Random(0)

    def text(length: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(length)]

    lengths = [
        (1, 1, 1),  # nothing but first tokens: the row is the prompt
        (1, 7, 3),  # a prompt of one token, such as a beginning of sequence
        (5, 1, 9),  # a one-token completion on either side
        (5, 9, 1),
        (6, 6, 6),  # equal lengths
        (2, 90, 4),  # very different lengths
        (70, 3, 60),
        (30, 20, 25),
    ]
    rows = [[text(count) for count in counts] for counts in lengths]
    rows.append([[1], [2, 3, 4, 5, 6], [2, 3, 4, 9, 6]])  # completions that begin alike
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{"pair_id": f"pair{n}", **dict(zip(names, row, strict=True))} for n, row in enumerate(rows)]


PAIRS = Dataset.from_list(_pairs())


def measure(model: Any, path: Any, pairs: Dataset = PAIRS, **changes: Any) -> PairLogps:
    settings = {"tokens_per_batch": 400, "pad_token_id": 0, "autocast_dtype": None, "what": "test"}
    return pair_logps(model, pairs, path=path, **{**settings, **changes})


def with_lora(model: Any) -> Any:
    """As a scorer in training: an adapter that is no longer zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, lora).eval()


def one_by_one(model: Any) -> torch.Tensor:
    """Log-probs of PAIRS [P, 2] from the logits of each completion alone."""
    pairs = []
    for pair in PAIRS:
        sides = []
        for side in ("chosen_ids", "rejected_ids"):
            ids, first = torch.tensor([pair["prompt_ids"] + pair[side]]), len(pair["prompt_ids"])
            log_probs = model(input_ids=ids).logits[0, first - 1 : -1].log_softmax(dim=-1)
            sides.append(log_probs.gather(1, ids[0, first:, None]).sum())
        pairs.append(torch.stack(sides))
    return torch.stack(pairs)


def losses(policy: PairLogps, reference: PairLogps) -> np.ndarray:
    policy_P2, reference_P2 = (np.stack(logps[1:], axis=1) for logps in (policy, reference))
    return pair_losses(policy_P2, reference_P2, np.ones_like(policy_P2), {"beta": BETA}).loss_P


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_losses_equal_those_of_padded_rows(family: str, lora: bool) -> None:
    policy, reference = tiny_family(family, seed=1), tiny_family(family, seed=2)
    policy = with_lora(policy) if lora else policy
    shared, padded = (
        [measure(model, path) for model in (policy, reference)] for path in ("shared", "padded")
    )
    for ours, plain in zip(shared, padded, strict=True):
        np.testing.assert_allclose(ours.chosen_P, plain.chosen_P, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(ours.rejected_P, plain.rejected_P, rtol=0, atol=TOLERANCE)
    assert np.ptp(losses(*padded)) > 1.0  # the losses do differ from pair to pair
    np.testing.assert_allclose(losses(*shared), losses(*padded), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_does_not_depend_on_its_batch(family: str) -> None:
    model = tiny_family(family)
    together = measure(model, "shared", tokens_per_batch=10_000)
    alone = [measure(model, "shared", PAIRS.select([row])) for row in range(len(PAIRS))]
    np.testing.assert_allclose(together.chosen_P, [each.chosen_P[0] for each in alone], atol=TOLERANCE)
    np.testing.assert_allclose(together.rejected_P, [each.rejected_P[0] for each in alone], atol=TOLERANCE)


def test_a_completion_does_not_see_the_other() -> None:
    model = tiny_family("llama")
    other = PAIRS.map(lambda row: {"rejected_ids": [3] * (len(row["rejected_ids"]) + 2)})
    first, second = measure(model, "shared"), measure(model, "shared", other)
    np.testing.assert_allclose(first.chosen_P, second.chosen_P, atol=TOLERANCE)
    assert (np.abs(first.rejected_P - second.rejected_P) > 0.1).all()


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_within_its_tolerance(family: str, weights: str) -> None:
    truth = measure(tiny_family(family), "padded")
    model = tiny_family(family).to(getattr(torch, weights))
    autocast = torch.bfloat16 if weights == "float32" else None
    shared, padded = (measure(model, path, autocast_dtype=autocast) for path in ("shared", "padded"))
    for side in ("chosen", "rejected"):
        tokens_P = np.array([len(ids) for ids in PAIRS[f"{side}_ids"]])
        ours, plain, exact = (getattr(each, f"{side}_P") for each in (shared, padded, truth))
        assert (np.abs(ours - plain) / tokens_P).max() < TOLERANCE_BF16
        # Sharing adds no rounding of its own.
        assert np.abs(ours - exact).mean() < 1.5 * np.abs(plain - exact).mean() + 0.01


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_padded_rows(family: str, lora: bool) -> None:
    gradients = []
    for kind in ("packed", "plain"):
        model = tiny_family(family)
        model = with_lora(model) if lora else model
        if kind == "packed":
            with log_probs_only(model):
                logps_B2 = forward_logps(model, RowCollator(model, pad_token_id=0, kind="packed")(PAIRS[:]))
        else:
            logps_B2 = one_by_one(model)
        chosen_B, rejected_B = logps_B2.T
        (-torch.nn.functional.logsigmoid(BETA * (chosen_B - rejected_B)).mean()).backward()
        gradients.append(
            torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
        )
    ours, plain = gradients
    assert float((ours - plain).norm() / plain.norm()) < 1e-4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attentions_block_mask_gives_the_same_log_probs() -> None:
    # Compiled it needs a GPU or a C++ compiler; its mask is tested in eager mode.
    with torch.compiler.set_stance("force_eager"):
        flex = measure(tiny_family("llama", attention="flex_attention"), "shared")
    plain = measure(tiny_family("llama"), "padded")
    np.testing.assert_allclose(flex.chosen_P, plain.chosen_P, atol=TOLERANCE)
    np.testing.assert_allclose(flex.rejected_P, plain.rejected_P, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_is_compiled_once_for_all_widths_and_numbers_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for one row, and rows of one block: four times for scoring. By itself torch compiles these shapes
    six times, and gives up after eight. Graphs are counted, and run as they are."""
    compiled: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, example: object) -> object:
        compiled.append(graph)
        return graph.forward

    wrapper, compile_with = flex_attention.WrappedFlexAttention, torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend=count))
    monkeypatch.setattr(wrapper, "_instance", None)
    torch._dynamo.reset()
    model = tiny_family("llama", attention="flex_attention").eval()  # four heads
    random = np.random.default_rng(0)
    shapes = [
        (4, 300),
        (4, 500),
        (2, 700),
        (3, 380),
        (1, 300),
        (1, 600),
        (4, 100),
        (1, 100),
        (7, 90),
        (5, 900),
    ]
    with log_probs_only(model), torch.no_grad():
        for rows, width in shapes:
            third = [random.integers(3, 50, width // 3).tolist() for _ in range(rows)]
            pairs = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), third)
            forward_logps(model, RowCollator(model, pad_token_id=0, kind="packed")(pairs))
    torch._dynamo.reset()
    assert len(compiled) == 4
