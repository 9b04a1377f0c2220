"""The real engine with a simulated executor, stepped by hand inside `asyncio.run`."""

import asyncio
import itertools
from dataclasses import replace

from nanovllm.v1 import executor_pb2, inference_pb2
from scheduler_service.admission import AdmissionLimits
from scheduler_service.completion import Delta
from scheduler_service.engine import Engine, EngineLimits
from scheduler_service.executors.connection import Connection
from scheduler_service.executors.pool import ExecutorPool
from scheduler_service.live_request import LiveRequest
from scheduler_service.model_spec import DefaultSampling, ModelSpec
from scheduler_service.plan import Plan, StepResult
from scheduler_service.router import RoutingPolicy
from scheduler_service.scheduler import ExecutorCapacity, SchedulerPolicy
from scheduler_service.telemetry.metrics import SchedulerMetrics
from scheduler_service.telemetry.request_metrics import RequestMetrics
from scheduler_service.text.tokenizer import Tokenizer
from scheduler_service.validation import TokenPrompt, validate_generate
from tests.scheduler.simulated_executor import SimulatedExecutor

MODEL = ModelSpec(
    name="tiny",
    architecture="Qwen3ForCausalLM",
    vocab_size=320,
    max_model_len=256,
    eos_token_ids=(258,),
    defaults=DefaultSampling(),
    fingerprint="f" * 64,
)
CAPACITY = ExecutorCapacity(
    num_blocks=64, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128
)

#: But for `max_queued_requests`, which the harness takes by itself.
NO_LIMITS = AdmissionLimits(
    max_queued_requests=0,
    max_queued_tokens=2**40,
    max_queue_wait_s=0,
    max_requests_per_client=0,
    max_response_bytes=2**40,
)


class OtherExecutor:
    """An executor beside the harness's own."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.scheduler = connection.member.scheduler
        self.executor: SimulatedExecutor | None = None

    def connect(self, capacity: ExecutorCapacity = CAPACITY) -> None:
        self.executor = executor = SimulatedExecutor(capacity)
        self.connection.on_connected(info_of(capacity), capacity, executor.plans.append)

    def lose(self) -> None:
        self.executor = None
        self.connection.on_disconnected("the other executor went away")

    def run_iteration(self) -> None:
        if self.executor is not None:
            self.executor.run_iteration()
            results = list(self.executor.results)
            self.executor.results.clear()
            if results:
                self.connection.on_results(results)


class EngineHarness:
    """Must be made inside a running event loop."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        connect: bool = True,
        max_queued_requests: int = 100,
        executor_wait_timeout_s: float = 100.0,
        max_executor_losses: int = 2,
        admission: AdmissionLimits = NO_LIMITS,
    ) -> None:
        self.pool = ExecutorPool(SchedulerPolicy(), RoutingPolicy(), executor_wait_timeout_s)
        self.connection = self.pool.add_executor("unix:/executor")
        self.scheduler = self.connection.member.scheduler
        self.metrics = SchedulerMetrics(self.pool.load, MODEL.name)
        self.engine = Engine(
            self.pool,
            MODEL,
            tokenizer,
            RequestMetrics(self.metrics),
            EngineLimits(
                replace(admission, max_queued_requests=max_queued_requests), max_executor_losses
            ),
        )
        self.pool.start()
        self.plans: list[Plan] = []
        self.executor = SimulatedExecutor(CAPACITY)
        self.others: list[OtherExecutor] = []
        self._ids = itertools.count()
        if connect:
            self.connect()

    def connect(self, capacity: ExecutorCapacity = CAPACITY) -> None:
        """A fresh executor, as after a restart."""
        self.executor = executor = SimulatedExecutor(capacity)

        def send(plan: Plan) -> None:
            self.plans.append(plan)
            executor.plans.append(plan)

        self.connection.on_connected(info_of(capacity), capacity, send)

    def join(
        self, address: str = "unix:/other", capacity: ExecutorCapacity | None = CAPACITY
    ) -> OtherExecutor:
        """One more executor, connected unless it has no capacity."""
        self.pool.add_executor(address)
        other = self.adopt(address)
        if capacity is not None:
            other.connect(capacity)
        return other

    def adopt(self, address: str) -> OtherExecutor:
        """The executor at an address that has joined already."""
        (connection,) = (each for each in self.pool.connections() if each.address == address)
        other = OtherExecutor(connection)
        self.others.append(other)
        return other

    def lose_executor(self) -> None:
        # It must not go on reporting.
        self.executor = SimulatedExecutor(CAPACITY)
        self.connection.on_disconnected("the executor went away")

    def submit(
        self,
        prompt: list[int],
        *,
        request_id: str = "",
        priority: int = 0,
        resume: inference_pb2.Resume | None = None,
        **params,
    ) -> LiveRequest:
        """Submits through the real validation; `params` are fields of SamplingParams."""
        request = inference_pb2.GenerateRequest(
            request_id=request_id or f"request-{next(self._ids)}",
            token_ids=inference_pb2.TokenIds(ids=prompt),
            priority=priority,
            sampling_params=inference_pb2.SamplingParams(**params),
            resume=resume,
        )
        spec = validate_generate(request, MODEL)
        assert isinstance(spec.prompt, TokenPrompt)
        with self.engine.reserve(spec) as reservation:
            return self.engine.submit(reservation, spec.prompt.token_ids)

    def read(self, request: LiveRequest, deadline_s: float | None = None) -> "asyncio.Task":
        """Collects the deltas of a request in a task of their own."""
        return asyncio.create_task(self._collect(request, deadline_s))

    async def _collect(self, request: LiveRequest, deadline_s: float | None) -> list[Delta]:
        return [delta async for delta in self.engine.deltas(request, deadline_s)]

    async def step(self) -> None:
        """Lets everything that is ready run, then one iteration of the executor."""
        await settle()
        self.executor.run_iteration()
        results = list(self.executor.results)
        self.executor.results.clear()
        if results:
            self.report(results)
        for other in self.others:
            other.run_iteration()
        await settle()

    def report(self, results: list[StepResult]) -> None:
        self.connection.on_results(results)
        self.pool.fleet.verify()

    async def finish(self, *tasks: "asyncio.Task", limit: int = 1000) -> None:
        """Steps until the tasks are done."""
        for _ in range(limit):
            if all(task.done() for task in tasks):
                return
            await self.step()
        raise TimeoutError("the engine makes no progress")

    async def check_nothing_is_left(self) -> None:
        """After the last request nothing is remembered, here or on the executor."""
        await settle()
        self.executor.run_iteration()
        self.executor.results.clear()
        for other in self.others:
            other.run_iteration()
            assert other.executor is None or other.executor.num_occupied_slots == 0
        self.pool.fleet.verify()
        assert self.engine._requests == {}
        assert self.engine._reservations == {}
        await asyncio.wait_for(self.engine.wait_until_idle(), 10)
        assert self.engine._owners == {}
        load = self.pool.load
        assert (load.num_running, load.num_waiting, load.kv_usage_ratio) == (0, 0, 0)
        assert self.executor.num_occupied_slots == 0
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"tasks left behind: {others}"


def info_of(capacity: ExecutorCapacity) -> executor_pb2.GetExecutorInfoResponse:
    """What an executor of this capacity says of itself."""
    return executor_pb2.GetExecutorInfoResponse(
        epoch=capacity.executor_epoch,
        block_size=capacity.block_size,
        num_blocks=capacity.num_blocks,
        max_num_seqs=capacity.max_num_seqs,
        max_num_batched_tokens=capacity.max_num_batched_tokens,
        max_model_len=capacity.max_model_len,
        device="simulated",
        dtype="float32",
        attention_backend="torch",
    )


async def settle() -> None:
    """Runs every callback and task that is ready, and what those make ready."""
    for _ in range(10):
        await asyncio.sleep(0)


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def ids_of(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]
