"""The sampler's rules one by one, against plain references."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from nanovllm_core.sampler import SampledTokens, SamplingBatch, sample
from tests.core.sampling_rows import make_batch

VOCAB_SIZE = 12


def random_logits(rows: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def changed_logits(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """What the greedy choice looks at: greedy sampling leaves it in place."""
    logits = logits.clone()
    sample(logits, batch)
    return logits


def everything_on(rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(rows, generator=generator) * (high - low) + low

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape or (rows,), generator=generator).int()

    num_prompt_tokens = integers(1, 5)
    return {
        "temperature": torch.where(torch.arange(rows) % 4 == 0, 0.0, uniform(0.3, 2.0)),
        "top_p": uniform(0.5, 1.0),
        "min_p": uniform(0.0, 0.1),
        "top_k": integers(0, 40),
        "seeds": integers(-1000, 1000).long(),
        "positions": integers(0, 1000).long(),
        "presence_penalty": uniform(-1.0, 1.0),
        "frequency_penalty": uniform(-1.0, 1.0),
        "repetition_penalty": uniform(0.7, 1.5),
        "token_ids": integers(0, 50, rows, 10),
        "num_prompt_tokens": num_prompt_tokens,
        "num_tokens": num_prompt_tokens + integers(0, 6),
        "bias_token_ids": torch.arange(3).int().expand(rows, 3) - integers(0, 2)[:, None],
        "bias_values": torch.rand((rows, 3), generator=generator) * 4 - 2,
        "stop_token_ids": integers(-1, 50, rows, 4),
        "min_total_tokens": integers(0, 10),
    }


def take(fields: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    return {
        name: value[rows] if isinstance(value, Tensor) else value for name, value in fields.items()
    }


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0]])
    result = sample(logits, make_batch(2))
    assert result.token_ids.tolist() == [1, 0]
    assert result.token_ids.dtype == torch.int32
    assert result.chosen_logprobs is None
    assert result.top_token_ids is None
    assert result.top_logprobs is None


def test_greedy_rows_stay_greedy_beside_random_ones() -> None:
    logits = random_logits(200)
    expected = logits.argmax(-1)
    is_greedy = torch.arange(200) % 2 == 0
    batch = make_batch(200, any_random=True, temperature=torch.where(is_greedy, 0.0, 5.0))
    tokens = sample(logits, batch).token_ids.long()
    assert torch.equal(tokens[is_greedy], expected[is_greedy])
    assert not torch.equal(tokens[~is_greedy], expected[~is_greedy])


def test_a_row_gets_the_same_token_whatever_the_batch() -> None:
    rows = 64
    fields = everything_on(rows)
    logits = random_logits(rows, 50)

    def tokens(order: Tensor) -> SampledTokens:
        batch = make_batch(len(order), everything=True, **take(fields, order))
        return sample(logits[order].clone(), batch)

    together = tokens(torch.arange(rows))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    shuffled = tokens(order)
    assert torch.equal(shuffled.token_ids, together.token_ids[order])
    assert shuffled.chosen_logprobs is not None
    assert together.chosen_logprobs is not None
    assert torch.equal(shuffled.chosen_logprobs, together.chosen_logprobs[order])
    for row in (0, 1, 31, 63):
        alone = tokens(torch.tensor([row]))
        assert alone.token_ids.item() == together.token_ids[row].item()


def test_passes_that_other_rows_need_do_not_change_a_row() -> None:
    logits = random_logits(100, 50)
    plain = make_batch(100, any_random=True, temperature=1.0)
    every = make_batch(100, everything=True, temperature=1.0)
    expected = sample(logits.clone(), plain).token_ids
    assert torch.equal(sample(logits.clone(), every).token_ids, expected)


def test_seed_and_position_both_change_the_draw() -> None:
    logits = torch.zeros(100, 1000)

    def tokens(seed: int, position: int) -> Tensor:
        batch = make_batch(
            100,
            any_random=True,
            temperature=1.0,
            seeds=torch.arange(100) + seed,
            positions=torch.full((100,), position),
        )
        return sample(logits.clone(), batch).token_ids

    base = tokens(0, 5)
    assert torch.equal(base, tokens(0, 5))
    assert (base == tokens(0, 6)).float().mean() < 0.05
    assert (base == tokens(100, 5)).float().mean() < 0.05


histories = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=10)


@given(
    prompts=st.lists(histories, min_size=1, max_size=4),
    outputs=st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=10), min_size=4, max_size=4),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    frequency=st.sampled_from([-0.5, 0.0, 0.7]),
    presence=st.sampled_from([-1.0, 0.0, 1.5]),
)
@settings(max_examples=150, deadline=None)
def test_penalties_equal_a_plain_reference(
    prompts: list[list[int]],
    outputs: list[list[int]],
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    rows = len(prompts)
    logits = random_logits(rows)
    # The padding behind a history is the worst there can be: real token ids.
    token_ids = torch.full((rows, 24), 3, dtype=torch.int32)
    expected = logits.clone()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=False)):
        known = prompt + output
        token_ids[row, : len(known)] = torch.tensor(known)
        expected[row] = RepetitionPenaltyLogitsProcessor(repetition)(
            torch.tensor([known]), expected[row : row + 1]
        )[0]
        for token in set(output):
            expected[row, token] -= frequency * output.count(token) + presence
    batch = make_batch(
        rows,
        any_penalty=True,
        token_ids=token_ids,
        num_prompt_tokens=[len(prompt) for prompt in prompts],
        num_tokens=[len(p) + len(o) for p, o in zip(prompts, outputs, strict=False)],
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    torch.testing.assert_close(changed_logits(logits, batch), expected, rtol=1e-5, atol=1e-5)


def test_penalties_are_exactly_off_at_their_neutral_values() -> None:
    logits = random_logits(2)
    batch = make_batch(
        2, any_penalty=True, token_ids=[[1, 2, 2, 5], [3, 0, 0, 0]], num_tokens=[4, 1]
    )
    assert torch.equal(changed_logits(logits, batch), logits)


def test_bias_is_added_to_its_tokens_only() -> None:
    logits = random_logits(3)
    batch = make_batch(
        3,
        any_bias=True,
        bias_token_ids=[[4, 0], [7, -1], [-1, -1]],
        bias_values=[[100.0, -2.0], [0.5, 9.0], [9.0, 9.0]],
    )
    expected = logits.clone()
    expected[0, 4] += 100.0
    expected[0, 0] -= 2.0
    expected[1, 7] += 0.5
    assert torch.equal(changed_logits(logits, batch), expected)


def test_bias_comes_before_the_repetition_penalty() -> None:
    logits = torch.tensor([[-1.0, 0.0]])
    batch = make_batch(
        1,
        any_bias=True,
        any_penalty=True,
        bias_token_ids=[[0]],
        bias_values=[[5.0]],
        repetition_penalty=2.0,
    )
    # (-1 + 5) / 2; the other order would give -1 * 2 + 5.
    assert changed_logits(logits, batch)[0, 0] == 2.0


@pytest.mark.parametrize(("num_tokens", "is_masked"), [(4, True), (5, True), (6, False)])
def test_stop_tokens_cannot_be_chosen_below_the_minimum(num_tokens: int, is_masked: bool) -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [2, 9]] = 50.0
    logits[0, 5] = 10.0
    batch = make_batch(
        1,
        any_min_tokens=True,
        any_random=True,
        temperature=1.0,
        stop_token_ids=[[2, -1, 9]],
        num_tokens=num_tokens,
        min_total_tokens=6,
        token_ids=torch.zeros((1, 8), dtype=torch.int32),
    )
    token = sample(logits, batch).token_ids.item()
    assert token == 5 if is_masked else token in (2, 9)


def test_a_bias_cannot_bring_a_forbidden_stop_token_back() -> None:
    batch = make_batch(
        1,
        any_min_tokens=True,
        any_bias=True,
        stop_token_ids=[[2]],
        min_total_tokens=9,
        bias_token_ids=[[2]],
        bias_values=[[100.0]],
    )
    assert changed_logits(torch.zeros(1, VOCAB_SIZE), batch)[0, 2] == -math.inf


def test_logprobs_are_those_of_the_untouched_logits() -> None:
    rows = 40
    logits = random_logits(rows, 50)
    expected = logits.log_softmax(-1)
    batch = make_batch(rows, everything=True, **everything_on(rows))
    batch.max_logprobs = 5
    result = sample(logits, batch)
    assert result.chosen_logprobs is not None
    assert result.top_token_ids is not None
    assert result.top_logprobs is not None
    chosen = expected.gather(1, result.token_ids.long()[:, None])[:, 0]
    torch.testing.assert_close(result.chosen_logprobs, chosen)
    top = expected.topk(5)
    assert torch.equal(result.top_token_ids, top.indices.int())
    torch.testing.assert_close(result.top_logprobs, top.values)


def test_no_top_tokens_still_give_the_chosen_logprob() -> None:
    logits = random_logits(2)
    expected = logits.log_softmax(-1).amax(-1)
    result = sample(logits, make_batch(2, max_logprobs=0))
    assert result.chosen_logprobs is not None
    assert result.top_token_ids is not None
    torch.testing.assert_close(result.chosen_logprobs, expected)
    assert result.top_token_ids.shape == (2, 0)


def test_more_logprobs_than_tokens_give_the_whole_vocabulary() -> None:
    result = sample(random_logits(1), make_batch(1, max_logprobs=99))
    assert result.top_token_ids is not None
    assert sorted(result.top_token_ids[0].tolist()) == list(range(VOCAB_SIZE))
