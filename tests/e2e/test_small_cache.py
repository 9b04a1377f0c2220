"""A KV cache and a queue that are too small for everything at once."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from nanovllm import (
    Client,
    FinishReason,
    LocalServices,
    OverloadedError,
    RequestTooLargeError,
    SamplingParams,
)
from tests.e2e.support import (
    Metrics,
    Reference,
    greedy,
    random_prompt,
    running_services,
    wait_until,
    wait_until_idle,
)

BLOCK_SIZE = 8
NUM_BLOCKS = 40
CACHE_TOKENS = BLOCK_SIZE * NUM_BLOCKS
MAX_QUEUED = 8


@pytest.fixture(scope="module")
def services(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServices]:
    with running_services(
        checkpoint("qwen3"),
        tmp_path_factory.mktemp("logs"),
        executor=[
            *("--num-kv-blocks", str(NUM_BLOCKS), "--block-size", str(BLOCK_SIZE)),
            *("--max-num-seqs", "6", "--max-num-batched-tokens", "32"),
        ],
        scheduler=["--max-queued-requests", str(MAX_QUEUED), "--lookahead-tokens", "8"],
        metrics=True,
    ) as running:
        yield running


@pytest.fixture
def client(services: LocalServices) -> Iterator[Client]:
    with Client(services.address) as connected:
        yield connected
        wait_until_idle(connected)


def test_preempted_requests_resume_with_the_tokens_of_transformers(
    client: Client, services: LocalServices, reference: Callable[[str], Reference]
) -> None:
    before = Metrics(services.scheduler.metrics_url)
    # Four of these fill the cache, and there are six slots.
    prompts = [random_prompt(20 + 5 * index, seed=70 + index) for index in range(6)]
    max_tokens = 80
    with ThreadPoolExecutor(len(prompts)) as threads:
        outputs = list(
            threads.map(lambda prompt: client.generate(prompt, greedy(max_tokens)), prompts)
        )
    after = Metrics(services.scheduler.metrics_url)
    assert after["num_preemptions_total"] > before["num_preemptions_total"]
    assert after["recomputed_tokens_total"] > before["recomputed_tokens_total"]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == reference("qwen3").greedy(prompt, max_tokens)


def test_preempted_seeded_requests_resume_with_the_same_random_numbers(
    client: Client, services: LocalServices
) -> None:
    prompt, n = random_prompt(30, seed=80), 6
    params = replace(greedy(80, seed=9, n=n, logprobs=2), temperature=5.0)
    before = Metrics(services.scheduler.metrics_url)["num_preemptions_total"]
    crowded = client.generate(prompt, params)
    assert Metrics(services.scheduler.metrics_url)["num_preemptions_total"] > before
    alone = client.generate(prompt, replace(params, n=1))
    assert crowded.completions[0].token_ids == alone.token_ids
    assert len({tuple(completion.token_ids) for completion in crowded.completions}) == n
    assert all(
        completion.logprobs is not None and len(completion.logprobs) == 80
        for completion in crowded.completions
    )


def test_request_that_fills_the_cache_alone_is_served(
    client: Client, reference: Callable[[str], Reference]
) -> None:
    prompt = random_prompt(CACHE_TOKENS - 30, seed=81)
    # The last token is never fed back, so it needs no room.
    output = client.generate(prompt, greedy(31))
    assert output.token_ids == reference("qwen3").greedy(prompt, 31)


def test_request_that_can_never_fit_is_refused_for_good(
    client: Client, services: LocalServices
) -> None:
    prompt = random_prompt(CACHE_TOKENS - 30, seed=81)
    with pytest.raises(RequestTooLargeError, match=f"{CACHE_TOKENS + 1} tokens of KV cache"):
        client.generate(prompt, greedy(32))
    with pytest.raises(RequestTooLargeError, match=f"it holds {CACHE_TOKENS}"):
        client.generate(random_prompt(CACHE_TOKENS + 10), greedy(1))


def test_request_without_a_limit_is_content_with_the_cache(client: Client) -> None:
    output = client.generate(random_prompt(20, seed=82), SamplingParams(ignore_eos=True))
    assert output.finish_reason is FinishReason.LENGTH
    assert 20 + len(output.token_ids) == CACHE_TOKENS + 1


def test_full_queue_refuses_and_says_when_to_come_back(
    client: Client, services: LocalServices
) -> None:
    endless = greedy(250, n=6)
    with client.stream(random_prompt(10), endless), client.stream(random_prompt(10), endless):
        wait_until(lambda: client.server_status().num_waiting >= 3, "sequences wait")
        with pytest.raises(OverloadedError, match=f"the limit is {MAX_QUEUED}") as caught:
            client.generate(random_prompt(10), greedy(1, n=MAX_QUEUED))
        assert caught.value.retry_after_s > 0
    wait_until_idle(client)
    assert client.generate(random_prompt(10), greedy(1)).token_ids


def test_refusals_are_counted_by_reason(client: Client, services: LocalServices) -> None:
    before = Metrics(services.scheduler.metrics_url)
    with pytest.raises(RequestTooLargeError):
        client.generate(random_prompt(10), greedy(CACHE_TOKENS))
    after = Metrics(services.scheduler.metrics_url)
    name, label = "admission_rejections_total", {"reason": "never_fits"}
    assert after.value(name, **label) == before.value(name, **label) + 1
