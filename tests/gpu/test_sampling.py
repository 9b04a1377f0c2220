"""Sampling parameters on the GPU, in graphs and kernel by kernel, through the whole system."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovllm import FinishReason, SamplingParams
from tests.e2e.support import VOCAB_SIZE, greedy, random_prompt
from tests.gpu.conftest import Tiny
from tests.gpu.support import (
    FLOAT32_MARGIN,
    NEEDS_GPU,
    Served,
    generate_together,
    regrets,
    served_on_gpu,
)

pytestmark = NEEDS_GPU

PROMPT = random_prompt(20, seed=40)
NUM_TOKENS = 24
EOS = 258
MAX_NUM_SEQS = 32
RANDOM = SamplingParams(temperature=3.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def served(
    tiny: Callable[[str, str], Tiny], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    model = tiny("qwen3", "float32")
    with served_on_gpu(
        model.checkpoint,
        model.oracle,
        tmp_path_factory.mktemp("logs"),
        dtype="float32",
        backend="triton",
        executor=[
            *("--num-kv-blocks", "512", "--max-num-seqs", str(MAX_NUM_SEQS)),
            *("--max-model-len", "1024"),
        ],
    ) as running:
        yield running


def seeded(seed: int, **fields: Any) -> SamplingParams:
    return replace(RANDOM, seed=seed, **fields)


class TestSeeds:
    def test_same_seed_gives_the_same_tokens_alone_and_among_others(self, served: Served) -> None:
        alone = served.client.generate(PROMPT, seeded(1)).token_ids
        assert served.client.generate(PROMPT, seeded(1)).token_ids == alone
        # The completions of one request start together.
        crowd = served.client.generate(PROMPT, seeded(1, n=17)).completions
        assert crowd[0].token_ids == alone
        assert len({tuple(completion.token_ids) for completion in crowd}) == len(crowd)

    def test_seed_keeps_its_tokens_among_other_prompts_and_parameters(self, served: Served) -> None:
        alone = served.client.generate(PROMPT, seeded(1)).token_ids
        prompts = [PROMPT, *(random_prompt(5 * index, seed=index) for index in range(1, 17))]
        others = [
            seeded(seed, top_p=0.9 if seed % 2 else None, max_tokens=10 * seed)
            for seed in range(2, 18)
        ]
        outputs = generate_together(served.client, prompts, [seeded(1), *others])
        assert outputs[0].token_ids == alone

    def test_tokens_are_those_that_seed_and_position_choose(self, served: Served) -> None:
        token_ids = served.client.generate(PROMPT, seeded(3, max_tokens=200)).token_ids
        worst = served.oracle.drawing_regrets(PROMPT, token_ids, 3.0, seed=3).max().item()
        assert worst < FLOAT32_MARGIN


class TestDistribution:
    """Two tokens: the first is drawn kernel by kernel behind the prefill, the second in a graph."""

    NUM_DRAWS = 2048
    NUM_COMPLETIONS = 64
    # What a right sampler exceeds in one of a million choices of seeds: the total variation from
    # the exact distribution moves by at most 1 / NUM_DRAWS with one draw (McDiarmid's inequality).
    DEVIATION = math.sqrt(math.log(1e6) / (2 * NUM_DRAWS))

    @pytest.mark.parametrize(
        "fields",
        [
            {"temperature": 1.0},
            {"temperature": 0.6},
            {"temperature": 2.0, "top_k": 4},
            {"temperature": 2.0, "top_p": 0.6},
            {"temperature": 2.0, "min_p": 0.2},
            {"temperature": 3.0, "top_k": 12, "top_p": 0.8, "min_p": 0.3},
        ],
        ids=lambda fields: "-".join(fields),
    )
    def test_drawn_pairs_have_the_exact_probabilities(
        self, served: Served, fields: dict[str, Any]
    ) -> None:
        exact = self._exact(served, **fields)
        frequencies = self._draw(served, fields) / self.NUM_DRAWS
        distance = total_variation(frequencies, exact)
        expected = 0.5 * (exact * (1 - exact) / self.NUM_DRAWS).sqrt().sum().item()
        limit = expected + self.DEVIATION
        assert distance < limit
        assert (frequencies[exact == 0] == 0).all()
        # Draws with the temperature alone would be told apart.
        if len(fields) > 1:
            unfiltered = self._exact(served, fields["temperature"])
            assert total_variation(unfiltered, exact) > 2 * limit

    @staticmethod
    def _exact(
        served: Served,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> Tensor:
        """Probabilities of the first two tokens, [first, second]."""
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            warpers.append(MinPLogitsWarper(min_p))

        def probabilities(sequences: list[list[int]]) -> Tensor:
            scores: Any = served.oracle.next_logits(sequences)
            history: Any = torch.tensor(sequences)
            result: Tensor = warpers(history, scores).double().softmax(-1)
            return result

        first = probabilities([PROMPT])
        return first.T * probabilities([[*PROMPT, token] for token in range(VOCAB_SIZE)])

    def _draw(self, served: Served, fields: dict[str, Any]) -> Tensor:
        """How often each pair came, [first, second]."""
        num_requests = self.NUM_DRAWS // self.NUM_COMPLETIONS
        params = [
            SamplingParams(
                seed=seed, n=self.NUM_COMPLETIONS, max_tokens=2, ignore_eos=True, **fields
            )
            for seed in range(num_requests)
        ]
        outputs = generate_together(served.client, [PROMPT] * num_requests, params)
        pairs = torch.tensor(
            [completion.token_ids for output in outputs for completion in output.completions]
        )
        counts = torch.bincount(pairs[:, 0] * VOCAB_SIZE + pairs[:, 1], minlength=VOCAB_SIZE**2)
        assert counts.sum() == self.NUM_DRAWS
        return counts.double().view(VOCAB_SIZE, VOCAB_SIZE)


def total_variation(one: Tensor, other: Tensor) -> float:
    return 0.5 * (one - other).abs().sum().item()


class TestChangedLogits:
    @pytest.mark.parametrize(
        ("presence", "frequency", "repetition"),
        [(2.0, 0.0, 1.0), (0.0, 1.5, 1.0), (0.0, 0.0, 1.4), (1.0, -0.5, 1.2)],
    )
    def test_penalties_choose_what_their_definition_chooses(
        self, served: Served, presence: float, frequency: float, repetition: float
    ) -> None:
        # A prompt after which the model likes to repeat itself.
        prompt, max_tokens = [1, 2, 3, 4], 60
        params = greedy(
            max_tokens,
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
        )
        token_ids = served.client.generate(prompt, params).token_ids
        assert token_ids != served.client.generate(prompt, greedy(max_tokens)).token_ids
        logits = served.oracle.logits(prompt, token_ids)
        for step, row in enumerate(logits):
            output = torch.tensor(token_ids[:step], dtype=torch.int64)
            seen = torch.cat([torch.tensor(prompt), output]).unique()
            row[seen] = torch.where(row[seen] > 0, row[seen] / repetition, row[seen] * repetition)
            counts = torch.bincount(output, minlength=VOCAB_SIZE)
            row -= frequency * counts + presence * (counts > 0)
        assert regrets(logits, token_ids).max().item() < FLOAT32_MARGIN

    def test_biases_force_and_forbid_tokens(self, served: Served) -> None:
        forced = served.client.generate(PROMPT, seeded(7, logit_bias={99: 100.0}))
        assert forced.token_ids == [99] * NUM_TOKENS
        free = served.client.generate(PROMPT, greedy(NUM_TOKENS)).token_ids
        bias = dict.fromkeys(free, -100.0)
        bound = served.client.generate(PROMPT, greedy(NUM_TOKENS, logit_bias=bias)).token_ids
        assert not set(free) & set(bound)
        logits = served.oracle.logits(PROMPT, bound)
        logits[:, sorted(bias)] -= 100.0
        assert regrets(logits, bound).max().item() < FLOAT32_MARGIN


class TestStopping:
    def test_stop_token_ends_a_completion_in_a_graph(self, served: Served) -> None:
        free = served.client.generate(PROMPT, greedy(NUM_TOKENS)).token_ids
        stop = free[NUM_TOKENS // 2]
        (completion,) = served.client.generate(
            PROMPT, greedy(NUM_TOKENS, stop_token_ids=[stop])
        ).completions
        assert completion.token_ids == free[: free.index(stop) + 1]
        assert completion.finish_reason is FinishReason.STOP
        assert completion.stop_reason == stop

    def test_stop_tokens_cannot_be_chosen_before_min_tokens(self, served: Served) -> None:
        first = served.client.generate(PROMPT, greedy(1)).token_ids[0]
        min_tokens = 10
        params = SamplingParams(
            temperature=0.0, max_tokens=400, min_tokens=min_tokens, stop_token_ids=[first]
        )
        (completion,) = served.client.generate(PROMPT, params).completions
        token_ids = completion.token_ids
        assert len(token_ids) > min_tokens
        if completion.finish_reason is FinishReason.STOP:
            assert token_ids[-1] in (first, EOS)
        assert not {first, EOS} & set(token_ids[:-1])
        logits = served.oracle.logits(PROMPT, token_ids)
        logits[:min_tokens, [first, EOS]] = float("-inf")
        assert regrets(logits, token_ids).max().item() < FLOAT32_MARGIN


def test_batch_that_mixes_graph_and_eager_requests_gives_each_its_own_tokens(
    served: Served,
) -> None:
    kinds = [
        greedy(120),
        seeded(1, max_tokens=100),
        seeded(2, max_tokens=90, top_k=20, top_p=0.9),
        seeded(3, max_tokens=80, top_p=0.9),
        greedy(30, logprobs=2),
        greedy(40, presence_penalty=1.0),
        seeded(4, max_tokens=50, logit_bias={5: 2.0}),
        greedy(60, min_tokens=20, stop_token_ids=[5]),
    ]
    params = kinds * 2
    prompts = [random_prompt(3 + 7 * index, seed=60 + index) for index in range(len(params))]
    alone = [
        served.client.generate(prompt, wanted)
        for prompt, wanted in zip(prompts, params, strict=True)
    ]
    together = generate_together(served.client, prompts, params)
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
