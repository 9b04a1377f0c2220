"""Health checks whose watchers cannot hold anybody up."""

import asyncio
from typing import cast

import grpc
from grpc_health.v1 import health, health_pb2


class HealthServicer(health.aio.HealthServicer):
    """gRPC's own, but for `Watch`.

    That one writes while it holds the lock that `set` needs. A peer that watches and reads nothing
    would stop whoever reports a change: links to executors, and the shutdown.
    """

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Streams the status of a service, of several changes perhaps the last one only."""
        newest = _Newest()
        async with asyncio.TaskGroup() as group:
            watching = cast(grpc.aio.ServicerContext, newest)
            group.create_task(super().Watch(request, watching), name="watch health")
            while True:
                await context.write(await newest.take())


class _Newest:
    """Stands in for a call's context: keeps the last message that was written."""

    def __init__(self) -> None:
        self._response: health_pb2.HealthCheckResponse | None = None
        self._is_there = asyncio.Event()

    async def write(self, response: health_pb2.HealthCheckResponse) -> None:
        """Replaces what was not taken; never waits."""
        self._response = response
        self._is_there.set()

    async def take(self) -> health_pb2.HealthCheckResponse:
        """Waits for a message."""
        await self._is_there.wait()
        self._is_there.clear()
        return cast(health_pb2.HealthCheckResponse, self._response)
