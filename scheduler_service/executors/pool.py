"""The executors of this process: their sessions, their comings and goings, and their plans.

Everything here runs on the engine's event loop. Which sequence belongs where is the fleet's to
decide; the pool does it when something happens and makes the plans that follow.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Protocol

from scheduler_service.errors import NoExecutorError
from scheduler_service.executors.connection import Connection
from scheduler_service.executors.description import ExecutorDescription
from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.load import FleetLoad
from scheduler_service.executors.member import Member
from scheduler_service.plan import StepResult
from scheduler_service.router import RoutingPolicy
from scheduler_service.scheduler import ExecutorCapacity, SchedulerPolicy
from scheduler_service.sequence import FinishReason
from scheduler_service.sequence import Sequence as LiveSequence

# What a client should wait before it asks again: somebody who drained everything is at work.
_RETRY_AFTER_S = 1.0


class ExecutorChangeError(Exception):
    """The executors cannot be changed as asked; the message says why."""


class ExecutorKnownError(ExecutorChangeError):
    """There is an executor of this address already."""


class UnknownExecutorError(ExecutorChangeError):
    """There is no executor of this address."""


class LastExecutorError(ExecutorChangeError):
    """Without this executor nobody would take sequences."""


class PoolListener(Protocol):
    """The owner of the requests, who is told before sequences are moved."""

    def on_limits_changed(self, unsettled: Sequence[LiveSequence]) -> None:
        """Other executors than before take sequences; `unsettled` wait for a place with them."""

    def on_displaced(self, seqs: Sequence[LiveSequence], *, is_loss: bool) -> None:
        """Sequences lost their slots and wait again; a loss is nobody's wish."""

    def on_results(self, member: Member, results: Iterable[StepResult]) -> None:
        """Results arrived, in order. Raises ExecutorProtocolError."""

    def on_stranded(self, seqs: Sequence[LiveSequence], error: NoExecutorError | None) -> None:
        """Nobody will run these sequences; None: because no executor is large enough."""

    def on_planned(self) -> None:
        """Plans were made."""


class Links(Protocol):
    """Who keeps the sessions open."""

    def start(self, connection: Connection) -> None:
        """An executor joined."""

    def stop(self, connection: Connection) -> None:
        """An executor left."""


class ExecutorPool:
    """Owns the fleet. Must be given a listener before anything happens."""

    def __init__(
        self, policy: SchedulerPolicy, routing: RoutingPolicy, wait_timeout_s: float
    ) -> None:
        self.fleet = Fleet(policy, routing)
        self.load = FleetLoad(self.fleet)
        self.listener: PoolListener | None = None
        #: None: whoever uses the pool opens sessions by itself.
        self.links: Links | None = None
        self._wait_timeout_s = wait_timeout_s
        self._connections: dict[str, Connection] = {}
        self._is_started = False
        self._to_plan: set[Connection] = set()

    def start(self) -> None:
        """Starts the clocks on the first connections."""
        self._is_started = True
        for connection in self._connections.values():
            connection.absence.begin()

    # Members

    def add_executor(self, address: str) -> Connection:
        """An executor joins; it gets sequences once it is connected. Raises ExecutorKnownError."""
        if address in self._connections:
            raise ExecutorKnownError(f"executor {address} is there already")
        connection = Connection(self.fleet.join(address), self, self._wait_timeout_s)
        self._connections[address] = connection
        if self._is_started:
            connection.absence.begin()
        if self.links is not None:
            self.links.start(connection)
        return connection

    def drain_executor(self, address: str) -> None:
        """Sends it nothing new; what runs there goes on. Raises UnknownExecutorError."""
        self._connection(address).member.is_draining = True
        self._settle()

    def undrain_executor(self, address: str) -> None:
        """Sends it sequences again. Raises UnknownExecutorError."""
        connection = self._connection(address)
        connection.member.is_draining = False
        self._settle()
        self.fleet.fill(connection.member)
        self._plan_all()

    def remove_executor(self, address: str) -> None:
        """An executor leaves at once; others go on with what ran there, or it fails.

        Raises UnknownExecutorError, and LastExecutorError rather than leave nobody who takes
        sequences.
        """
        connection = self._connection(address)
        others = [each for each in self._connections.values() if each is not connection]
        staying = [each for each in others if not each.member.is_draining]
        if connection.member.is_connected:
            # What runs here would fail at once if those who stay are given up; see `refusal`.
            staying = [each for each in staying if not each.absence.is_too_long]
        if not staying:
            raise LastExecutorError(
                f"without executor {address} nobody would take sequences; add another one first, "
                "or undrain one, and wait until it is connected"
            )
        connection.close()
        displaced = self.fleet.on_lost(connection.member)
        self._told.on_displaced(displaced, is_loss=False)
        self.fleet.leave(connection.member)
        del self._connections[address]
        if self.links is not None:
            self.links.stop(connection)
        self._told.on_limits_changed(self.fleet.lobby.waiting())
        self._settle()

    def connections(self) -> list[Connection]:
        """The connections to all executors, in the order in which they joined."""
        return list(self._connections.values())

    def executors(self) -> list[ExecutorDescription]:
        """Describes every executor, in the order in which they joined."""
        return [ExecutorDescription.of(connection) for connection in self._connections.values()]

    def refusal(self) -> NoExecutorError | None:
        """What new requests are told while there is nobody to wait for; None: they may come."""
        staying = [each for each in self._connections.values() if not each.member.is_draining]
        if not staying:
            return NoExecutorError("every executor is drained", _RETRY_AFTER_S)
        if not all(connection.absence.is_too_long for connection in staying):
            return None
        return staying[0].absence.error(*(each.absence.problem for each in staying[1:]))

    # Sequences

    def fits(self, seq: LiveSequence) -> bool:
        """Whether an executor could hold the sequence at its full length."""
        return self.fleet.fits(seq)

    def add(self, seqs: Sequence[LiveSequence]) -> None:
        """Queues the sequences of a new request."""
        self.fleet.add(seqs)
        for seq in seqs:
            self._plan_soon(self.fleet.member_of(seq))

    def finish(self, seq: LiveSequence, reason: FinishReason) -> None:
        """Ends a sequence in any state. Repeating it does nothing."""
        self.fleet.finish(seq, reason)
        self._plan_soon(self.fleet.member_of(seq))

    def drop_prefixes(self) -> int:
        """Forgets the cached prefixes that no sequence uses; returns how many blocks that frees."""
        return sum(blocks.drop_cache() for blocks in self.load.blocks)

    # What connections tell

    def on_connected(self, connection: Connection, capacity: ExecutorCapacity) -> None:
        """A session is open: all slots are free, the cache is empty."""
        member = connection.member
        member.scheduler.attach(capacity)
        unsettled = [*self.fleet.lobby.waiting(), *member.scheduler.waiting()]
        self._told.on_limits_changed(unsettled)
        self._settle(member)
        self.fleet.fill(member)
        self._plan_all()

    def on_lost(self, connection: Connection) -> None:
        """A session is over: what ran there goes on elsewhere at once, if it can."""
        self._told.on_displaced(self.fleet.on_lost(connection.member), is_loss=True)
        self._settle()

    def on_results(self, connection: Connection, results: Iterable[StepResult]) -> None:
        """Results arrived, in order. Raises ExecutorProtocolError."""
        self._told.on_results(connection.member, results)
        self._plan(connection)

    def on_absent_for_too_long(self, connection: Connection) -> None:
        """Ends what waits for this executor, and for any at all if it was the last to hope for."""
        scheduler = connection.member.scheduler
        self._told.on_limits_changed(scheduler.waiting())
        self._settle()
        self._told.on_stranded(scheduler.waiting(), connection.absence.error())

    @property
    def _told(self) -> PoolListener:
        if self.listener is None:
            raise RuntimeError("the pool has no listener yet")
        return self.listener

    def _connection(self, address: str) -> Connection:
        connection = self._connections.get(address)
        if connection is None:
            raise UnknownExecutorError(
                f"there is no executor {address}; there are {', '.join(self._connections)}"
            )
        return connection

    def _settle(self, changed: Member | None = None) -> None:
        hopeless = self.fleet.settle(changed)
        if hopeless:
            self._told.on_stranded(hopeless, None)
        refusal = self.refusal()
        if refusal is not None:
            self._told.on_stranded(self.fleet.lobby.waiting(), refusal)
        self._plan_all()

    # Planning

    def _plan_all(self) -> None:
        for member in self.fleet.members:
            self._plan_soon(member)

    def _plan_soon(self, member: Member | None) -> None:
        """Plans once after everything that arrived in this turn of the event loop."""
        if member is None or not member.is_connected:
            return
        if not self._to_plan:
            asyncio.get_running_loop().call_soon(self._plan_now)
        self._to_plan.add(self._connections[member.address])

    def _plan_now(self) -> None:
        connections, self._to_plan = self._to_plan, set()
        for connection in connections:
            self._plan(connection)

    def _plan(self, connection: Connection) -> None:
        connection.send_plans()
        self._told.on_planned()
