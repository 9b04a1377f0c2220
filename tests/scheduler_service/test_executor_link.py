"""The link against a scripted executor behind a real gRPC server."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from nanovllm.service_settings import EXECUTOR_SERVER_OPTIONS
from nanovllm.v1 import executor_pb2, executor_pb2_grpc
from nanovllm.wire import pack_int32
from scheduler_service.link import executor_link
from scheduler_service.link.executor_link import ExecutorLink, LinkSettings, SessionEndedError
from scheduler_service.link.executor_liveness import LivenessLimits
from scheduler_service.plan import Admit, Plan, StepResult
from scheduler_service.scheduler import ExecutorCapacity
from scheduler_service.sequence import SlotSampling
from scheduler_service.telemetry.metrics.link_counts import LinkCounts

FINGERPRINT = "a" * 64
Script = Callable[["ScriptedExecutor", AsyncIterator, grpc.aio.ServicerContext], AsyncIterator]


class ScriptedExecutor(executor_pb2_grpc.ExecutorServiceServicer):
    """Opens sessions as an executor does; what follows is up to the script."""

    def __init__(self, script: Script, fingerprint: str = FINGERPRINT) -> None:
        self.script = script
        self.fingerprint = fingerprint
        self.epoch = 7
        # Other than the one that was asked for.
        self.answered_session_id: int | None = None
        self.started: list[executor_pb2.StartSession] = []
        self.plans: list[executor_pb2.Plan] = []

    async def GetExecutorInfo(self, request, context):  # noqa: N802
        return executor_pb2.GetExecutorInfoResponse(
            epoch=self.epoch,
            model_fingerprint=self.fingerprint,
            vocab_size=320,
            block_size=4,
            num_blocks=9,
            max_num_seqs=3,
            max_num_batched_tokens=64,
            max_model_len=128,
        )

    async def Execute(self, request_iterator, context):  # noqa: N802
        start = (await anext(request_iterator)).start_session
        self.started.append(start)
        if start.expected_epoch != self.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another epoch")
        yield executor_pb2.ExecuteResponse(
            session_started=executor_pb2.SessionStarted(
                epoch=self.epoch, session_id=self.answered_session_id or start.session_id
            )
        )
        async for response in self.script(self, request_iterator, context):
            yield response


class FakeConnection:
    """Records what the link reports."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.has_work_in_flight = False
        self.info: executor_pb2.GetExecutorInfoResponse | None = None
        self.capacities: list[ExecutorCapacity] = []
        self.results: list[StepResult] = []
        self.problems: list[str] = []
        self.suspicions: list[bool] = []
        self.bugs: list[Exception] = []
        self.counts = LinkCounts()
        self.send: Callable[[Plan], None] | None = None
        self.changed = asyncio.Event()

    @property
    def has_session(self) -> bool:
        return self.send is not None

    def on_connected(self, info, capacity: ExecutorCapacity, send: Callable[[Plan], None]) -> None:
        self.info = info
        self.capacities.append(capacity)
        self.send = send
        self.changed.set()

    def on_disconnected(self, problem: str) -> None:
        self.send = self.info = None
        self.problems.append(problem)
        self.changed.set()

    def on_results(self, results: list[StepResult]) -> None:
        if self.bugs:
            raise self.bugs.pop()
        self.results.extend(results)
        self.changed.set()

    def on_suspicion(self, is_suspect: bool) -> None:
        self.suspicions.append(is_suspect)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def counted_ends(connection: FakeConnection) -> dict[str, int]:
    """Sessions that ended so far, by reason."""
    return {end.value: count for end, count in connection.counts.sessions_ended.items() if count}


async def echo_step_ids(executor, plans, context) -> AsyncIterator:
    """Answers every plan with a result that names it."""
    async for request in plans:
        executor.plans.append(request.plan)
        result = executor_pb2.StepResult(applied_step_id=request.plan.step_id)
        yield executor_pb2.ExecuteResponse(step_results=executor_pb2.StepResults(results=[result]))


@pytest.fixture
def converse(tmp_path: Path) -> Callable[..., None]:
    """Runs a link against a scripted executor while a scenario watches the connection."""

    def run(
        script: Script,
        scenario: Callable[[FakeConnection, ScriptedExecutor, ExecutorLink], Awaitable[None]],
        *,
        silence_timeout_s: float = 30.0,
        stall_timeout_s: float = 30.0,
        fingerprint: str = FINGERPRINT,
        listen: str = f"unix:{tmp_path}/executor.sock",
    ) -> list[bool]:
        states: list[bool] = []

        async def main() -> None:
            executor = ScriptedExecutor(script, fingerprint)
            server = grpc.aio.server(options=EXECUTOR_SERVER_OPTIONS)
            executor_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server)
            port = server.add_insecure_port(listen)
            address = listen.replace(":0", f":{port}")
            await server.start()
            connection = FakeConnection(address)

            async def on_change(connected: bool) -> None:
                states.append(connected)

            limits = LivenessLimits(silence_timeout_s, stall_timeout_s)
            model = SimpleNamespace(name="tiny", fingerprint=FINGERPRINT)
            link = ExecutorLink(
                connection, LinkSettings(model, limits), connection.counts, on_change
            )
            task = asyncio.create_task(link.run())
            try:
                scenario_task = asyncio.create_task(scenario(connection, executor, link))
                await asyncio.wait([task, scenario_task], return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    scenario_task.cancel()
                    task.result()
                await scenario_task
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await server.stop(None)

        asyncio.run(main())
        return states

    return run


def test_plans_go_down_in_order_and_results_come_up(converse):
    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: connection.send is not None)
        for step_id in range(1, 21):
            connection.send(Plan(step_id, releases=[step_id % 3]))
        await connection.until(lambda: len(connection.results) == 20)
        assert [result.applied_step_id for result in connection.results] == list(range(1, 21))
        assert [plan.release_slots for plan in executor.plans[:3]] == [
            pack_int32([1]),
            pack_int32([2]),
            pack_int32([0]),
        ]
        assert connection.capacities == [ExecutorCapacity(9, 4, 3, 64, 128)]
        assert connection.info.block_size == 4
        assert connection.counts.num_plans == 20
        assert connection.counts.round_trip.cumulative(()) == [20]

    assert converse(echo_step_ids, scenario) == [True, False]


def test_a_bug_that_a_session_brings_out_ends_the_session_and_not_the_link(converse, caplog):
    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        connection.bugs.append(ZeroDivisionError("a bug"))
        await connection.until(lambda: connection.send is not None)
        connection.send(Plan(1))
        await connection.until(lambda: len(connection.capacities) == 2)
        # Clients are told this; the exception's text is for the log alone.
        assert connection.problems[0] == "the scheduler failed in a session"
        assert counted_ends(connection) == {"bug": 1}
        connection.send(Plan(1))
        await connection.until(lambda: len(connection.results) == 1)

    assert converse(echo_step_ids, scenario)[:3] == [True, False, True]
    # gRPC's own logger may add that the scripted server's call was cancelled at the end.
    records = [record for record in caplog.records if record.name == executor_link.__name__]
    (record,) = [record for record in records if record.exc_info]
    assert record.exc_info[0] is ZeroDivisionError


def test_the_executor_is_never_reached_through_a_proxy(converse, monkeypatch: pytest.MonkeyPatch):
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: connection.send is not None or bool(connection.problems))
        assert connection.problems == []

    converse(echo_step_ids, scenario, listen="127.0.0.1:0")


def test_a_plan_of_many_long_prompts_is_not_too_large(converse):
    num_tokens = 17 * 2**20
    large = Admit(
        slot=0,
        token_ids=np.zeros(num_tokens, np.int32),
        block_ids=[0],
        num_cached_tokens=0,
        num_prompt_tokens=num_tokens,
        max_total_tokens=num_tokens + 1,
        min_total_tokens=0,
        stop_token_ids=(),
        sampling=SlotSampling(),
    )

    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: connection.send is not None)
        connection.send(Plan(1, admits=[large]))
        await connection.until(lambda: bool(connection.results) or bool(connection.problems))
        assert connection.problems == []
        assert len(executor.plans[0].admits[0].token_ids) == 4 * num_tokens

    converse(echo_step_ids, scenario)


def test_another_model_is_refused_with_what_to_change(converse, caplog):
    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: len(connection.problems) == 2)
        assert "same --model" in connection.problems[0]
        assert counted_ends(connection) == {"refused": 2}
        assert executor.started == []
        assert connection.info is None

    with caplog.at_level(logging.WARNING):
        assert True not in converse(echo_step_ids, scenario, fingerprint="b" * 64)
    # Said once, not at every attempt.
    problems = [record.fields["problem"] for record in caplog.records if hasattr(record, "fields")]
    assert sum("same --model" in problem for problem in problems) == 1


def test_a_session_that_the_executor_ends_is_followed_by_a_new_one(converse):
    async def end_at_first_plan(executor, plans, context) -> AsyncIterator:
        await anext(plans)
        await context.abort(grpc.StatusCode.ABORTED, "a newer session took over")
        yield

    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: connection.send is not None)
        connection.send(Plan(1))
        await connection.until(lambda: len(connection.capacities) == 2)
        assert "ABORTED" in connection.problems[0]
        assert "a newer session took over" in connection.problems[0]
        assert counted_ends(connection) == {"fenced": 1}
        first, second = executor.started
        assert first.session_id != second.session_id

    assert converse(end_at_first_plan, scenario)[:3] == [True, False, True]


def test_plans_written_while_a_session_ends_do_not_end_the_link(converse):
    """gRPC raises InvalidStateError, not a status, for a write to a call that is over."""

    async def end_at_once(executor, plans, context) -> AsyncIterator:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        yield

    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        async def flood() -> None:
            while True:
                if connection.send is not None:
                    connection.send(Plan(1))
                await asyncio.sleep(0)

        flooding = asyncio.create_task(flood())
        await connection.until(lambda: len(connection.problems) >= 3)
        flooding.cancel()
        assert len(executor.started) >= 3

    converse(end_at_once, scenario)


def test_a_write_to_a_call_that_is_over_ends_the_session_with_the_status_of_the_call():
    class EndedCall:
        async def write(self, request) -> None:
            raise asyncio.InvalidStateError("RPC already finished.")

        async def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        async def details(self) -> str:
            return "gone"

    with pytest.raises(SessionEndedError, match="UNAVAILABLE: gone"):
        asyncio.run(executor_link._write(EndedCall(), executor_pb2.ExecuteRequest()))


@pytest.mark.parametrize(
    "result",
    [
        executor_pb2.StepResult(slots=b"abc"),
        executor_pb2.StepResult(slots=pack_int32([1]), token_ids=pack_int32([1])),
        executor_pb2.StepResult(iteration=2),
    ],
)
def test_a_malformed_result_ends_the_session_as_a_breach_of_protocol(converse, result):
    async def send_nonsense(executor, plans, context) -> AsyncIterator:
        await anext(plans)
        yield executor_pb2.ExecuteResponse(step_results=executor_pb2.StepResults(results=[result]))
        await anext(plans)

    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: connection.send is not None)
        connection.send(Plan(1))
        await connection.until(lambda: bool(connection.problems))
        assert "broke the protocol" in connection.problems[0]
        assert counted_ends(connection) == {"protocol": 1}

    converse(send_nonsense, scenario)


async def beat(executor, plans, context) -> AsyncIterator:
    """Sends heartbeats without progress, and nothing else."""
    while True:
        yield executor_pb2.ExecuteResponse(heartbeat=executor_pb2.Heartbeat())
        await asyncio.sleep(executor.started[-1].heartbeat_interval_ms / 1000)


def test_an_executor_that_owes_results_and_only_beats_is_given_up(converse):
    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: connection.send is not None)
        connection.has_work_in_flight = True
        await connection.until(lambda: bool(connection.problems))
        assert "made no progress" in connection.problems[0]
        assert counted_ends(connection) == {"stalled": 1}

    converse(beat, scenario, stall_timeout_s=0.2)


def test_an_idle_executor_that_beats_stays_connected(converse):
    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: connection.send is not None)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await connection.until(lambda: bool(connection.problems))

    converse(beat, scenario, silence_timeout_s=5.0, stall_timeout_s=0.2)


def test_an_idle_executor_that_sends_nothing_is_given_up(converse):
    async def say_nothing(executor, plans, context) -> AsyncIterator:
        async for _ in plans:
            pass
        yield

    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: bool(connection.problems))
        assert "sent nothing" in connection.problems[0]
        assert not connection.has_work_in_flight

    converse(say_nothing, scenario, silence_timeout_s=0.2)


def test_the_executor_is_asked_for_several_heartbeats_within_the_limit(converse):
    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: connection.send is not None)
        assert executor.started[0].heartbeat_interval_ms == 1000

    converse(echo_step_ids, scenario, silence_timeout_s=5.0)


def test_an_answer_that_belongs_to_another_session_is_not_taken(converse):
    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        executor.answered_session_id = 1
        await connection.until(lambda: bool(connection.problems))
        assert "for another session" in connection.problems[0]
        assert connection.capacities == []

    converse(echo_step_ids, scenario)


def test_a_stream_that_breaks_counts_as_a_lost_session(converse):
    async def break_at_first_plan(executor, plans, context) -> AsyncIterator:
        await anext(plans)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the executor is shutting down")
        yield

    async def scenario(connection: FakeConnection, executor: ScriptedExecutor, link: ExecutorLink):
        await connection.until(lambda: connection.send is not None)
        connection.send(Plan(1))
        await connection.until(lambda: bool(connection.problems))
        assert counted_ends(connection) == {"lost": 1}

    converse(break_at_first_plan, scenario)


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_num_seqs", "max_model_len"])
def test_an_executor_that_claims_to_hold_nothing_gets_no_session(name: str):
    sizes = dict.fromkeys(("num_blocks", "block_size", "max_num_seqs", "max_model_len"), 8)
    info = executor_pb2.GetExecutorInfoResponse(max_num_batched_tokens=8, **(sizes | {name: 0}))
    with pytest.raises(SessionEndedError, match=f"claims a {name} of 0"):
        executor_link._capacity(info)
