"""An executor is replaced by another one while requests run: joined, drained, removed, stopped."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from nanovllm import Client, Completion, FinishReason
from nanovllm.admin import AdminClient, ExecutorStatus
from tests.e2e.background import BackgroundRequest
from tests.e2e.executors import Stack, running_stack
from tests.e2e.support import LIMIT_S, Metrics, Reference, greedy, random_prompt, wait_until

PROMPTS = [random_prompt(12 + index, seed=700 + index) for index in range(8)]
# A stream that outlasts all of them.
LONG_PROMPT = random_prompt(12, seed=690)
NUM_LONG_TOKENS = 1000
NUM_STREAMS = 8
NUM_TOKENS = 60
#: Requests that must end before the next thing happens.
NUM_BETWEEN = 24


class Load:
    """Streams that follow each other until the block ends; keeps what they brought."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._is_over = threading.Event()
        self._changed = threading.Condition()
        self._threads = ThreadPoolExecutor(NUM_STREAMS)
        self._futures: list[Future[None]] = []
        #: By the number of the prompt.
        self.completions: list[tuple[int, Completion]] = []

    def __enter__(self) -> "Load":
        self._futures = [self._threads.submit(self._run, first) for first in range(NUM_STREAMS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._threads.shutdown()
        for future in self._futures:
            future.result()

    def _run(self, first: int) -> None:
        for number in itertools.count(first):
            if self._is_over.is_set():
                return
            index = number % len(PROMPTS)
            try:
                output = self._client.generate(PROMPTS[index], greedy(NUM_TOKENS))
            finally:
                with self._changed:
                    self._changed.notify_all()
            with self._changed:
                self.completions.append((index, output.completions[0]))

    def wait_for_more(self) -> None:
        """Waits until a number of further requests have ended; fails with one that failed."""
        with self._changed:
            goal = len(self.completions) + NUM_BETWEEN
            self._changed.wait_for(
                lambda: len(self.completions) >= goal or any(map(Future.done, self._futures)),
                LIMIT_S,
            )
            assert len(self.completions) >= goal


@pytest.fixture
def stack(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Stack]:
    """A scheduler that knows the first of two executors."""
    with running_stack(checkpoint("qwen3"), tmp_path, ("old", "new"), known=("old",)) as stack:
        yield stack


def test_an_executor_is_replaced_under_load_without_a_failed_request(
    stack: Stack, reference: Callable[[str], Reference]
) -> None:
    old, new = stack.address("old"), stack.address("new")
    with (
        stack.client as client,
        AdminClient(stack.address("admin")) as admin,
        ThreadPoolExecutor(1) as threads,
    ):

        def status(address: str) -> ExecutorStatus:
            return next(each for each in admin.executors() if each.summary.address == address)

        def num_prefilling(name: str) -> float:
            """Tokens of iterations that computed a prompt."""
            metrics = Metrics(stack.executors[name].metrics_url)
            return sum(
                metrics.value("step_tokens_total", kind=kind) for kind in ("prefill", "mixed")
            )

        with Load(client) as load:
            load.wait_for_more()
            long = BackgroundRequest(client, threads, LONG_PROMPT, greedy(NUM_LONG_TOKENS))
            long.wait_for_tokens(1)

            admin.add_executor(new)
            wait_until(lambda: status(new).connected, "the new executor is connected")
            wait_until(lambda: status(new).summary.num_running > 0, "it has sequences")

            assert admin.drain_executor(old) > 0
            load.wait_for_more()
            wait_until(lambda: status(old).summary.num_running == 0, "the old one is idle")
            assert long.completion().finish_reason is FinishReason.LENGTH
            num_before = num_prefilling("old")
            load.wait_for_more()
            assert num_prefilling("old") == num_before > 0

            assert admin.remove_executor(old) == 0
            stack.executors["old"].stop(LIMIT_S)
            load.wait_for_more()
            (remaining,) = admin.executors()
            assert (remaining.summary.address, remaining.connected) == (new, True)

    expected = [reference("qwen3").greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert long.completion().token_ids == reference("qwen3").greedy(LONG_PROMPT, NUM_LONG_TOKENS)
    assert len(load.completions) >= 4 * NUM_BETWEEN
    for index, completion in load.completions:
        assert completion.token_ids == expected[index]
        assert completion.finish_reason is FinishReason.LENGTH
    # From then on neither executor was ever missed.
    _, added, log = stack.log("scheduler").partition("an administrator added an executor")
    assert added
    assert "executor unavailable" not in log
