"""Watchers of the health service, those that read nothing among them."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scheduler_service.health import HealthServicer

LIMIT_S = 10
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class DeafPeer:
    """A call whose peer takes nothing."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()

    async def write(self, response: health_pb2.HealthCheckResponse) -> None:
        self.is_asked.set()
        await asyncio.Event().wait()


def test_a_watcher_that_reads_nothing_holds_up_neither_changes_nor_the_shutdown():
    async def main() -> None:
        servicer = HealthServicer()
        peer = DeafPeer()
        watch = asyncio.create_task(servicer.Watch(health_pb2.HealthCheckRequest(), peer))
        await asyncio.wait_for(peer.is_asked.wait(), LIMIT_S)
        for status in (NOT_SERVING, SERVING):
            await asyncio.wait_for(servicer.set("", status), LIMIT_S)
        await asyncio.wait_for(servicer.enter_graceful_shutdown(), LIMIT_S)
        watch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watch
        response = await servicer.Check(health_pb2.HealthCheckRequest(), None)
        assert response.status == NOT_SERVING

    asyncio.run(main())


def test_a_watcher_is_told_of_changes_over_grpc(tmp_path):
    async def main() -> None:
        servicer, server = HealthServicer(), grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        address = f"unix:{tmp_path}/health.sock"
        server.add_insecure_port(address)
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service="other"), timeout=LIMIT_S)
            seen = [(await watch.read()).status]
            for status in (SERVING, NOT_SERVING):
                await servicer.set("other", status)
                seen.append((await watch.read()).status)
            watch.cancel()
        unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        assert seen == [unknown, SERVING, NOT_SERVING]
        await server.stop(None)

    asyncio.run(main())
