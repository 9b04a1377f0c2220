"""The admin service: what an administrator sees and can do."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2

from nanovllm.admin import AdminClient, LiveRequest, LogLevel, SchedulerState, SequenceState
from nanovllm.cli import main as nanovllm_command
from nanovllm.cli.admin import format_state
from nanovllm.errors import AuthenticationError, InvalidRequestError
from nanovllm.v1 import admin_pb2_grpc
from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.access.security import Security
from scheduler_service.admin import AdminServicer
from scheduler_service.serving_state import ServingState
from scheduler_service.settings import SchedulerSettings
from tests.scheduler_service.serving import (
    Service,
    failure,
    retry_after_s,
    until,
)
from tests.security.callers import ALICE, BOB, bearer, request, start


@pytest.fixture
def root_level() -> Iterator[None]:
    """The level of this process's logs is put back."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def test_live_requests_are_listed_with_their_callers(administer):
    async def scenario(service: Service, admin: AdminClient, _: ServingState):
        assert (await asyncio.to_thread(admin.state)).requests == ()
        alice = start(service, ALICE, "one")
        await until(lambda: len(service.harness.engine.live_requests()) == 1)
        bob = start(service, BOB, "two")
        await until(lambda: len(service.harness.engine.live_requests()) == 2)
        state = await asyncio.to_thread(admin.state)
        assert not state.draining
        assert [(item.request_id, item.caller) for item in state.requests] == [
            ("one", "token:alice"),
            ("two", "token:bob"),
        ]
        (sequence,) = state.requests[0].sequences
        assert (sequence.prompt_tokens, sequence.output_tokens) == (12, 0)
        assert sequence.state is SequenceState.WAITING
        assert state.requests[0].age_s >= state.requests[1].age_s >= 0
        service.harness.connect()
        await asyncio.gather(alice, bob)

    administer(scenario, connect=False)


def test_an_administrator_ends_the_requests_of_one_caller_or_of_all(administer):
    async def scenario(service: Service, admin: AdminClient, _: ServingState):
        tasks = [start(service, ALICE, "x"), start(service, BOB, "x"), start(service, BOB, "y")]
        await until(lambda: len(service.harness.engine.live_requests()) == 3)
        assert await asyncio.to_thread(admin.abort, "x", "token:carol") == 0
        assert await asyncio.to_thread(admin.abort, "x", "token:alice") == 1
        assert (await tasks[0])[-1].finish_reason == pb.FINISH_REASON_ABORT
        assert await asyncio.to_thread(admin.abort, "x") == 1
        assert (await tasks[1])[-1].finish_reason == pb.FINISH_REASON_ABORT
        assert await asyncio.to_thread(admin.abort, "y") == 1
        await tasks[2]
        with pytest.raises(InvalidRequestError, match="request_id"):
            await asyncio.to_thread(admin.abort, "")

    administer(scenario, connect=False)


def test_a_drained_server_lets_live_requests_end_and_refuses_new_ones(administer):
    async def scenario(service: Service, admin: AdminClient, serving: ServingState):
        live = start(service, ALICE, "live")
        await until(lambda: len(service.harness.engine.live_requests()) == 1)
        assert await asyncio.to_thread(admin.drain) == 1
        assert (await asyncio.to_thread(admin.state)).draining
        assert await status_of(serving) == health_pb2.HealthCheckResponse.NOT_SERVING
        error = await failure(service.stub.Generate(request(), metadata=bearer(BOB)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert retry_after_s(error) is not None
        service.harness.connect()
        assert (await live)[-1].finish_reason == pb.FINISH_REASON_LENGTH
        # An executor that comes back does not end the drain.
        await serving.set_connected(True)
        assert await status_of(serving) == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.to_thread(admin.undrain)
        assert await status_of(serving) == health_pb2.HealthCheckResponse.SERVING
        assert (await start(service, BOB, ""))[-1].finish_reason == pb.FINISH_REASON_LENGTH

    administer(scenario, connect=False)


async def status_of(serving: ServingState) -> int:
    answer = await serving._health.Check(health_pb2.HealthCheckRequest(), None)
    return answer.status


def test_a_flushed_cache_has_no_hits(administer):
    async def scenario(service: Service, admin: AdminClient, _: ServingState):
        await start(service, ALICE, "")
        assert (await start(service, ALICE, ""))[-1].usage.cached_tokens == 8
        blocks = service.harness.scheduler.blocks
        await until(lambda: blocks.num_owned == 0)
        num_cached = blocks.num_cached
        assert await asyncio.to_thread(admin.flush_prefix_cache) == num_cached > 0
        assert blocks.num_free == blocks.num_blocks
        assert (await start(service, ALICE, ""))[-1].usage.cached_tokens == 0

    administer(scenario)


@pytest.mark.usefixtures("root_level")
def test_the_log_level_changes_at_once(administer):
    async def scenario(service: Service, admin: AdminClient, _: ServingState):
        logging.getLogger().setLevel(logging.WARNING)
        assert await asyncio.to_thread(admin.set_log_level, LogLevel.ERROR) is LogLevel.WARNING
        assert logging.getLogger().level == logging.ERROR
        assert await asyncio.to_thread(admin.set_log_level, LogLevel.INFO) is LogLevel.ERROR

    administer(scenario)


@pytest.mark.usefixtures("root_level")
def test_the_command_does_what_the_service_can(
    administer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    async def command(*arguments: str) -> str:
        address = ["--address", f"unix:{tmp_path}/admin.sock"]
        status = await asyncio.to_thread(nanovllm_command, ["admin", *arguments, *address])
        output = capsys.readouterr()
        return output.out.strip() if status == 0 else f"{status}: {output.err.strip()}"

    async def scenario(service: Service, admin: AdminClient, _: ServingState):
        live = start(service, ALICE, "a\x1b[2Jb")
        await until(lambda: len(service.harness.engine.live_requests()) == 1)
        listing = await command("state")
        assert listing.startswith("taking requests, 1 live\n'a\\x1b[2Jb'  token:alice  ")
        assert listing.endswith(" s  waiting 12+0 tokens")
        assert '"caller": "token:alice"' in await command("state", "--json")
        assert await command("drain") == "draining, 1 requests live"
        assert await command("undrain") == "taking requests"
        assert await command("flush-prefix-cache") == "0 KV blocks freed"
        assert (await command("log-level", "error")).startswith("error, was ")
        assert (
            await command("abort", "nobody") == "1: nanovllm: no live request has the id 'nobody'"
        )
        assert await command("abort", "a\x1b[2Jb") == "1 ended"
        await live

    administer(scenario, connect=False)


def test_names_in_certificates_do_not_steer_the_administrators_terminal():
    live = LiveRequest("one", "certificate:CN=\x1b[2J", age_s=1.0, sequences=())
    assert "\x1b" not in format_state(SchedulerState((live,), draining=False))


def test_tokens_of_callers_are_none_of_an_administrator(tmp_path: Path):
    path = tmp_path / "admin-tokens"
    path.write_text(f"root:{'r' * 32}\n")
    path.chmod(0o600)
    callers = tmp_path / "callers"
    callers.write_text(f"alice:{ALICE}\n")
    callers.chmod(0o600)
    security = Security.of(
        SchedulerSettings.from_arguments(
            ["--admin-tokens-file", str(path), "--auth-tokens-file", str(callers)]
        )
    )

    engine = SimpleNamespace(live_requests=list, reservations=list)

    async def main() -> None:
        server = grpc.aio.server(interceptors=security.admin_interceptors)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(engine, SimpleNamespace(is_draining=True), SchedulerSettings()), server
        )
        address = f"unix:{tmp_path}/admin.sock"
        server.add_insecure_port(address)
        await server.start()

        def ask(token: str | None) -> SchedulerState:
            with AdminClient(address, token=token) as client:
                return client.state()

        for token in (None, ALICE):
            with pytest.raises(AuthenticationError):
                await asyncio.to_thread(ask, token)
        assert (await asyncio.to_thread(ask, "r" * 32)).draining
        await server.stop(None)

    asyncio.run(main())
