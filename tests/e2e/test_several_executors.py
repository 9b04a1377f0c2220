"""Two executors under one scheduler, both real processes."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanovllm import Client, FinishReason, ServiceProcess
from tests.e2e.background import BackgroundRequest
from tests.e2e.support import CPU, LIMIT_S, Reference, greedy, random_prompt, wait_until

NUM_STREAMS = 32
NUM_TOKENS = 120


class Stack:
    """One scheduler and two executors."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.executors = [self._executor(model, folder, name) for name in ("one", "two")]
        self.scheduler = ServiceProcess(
            "scheduler_service",
            [
                *("--model", str(model), "--listen", f"unix:{folder}/scheduler.sock"),
                *("--executor", f"unix:{folder}/one.sock,unix:{folder}/two.sock"),
                *("--metrics-port", "-1"),
            ],
            log_path=folder / "scheduler.log",
        )

    @staticmethod
    def _executor(model: Path, folder: Path, name: str) -> ServiceProcess:
        return ServiceProcess(
            "executor_service",
            [
                *("--model", str(model), "--listen", f"unix:{folder}/{name}.sock", *CPU),
                *("--num-kv-blocks", "512", "--block-size", "16", "--max-num-seqs", "32"),
                *("--max-num-batched-tokens", "256", "--metrics-port", "-1"),
            ],
            log_path=folder / f"{name}.log",
        )

    @property
    def processes(self) -> list[ServiceProcess]:
        return [*self.executors, self.scheduler]


@pytest.fixture(scope="module")
def stack(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("several")
    stack = Stack(checkpoint("qwen3"), folder)
    try:
        for process in stack.processes:
            process.start()
        for process in stack.processes:
            process.wait_until_ready(4 * LIMIT_S)
        yield stack
    finally:
        for process in reversed(stack.processes):
            process.stop(LIMIT_S)
    for log in folder.glob("*.log"):
        assert "Traceback" not in (text := log.read_text()), text


def running(client: Client) -> dict[str, int]:
    """Sequences that run, by the name of the executor."""
    return {
        Path(executor.address).stem: executor.num_running
        for executor in client.server_status().executors
    }


def test_a_killed_executors_requests_go_on_at_the_other_one_at_once(
    stack: Stack, reference: Callable[[str], Reference]
) -> None:
    prompts = [random_prompt(12 + index % 5, seed=300 + index) for index in range(NUM_STREAMS)]
    victim, survivor = stack.executors
    with (
        Client(stack.scheduler.address) as client,
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
        for request, prompt in zip(requests, prompts, strict=True):
            completion = request.completion()
            assert completion.token_ids == reference("qwen3").greedy(prompt, NUM_TOKENS)
            assert completion.finish_reason is FinishReason.LENGTH
        assert list(running(client)) == ["two"]

        victim.restart(2 * LIMIT_S)
        wait_until(lambda: len(running(client)) == 2, "the restarted executor is connected")
        again = [
            BackgroundRequest(client, threads, prompt, greedy(NUM_TOKENS)) for prompt in prompts
        ]
        wait_until(lambda: running(client)["one"] > 0, "the restarted executor has sequences")
        for request, prompt in zip(again, prompts, strict=True):
            assert request.completion().token_ids == reference("qwen3").greedy(prompt, NUM_TOKENS)
        assert survivor.running
