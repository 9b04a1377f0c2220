"""Bounds on what one connection or call may carry, whatever it is for."""

import asyncio
from pathlib import Path

import grpc
import pytest

from nanovllm.channel import MAX_MESSAGE_BYTES
from nanovllm.service_settings import (
    EXECUTOR_SERVER_OPTIONS,
    MAX_CALLS_PER_CONNECTION,
    MAX_METADATA_BYTES,
    SERVER_OPTIONS,
)
from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler_service.serving import Service, failure, served


def test_headers_and_messages_that_are_too_large_are_refused(tokenizer: Tokenizer, tmp_path: Path):
    async def scenario(service: Service) -> None:
        status = pb.GetServerStatusRequest()
        await service.stub.GetServerStatus(status, metadata=(("x", "a" * 1024),))
        error = await failure(
            service.stub.GetServerStatus(status, metadata=(("x", "a" * MAX_METADATA_BYTES),))
        )
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with grpc.aio.insecure_channel(
            service.address, [("grpc.max_send_message_length", -1)]
        ) as channel:
            send = channel.unary_unary("/nanovllm.v1.InferenceService/Tokenize")
            error = await failure(send(b"\x0a" * (MAX_MESSAGE_BYTES + 1), timeout=60))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # The service goes on.
        await service.stub.GetServerStatus(status)

    async def main() -> None:
        address = f"unix:{tmp_path}/scheduler.sock"
        async with served(tokenizer, address, server_options=SERVER_OPTIONS) as service:
            await scenario(service)

    asyncio.run(main())


@pytest.mark.parametrize("options", [SERVER_OPTIONS, EXECUTOR_SERVER_OPTIONS])
def test_both_services_bound_the_calls_of_a_connection(options: list[tuple[str, int]]):
    limit = dict(options)["grpc.max_concurrent_streams"]
    assert 0 < limit <= MAX_CALLS_PER_CONNECTION


def test_no_more_calls_of_a_connection_run_than_the_limit_allows(tmp_path: Path):
    async def main() -> None:
        go_on = asyncio.Event()
        num_running = most_running = 0

        async def wait(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            nonlocal num_running, most_running
            num_running += 1
            most_running = max(most_running, num_running)
            await go_on.wait()
            num_running -= 1
            return b""

        options = dict(SERVER_OPTIONS) | {"grpc.max_concurrent_streams": 2}
        server = grpc.aio.server(options=list(options.items()))
        handlers = {"Wait": grpc.unary_unary_rpc_method_handler(wait)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
        server.add_insecure_port(f"unix:{tmp_path}/s")
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
            call = channel.unary_unary("/t.T/Wait")
            calls = [asyncio.ensure_future(call(b"", timeout=30)) for _ in range(5)]
            async with asyncio.timeout(20):
                while num_running < 2:
                    await asyncio.sleep(0)
            go_on.set()
            # The others wait for their turn or are refused, as gRPC likes.
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert outcomes.count(b"") >= 2
        assert most_running == 2
        await server.stop(None)

    asyncio.run(main())
