"""Sampling parameters and log-probabilities through the whole system."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm import Client, SamplingParams
from tests.e2e.support import VOCAB_SIZE, Reference, greedy, random_prompt

PROMPT = random_prompt(20, seed=40)
NUM_TOKENS = 24
RANDOM = SamplingParams(temperature=8.0, max_tokens=NUM_TOKENS, ignore_eos=True)


def seeded(seed: int, **fields: Any) -> SamplingParams:
    return replace(RANDOM, seed=seed, **fields)


class TestSeeds:
    def test_same_seed_gives_the_same_tokens_alone_and_among_others(self, client: Client) -> None:
        alone = client.generate(PROMPT, seeded(1)).token_ids
        assert client.generate(PROMPT, seeded(1)).token_ids == alone
        with ThreadPoolExecutor(8) as threads:
            outputs = list(
                threads.map(lambda seed: client.generate(PROMPT, seeded(seed)), range(8))
            )
        assert outputs[1].token_ids == alone
        assert len({tuple(output.token_ids) for output in outputs}) == 8

    def test_requests_without_a_seed_differ(self, client: Client) -> None:
        outputs = [tuple(client.generate(PROMPT, RANDOM).token_ids) for _ in range(3)]
        assert len(set(outputs)) == 3

    def test_one_completion_is_the_first_of_several(self, client: Client) -> None:
        one = client.generate(PROMPT, seeded(2))
        several = client.generate(PROMPT, seeded(2, n=4))
        assert several.completions[0].token_ids == one.token_ids
        assert len({tuple(completion.token_ids) for completion in several.completions}) == 4

    @pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
    def test_every_64_bit_seed_is_repeatable(self, client: Client, seed: int) -> None:
        first = client.generate(PROMPT, seeded(seed, n=3))
        again = client.generate(PROMPT, seeded(seed, n=3))
        assert [c.token_ids for c in first.completions] == [c.token_ids for c in again.completions]


class TestSeveralCompletions:
    def test_every_index_ends_in_exactly_one_terminal_message(self, client: Client) -> None:
        ended: list[int] = []
        with client.stream(PROMPT, seeded(3, n=10)) as stream:
            for delta in stream:
                assert delta.index not in ended
                assert (delta.usage is not None) == (delta.finish_reason is not None)
                if delta.finish_reason is not None:
                    ended.append(delta.index)
        assert sorted(ended) == list(range(10))

    def test_more_completions_than_slots_are_all_served(self, client: Client) -> None:
        output = client.generate(PROMPT, seeded(4, n=20))
        assert [completion.index for completion in output.completions] == list(range(20))
        assert all(len(completion.token_ids) == NUM_TOKENS for completion in output.completions)


class TestRestrictions:
    @pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
    def test_keeping_only_the_best_token_is_greedy(
        self, client: Client, fields: dict[str, Any]
    ) -> None:
        expected = client.generate(PROMPT, greedy(NUM_TOKENS)).token_ids
        assert client.generate(PROMPT, seeded(5, **fields)).token_ids == expected

    def test_tiny_temperature_is_greedy(self, client: Client) -> None:
        expected = client.generate(PROMPT, greedy(NUM_TOKENS)).token_ids
        for temperature in (1e-38, 1e-4):
            params = replace(RANDOM, temperature=temperature)
            assert client.generate(PROMPT, params).token_ids == expected

    def test_greedy_does_not_depend_on_the_seed(self, client: Client) -> None:
        outputs = [
            client.generate(PROMPT, greedy(NUM_TOKENS, seed=seed)).token_ids for seed in (1, 2)
        ]
        assert outputs[0] == outputs[1]

    def test_top_k_chooses_among_the_k_best(self, client: Client) -> None:
        output = client.generate(PROMPT, seeded(6, top_k=3, logprobs=3))
        (completion,) = output.completions
        assert completion.logprobs is not None
        ranks = [
            entry.top_token_ids.index(token_id)
            for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        assert set(ranks) == {0, 1, 2}

    def test_bias_of_100_forces_a_token(self, client: Client) -> None:
        output = client.generate(PROMPT, seeded(7, logit_bias={99: 100.0}))
        assert output.token_ids == [99] * NUM_TOKENS

    def test_bias_of_minus_100_forbids_a_token(self, client: Client) -> None:
        free = client.generate(PROMPT, greedy(NUM_TOKENS)).token_ids
        bias = dict.fromkeys(free, -100.0)
        bound = client.generate(PROMPT, greedy(NUM_TOKENS, logit_bias=bias)).token_ids
        assert not set(free) & set(bound)


def _presence(logits: torch.Tensor, prompt: list[int], output: list[int]) -> None:
    for token_id in set(output):
        logits[token_id] -= 2.0


def _frequency(logits: torch.Tensor, prompt: list[int], output: list[int]) -> None:
    for token_id in output:
        logits[token_id] -= 1.5


def _repetition(logits: torch.Tensor, prompt: list[int], output: list[int]) -> None:
    for token_id in {*prompt, *output}:
        logits[token_id] *= 1 / 1.4 if logits[token_id] > 0 else 1.4


class TestPenalties:
    @pytest.mark.parametrize(
        ("fields", "penalise"),
        [
            ({"presence_penalty": 2.0}, _presence),
            ({"frequency_penalty": 1.5}, _frequency),
            ({"repetition_penalty": 1.4}, _repetition),
        ],
        ids=["presence", "frequency", "repetition"],
    )
    def test_penalties_choose_what_their_definition_chooses(
        self,
        client: Client,
        reference: Callable[[str], Reference],
        fields: dict[str, float],
        penalise: Callable[[torch.Tensor, list[int], list[int]], None],
    ) -> None:
        model = reference("qwen3").model
        # A prompt after which the model likes to repeat itself.
        prompt = [1, 2, 3, 4]
        plain = client.generate(prompt, greedy(60)).token_ids
        output: list[int] = []
        for _ in range(60):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + output])).logits[0, -1].clone()
            penalise(logits, prompt, output)
            best, second = logits.topk(2).values.tolist()
            assert best - second > 1e-4
            output.append(int(logits.argmax()))
        assert output != plain
        assert client.generate(prompt, greedy(60, **fields)).token_ids == output


class TestLogprobs:
    def test_log_probabilities_equal_those_of_transformers(
        self, client: Client, reference: Callable[[str], Reference]
    ) -> None:
        output = client.generate(PROMPT, greedy(NUM_TOKENS, logprobs=5))
        expected = reference("qwen3").logprobs(PROMPT + output.token_ids)[len(PROMPT) - 1 : -1]
        best = expected.topk(5)
        (completion,) = output.completions
        assert completion.logprobs is not None
        assert len(completion.logprobs) == NUM_TOKENS
        for index, entry in enumerate(completion.logprobs):
            assert entry.logprob == pytest.approx(
                expected[index, completion.token_ids[index]].item(), abs=1e-3
            )
            assert entry.top_logprobs == pytest.approx(best.values[index].tolist(), abs=1e-3)
            assert entry.top_token_ids == tuple(best.indices[index].tolist())
            # Greedy chooses the most probable one, and both figures of it agree.
            assert entry.top_token_ids[0] == completion.token_ids[index]
            assert entry.top_logprobs[0] == entry.logprob

    def test_log_probabilities_are_those_before_any_parameter_is_applied(
        self, client: Client, reference: Callable[[str], Reference]
    ) -> None:
        params = seeded(8, logprobs=20, top_k=50, logit_bias={9: 5.0}, repetition_penalty=1.3)
        output = client.generate(PROMPT, params)
        expected = reference("qwen3").logprobs(PROMPT + output.token_ids)[len(PROMPT) - 1 : -1]
        (completion,) = output.completions
        assert completion.logprobs is not None
        num_found = 0
        for index, entry in enumerate(completion.logprobs):
            chosen = completion.token_ids[index]
            assert entry.logprob == pytest.approx(expected[index, chosen].item(), abs=1e-3)
            assert len(entry.top_token_ids) == len(set(entry.top_token_ids)) == 20
            assert list(entry.top_logprobs) == sorted(entry.top_logprobs, reverse=True)
            assert 0 < sum(torch.tensor(entry.top_logprobs).exp().tolist()) < 1 + 1e-5
            if chosen in entry.top_token_ids:
                num_found += 1
                assert entry.top_logprobs[entry.top_token_ids.index(chosen)] == entry.logprob
            else:
                assert entry.logprob <= entry.top_logprobs[-1]
        assert 0 < num_found < NUM_TOKENS

    def test_zero_log_probabilities_return_the_chosen_one_only(self, client: Client) -> None:
        (completion,) = client.generate(PROMPT, greedy(4, logprobs=0)).completions
        assert completion.logprobs is not None
        assert [entry.top_token_ids for entry in completion.logprobs] == [()] * 4
        assert all(entry.logprob < 0 for entry in completion.logprobs)

    def test_no_log_probabilities_come_unless_asked_for(self, client: Client) -> None:
        assert client.generate(PROMPT, greedy(4)).completions[0].logprobs is None

    def test_requests_with_and_without_log_probabilities_share_a_batch(
        self, client: Client
    ) -> None:
        wanted = [None, 0, 3, None, 20, 1]
        with ThreadPoolExecutor(len(wanted)) as threads:
            outputs = list(
                threads.map(
                    lambda count: client.generate(PROMPT, greedy(NUM_TOKENS, logprobs=count)),
                    wanted,
                )
            )
        for count, output in zip(wanted, outputs, strict=True):
            (completion,) = output.completions
            assert completion.token_ids == outputs[0].token_ids
            if count is None:
                assert completion.logprobs is None
            else:
                assert completion.logprobs is not None
                assert {len(entry.top_logprobs) for entry in completion.logprobs} == {count}


def test_every_sampled_token_is_in_the_vocabulary(client: Client) -> None:
    output = client.generate(PROMPT, replace(RANDOM, temperature=100.0, max_tokens=300))
    assert all(0 <= token_id < VOCAB_SIZE for token_id in output.token_ids)
    assert len(set(output.token_ids)) > 100
