"""Runs both services under a varied load while a Prometheus watches, and draws the dashboards.

    python -m deploy.grafana.watched_load --model smollm2-135m-instruct --output docs/images

It takes about seven minutes. The load has phases so that the panels have something to show: calm,
conversations with a common prefix, a crowd that fills the queue and the KV cache, long prompts, and
the loss of the executor.
"""

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.grafana.local_prometheus import LocalPrometheus
from deploy.grafana.render import TimeRange, render_all
from nanovllm import AsyncClient, LocalServices, NanovllmError, SamplingParams

SCHEDULER_JOB, EXECUTOR_JOB = "nanovllm-scheduler", "nanovllm-executor"
# As in deploy/prometheus/prometheus.yml.
_SCRAPE_INTERVAL_S = 5.0
_STARTUP_TIMEOUT_S = 300.0
# Small enough that the crowd preempts and is refused.
_EXECUTOR_ARGS = (
    *("--device", "cpu", "--dtype", "float32", "--block-size", "16", "--num-kv-blocks", "64"),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "128", "--max-model-len", "1024"),
)
_SCHEDULER_ARGS = ("--max-queued-requests", "10", "--lookahead-tokens", "16")


@dataclass(frozen=True, slots=True)
class Phase:
    """Clients that send one request after the other for some time."""

    name: str
    duration_s: float
    num_clients: int
    # Longest prompt and answer; lengths are drawn from half of that up.
    prompt_tokens: int
    max_tokens: int
    # Tokens that all prompts begin with.
    common_tokens: int = 0
    # Share of the requests whose client leaves after half of the answer.
    aborted_share: float = 0.0
    pause_s: float = 0.0
    loses_executor: bool = False


PHASES = (
    Phase("calm", 50, 1, 60, 40, pause_s=1.0),
    Phase("conversations", 80, 4, 40, 60, common_tokens=96, pause_s=0.5),
    Phase("crowd", 100, 24, 80, 160, common_tokens=32, aborted_share=0.1),
    Phase("calm again", 30, 1, 60, 40, pause_s=1.0),
    Phase("long prompts", 60, 3, 600, 24),
    Phase("executor lost", 50, 4, 40, 80, common_tokens=96, loses_executor=True),
    Phase("after it", 40, 4, 40, 60, common_tokens=96, pause_s=0.5),
)


class Load:
    """Sends the requests of all phases."""

    def __init__(self, client: AsyncClient, vocabulary_size: int) -> None:
        self._client = client
        self._random = random.Random(0)
        self._vocabulary_size = vocabulary_size
        self._common = self._tokens(max(phase.common_tokens for phase in PHASES))

    async def run(self, phase: Phase) -> None:
        """Runs one phase; at its end clients leave, whatever they still wait for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(phase.duration_s), asyncio.TaskGroup() as group:
                for _ in range(phase.num_clients):
                    group.create_task(self._send_requests(phase))

    async def _send_requests(self, phase: Phase) -> None:
        while True:
            try:
                await self._request(phase)
            except NanovllmError:
                # Refused, which is a part of the picture.
                await asyncio.sleep(1.0)
            await asyncio.sleep(phase.pause_s * self._random.uniform(0.5, 1.5))

    async def _request(self, phase: Phase) -> None:
        num_tokens = self._random.randint(phase.prompt_tokens // 2, phase.prompt_tokens)
        prompt = self._common[: phase.common_tokens] + self._tokens(num_tokens)
        max_tokens = self._random.randint(phase.max_tokens // 2, phase.max_tokens)
        leaves = self._random.random() < phase.aborted_share
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        num_received = 0
        async with self._client.stream(prompt, params) as stream:
            async for delta in stream:
                num_received += len(delta.token_ids)
                if leaves and num_received > max_tokens // 2:
                    return

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(range(self._vocabulary_size), k=count)


async def _run_phases(services: LocalServices, prometheus: LocalPrometheus) -> None:
    async with AsyncClient(services.address) as client:
        load = Load(client, (await client.model_info()).vocab_size)
        for phase in PHASES:
            print(f"{phase.name}: {phase.num_clients} clients, {phase.duration_s:g} s", flush=True)
            running = asyncio.create_task(load.run(phase))
            if phase.loses_executor:
                await asyncio.sleep(phase.duration_s / 3)
                await asyncio.to_thread(_restart_executor, services, prometheus)
            await running


def _restart_executor(services: LocalServices, prometheus: LocalPrometheus) -> None:
    services.executor.kill()
    services.executor.wait()
    services.executor.restart(_STARTUP_TIMEOUT_S)
    prometheus.move_target(EXECUTOR_JOB, _present(services.executor.metrics_url))


def _present(url: str | None) -> str:
    if url is None:
        raise RuntimeError("a service was started without metrics")
    return url


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Load the services and draw the dashboards.")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nanovllm-watch-")))
        services = stack.enter_context(
            LocalServices(
                options.model,
                executor_args=_EXECUTOR_ARGS,
                scheduler_args=_SCHEDULER_ARGS,
                metrics=True,
                log_dir=folder / "logs",
            )
        )
        prometheus = LocalPrometheus(
            folder / "prometheus",
            {
                SCHEDULER_JOB: _present(services.scheduler.metrics_url),
                EXECUTOR_JOB: _present(services.executor.metrics_url),
            },
            interval_s=_SCRAPE_INTERVAL_S,
        )
        api = stack.enter_context(prometheus)
        start_s = time.time()
        asyncio.run(_run_phases(services, prometheus))
        over = TimeRange(start_s, time.time(), _SCRAPE_INTERVAL_S)
        for path in render_all(api, over, options.output):
            print(path)


if __name__ == "__main__":
    main()
