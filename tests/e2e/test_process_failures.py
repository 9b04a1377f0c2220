"""Processes that are killed, stopped, drained or replaced while requests run."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nanovllm import (
    AsyncClient,
    Client,
    FinishReason,
    Health,
    LocalServices,
    RequestOutput,
    RequestTooLargeError,
    SamplingParams,
    ServerError,
    ServiceProcess,
    UnavailableError,
)
from nanovllm.outputs import OutputFolder
from nanovllm.requests import Prompt, generate_request
from tests.e2e.background import BackgroundRequest
from tests.e2e.support import (
    CPU,
    LIMIT_S,
    CallError,
    Metrics,
    Reference,
    greedy,
    random_prompt,
    running_services,
    wait_until,
    wait_until_idle,
    wait_until_serving,
)

SILENCE_TIMEOUT_S = 1.0
MAX_NUM_SEQS = 4
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def breakable(checkpoint: Callable[[str], Path], logs: Path) -> Iterator[LocalServices]:
    with running_services(
        checkpoint("qwen3"),
        logs,
        executor=[
            *("--num-kv-blocks", "256", "--max-num-seqs", str(MAX_NUM_SEQS)),
            *("--max-num-batched-tokens", "64"),
        ],
        scheduler=["--executor-silence-timeout-s", str(SILENCE_TIMEOUT_S)],
        metrics=True,
    ) as running:
        yield running


@pytest.fixture
def services(breakable: LocalServices) -> LocalServices:
    """Services that a test may break; what the test before it broke is started again."""
    broken = [s for s in (breakable.executor, breakable.scheduler) if not s.running]
    for service in broken:
        service.start()
    for service in broken:
        service.wait_until_ready(2 * LIMIT_S)
    with Client(breakable.address) as client:
        wait_until_serving(client)
        wait_until_idle(client)
    return breakable


@pytest.fixture
def client(services: LocalServices) -> Iterator[Client]:
    with Client(services.address) as connected:
        yield connected


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def num_restarts(services: LocalServices) -> float:
    return Metrics(services.scheduler.metrics_url)["executor_restarts_total"]


def is_served(client: Client) -> bool:
    try:
        return len(client.generate("abc", greedy(4), timeout_s=LIMIT_S).token_ids) == 4
    except ServerError:
        return False


class TestExecutorLoss:
    def test_requests_resume_after_the_executor_was_killed_without_gap_or_repeat(
        self,
        services: LocalServices,
        client: Client,
        threads: ThreadPoolExecutor,
        reference: Callable[[str], Reference],
    ) -> None:
        prompts = [random_prompt(20 + 30 * index, seed=100 + index) for index in range(3)]
        seeded = replace(greedy(NUM_TOKENS, seed=7, logprobs=1), temperature=5.0)
        undisturbed = client.generate(prompts[0], seeded)
        before = Metrics(services.scheduler.metrics_url)
        requests = [
            BackgroundRequest(client, threads, prompt, greedy(NUM_TOKENS)) for prompt in prompts
        ]
        sampled = BackgroundRequest(client, threads, prompts[0], seeded)
        queued = BackgroundRequest(client, threads, prompts[0], greedy(5))
        for request in (*requests, sampled):
            request.wait_for_tokens(20)
        services.executor.kill()
        assert services.executor.wait(LIMIT_S) == -signal.SIGKILL
        wait_until(lambda: client.health() is Health.NOT_SERVING, "the loss is noticed")
        services.executor.restart(2 * LIMIT_S)

        for request, prompt in zip(requests, prompts, strict=True):
            completion = request.completion()
            assert completion.token_ids == reference("qwen3").greedy(prompt, NUM_TOKENS)
            assert completion.finish_reason is FinishReason.LENGTH
            assert completion.usage.prompt_tokens == len(prompt)
        assert sampled.completion().token_ids == undisturbed.token_ids
        logprobs = sampled.completion().logprobs
        assert logprobs is not None
        assert len(logprobs) == NUM_TOKENS
        assert queued.completion().token_ids == reference("qwen3").greedy(prompts[0], 5)
        after = Metrics(services.scheduler.metrics_url)

        def growth(name: str) -> float:
            return after[name] - before[name]

        assert growth("executor_restarts_total") == 1
        assert growth("recomputed_tokens_total") > 0
        # No token was generated, or counted, twice.
        assert growth("generation_tokens_total") == 4 * NUM_TOKENS + 5

    def test_requests_survive_an_executor_that_is_shut_down_and_started_again(
        self,
        services: LocalServices,
        client: Client,
        threads: ThreadPoolExecutor,
        reference: Callable[[str], Reference],
    ) -> None:
        prompt = random_prompt(40, seed=110)
        request = BackgroundRequest(client, threads, prompt, greedy(NUM_TOKENS))
        request.wait_for_tokens(5)
        services.executor.terminate()
        assert services.executor.wait(LIMIT_S) == 0
        services.executor.restart(2 * LIMIT_S)
        assert request.completion().token_ids == reference("qwen3").greedy(prompt, NUM_TOKENS)

    def test_stalled_executor_counts_as_lost_and_requests_go_on_when_it_is_back(
        self,
        services: LocalServices,
        client: Client,
        threads: ThreadPoolExecutor,
        reference: Callable[[str], Reference],
    ) -> None:
        prompt = random_prompt(40, seed=111)
        before = num_restarts(services)
        request = BackgroundRequest(client, threads, prompt, greedy(NUM_TOKENS))
        request.wait_for_tokens(5)
        os.kill(services.executor.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: client.health() is Health.NOT_SERVING, "the stall is noticed")
        finally:
            os.kill(services.executor.pid, signal.SIGCONT)
        wait_until_serving(client)
        assert request.completion().token_ids == reference("qwen3").greedy(prompt, NUM_TOKENS)
        assert num_restarts(services) == before + 1

    def test_short_pause_of_the_executor_is_not_a_loss(
        self, services: LocalServices, client: Client, threads: ThreadPoolExecutor
    ) -> None:
        before = num_restarts(services)
        request = BackgroundRequest(client, threads, random_prompt(9), greedy(NUM_TOKENS))
        request.wait_for_tokens(5)
        os.kill(services.executor.pid, signal.SIGSTOP)
        threading.Event().wait(SILENCE_TIMEOUT_S / 4)
        os.kill(services.executor.pid, signal.SIGCONT)
        assert len(request.completion().token_ids) == NUM_TOKENS
        assert num_restarts(services) == before

    def test_vanished_idle_executor_is_noticed_too(
        self, services: LocalServices, client: Client
    ) -> None:
        os.kill(services.executor.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: client.health() is Health.NOT_SERVING, "the silence is noticed")
        finally:
            os.kill(services.executor.pid, signal.SIGCONT)
        wait_until_serving(client)

    def test_smaller_executor_serves_what_still_fits_and_refuses_the_rest(
        self,
        services: LocalServices,
        client: Client,
        threads: ThreadPoolExecutor,
        checkpoint: Callable[[str], Path],
        reference: Callable[[str], Reference],
        tmp_path: Path,
    ) -> None:
        prompts = [random_prompt(20, seed=112 + index) for index in range(2)]
        fits, too_large = (
            BackgroundRequest(client, threads, prompt, greedy(count))
            for prompt, count in zip(prompts, (200, 3000), strict=True)
        )
        for request in (fits, too_large):
            request.wait_for_tokens(5)
        services.executor.kill()
        services.executor.wait(LIMIT_S)
        smaller = ServiceProcess(
            "executor_service",
            [
                *("--model", str(checkpoint("qwen3")), "--metrics-port", "-1", *CPU),
                *("--listen", services.executor_address, "--block-size", "16"),
                *("--num-kv-blocks", "20"),
            ],
            log_path=tmp_path / "log",
        )
        with smaller:
            smaller.wait_until_ready(2 * LIMIT_S)
            assert fits.completion().token_ids == reference("qwen3").greedy(prompts[0], 200)
            error = too_large.error()
            assert isinstance(error, RequestTooLargeError)
            assert "KV cache" in str(error)


MIXED: list[tuple[Prompt, SamplingParams]] = [
    (random_prompt(30, seed=150), greedy(NUM_TOKENS, stop=["\x00never\x00"], logprobs=1)),
    (random_prompt(11, seed=151), replace(greedy(NUM_TOKENS, seed=3), temperature=3.0)),
    # Without a seed the first attempt's has to be kept.
    ("A text \u20ac", replace(greedy(NUM_TOKENS, n=2, frequency_penalty=0.5), temperature=2.0)),
    ([{"role": "user", "content": "hello"}], greedy(NUM_TOKENS, min_tokens=NUM_TOKENS)),
]


def check_like_undisturbed(client: Client, outputs: list[RequestOutput]) -> None:
    for (prompt, params), output in zip(MIXED, outputs, strict=True):
        for completion in output.completions:
            assert completion.finish_reason is FinishReason.LENGTH
            assert len(completion.token_ids) == completion.usage.completion_tokens == NUM_TOKENS
        if params.temperature and params.seed is None:
            ids = [completion.token_ids for completion in output.completions]
            assert ids[0] != ids[1]
            for completion in output.completions:
                assert completion.text == client.detokenize(completion.token_ids)
            continue
        undisturbed = client.generate(prompt, params)
        for completion, expected in zip(output.completions, undisturbed.completions, strict=True):
            assert completion.token_ids == expected.token_ids
            assert completion.text == expected.text
            assert completion.usage.prompt_tokens == expected.usage.prompt_tokens
            if params.logprobs is not None:
                assert [entry.logprob for entry in completion.logprobs or ()] == pytest.approx(
                    [entry.logprob for entry in expected.logprobs or ()], abs=1e-3
                )


class TestSchedulerLoss:
    def test_resuming_requests_survive_a_killed_scheduler_without_gap_or_repeat(
        self, services: LocalServices, threads: ThreadPoolExecutor
    ) -> None:
        with Client(services.address, resume=True) as client:
            requests = [
                BackgroundRequest(client, threads, prompt, params) for prompt, params in MIXED
            ]
            # More than the slots hold: the last one may be still in the queue.
            for request in requests[:2]:
                request.wait_for_tokens(20)
            services.scheduler.kill()
            services.scheduler.wait(LIMIT_S)
            services.scheduler.restart(LIMIT_S)
            check_like_undisturbed(client, [request.output() for request in requests])
            wait_until_idle(client)

    def test_resuming_requests_go_to_another_scheduler_with_asyncio_too(
        self, services: LocalServices, checkpoint: Callable[[str], Path], tmp_path: Path
    ) -> None:
        other = ServiceProcess(
            "scheduler_service",
            [
                *("--model", str(checkpoint("qwen3")), "--metrics-port", "-1"),
                *("--executor", services.executor_address, "--listen", f"unix:{tmp_path}/2.sock"),
            ],
            log_path=tmp_path / "other.log",
        )

        async def interfere(progress: asyncio.Event) -> None:
            await progress.wait()
            services.scheduler.kill()
            await asyncio.to_thread(services.scheduler.wait, LIMIT_S)
            await asyncio.to_thread(other.start)

        async def read(client: AsyncClient, index: int, progress: asyncio.Event) -> RequestOutput:
            request = generate_request(*MIXED[index])
            folder = OutputFolder(request)
            num_tokens = 0
            async with client.start(request, timeout_s=4 * LIMIT_S) as stream:
                async for delta in stream:
                    folder.add(delta)
                    num_tokens += len(delta.token_ids)
                    if num_tokens > 20:
                        progress.set()
            return folder.output()

        async def main() -> list[RequestOutput]:
            progress = asyncio.Event()
            addresses = [f"unix:{tmp_path}/2.sock"]
            async with AsyncClient(services.address, addresses=addresses, resume=True) as client:
                *outputs, _ = await asyncio.gather(
                    *(read(client, index, progress) for index in range(len(MIXED))),
                    interfere(progress),
                )
            return outputs

        try:
            outputs = asyncio.run(main())
            with Client(other.address) as client:
                check_like_undisturbed(client, outputs)
        finally:
            other.stop()

    def test_killed_scheduler_frees_the_executor_for_the_next_one(
        self,
        services: LocalServices,
        client: Client,
        threads: ThreadPoolExecutor,
        reference: Callable[[str], Reference],
    ) -> None:
        lost = [
            BackgroundRequest(client, threads, random_prompt(30, seed=i), greedy(3000))
            for i in range(MAX_NUM_SEQS)
        ]
        for request in lost:
            request.wait_for_tokens(1)
        services.scheduler.kill()
        assert services.scheduler.wait(LIMIT_S) == -signal.SIGKILL
        assert all(isinstance(request.error(), UnavailableError) for request in lost)

        def num_steps() -> float:
            return Metrics(services.executor.metrics_url)["step_duration_seconds_count"]

        def has_stopped() -> bool:
            before = num_steps()
            threading.Event().wait(0.05)
            return num_steps() == before

        # Nobody would read what the orphaned slots produce.
        wait_until(has_stopped, "the executor has freed its slots")
        services.scheduler.restart(LIMIT_S)
        wait_until_serving(client)
        prompts = [random_prompt(30, seed=120 + index) for index in range(MAX_NUM_SEQS)]
        outputs = list(threads.map(lambda prompt: client.generate(prompt, greedy(20)), prompts))
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.token_ids == reference("qwen3").greedy(prompt, 20)

    def test_newer_scheduler_fences_the_older_one(
        self,
        services: LocalServices,
        logs: Path,
        checkpoint: Callable[[str], Path],
        tmp_path: Path,
    ) -> None:
        newer = ServiceProcess(
            "scheduler_service",
            [
                *("--model", str(checkpoint("qwen3")), "--metrics-port", "-1"),
                *("--executor", services.executor_address, "--listen", f"unix:{tmp_path}/2.sock"),
            ],
            log_path=tmp_path / "newer.log",
        )
        with newer:
            newer.wait_until_ready(LIMIT_S)
            with Client(newer.address) as client:
                wait_until_serving(client)
                assert is_served(client)
            older_log = logs / "scheduler.log"
            wait_until(
                lambda: "ABORTED: a newer session took over" in older_log.read_text(),
                "the older scheduler logs that it was fenced",
            )
            wait_until(
                lambda: "waits until that one is gone" in older_log.read_text(),
                "the older scheduler stays away",
            )
        assert services.executor.running
        # With the newer one gone, the older one gets its executor back.
        with Client(services.address) as client:
            wait_until_serving(client)
            assert is_served(client)


class TestShutdown:
    def test_scheduler_drains_running_requests_and_exits_zero(
        self,
        services: LocalServices,
        client: Client,
        threads: ThreadPoolExecutor,
        reference: Callable[[str], Reference],
    ) -> None:
        prompt = random_prompt(40, seed=130)
        request = BackgroundRequest(client, threads, prompt, greedy(NUM_TOKENS))
        request.wait_for_tokens(5)
        services.scheduler.terminate()
        completion = request.completion()
        assert completion.token_ids == reference("qwen3").greedy(prompt, NUM_TOKENS)
        assert completion.finish_reason is FinishReason.LENGTH
        assert services.scheduler.wait(LIMIT_S) == 0

    def test_draining_scheduler_refuses_new_requests(
        self, services: LocalServices, client: Client, threads: ThreadPoolExecutor
    ) -> None:
        request = BackgroundRequest(client, threads, random_prompt(10), greedy(NUM_TOKENS))
        request.wait_for_tokens(5)
        services.scheduler.terminate()

        refusals: list[UnavailableError] = []

        def is_refused() -> bool:
            try:
                client.generate("abc", greedy(1))
            except UnavailableError as error:
                refusals.append(error)
            return bool(refusals)

        wait_until(is_refused, "a new request is refused")
        cause = refusals[0].__cause__
        assert isinstance(cause, grpc.RpcError)
        assert CallError.of(cause).retry_after_s == 1.0
        assert len(request.completion().token_ids) == NUM_TOKENS
        assert services.scheduler.wait(LIMIT_S) == 0

    def test_idle_services_exit_zero_at_once_and_leave_no_sockets(
        self, services: LocalServices
    ) -> None:
        for service in (services.scheduler, services.executor):
            socket = Path(service.address.removeprefix("unix:"))
            assert socket.exists()
            start_s = time.monotonic()
            service.terminate()
            assert service.wait(LIMIT_S) == 0
            assert time.monotonic() - start_s < 5.0
            assert not socket.exists()

    def test_watcher_of_the_health_service_does_not_delay_the_end(
        self, services: LocalServices
    ) -> None:
        with grpc.insecure_channel(services.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            start_s = time.monotonic()
            services.scheduler.terminate()
            assert services.scheduler.wait(LIMIT_S) == 0
            assert time.monotonic() - start_s < 5.0

    def test_second_signal_ends_the_scheduler_at_once_and_leaves_no_socket(
        self, services: LocalServices, client: Client, threads: ThreadPoolExecutor
    ) -> None:
        request = BackgroundRequest(client, threads, random_prompt(10), greedy(4000))
        request.wait_for_tokens(5)
        services.scheduler.terminate()
        wait_until(lambda: client.health() is Health.NOT_SERVING, "the scheduler drains")
        os.kill(services.scheduler.pid, signal.SIGINT)
        assert services.scheduler.wait(LIMIT_S) == 128 + signal.SIGINT
        assert isinstance(request.error(), UnavailableError)
        assert not Path(services.address.removeprefix("unix:")).exists()

    def test_interrupted_services_exit_zero(self, services: LocalServices) -> None:
        for service in (services.scheduler, services.executor):
            os.kill(service.pid, signal.SIGINT)
            assert service.wait(LIMIT_S) == 0


def test_drain_has_a_limit(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with (
        running_services(
            checkpoint("qwen3"),
            tmp_path,
            executor=["--num-kv-blocks", "256"],
            scheduler=["--drain-timeout-s", "0.3"],
        ) as services,
        Client(services.address) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        request = BackgroundRequest(client, threads, random_prompt(10), greedy(4000))
        request.wait_for_tokens(5)
        services.scheduler.terminate()
        resuming = BackgroundRequest(client, threads, random_prompt(10), greedy(300), resume=True)
        assert services.scheduler.wait(LIMIT_S) == 0
        error = request.error()
        assert isinstance(error, UnavailableError)
        assert "can be resumed" in str(error)
        services.scheduler.restart(LIMIT_S)
        assert len(resuming.completion().token_ids) == 300
        assert "Traceback" not in (tmp_path / "scheduler.log").read_text()
