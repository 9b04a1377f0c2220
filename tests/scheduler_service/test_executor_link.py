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
from scheduler_service import executor_link
from scheduler_service.executor_link import ExecutorLink, LinkSettings, SessionEndedError
from scheduler_service.plan import Admit, Plan, StepResult
from scheduler_service.scheduler import ExecutorCapacity
from scheduler_service.sequence import SlotSampling

FINGERPRINT = "a" * 64
Script = Callable[["ScriptedExecutor", AsyncIterator, grpc.aio.ServicerContext], AsyncIterator]


class ScriptedExecutor(executor_pb2_grpc.ExecutorServiceServicer):
    """Opens sessions as an executor does; what follows is up to the script."""

    def __init__(self, script: Script, fingerprint: str = FINGERPRINT) -> None:
        self.script = script
        self.fingerprint = fingerprint
        self.epoch = 7
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
            session_started=executor_pb2.SessionStarted(epoch=self.epoch)
        )
        async for response in self.script(self, request_iterator, context):
            yield response


class FakeEngine:
    """Records what the link reports."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(name="tiny", fingerprint=FINGERPRINT)
        self.scheduler = SimpleNamespace(has_work_in_flight=False)
        self.capacities: list[ExecutorCapacity] = []
        self.results: list[StepResult] = []
        self.problems: list[str] = []
        self.bugs: list[Exception] = []
        self.send: Callable[[Plan], None] | None = None
        self.changed = asyncio.Event()

    def on_connected(self, capacity: ExecutorCapacity, send: Callable[[Plan], None]) -> None:
        self.capacities.append(capacity)
        self.send = send
        self.changed.set()

    def on_disconnected(self, problem: str) -> None:
        self.send = None
        self.problems.append(problem)
        self.changed.set()

    def on_results(self, results: list[StepResult]) -> None:
        if self.bugs:
            raise self.bugs.pop()
        self.results.extend(results)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


async def echo_step_ids(executor, plans, context) -> AsyncIterator:
    """Answers every plan with a result that names it."""
    async for request in plans:
        executor.plans.append(request.plan)
        result = executor_pb2.StepResult(applied_step_id=request.plan.step_id)
        yield executor_pb2.ExecuteResponse(step_results=executor_pb2.StepResults(results=[result]))


@pytest.fixture
def converse(tmp_path: Path) -> Callable[..., None]:
    """Runs a link against a scripted executor while a scenario watches the engine."""

    def run(
        script: Script,
        scenario: Callable[[FakeEngine, ScriptedExecutor, ExecutorLink], Awaitable[None]],
        *,
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
            engine = FakeEngine()

            async def on_change(connected: bool) -> None:
                states.append(connected)

            link = ExecutorLink(engine, LinkSettings(address, stall_timeout_s), on_change)
            task = asyncio.create_task(link.run())
            try:
                scenario_task = asyncio.create_task(scenario(engine, executor, link))
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
    async def scenario(engine: FakeEngine, executor: ScriptedExecutor, link: ExecutorLink):
        await engine.until(lambda: engine.send is not None)
        for step_id in range(1, 21):
            engine.send(Plan(step_id, releases=[step_id % 3]))
        await engine.until(lambda: len(engine.results) == 20)
        assert [result.applied_step_id for result in engine.results] == list(range(1, 21))
        assert [plan.release_slots for plan in executor.plans[:3]] == [
            pack_int32([1]),
            pack_int32([2]),
            pack_int32([0]),
        ]
        assert engine.capacities == [ExecutorCapacity(9, 4, 3, 64, 128)]
        assert link.info.block_size == 4

    assert converse(echo_step_ids, scenario) == [True, False]


def test_a_bug_that_a_session_brings_out_ends_the_session_and_not_the_link(converse, caplog):
    async def scenario(engine: FakeEngine, executor: ScriptedExecutor, link: ExecutorLink):
        engine.bugs.append(ZeroDivisionError("a bug"))
        await engine.until(lambda: engine.send is not None)
        engine.send(Plan(1))
        await engine.until(lambda: len(engine.capacities) == 2)
        assert "ZeroDivisionError('a bug')" in engine.problems[0]
        engine.send(Plan(1))
        await engine.until(lambda: len(engine.results) == 1)

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

    async def scenario(engine: FakeEngine, executor: ScriptedExecutor, link: ExecutorLink):
        await engine.until(lambda: engine.send is not None or bool(engine.problems))
        assert engine.problems == []

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

    async def scenario(engine: FakeEngine, executor: ScriptedExecutor, link: ExecutorLink):
        await engine.until(lambda: engine.send is not None)
        engine.send(Plan(1, admits=[large]))
        await engine.until(lambda: bool(engine.results) or bool(engine.problems))
        assert engine.problems == []
        assert len(executor.plans[0].admits[0].token_ids) == 4 * num_tokens

    converse(echo_step_ids, scenario)


def test_another_model_is_refused_with_what_to_change(converse, caplog):
    async def scenario(engine: FakeEngine, executor: ScriptedExecutor, link: ExecutorLink):
        await engine.until(lambda: len(engine.problems) == 2)
        assert "same --model" in engine.problems[0]
        assert executor.started == []
        assert link.info is None

    with caplog.at_level(logging.WARNING):
        assert True not in converse(echo_step_ids, scenario, fingerprint="b" * 64)
    # Said once, not at every attempt.
    assert sum("same --model" in record.message for record in caplog.records) == 1


def test_a_session_that_the_executor_ends_is_followed_by_a_new_one(converse):
    async def end_at_first_plan(executor, plans, context) -> AsyncIterator:
        await anext(plans)
        await context.abort(grpc.StatusCode.ABORTED, "a newer session took over")
        yield

    async def scenario(engine: FakeEngine, executor: ScriptedExecutor, link: ExecutorLink):
        await engine.until(lambda: engine.send is not None)
        engine.send(Plan(1))
        await engine.until(lambda: len(engine.capacities) == 2)
        assert "ABORTED" in engine.problems[0]
        assert "a newer session took over" in engine.problems[0]
        first, second = executor.started
        assert first.session_id != second.session_id

    assert converse(end_at_first_plan, scenario)[:3] == [True, False, True]


def test_plans_written_while_a_session_ends_do_not_end_the_link(converse):
    """gRPC raises InvalidStateError, not a status, for a write to a call that is over."""

    async def end_at_once(executor, plans, context) -> AsyncIterator:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        yield

    async def scenario(engine: FakeEngine, executor: ScriptedExecutor, link: ExecutorLink):
        async def flood() -> None:
            while True:
                if engine.send is not None:
                    engine.send(Plan(1))
                await asyncio.sleep(0)

        flooding = asyncio.create_task(flood())
        await engine.until(lambda: len(engine.problems) >= 3)
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
    ],
)
def test_a_malformed_result_ends_the_session_as_a_breach_of_protocol(converse, result):
    async def send_nonsense(executor, plans, context) -> AsyncIterator:
        await anext(plans)
        yield executor_pb2.ExecuteResponse(step_results=executor_pb2.StepResults(results=[result]))
        await anext(plans)

    async def scenario(engine: FakeEngine, executor: ScriptedExecutor, link: ExecutorLink):
        await engine.until(lambda: engine.send is not None)
        engine.send(Plan(1))
        await engine.until(lambda: bool(engine.problems))
        assert "broke the protocol" in engine.problems[0]

    converse(send_nonsense, scenario)


def test_an_executor_that_owes_results_and_is_silent_is_given_up(converse):
    async def never_answer(executor, plans, context) -> AsyncIterator:
        async for _ in plans:
            pass
        yield

    async def scenario(engine: FakeEngine, executor: ScriptedExecutor, link: ExecutorLink):
        await engine.until(lambda: engine.send is not None)
        engine.scheduler.has_work_in_flight = True
        engine.send(Plan(1))
        await engine.until(lambda: bool(engine.problems))
        assert "made no progress" in engine.problems[0]

    converse(never_answer, scenario, stall_timeout_s=0.1)


def test_silence_counts_from_the_moment_that_work_begins(monkeypatch: pytest.MonkeyPatch):
    """A link that was idle for longer than the limit gives the next request its full time."""
    now_s = 0.0
    monkeypatch.setattr(executor_link, "time", SimpleNamespace(monotonic=lambda: now_s))

    class Scheduler:
        def __init__(self) -> None:
            self.works = False
            self.looked_at = asyncio.Event()

        @property
        def has_work_in_flight(self) -> bool:
            self.looked_at.set()
            return self.works

        async def tick(self) -> None:
            self.looked_at.clear()
            await self.looked_at.wait()

    async def main() -> None:
        nonlocal now_s
        engine = FakeEngine()
        engine.scheduler = scheduler = Scheduler()

        async def on_change(connected: bool) -> None:
            pass

        link = ExecutorLink(engine, LinkSettings("unix:/nowhere", 0.01), on_change)
        watch = asyncio.create_task(link._watch_progress())
        now_s = 1000.0
        await scheduler.tick()
        scheduler.works = True
        link._send(Plan(1))
        for _ in range(3):
            await scheduler.tick()
        assert not watch.done()
        now_s += 1.0
        with pytest.raises(SessionEndedError, match=r"no progress for 1\.0 s"):
            await asyncio.wait_for(watch, 10)

    asyncio.run(main())
