"""Two executors under one scheduler, both real processes."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanovllm import Client, FinishReason
from tests.e2e.background import BackgroundRequest
from tests.e2e.executors import Stack, running_stack
from tests.e2e.support import LIMIT_S, Metrics, Reference, greedy, random_prompt, wait_until

# All of them run at the same time, which the first must not end too early for.
NUM_STREAMS = 12
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def stack(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("several")
    with running_stack(checkpoint("qwen3"), folder, ("one", "two")) as stack:
        yield stack


def running(client: Client) -> dict[str, int]:
    """Sequences that run, by the name of the executor."""
    return {
        Path(executor.address).stem: executor.num_running
        for executor in client.server_status().executors
    }


def by_executor(metrics: Metrics, name: str) -> dict[str, float]:
    """A metric of the scheduler, by the name of the executor."""
    return {Path(address).stem: value for address, value in metrics.by(name, "executor").items()}


def test_a_killed_executors_requests_go_on_at_the_other_one_at_once(
    stack: Stack, reference: Callable[[str], Reference]
) -> None:
    prompts = [random_prompt(12 + index % 5, seed=1000 + index) for index in range(NUM_STREAMS)]
    expected = [reference("qwen3").greedy(prompt, NUM_TOKENS) for prompt in prompts]
    victim, survivor = stack.executors.values()
    with (
        stack.client as client,
        ThreadPoolExecutor(NUM_STREAMS) as threads,
    ):
        wait_until(lambda: len(running(client)) == 2, "both executors are connected")
        requests = [
            BackgroundRequest(client, threads, prompt, greedy(NUM_TOKENS)) for prompt in prompts
        ]
        for request in requests:
            request.wait_for_tokens(1)
        counts = running(client)
        # Nothing is cached, so they are spread evenly, but for those that have ended by now.
        assert min(counts.values()) > 0, counts
        victim.kill()
        assert victim.wait(LIMIT_S) == -signal.SIGKILL

        # Nobody starts the victim again before all of them are done.
        for request, token_ids in zip(requests, expected, strict=True):
            completion = request.completion()
            assert completion.token_ids == token_ids
            assert completion.finish_reason is FinishReason.LENGTH
        assert list(running(client)) == ["two"]
        metrics = Metrics(stack.scheduler.metrics_url)
        assert by_executor(metrics, "executor_connected") == {"one": 0, "two": 1}
        assert 0 < metrics.value("requests_moved_total", reason="lost") <= counts["one"]
        assert metrics["requests_moved_total"] == metrics.value(
            "requests_moved_total", reason="lost"
        )

        victim.restart(2 * LIMIT_S)
        wait_until(lambda: len(running(client)) == 2, "the restarted executor is connected")
        again = [
            BackgroundRequest(client, threads, prompt, greedy(NUM_TOKENS)) for prompt in prompts
        ]
        wait_until(lambda: running(client)["one"] > 0, "the restarted executor has sequences")
        for request, token_ids in zip(again, expected, strict=True):
            assert request.completion().token_ids == token_ids
        assert survivor.running
        metrics = Metrics(stack.scheduler.metrics_url)
        assert by_executor(metrics, "executor_restarts_total") == {"one": 1, "two": 0}
        routed = metrics["requests_routed_total"] - metrics["requests_moved_total"]
        assert routed == 2 * NUM_STREAMS
