"""Whether new requests are taken, and what health checks are told about it."""

from collections.abc import Sequence

from grpc_health.v1 import health, health_pb2

from scheduler_service.engine import Engine
from scheduler_service.errors import DrainingError

# What a refused client should wait before it asks again, here or at another server.
_RETRY_AFTER_S = 5.0


class ServingState:
    """Healthy means that an executor is there and that nobody has asked to drain."""

    def __init__(
        self, engine: Engine, health_servicer: health.aio.HealthServicer, services: Sequence[str]
    ) -> None:
        self._engine = engine
        self._health = health_servicer
        self._services = services
        self._is_connected = False
        self.is_draining = False

    @property
    def is_serving(self) -> bool:
        """Whether health checks succeed."""
        return self._is_connected and not self.is_draining

    async def set_connected(self, connected: bool) -> None:
        """An executor came or went; whether any is there now."""
        self._is_connected = connected
        await self._tell()

    async def set_draining(self, draining: bool) -> None:
        """Refuses new requests, or takes them again."""
        self.is_draining = draining
        self._engine.refuse_new(
            DrainingError("this server is drained; send the request to another", _RETRY_AFTER_S)
            if draining
            else None
        )
        await self._tell()

    async def _tell(self) -> None:
        response = health_pb2.HealthCheckResponse
        for service in self._services:
            # As it is now: another change may have come while the service before was told.
            status = response.SERVING if self.is_serving else response.NOT_SERVING
            await self._health.set(service, status)
