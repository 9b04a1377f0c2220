"""What clients learn of failures inside: a reference, and nothing that the failure says."""

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from executor_service.error_guard import ErrorGuard as ExecutorErrorGuard
from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.access.interception import ErrorGuard, refusal

SECRET = "/srv/models/private"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class SecretError(Exception):
    """Its text is nobody's business."""


def method(function: Callable[..., Any], kind: str) -> Any:
    return getattr(grpc, f"{kind}_rpc_method_handler")(
        function,
        request_deserializer=pb.AbortRequest.FromString,
        response_serializer=pb.AbortResponse.SerializeToString,
    )


async def fail(request: Any, context: Any) -> Any:
    raise SecretError(SECRET)


async def fail_midway(request: Any, context: Any) -> Any:
    yield pb.AbortResponse(aborted=True)
    raise SecretError(SECRET)


async def abort(request: Any, context: Any) -> Any:
    await context.abort(grpc.StatusCode.NOT_FOUND, "said on purpose")


Ask = Callable[..., Any]


def run(
    address: str, handlers: dict[str, Any], scenario: Callable[[Ask], Any], *guards: Any
) -> None:
    """Gives a scenario a function that calls a method: number of responses, code and details."""

    async def main() -> None:
        server = grpc.aio.server(interceptors=guards)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
        server.add_insecure_port(address)
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:

            async def ask(name: str, data: bytes = b"") -> tuple[int, grpc.StatusCode, str]:
                stream = channel.unary_stream(f"/t.T/{name}")(data, timeout=20)
                num_responses = 0
                try:
                    async for _ in stream:
                        num_responses += 1
                except grpc.aio.AioRpcError as error:
                    return num_responses, error.code(), error.details() or ""
                return num_responses, grpc.StatusCode.OK, ""

            await scenario(ask)
        await server.stop(None)

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_an_unexpected_exception_is_logged_under_the_reference_that_the_client_gets(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async def scenario(ask: Ask) -> None:
        _, code, details = await ask("Fail")
        assert code is grpc.StatusCode.INTERNAL
        assert SECRET not in details
        assert "SecretError" not in details
        reference = re.fullmatch(r".* reference ([0-9a-f]{8})", details)
        assert reference is not None
        (record,) = [item for item in caplog.records if item.name.endswith("interception")]
        assert record.fields == {"method": "/t.T/Fail", "reference": reference[1]}
        assert record.exc_info is not None
        assert record.exc_info[0] is SecretError

    run(f"unix:{tmp_path}/s", {"Fail": method(fail, kind)}, scenario, ErrorGuard())


def test_what_was_sent_before_a_failure_arrives(tmp_path: Path):
    async def scenario(ask: Ask) -> None:
        responses, code, _ = await ask("Fail")
        assert (responses, code) == (1, grpc.StatusCode.INTERNAL)

    handlers = {"Fail": method(fail_midway, "unary_stream")}
    run(f"unix:{tmp_path}/s", handlers, scenario, ErrorGuard())


@pytest.mark.parametrize("kind", KINDS)
def test_a_status_that_a_handler_chose_is_left_alone(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async def scenario(ask: Ask) -> None:
        _, code, details = await ask("Abort")
        assert (code, details) == (grpc.StatusCode.NOT_FOUND, "said on purpose")
        assert not [item for item in caplog.records if item.levelno >= logging.ERROR]

    run(f"unix:{tmp_path}/s", {"Abort": method(abort, kind)}, scenario, ErrorGuard())


@pytest.mark.parametrize("kind", ["stream_unary", "stream_stream"])
def test_bytes_that_are_no_message_end_a_stream_of_requests(kind: str, tmp_path: Path):
    async def count(requests: Any, context: Any) -> Any:
        async for _ in requests:
            pass
        raise SecretError(SECRET)

    async def scenario(ask: Ask) -> None:
        _, code, details = await ask("Count", b"\xff\xff\xff")
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details == "the request is no valid message of this method"
        assert (await ask("Count", b""))[1] is grpc.StatusCode.INTERNAL

    run(f"unix:{tmp_path}/s", {"Count": method(count, kind)}, scenario, ErrorGuard())


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
def test_bytes_that_are_no_message_are_an_invalid_argument(kind: str, tmp_path: Path):
    async def scenario(ask: Ask) -> None:
        _, code, details = await ask("Fail", b"\xff\xff\xff")
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details == "the request is no valid message of this method"

    run(f"unix:{tmp_path}/s", {"Fail": method(fail, kind)}, scenario, ErrorGuard())


def test_a_method_that_does_not_exist_stays_unimplemented(tmp_path: Path):
    async def scenario(ask: Ask) -> None:
        assert (await ask("Nothing"))[1] is grpc.StatusCode.UNIMPLEMENTED

    run(f"unix:{tmp_path}/s", {"Fail": method(fail, "unary_unary")}, scenario, ErrorGuard())


@pytest.mark.parametrize("kind", KINDS)
def test_the_executor_keeps_its_failures_to_itself_too(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def fail_now(request: Any, context: grpc.ServicerContext) -> Any:
        raise SecretError(SECRET)

    def abort_now(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.NOT_FOUND, "said on purpose")

    handlers = {"Fail": method(fail_now, kind), "Abort": method(abort_now, kind)}
    server = grpc.server(ThreadPoolExecutor(2), interceptors=(ExecutorErrorGuard(),))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
    server.add_insecure_port(f"unix:{tmp_path}/s")
    server.start()
    try:
        with grpc.insecure_channel(f"unix:{tmp_path}/s") as channel:

            def ask(name: str) -> tuple[grpc.StatusCode, str]:
                with pytest.raises(grpc.RpcError) as caught:
                    list(channel.unary_stream(f"/t.T/{name}")(b"", timeout=20))
                assert isinstance(caught.value, grpc.Call)
                return caught.value.code(), caught.value.details() or ""

            code, details = ask("Fail")
            assert code is grpc.StatusCode.INTERNAL
            assert SECRET not in details
            assert ask("Abort") == (grpc.StatusCode.NOT_FOUND, "said on purpose")
    finally:
        server.stop(None).wait()
    (record,) = [item for item in caplog.records if item.name.endswith("error_guard")]
    assert record.fields["reference"] in details


@pytest.mark.parametrize("kind", ["stream_unary", "stream_stream"])
def test_a_call_that_its_peer_cancels_is_no_failure_of_the_executor(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    reading, ended = threading.Event(), []

    def read(requests: Any, context: grpc.ServicerContext) -> Any:
        reading.set()
        try:
            next(requests)
        except grpc.RpcError:
            ended.append(context.is_active())
            raise

    handlers = {"Read": method(read, kind)}
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads, interceptors=(ExecutorErrorGuard(),))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
        server.add_insecure_port(f"unix:{tmp_path}/s")
        server.start()
        silence = threading.Event()
        with grpc.insecure_channel(f"unix:{tmp_path}/s") as channel:
            call = channel.stream_stream("/t.T/Read")(_silent(silence), timeout=20)
            assert reading.wait(20)
            call.cancel()
        silence.set()
        server.stop(None).wait()
    # The threads have ended, so whatever they log is there.
    assert ended == [False]
    assert not [item for item in caplog.records if item.name.endswith("error_guard")]


def _silent(until: threading.Event) -> Iterator[bytes]:
    """Requests of a peer that sends none."""
    until.wait(20)
    yield from ()


def test_a_refusal_fits_calls_of_every_kind(tmp_path: Path):
    async def scenario(ask: Ask) -> None:
        assert await ask("No", b"x") == (0, grpc.StatusCode.UNAUTHENTICATED, "no")

    handlers = {"No": refusal(grpc.StatusCode.UNAUTHENTICATED, "no")}
    run(f"unix:{tmp_path}/s", handlers, scenario)
