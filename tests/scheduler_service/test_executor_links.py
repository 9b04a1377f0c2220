"""The links to all executors, as tasks."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler_service.executors.connection import Connection
from scheduler_service.executors.pool import ExecutorPool
from scheduler_service.link import executor_links
from scheduler_service.link.executor_links import ExecutorLinks
from scheduler_service.router import RoutingPolicy
from scheduler_service.scheduler import SchedulerPolicy
from scheduler_service.telemetry.metrics import SchedulerMetrics
from scheduler_service.telemetry.metrics.link_counts import LinkCounts
from tests.scheduler_service.engine_harness import CAPACITY, info_of, settle


class FakeLink:
    """Runs until it is cancelled or told to fail."""

    made: list["FakeLink"]

    def __init__(
        self,
        connection: Connection,
        settings: Any,
        counts: LinkCounts,
        on_change: Callable[[bool], Awaitable[None]],
    ) -> None:
        self.connection = connection
        self.counts = counts
        self.on_change = on_change
        self.is_running = False
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.made.append(self)

    async def run(self) -> None:
        self.is_running = True
        try:
            await self.failure
        finally:
            self.is_running = False
            await self.on_change(False)


class Stage:
    """A pool of two executors with its links, and what they say of the state."""

    def __init__(self) -> None:
        self.pool = ExecutorPool(SchedulerPolicy(), RoutingPolicy(), 10.0)
        self.pool.listener = SimpleNamespace(
            on_limits_changed=lambda unsettled: None,
            on_displaced=lambda seqs, is_loss: None,
            on_stranded=lambda seqs, error: None,
            on_planned=lambda: None,
        )
        self.states: list[bool] = []
        for address in ("unix:/one", "unix:/two"):
            self.pool.add_executor(address)

        async def on_change(is_connected: bool) -> None:
            self.states.append(is_connected)

        self.metrics = SchedulerMetrics(self.pool.load, "tiny")
        self.links = ExecutorLinks(self.pool, SimpleNamespace(), self.metrics, on_change)
        self.task = asyncio.create_task(self.links.run())

    def running(self) -> list[str]:
        return [link.connection.address for link in FakeLink.made if link.is_running]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(scenario: Callable[[Stage], Awaitable[None]]) -> None:
        async def main() -> None:
            FakeLink.made = []
            stage = Stage()
            await settle()
            await scenario(stage)
            stage.task.cancel()
            await asyncio.gather(stage.task, return_exceptions=True)
            assert stage.running() == []
            assert stage.pool.links is None

        asyncio.run(main())

    monkeypatch.setattr(executor_links, "ExecutorLink", FakeLink)
    return run


def test_every_executor_has_a_link_as_long_as_it_belongs_to_the_pool(run):
    async def scenario(stage: Stage) -> None:
        assert stage.running() == ["unix:/one", "unix:/two"]
        stage.pool.add_executor("unix:/three")
        await settle()
        assert stage.running() == ["unix:/one", "unix:/two", "unix:/three"]
        stage.pool.remove_executor("unix:/two")
        await settle()
        assert stage.running() == ["unix:/one", "unix:/three"]
        assert not stage.task.done()

    run(scenario)


def test_a_link_that_fails_ends_the_others_with_its_error(run):
    async def scenario(stage: Stage) -> None:
        FakeLink.made[1].failure.set_exception(ZeroDivisionError("a bug"))
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(asyncio.shield(stage.task), 10)
        assert stage.running() == []

    run(scenario)


def test_listeners_hear_whether_any_executor_is_connected(run):
    async def scenario(stage: Stage) -> None:
        one, two = FakeLink.made
        one.connection.on_connected(info_of(CAPACITY), CAPACITY, lambda plan: None)
        await one.on_change(True)
        await two.on_change(False)
        assert stage.states == [True, True]
        one.connection.on_disconnected("gone")
        await one.on_change(False)
        assert stage.states[2:] == [False]

    run(scenario)


def test_removing_the_only_connected_executor_is_heard_of(run):
    async def scenario(stage: Stage) -> None:
        one, _ = FakeLink.made
        one.connection.on_connected(info_of(CAPACITY), CAPACITY, lambda plan: None)
        stage.pool.remove_executor("unix:/one")
        await settle()
        assert stage.states == [False]

    run(scenario)


def test_what_links_count_is_shown_for_the_executors_that_are_there(run):
    async def scenario(stage: Stage) -> None:
        def plans() -> dict[str, float]:
            return {
                sample.labels["executor"]: sample.value
                for family in stage.metrics.registry.collect()
                for sample in family.samples
                if sample.name == "nanovllm_plans_total"
            }

        for number, link in enumerate(FakeLink.made, start=1):
            link.counts.num_plans = number
        assert plans() == {"unix:/one": 1, "unix:/two": 2}
        stage.pool.remove_executor("unix:/two")
        assert plans() == {"unix:/one": 1}
        stage.pool.add_executor("unix:/two")
        assert plans() == {"unix:/one": 1, "unix:/two": 0}
        # The link that was stopped may not have noticed yet.
        FakeLink.made[1].counts.num_plans += 1
        assert plans() == {"unix:/one": 1, "unix:/two": 0}

    run(scenario)
