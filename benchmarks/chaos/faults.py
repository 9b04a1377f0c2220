"""What goes wrong, one function for each kind. Every fault ends with its cause gone again."""

import asyncio
import os
import random
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc

from benchmarks.chaos.cases import burst_case
from benchmarks.chaos.client import Ending, send
from benchmarks.chaos.stage import SILENCE_TIMEOUT_S, Stage
from nanovllm.aio import AsyncClient
from nanovllm.channel import EXECUTOR_CHANNEL_OPTIONS
from nanovllm.v1 import executor_pb2, executor_pb2_grpc

_NOTICED_S = 2 * SILENCE_TIMEOUT_S
_UNNOTICED_S = SILENCE_TIMEOUT_S / 4
_BURST_REQUESTS = 12
_BURST_LIMIT_S = 120.0
_CALL_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Ground:
    """What a fault works on."""

    stage: Stage
    rng: random.Random


Fault = Callable[[Ground], Awaitable[None]]


class FaultFailedError(RuntimeError):
    """A fault's own requests ended as they must not."""


async def kill_executor(ground: Ground) -> None:
    """kill -9, then a supervisor starts it again."""
    ground.stage.executor.kill()
    await ground.stage.bring_back_executor()


async def restart_executor(ground: Ground) -> None:
    """SIGTERM, then a supervisor starts it again."""
    ground.stage.executor.terminate()
    await ground.stage.bring_back_executor()


async def hang_executor(ground: Ground) -> None:
    """SIGSTOP for longer than the limit, then SIGCONT: what it held back comes late."""
    await _stop_for(ground.stage.executor.pid, _NOTICED_S)


async def pause_executor(ground: Ground) -> None:
    """SIGSTOP for less than the limit."""
    await _stop_for(ground.stage.executor.pid, _UNNOTICED_S)


async def pause_scheduler(ground: Ground) -> None:
    """SIGSTOP of the scheduler for longer than the executor's limit."""
    await _stop_for(ground.stage.scheduler.pid, _NOTICED_S)


async def cut_executor_off(ground: Ground) -> None:
    """A partition between the services; after it the old session's messages arrive, late."""
    ground.stage.link.cut()
    await asyncio.sleep(_NOTICED_S)
    ground.stage.link.heal()


async def reset_executor_link(ground: Ground) -> None:
    """The services' connection is reset."""
    ground.stage.link.reset()


async def kill_scheduler(ground: Ground) -> None:
    """kill -9, then a supervisor starts it again."""
    await ground.stage.collect_counters()
    ground.stage.scheduler.kill()
    await ground.stage.bring_back_scheduler()


async def restart_scheduler(ground: Ground) -> None:
    """SIGTERM with less time to drain than requests need."""
    await ground.stage.collect_counters()
    ground.stage.scheduler.terminate()
    await ground.stage.bring_back_scheduler()


async def reset_clients(ground: Ground) -> None:
    """All clients lose their connection at once and come back at once."""
    ground.stage.front.reset()


async def cut_clients_off(ground: Ground) -> None:
    """A short partition between clients and scheduler."""
    ground.stage.front.cut()
    await asyncio.sleep(_UNNOTICED_S)
    ground.stage.front.heal()


async def storm_of_aborts(ground: Ground) -> None:
    """Requests arrive together and are all given up in the middle."""
    async with AsyncClient(ground.stage.front.address, resume=True) as client:
        await _burst(client, ground.rng, max_tokens=20)


async def storm_of_connections(ground: Ground) -> None:
    """The same, each over a connection of its own."""

    async def one() -> None:
        async with AsyncClient(ground.stage.front.address, resume=True) as client:
            await _burst(client, ground.rng, max_tokens=10, count=1)

    await asyncio.gather(*(one() for _ in range(_BURST_REQUESTS)))


async def memory_pressure(ground: Ground) -> None:
    """Long requests, together more than the KV cache holds."""
    async with AsyncClient(ground.stage.front.address, resume=True) as client:
        await _burst(client, ground.rng, max_tokens=120)


async def foreign_session(ground: Ground) -> None:
    """Another scheduler takes the executor over, breaks the protocol and is gone."""
    address = ground.stage.executor.address
    async with grpc.aio.insecure_channel(address, options=EXECUTOR_CHANNEL_OPTIONS) as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        info = await stub.GetExecutorInfo(
            executor_pb2.GetExecutorInfoRequest(), timeout=_CALL_LIMIT_S
        )
        start = executor_pb2.StartSession(
            expected_epoch=info.epoch, session_id=secrets.randbits(64)
        )

        async def messages() -> AsyncIterator[executor_pb2.ExecuteRequest]:
            yield executor_pb2.ExecuteRequest(start_session=start)
            await asyncio.sleep(_UNNOTICED_S)
            yield executor_pb2.ExecuteRequest(plan=executor_pb2.Plan(step_id=7))
            # The executor is to end the session, not this side.
            await asyncio.sleep(_CALL_LIMIT_S)

        try:
            async for _ in stub.Execute(messages(), timeout=_CALL_LIMIT_S):
                pass
        except grpc.aio.AioRpcError as error:
            ends = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ABORTED)
            if error.code() not in ends:
                raise


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        *(kill_executor, restart_executor, hang_executor, pause_executor),
        *(cut_executor_off, reset_executor_link, foreign_session),
        *(kill_scheduler, restart_scheduler, pause_scheduler),
        *(reset_clients, cut_clients_off),
        *(storm_of_aborts, storm_of_connections, memory_pressure),
    )
}


def make_schedule(count: int, kinds: Sequence[str], rng: random.Random) -> list[str]:
    """Returns names of faults: every kind as often as the others, in random order."""
    schedule: list[str] = []
    while len(schedule) < count:
        schedule += rng.sample(kinds, len(kinds))
    return schedule[:count]


async def _stop_for(pid: int, duration_s: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(duration_s)
    finally:
        os.kill(pid, signal.SIGCONT)


async def _burst(
    client: AsyncClient, rng: random.Random, *, max_tokens: int, count: int = _BURST_REQUESTS
) -> None:
    cases = [burst_case(rng, max_tokens) for _ in range(count)]
    outcomes = await asyncio.gather(*(send(client, case, limit_s=_BURST_LIMIT_S) for case in cases))
    for outcome in outcomes:
        if outcome.ending not in (Ending.LEFT, Ending.COMPLETE):
            raise FaultFailedError(f"a request of a burst: {outcome.ending.value} {outcome.error}")
