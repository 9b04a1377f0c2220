"""Both services as processes, with a proxy before each, started again whenever they end."""

import asyncio
import time
import urllib.request
from collections import Counter
from pathlib import Path

import grpc
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.chaos.proxy import Proxy
from nanovllm.channel import EXECUTOR_CHANNEL_OPTIONS
from nanovllm.service_process import ServiceProcess
from nanovllm.v1 import executor_pb2, executor_pb2_grpc

#: Limit of a start; loading PyTorch takes seconds, and the machine may be busy.
START_LIMIT_S = 120.0
#: An executor counts as lost after this; faults that are to be noticed last longer.
SILENCE_TIMEOUT_S = 1.0
_DRAIN_TIMEOUT_S = 0.5
_EXECUTOR = (
    *("--device", "cpu", "--dtype", "float32", "--max-num-seqs", "6"),
    # Less than six long requests need, so that some are preempted.
    *("--num-kv-blocks", "32", "--block-size", "16", "--max-num-batched-tokens", "96"),
)
_SCHEDULER = (
    *("--executor-silence-timeout-s", str(SILENCE_TIMEOUT_S)),
    *("--executor-wait-timeout-s", "120", "--drain-timeout-s", str(_DRAIN_TIMEOUT_S)),
    # What waits long is hit by many faults, and none of them is its own.
    *("--max-executor-losses", "1000"),
)
_COUNTERS = ("num_preemptions_total", "executor_restarts_total", "recomputed_tokens_total")


class Stage:
    """Clients connect to `front`; the scheduler reaches its executor through `link`."""

    def __init__(self, model: Path, log_dir: Path) -> None:
        self.front = Proxy()
        self.link = Proxy()
        self._model = model
        self._log_dir = log_dir
        self._services: list[ServiceProcess] = []
        #: Sums over all schedulers that have ended in order or still run.
        self.counters: Counter[str] = Counter()
        #: When the executor that has produced no token yet became ready.
        self._executor_ready_s: float | None = None
        #: From the ready executor to the first token at a client, in seconds.
        self.recoveries_s: list[float] = []

    @property
    def executor(self) -> ServiceProcess:
        """The executor's process."""
        return self._services[0]

    @property
    def scheduler(self) -> ServiceProcess:
        """The scheduler's process."""
        return self._services[1]

    async def start(self) -> None:
        """Starts everything and waits until both services are ready."""
        await self.front.start()
        await self.link.start()
        common = ("--model", str(self._model), "--listen", "127.0.0.1:0", "--metrics-port", "0")
        self._services = [
            ServiceProcess(
                "executor_service",
                [*common, *_EXECUTOR],
                log_path=self._log_dir / "executor.log",
            ),
            ServiceProcess(
                "scheduler_service",
                [*common, *_SCHEDULER, "--executor", self.link.address],
                log_path=self._log_dir / "scheduler.log",
            ),
        ]
        await asyncio.gather(self._bring_up_executor(), self._bring_up_scheduler())

    async def close(self) -> None:
        """Stops everything."""
        for service in reversed(self._services):
            await asyncio.to_thread(service.stop)
        await self.front.close()
        await self.link.close()

    async def bring_back_executor(self) -> None:
        """Starts the executor again once it has ended."""
        self.link.upstream = None
        await asyncio.to_thread(self.executor.wait, START_LIMIT_S)
        await self._bring_up_executor()
        self._executor_ready_s = time.monotonic()

    async def bring_back_scheduler(self) -> None:
        """Starts the scheduler again once it has ended."""
        self.front.upstream = None
        await asyncio.to_thread(self.scheduler.wait, START_LIMIT_S)
        await self._bring_up_scheduler()

    def on_tokens(self, now_s: float) -> None:
        """A client received tokens."""
        if self._executor_ready_s is not None:
            self.recoveries_s.append(now_s - self._executor_ready_s)
            self._executor_ready_s = None

    async def collect_counters(self) -> None:
        """Adds the scheduler's counters up; to be called before it ends, and at the end."""
        values = await asyncio.to_thread(_read_metrics, self.scheduler.metrics_url)
        for name in _COUNTERS:
            self.counters[name] += values[f"nanovllm_{name}"]

    async def num_active_slots(self) -> int:
        """Slots that the executor holds, asked directly."""
        async with grpc.aio.insecure_channel(
            self.executor.address, options=EXECUTOR_CHANNEL_OPTIONS
        ) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            info = await stub.GetExecutorInfo(
                executor_pb2.GetExecutorInfoRequest(), timeout=START_LIMIT_S
            )
            count: int = info.num_active_slots
            return count

    async def _bring_up_executor(self) -> None:
        self.executor.start()
        self.link.upstream = await asyncio.to_thread(self.executor.wait_until_ready, START_LIMIT_S)

    async def _bring_up_scheduler(self) -> None:
        self.scheduler.start()
        self.front.upstream = await asyncio.to_thread(
            self.scheduler.wait_until_ready, START_LIMIT_S
        )


def _read_metrics(url: str | None) -> Counter[str]:
    """Samples of a metrics page, summed over their labels."""
    if url is None:
        raise ValueError("the scheduler serves no metrics")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=START_LIMIT_S) as response:
        text = response.read().decode()
    values: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] += int(sample.value)
    return values
