"""The links to all executors: one task each, for as long as its executor belongs to the pool."""

import asyncio

from scheduler_service.executors.connection import Connection
from scheduler_service.executors.pool import ExecutorPool
from scheduler_service.link.executor_link import ExecutorLink, LinkSettings, StateListener
from scheduler_service.telemetry.metrics import SchedulerMetrics


class ExecutorLinks:
    """Follows the pool. `on_change` is told whether any executor is connected."""

    def __init__(
        self,
        pool: ExecutorPool,
        settings: LinkSettings,
        metrics: SchedulerMetrics,
        on_change: StateListener,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._metrics = metrics
        self._on_change = on_change
        self._tasks: dict[Connection, asyncio.Task[None]] = {}
        self._ended: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Keeps every link running until cancelled; raises what one of them ended with."""
        self._pool.links = self
        for connection in self._pool.connections():
            self.start(connection)
        try:
            # A link ends by itself through a bug only.
            (await self._ended).result()
        finally:
            self._pool.links = None
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def start(self, connection: Connection) -> None:
        """An executor joined."""

        async def on_change(_: bool) -> None:
            await self._on_change(self._pool.load.is_connected)

        counts = self._metrics.executors.join(connection.address)
        link = ExecutorLink(connection, self._settings, counts, on_change)
        task = asyncio.create_task(link.run(), name=f"executor link {connection.address}")
        self._tasks[connection] = task
        task.add_done_callback(self._done)

    def stop(self, connection: Connection) -> None:
        """An executor left."""
        self._tasks.pop(connection).cancel()
        self._metrics.executors.leave(connection.address)

    def _done(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and not self._ended.done():
            self._ended.set_result(task)
