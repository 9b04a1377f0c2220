"""Who may call, and what callers can see of each other."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from nanovllm import AsyncClient, AuthenticationError, Client
from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.access import auth
from scheduler_service.access.caller import Caller, authenticated_by_token, caller_of
from scheduler_service.access.security import Security
from scheduler_service.access.tenancy import Tenancy
from scheduler_service.telemetry import log_budget
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler_service.serving import Service, failure, read_all, served, until
from tests.security.callers import ALICE, BOB, bearer, request, with_tokens

Scenario = Callable[[Service], Awaitable[None]]


@pytest.fixture
def serve(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario against a service."""

    def run(scenario: Scenario, security: Security | None, **options: bool) -> None:
        async def main() -> None:
            address = f"unix:{tmp_path}/scheduler.sock"
            async with served(tokenizer, address, security=security, **options) as service:
                await scenario(service)

        asyncio.run(main())

    return run


def metadata(*values: str) -> tuple[tuple[str, str], ...]:
    return tuple(("authorization", value) for value in values)


def test_calls_without_a_known_token_are_refused(serve, tmp_path: Path):
    async def scenario(service: Service):
        for headers, message in (
            ((), "send a token in the header"),
            (metadata(ALICE), "send a token"),
            (metadata(f"Basic {ALICE}"), "send a token"),
            (metadata("Bearer "), "send a token"),
            (metadata(f"Bearer {ALICE}", f"Bearer {BOB}"), "send a token"),
            (bearer("c" * 32), "this token is not known"),
            (bearer(ALICE + " "), "this token is not known"),
        ):
            for call in (
                service.stub.Generate(request(), metadata=headers),
                service.stub.GenerateMany(many(request()), metadata=headers),
                service.stub.GetServerStatus(pb.GetServerStatusRequest(), metadata=headers),
                service.stub.Abort(pb.AbortRequest(request_id="x"), metadata=headers),
            ):
                error = await failure(call)
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED, headers
                assert message in (error.details() or ""), headers
        for headers in (bearer(ALICE), bearer(BOB), metadata(f"bearer {ALICE}")):
            responses = await read_all(service.stub.Generate(request(), metadata=headers))
            assert responses[-1].finish_reason == pb.FINISH_REASON_LENGTH
            messages = await read_all(service.stub.GenerateMany(many(request()), metadata=headers))
            last = messages[-1].responses[-1]
            assert (last.number, last.is_last) == (1, True)
            assert last.response.finish_reason == pb.FINISH_REASON_LENGTH

    serve(scenario, with_tokens(tmp_path))


def many(*requests: pb.GenerateRequest) -> Iterator[pb.GenerateManyRequest]:
    """The messages of a call of GenerateMany with these requests."""
    for number, each in enumerate(requests, 1):
        start = pb.NumberedRequest(number=number, request=each)
        yield pb.GenerateManyRequest(starts=[start])


def test_requests_of_a_shared_call_belong_to_the_owner_of_its_token(serve, tmp_path: Path):
    async def scenario(service: Service):
        async with (
            AsyncClient(service.address, token=ALICE, share_call=True) as alice,
            AsyncClient(service.address, token=BOB, share_call=True) as bob,
            AsyncClient(service.address, share_call=True) as stranger,
        ):
            with pytest.raises(AuthenticationError, match="send a token"):
                await stranger.generate([1, 2, 3])
            waiting = alice.stream([1, 2, 3], request_id="mine")
            await until(lambda: len(service.harness.engine._requests) == 1)
            assert not await bob.abort("mine")
            # Bob's request has the same id, and another space of ids.
            other = bob.stream([1, 2, 3], request_id="mine")
            await until(lambda: len(service.harness.engine._requests) == 2)
            assert {key.owner for key in service.harness.engine._requests} == {
                "token:alice",
                "token:bob",
            }
            assert await alice.abort("mine")
            assert [delta.finish_reason async for delta in waiting] == ["abort"]
            other.close()

    serve(scenario, with_tokens(tmp_path), connect=False)


def test_who_tries_without_a_known_token_is_logged_and_the_tokens_are_not(
    serve, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # As long as the test takes, however slow the machine is.
    monkeypatch.setattr(log_budget, "_WINDOW_S", 3600.0)
    security = with_tokens(tmp_path)
    interceptor = security.interceptors[-1]
    assert isinstance(interceptor, auth.TokenInterceptor)
    wrong = "w" * 32

    def lines() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == auth.__name__]

    async def scenario(service: Service):
        for headers in ((), *[bearer(wrong)] * 20):
            await failure(
                service.stub.GetServerStatus(pb.GetServerStatusRequest(), metadata=headers)
            )
        interceptor._budget.close()

    serve(scenario, security)
    first, second, *others, rest = (record.fields for record in lines())
    assert len(others) == 8
    method = "/nanovllm.v1.InferenceService/GetServerStatus"
    assert first == {"caller": "unix", "reason": "no_token", "method": method}
    assert second["reason"] == "unknown_token"
    assert rest == {"unknown_token": 11}
    assert wrong not in str([record.__dict__ for record in lines()])


def test_a_refused_call_is_answered_before_its_request_is_sent(serve, tmp_path: Path):
    async def scenario(service: Service):
        # A client of a streaming kind that never sends its message would hold up a server that
        # reads first.
        async with grpc.aio.insecure_channel(service.address) as channel:
            call = channel.stream_stream("/nanovllm.v1.InferenceService/Generate")()
            async with asyncio.timeout(20):
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    serve(scenario, with_tokens(tmp_path))


def test_clients_send_their_token_with_every_call(serve, tmp_path: Path):
    async def scenario(service: Service):
        async with AsyncClient(service.address, token=ALICE) as client:
            output = await client.generate([1, 2, 3])
            assert output.token_ids
            assert (await client.model_info()).model_name == "tiny"

        def synchronous() -> None:
            with Client(service.address, token=BOB) as client:
                assert client.generate([1, 2, 3]).token_ids
                assert not client.abort("nothing")
            with Client(service.address) as stranger:
                with pytest.raises(AuthenticationError, match="send a token"):
                    stranger.generate([1, 2, 3])
                with pytest.raises(AuthenticationError, match="send a token"):
                    stranger.model_info()

        await asyncio.to_thread(synchronous)

    serve(scenario, with_tokens(tmp_path))


def test_health_is_open_and_reflection_is_not(tmp_path: Path):
    async def main() -> None:
        server = grpc.aio.server(interceptors=with_tokens(tmp_path).interceptors)
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        reflection.enable_server_reflection((reflection.SERVICE_NAME,), server)
        address = f"unix:{tmp_path}/s.sock"
        server.add_insecure_port(address)
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest()
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            ask = [reflection_pb2.ServerReflectionRequest(list_services="")]
            error = await failure(stub.ServerReflectionInfo(iter(ask)))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            (listing,) = await read_all(
                stub.ServerReflectionInfo(iter(ask), metadata=bearer(ALICE))
            )
            assert listing.list_services_response.service[0].name == reflection.SERVICE_NAME
        await server.stop(None)

    asyncio.run(main())


async def num_cached(service: Service, token: str | None, salt: str = "") -> int:
    headers = bearer(token) if token else ()
    call = service.stub.Generate(request(cache_salt=salt), metadata=headers)
    return (await read_all(call))[-1].usage.cached_tokens


def test_tenants_do_not_share_cached_prefixes(serve, tmp_path: Path):
    async def scenario(service: Service):
        assert await num_cached(service, ALICE) == 0
        assert await num_cached(service, ALICE) == 8
        # Neither with the same salt nor by naming another tenant.
        assert await num_cached(service, BOB) == 0
        assert await num_cached(service, BOB, "token:alice") == 0
        assert await num_cached(service, ALICE, "salt") == 0
        assert await num_cached(service, ALICE, "salt") == 8

    serve(scenario, with_tokens(tmp_path))


def test_tenants_share_cached_prefixes_if_the_operator_says_so(serve, tmp_path: Path):
    async def scenario(service: Service):
        assert await num_cached(service, ALICE) == 0
        assert await num_cached(service, BOB) == 8

    serve(scenario, with_tokens(tmp_path, "--shared-prefix-cache"))


def test_without_authentication_everybody_shares(serve):
    async def scenario(service: Service):
        assert await num_cached(service, None) == 0
        assert await num_cached(service, None) == 8

    serve(scenario, None)


def test_a_tenant_neither_sees_nor_ends_the_requests_of_another(serve, tmp_path: Path):
    async def scenario(service: Service):
        engine = service.harness.engine
        abort = pb.AbortRequest(request_id="mine")
        alice = service.stub.Generate(request("mine"), metadata=bearer(ALICE))
        await until(lambda: len(engine.live_requests()) == 1)
        assert not (await service.stub.Abort(abort, metadata=bearer(BOB))).aborted
        # The same id is free for others, and theirs alone to end.
        bob = asyncio.create_task(
            read_all(service.stub.Generate(request("mine"), metadata=bearer(BOB)))
        )
        await until(lambda: len(engine.live_requests()) == 2)
        again = await failure(service.stub.Generate(request("mine"), metadata=bearer(ALICE)))
        assert again.code() is grpc.StatusCode.ALREADY_EXISTS
        assert (await service.stub.Abort(abort, metadata=bearer(BOB))).aborted
        assert (await bob)[-1].finish_reason == pb.FINISH_REASON_ABORT
        service.harness.connect()
        assert (await read_all(alice))[-1].finish_reason == pb.FINISH_REASON_LENGTH

    # Without an executor requests stay where they are.
    serve(scenario, with_tokens(tmp_path), connect=False)


def test_salts_of_tenants_differ_between_processes_and_cannot_be_put_together_by_hand():
    alice, bob = Caller("token:alice", True), Caller("token:bob", True)
    tenancy = Tenancy()
    assert tenancy.cache_salt(alice, "x") == tenancy.cache_salt(alice, "x")
    salts = {
        tenancy.cache_salt(alice, "x"),
        tenancy.cache_salt(bob, "x"),
        tenancy.cache_salt(alice, ""),
        Tenancy().cache_salt(alice, "x"),
        # A longer name and a shorter salt are not the same thing.
        tenancy.cache_salt(Caller("token:alic", True), "ex"),
    }
    assert len(salts) == 5
    assert tenancy.cache_salt(Caller("127.0.0.1"), "x") == "x"
    assert tenancy.owner_of(Caller("127.0.0.1")) == ""
    assert tenancy.owner_of(alice) == "token:alice"


@pytest.mark.parametrize(
    ("peer", "auth", "expected"),
    [
        ("unix:", {}, Caller("unix")),
        ("unix:/tmp/s", {}, Caller("unix")),
        ("ipv4:10.0.0.5:41000", {}, Caller("10.0.0.5")),
        ("ipv6:%5Bfe80::1%5D:41000", {}, Caller("fe80::1")),
        (
            "ipv4:10.0.0.5:41000",
            {"x509_subject_alternative_name": [b"b.example", b"a.example"]},
            Caller("certificate:a.example,b.example", True),
        ),
        (
            "ipv4:10.0.0.5:41000",
            {"x509_subject": [b"CN=alice,O=org"], "x509_common_name": [b"alice"]},
            Caller("certificate:CN=alice,O=org", True),
        ),
        ("ipv4:10.0.0.5:41000", {"transport_security_type": [b"ssl"]}, Caller("10.0.0.5")),
    ],
)
def test_a_caller_is_known_by_certificate_or_else_by_address(peer: str, auth, expected: Caller):
    context = SimpleNamespace(peer=lambda: peer, auth_context=lambda: auth)
    assert caller_of(context) == expected
    with authenticated_by_token("alice"):
        assert caller_of(context) == Caller("token:alice", True)
    assert caller_of(context) == expected
