"""Tokens and log-probabilities of the whole system against transformers."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import Client
from tests.e2e.support import Reference, greedy, random_prompt, running_services

BLOCK_SIZE = 16
MAX_NUM_SEQS = 6
MAX_NUM_BATCHED_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Served:
    """A model behind the services and in transformers."""

    client: Client
    reference: Reference

    def expect_parity(self, prompt: list[int], max_tokens: int) -> None:
        """Fails unless the services generate what transformers does."""
        output = self.client.generate(prompt, greedy(max_tokens))
        assert output.token_ids == self.reference.greedy(prompt, max_tokens)


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen2"])
def served(
    request: pytest.FixtureRequest,
    checkpoint: Callable[[str], Path],
    reference: Callable[[str], Reference],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    with (
        running_services(
            checkpoint(request.param),
            tmp_path_factory.mktemp("logs"),
            executor=[
                *("--max-num-seqs", str(MAX_NUM_SEQS), "--block-size", str(BLOCK_SIZE)),
                *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
                *("--num-kv-blocks", "256"),
            ],
        ) as services,
        Client(services.address) as client,
    ):
        yield Served(client, reference(request.param))


def test_short_prompt_gives_the_tokens_of_transformers(served: Served) -> None:
    served.expect_parity(random_prompt(5, seed=1), 48)


def test_prompt_of_one_token_gives_the_tokens_of_transformers(served: Served) -> None:
    served.expect_parity([7], 16)


def test_prompt_far_beyond_the_token_budget_gives_the_tokens_of_transformers(
    served: Served,
) -> None:
    status = served.client.server_status()
    assert status.executor is not None
    assert status.executor.max_num_batched_tokens == MAX_NUM_BATCHED_TOKENS
    served.expect_parity(random_prompt(12 * MAX_NUM_BATCHED_TOKENS + 1, seed=2), 24)


def test_more_concurrent_requests_than_slots_give_the_tokens_of_transformers(
    served: Served,
) -> None:
    prompts = [random_prompt(1 + 9 * index, seed=10 + index) for index in range(2 * MAX_NUM_SEQS)]
    max_tokens = [8 + 3 * index for index in range(len(prompts))]
    with ThreadPoolExecutor(len(prompts)) as threads:
        outputs = list(
            threads.map(
                lambda prompt, count: served.client.generate(prompt, greedy(count)),
                prompts,
                max_tokens,
            )
        )
    for prompt, count, output in zip(prompts, max_tokens, outputs, strict=True):
        assert output.token_ids == served.reference.greedy(prompt, count)


def test_prompts_that_share_a_cached_prefix_give_the_tokens_of_transformers(
    served: Served,
) -> None:
    prefix = random_prompt(5 * BLOCK_SIZE + 3, seed=3)
    served.client.generate(prefix, greedy(1))
    for ending in ([1], [2, 3], random_prompt(40, seed=4)):
        prompt = prefix + ending
        output = served.client.generate(prompt, greedy(24))
        assert output.num_cached_tokens == 5 * BLOCK_SIZE
        assert output.token_ids == served.reference.greedy(prompt, 24)


def test_same_prompt_arriving_many_times_at_once_gives_the_same_tokens(served: Served) -> None:
    prompt = random_prompt(70, seed=5)
    with ThreadPoolExecutor(MAX_NUM_SEQS) as threads:
        outputs = list(
            threads.map(lambda _: served.client.generate(prompt, greedy(20)), range(MAX_NUM_SEQS))
        )
    expected = served.reference.greedy(prompt, 20)
    assert [output.token_ids for output in outputs] == [expected] * MAX_NUM_SEQS
    # All but the first find the blocks that the first one computes.
    assert sum(output.num_cached_tokens > 0 for output in outputs) >= MAX_NUM_SEQS - 1


def test_bfloat16_log_probabilities_are_as_exact_as_those_of_transformers(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    prompt, max_tokens = random_prompt(100, seed=6), 100
    peer = Reference(
        AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=torch.bfloat16).eval()
    )
    with (
        running_services(
            checkpoint("qwen3"), tmp_path, executor=["--dtype", "bfloat16", "--num-kv-blocks", "64"]
        ) as services,
        Client(services.address) as client,
    ):
        executor = client.server_status().executor
        assert executor is not None
        assert executor.dtype == "bfloat16"
        output = client.generate(prompt, greedy(max_tokens, logprobs=0))
    (completion,) = output.completions
    assert completion.logprobs is not None
    ours = torch.tensor([entry.logprob for entry in completion.logprobs])

    def forced(model: Reference) -> torch.Tensor:
        """What a model says of the tokens that the service chose, given all before them."""
        every = model.logprobs(prompt + output.token_ids)[len(prompt) - 1 : -1]
        return every.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]

    exact = forced(reference("qwen3"))
    error = (ours - exact).abs().mean().item()
    peer_error = (forced(peer) - exact).abs().mean().item()
    # The random weights spread logits over dozens of units, where bfloat16 steps are coarse.
    assert error < 1.5 * peer_error
    assert error < 0.2
