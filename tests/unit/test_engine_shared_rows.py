from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from selective_dpo.errors import ModelError
from selective_dpo.logprobs import packing_support as support
from selective_dpo.logprobs.compute import pair_logps
from selective_dpo.logprobs.packing_support import RowCollator, packing_obstacle
from selective_dpo.logprobs.rows import (
    CHOSEN,
    PADDING,
    PROMPT,
    REJECTED,
    additive_mask,
    block_mask,
    forward_fields,
    forward_logps,
    log_probs_only,
    make_rows,
    part_lengths,
)
from selective_dpo.models import is_sharded, language_model
from tests.fixtures.families import tiny_family

ROWS = {
    "prompt_ids": [[1, 2], [3]],
    "chosen_ids": [[10, 11, 12], [20]],
    "rejected_ids": [[13, 14], [21, 22]],
}


def test_a_row_holds_the_prompt_once_and_completions_without_their_last_token() -> None:
    batch = make_rows(ROWS, "packed", 0)
    # 2 + (3 - 1) + (2 - 1) = 5 tokens, and 1 + 0 + 1 = 2.
    assert batch.input_ids.tolist() == [[1, 2, 10, 11, 13], [3, 21, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert batch.parts.tolist() == [
        [PROMPT, PROMPT, CHOSEN, CHOSEN, REJECTED],
        [PROMPT, REJECTED, PADDING, PADDING, PADDING],
    ]
    assert part_lengths(Dataset.from_dict(ROWS)).packed_P.tolist() == [5, 2]


def test_labels_are_predicted_by_the_token_before_them() -> None:
    batch = make_rows(ROWS, "packed", 0)
    assert batch.labels_N.tolist() == [10, 11, 12, 20, 13, 14, 21, 22]
    # Place 8 is that of no label: the end of a completion.
    assert batch.places_2BL.tolist() == [[0, 1, 2], [3, 8, 8], [4, 5, 8], [6, 7, 8]]
    # 10 and 13 both follow the prompt's last token, 2; 20 and 21 follow 3.
    assert batch.input_ids.flatten()[batch.predicted_at_N].tolist() == [2, 10, 11, 3, 2, 13, 3, 21]


def test_a_padded_row_holds_the_prompt_and_one_completion() -> None:
    batch, packed = make_rows(ROWS, "padded", 0, multiple_of=3), make_rows(ROWS, "packed", 0)
    assert batch.input_ids.tolist() == [
        [1, 2, 10, 11, 0, 0],
        [3, 0, 0, 0, 0, 0],
        [1, 2, 13, 0, 0, 0],
        [3, 21, 0, 0, 0, 0],
    ]
    assert batch.position_ids is None and batch.parts is None  # causal attention hides padding by itself
    masked = make_rows(ROWS, "masked", 0, multiple_of=3)
    assert batch.attention_mask is None and torch.equal(masked.input_ids, batch.input_ids)
    assert masked.attention_mask.sum(dim=1).tolist() == [4, 1, 3, 2]
    assert torch.equal(batch.labels_N, packed.labels_N) and torch.equal(batch.places_2BL, packed.places_2BL)
    assert batch.input_ids.flatten()[batch.predicted_at_N].tolist() == [2, 10, 11, 3, 2, 13, 3, 21]


def test_width_is_rounded_up_with_padding() -> None:
    batch = make_rows(ROWS, "packed", 9, multiple_of=8)
    assert batch.input_ids.shape == (2, 8)
    assert batch.input_ids[0].tolist() == [1, 2, 10, 11, 13, 9, 9, 9]
    assert batch.input_ids.flatten()[batch.predicted_at_N].tolist() == [2, 10, 11, 3, 2, 13, 3, 21]


def test_an_empty_prompt_predicts_nothing() -> None:
    rows = {"prompt_ids": [[]], "chosen_ids": [[5, 6]], "rejected_ids": [[7]]}
    batch = make_rows(rows, "packed", 0)
    assert batch.input_ids.tolist() == [[5]]
    assert batch.labels_N.tolist() == [6] and batch.places_2BL.tolist() == [[0], [1]]
    padded = make_rows(rows, "padded", 0)
    assert padded.labels_N.tolist() == [6] and padded.predicted_at_N.tolist() == [0]


def test_a_token_sees_the_prompt_and_its_own_part_up_to_itself() -> None:
    parts = make_rows(ROWS, "packed", 0).parts
    lowest = torch.finfo(torch.float32).min
    visible = [
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 1],  # rejected: not the chosen tokens between
        ],
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 0, 1, 0, 0],  # padding sees something, so that nothing is NaN
            [1, 0, 1, 1, 0],
            [1, 0, 1, 1, 1],
        ],
    ]
    wanted = torch.where(torch.tensor(visible) == 1, 0.0, lowest)[:, None]
    assert torch.equal(additive_mask(parts, torch.float32), wanted)
    assert additive_mask(parts, torch.bfloat16).dtype == torch.bfloat16


def test_the_block_mask_follows_the_same_rule() -> None:
    parts = make_rows(ROWS, "packed", 0, multiple_of=8).parts
    mask, wanted = block_mask(parts), additive_mask(parts, torch.float32)[:, 0] == 0
    at = torch.arange(8)
    for row in range(2):
        grid = mask.mask_mod(torch.tensor(row), torch.tensor(0), at[:, None], at[None, :])
        assert torch.equal(grid, wanted[row])


def test_the_head_is_shown_only_positions_that_predict_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    kernel = trl.trainer.utils._ChunkedLogProbFunction

    class Spy:
        @staticmethod
        def apply(hidden: Tensor, *others: Any) -> Any:
            shown.append(hidden.shape)
            return kernel.apply(hidden, *others)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Spy)
    model = tiny_family("llama")
    rows = RowCollator(model, pad_token_id=0, kind="packed")(ROWS)
    with log_probs_only(model):
        fields = forward_fields(model, rows)
    assert shown == [(3 + 1 + 2 + 2, 32)]
    assert list(fields) == ["log_probs"] and fields["log_probs"].shape == (4, 3)
    assert torch.equal(fields["log_probs"] != 0, rows.groups[0].places_2BL < 8)


def test_groups_that_go_through_the_model_apart_give_what_one_batch_gives() -> None:
    model, pairs = tiny_family("llama"), {name: [[1], *[[2] * 300, [3, 4]]] for name in ROWS}
    with log_probs_only(model), torch.no_grad():
        apart, together = (
            RowCollator(model, pad_token_id=0, kind="packed", splits=splits)(pairs)
            for splits in (True, False)
        )
        assert (len(apart.groups), len(together.groups)) == (2, 1)
        torch.testing.assert_close(forward_logps(model, apart), forward_logps(model, together))


def test_the_hook_is_taken_away_after_an_error() -> None:
    model = tiny_family("llama")
    pairs = {"prompt_ids": [[10**6]], "chosen_ids": [[1]], "rejected_ids": [[1]]}
    with log_probs_only(model), pytest.raises(IndexError):
        forward_logps(model, RowCollator(model, pad_token_id=0)(pairs))
    assert not model.base_model._forward_hooks


def test_a_trainers_head_is_put_back() -> None:
    model = tiny_family("llama")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.tensor([[1, 2, 3]])
    with log_probs_only(model):
        assert model(input_ids=ids, labels=ids, fused_lm_head=True).entropy is None
    assert model(input_ids=ids, labels=ids, fused_lm_head=True).entropy is not None
    untouched = tiny_family("llama")
    with log_probs_only(untouched):
        pass
    assert "forward" not in vars(untouched)


def test_the_language_model_is_found_inside_wrappers() -> None:
    model = tiny_family("llama")
    wrapped = torch.nn.Sequential(get_peft_model(model, LoraConfig(target_modules="all-linear")))
    assert language_model(wrapped) is model
    assert not is_sharded(wrapped)
    with pytest.raises(ModelError, match="no transformers model"):
        language_model(torch.nn.Linear(2, 2))


def test_models_with_ordinary_attention_take_shared_rows() -> None:
    for family in ("llama", "qwen2", "mistral", "gemma2"):
        assert packing_obstacle(tiny_family(family), 200) is None
    assert packing_obstacle(tiny_family("mistral", sliding_window=None), 10**6) is None


def _bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))


def _mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1))


def _jamba() -> Any:
    return JambaForCausalLM(
        JambaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        )
    )


def _flash() -> Any:
    model = tiny_family("llama")
    model.config._attn_implementation = "flash_attention_2"
    return model


def _prompt_tuning() -> Any:
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return get_peft_model(tiny_family("llama"), tuning)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny_family("mistral"), r"limited to 200 tokens and the longest pair has 201"),
        (lambda: tiny_family("gemma2"), r"limited to 200 tokens"),
        (_bloom, "no positions"),
        (_mamba, "state"),
        (_jamba, "state"),
        (_flash, "flash_attention_2 attention takes no mask"),
        (_prompt_tuning, "prompt-learning"),
    ],
)
def test_other_models_take_padded_rows_and_say_why(make: Any, reason: str) -> None:
    found = packing_obstacle(make(), 201)
    assert found and re.search(reason, found), found


@pytest.mark.parametrize("make", [_bloom, _mamba, _jamba, _prompt_tuning])
def test_their_rows_do_not_depend_on_what_they_are_padded_to(make: Any) -> None:
    model = make().eval()
    together = _measure(model, "auto", _pairs())
    for row in range(2):
        alone = _measure(model, "padded", _pairs().select([row]))
        for ids, found in (
            ("chosen_ids", together.chosen_P[row]),
            ("rejected_ids", together.rejected_P[row]),
        ):
            pair = _pairs()[row]
            tokens = torch.tensor([pair["prompt_ids"] + pair[ids]])
            with torch.no_grad():
                logits = model(input_ids=tokens).logits[0, -tokens.shape[1] :]
            first = len(pair["prompt_ids"])
            log_probs = logits[first - 1 : -1].log_softmax(dim=-1).gather(1, tokens[0, first:, None])
            assert found == pytest.approx(float(log_probs.sum()), abs=1e-4)
        assert alone.chosen_P[0] == pytest.approx(together.chosen_P[row], abs=1e-4)


def _pairs(prompt: int = 3) -> Dataset:
    rows = [
        {
            "pair_id": "a",
            "prompt_ids": [*range(1, prompt + 1)],
            "chosen_ids": [7, 8],
            "rejected_ids": [9] * 4,
        },
        {"pair_id": "b", "prompt_ids": [5], "chosen_ids": [4], "rejected_ids": [3, 2, 1]},
    ]
    return Dataset.from_list(rows)


def _measure(model: Any, path: Any, pairs: Dataset) -> Any:
    return pair_logps(
        model, pairs, tokens_per_batch=500, pad_token_id=0, autocast_dtype=None, what="test", path=path
    )


def test_the_choice_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    support.say_once.cache_clear()
    model = tiny_family("llama")
    for _ in range(2):
        _measure(model, "auto", _pairs())
    assert capsys.readouterr().err.count("log-probs: one row a pair (sdpa attention") == 1


def test_windows_shorter_than_a_pair_lead_to_padded_rows(capsys: pytest.CaptureFixture[str]) -> None:
    support.say_once.cache_clear()
    model = tiny_family("mistral", sliding_window=6)
    auto, padded = (_measure(model, path, _pairs(prompt=20)) for path in ("auto", "padded"))
    np.testing.assert_array_equal(auto.chosen_P, padded.chosen_P)
    assert "one row a completion (attention is limited to 6 tokens" in capsys.readouterr().err


def test_a_model_that_ignores_the_mask_is_found_out(capsys: pytest.CaptureFixture[str]) -> None:
    support.say_once.cache_clear()
    model = tiny_family("llama")
    inner = model.base_model.forward

    def without_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        ordinary = None if attention_mask is None or attention_mask.ndim > 2 else attention_mask
        return inner(*args, attention_mask=ordinary, **kwargs)

    without_mask.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
    model.base_model.forward = without_mask
    auto, padded = (_measure(model, path, _pairs()) for path in ("auto", "padded"))
    np.testing.assert_array_equal(auto.rejected_P, padded.rejected_P)
    assert "shared rows change this model's log-probs" in capsys.readouterr().err


def test_a_model_is_tried_once_and_again_on_a_longer_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def counting(model: Any, rows: Any) -> Any:
        tried.append(rows.groups[0].input_ids.shape[1])
        return forward_logps(model, rows)

    monkeypatch.setattr(support, "forward_logps", counting)
    model = tiny_family("llama")
    for _ in range(3):
        _measure(model, "auto", _pairs())
    # Prompt 3, completions 2 and 4 without their last tokens: with a mask, packed, and without a mask.
    assert tried == [3 + 3, 3 + 1 + 3, 3 + 3]
    _measure(model, "auto", _pairs(prompt=30))
    assert tried[3:] == [30 + 3, 30 + 1 + 3, 30 + 3]
    _measure(model, "auto", _pairs())
    pair_logps(
        model,
        _pairs(),
        tokens_per_batch=500,
        pad_token_id=0,
        autocast_dtype=torch.bfloat16,
        what="test",
    )
    assert len(tried) == 9  # another precision is another computation


def test_shared_rows_without_a_number_are_not_taken() -> None:
    nan, inf = float("nan"), float("inf")

    def gap(ours: list[float], plain: list[float]) -> list[float]:
        found: list[float] = support.gap_per_token(*map(torch.tensor, (ours, plain, [2.0, 2.0]))).tolist()
        return found

    assert gap([-3.0, -4.0], [-3.0, -5.0]) == [0.0, 0.5]  # 1 nat over 2 tokens
    assert gap([nan, -4.0], [-3.0, -4.0]) == [inf, 0.0]
    assert np.isnan(gap([nan, -4.0], [nan, -4.0])[0])


def test_a_pair_without_a_number_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")  # a token of the longer pair only
    for _ in range(2):
        assert np.isnan(_measure(model, "auto", _pairs()).rejected_P[0])
        assert not support._TRIALS[model]


def test_no_pairs_give_no_log_probs() -> None:
    assert _measure(tiny_family("llama"), "auto", _pairs().select([])).pair_ids == []


# A layer has 4 x 8 x 8 + 3 x 8 x 16 = 640 weights; a masked cell costs twice a causal one.
COSTS = support.RowCosts(token=2.0 * 640, packed_cell=4.0 * 8 * 1.1, padded_cell=4.0 * 8 * 0.55)


def test_costs_come_from_the_models_sizes() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    costs = support.row_costs(LlamaForCausalLM(config))
    assert costs == pytest.approx(COSTS)
    config._attn_implementation = "eager"  # writes all scores, masked or not
    assert support.row_costs(LlamaForCausalLM(config)).padded_cell == pytest.approx(COSTS.packed_cell)


def test_a_long_prompt_is_worth_packing_and_long_completions_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def packs(costs: support.RowCosts, *lengths: tuple[int, int, int], multiple_of: int = 1) -> bool:
        monkeypatch.setattr(support, "row_costs", lambda model: costs)
        collate = RowCollator(tiny_family("llama"), pad_token_id=0, multiple_of=multiple_of)
        pairs = zip(*([[1] * count for count in pair] for pair in lengths), strict=True)
        (group,) = collate(dict(zip(ROWS, pairs, strict=True))).groups
        return group.parts is not None

    # 698 tokens x 1280 + 698^2 x 35.2 = 18.0 million against 2 x (600 x 1280 + 600^2 x 17.6) = 14.2 million:
    # for so narrow a model attention is all that counts.
    assert not packs(COSTS, (500, 100, 100))
    # With 100 times the weights, 106 against 166 million; the last token is not read in either completion.
    wide = COSTS._replace(token=100 * COSTS.token)
    assert packs(wide, (500, 100, 100))
    # 1,014 tokens against 2 x 516: 129.8 + 36.2 million against 132.1 + 9.4 million.
    assert not packs(wide, (16, 500, 500))
    # Rounded up to 128, 640 tokens against 2 x 640 are still less; in a batch the longest pair decides.
    assert packs(wide, (1, 1, 1), (500, 70, 60), multiple_of=128)


def test_scoring_takes_padded_rows_without_a_mask_where_they_cost_less(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    support.say_once.cache_clear()
    monkeypatch.setattr(support, "row_costs", lambda model: COSTS._replace(packed_cell=10.0**6))
    model = tiny_family("llama")
    masks: list[Any] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    auto = _measure(model, "auto", _pairs())
    assert masks[-1] is None
    assert "one row a completion (at these lengths" in capsys.readouterr().err
    plain = _measure(model, "padded", _pairs())
    np.testing.assert_allclose(auto.chosen_P, plain.chosen_P, atol=1e-5)
    np.testing.assert_allclose(auto.rejected_P, plain.rejected_P, atol=1e-5)


def test_a_block_mask_is_that_of_each_two_tokens_without_making_them() -> None:
    """Against torch's own `create_block_mask`, which looks at each two tokens: the same blocks, partly or
    wholly seen, for rows of every mixture of parts."""
    from torch.nn.attention.flex_attention import create_block_mask

    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(40):  # ends of prompt, chosen and rejected, anywhere in 5 blocks; some parts empty
        ends = sorted(torch.randint(0, 641, (3,), generator=generator).tolist())
        lengths = [ends[0], ends[1] - ends[0], ends[2] - ends[1], 640 - ends[2]]
        kinds = (PROMPT, CHOSEN, REJECTED, PADDING)
        rows.append(torch.cat([torch.full((size,), kind) for size, kind in zip(lengths, kinds, strict=True)]))
    parts = torch.stack(rows)

    def visible(
        row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return ((parts[row, key] == PROMPT) | (parts[row, key] == parts[row, query])) & (key <= query)

    expected = create_block_mask(visible, len(parts), None, 640, 640, device="cpu")
    found = block_mask(parts)
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(found, name).squeeze(1), getattr(expected, name).squeeze(1)), name
    assert torch.equal(found.to_dense().squeeze(1), expected.to_dense().squeeze(1))
    for name in ("kv", "full_kv"):
        counts, mine, theirs = (
            getattr(found, f"{name}_num_blocks"),
            getattr(found, f"{name}_indices"),
            getattr(expected, f"{name}_indices"),
        )
        for row in range(len(parts)):
            for query in range(5):
                count = int(counts[row, 0, query])
                assert mine[row, 0, query, :count].tolist() == theirs[row, 0, query, :count].tolist()
