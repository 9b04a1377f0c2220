"""The public service behind a real gRPC server, with the engine harness as its executor."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from nanovllm.v1 import inference_pb2, inference_pb2_grpc
from scheduler_service.access.interception import ErrorGuard
from scheduler_service.access.security import Security
from scheduler_service.servicer import InferenceServicer
from scheduler_service.text.prompt_encoder import PromptEncoder
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler_service.engine_harness import EngineHarness, settle

LIMIT_S = 30

M = TypeVar("M", bound=Message)


@dataclass
class Service:
    """One running service and a client of it."""

    harness: EngineHarness
    stub: inference_pb2_grpc.InferenceServiceStub
    address: str
    encoder: PromptEncoder
    #: Cleared: the executors stand still.
    iterating: asyncio.Event


@asynccontextmanager
async def served(
    tokenizer: Tokenizer,
    address: str,
    *,
    write_timeout_s: float = 60.0,
    max_pending_bytes: int = 64 << 20,
    server_options: Sequence[tuple[str, Any]] = (),
    security: Security | None = None,
    add_services: Callable[[grpc.aio.Server, EngineHarness, PromptEncoder], None] | None = None,
    **options: Any,
) -> AsyncIterator[Service]:
    """Serves at `address`; the executor iterates by itself. Checks that nothing is left behind.

    `add_services` adds others of the same engine to the server.
    """
    harness = EngineHarness(tokenizer, **options)
    encoder = PromptEncoder(tokenizer, max_pending_bytes=max_pending_bytes)
    server = grpc.aio.server(
        interceptors=security.interceptors if security else (ErrorGuard(),),
        options=server_options,
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(
            harness.engine,
            encoder,
            harness.metrics,
            has_chat_template=True,
            write_timeout_s=write_timeout_s,
            tenancy=security.tenancy if security else None,
        ),
        server,
    )
    if add_services is not None:
        add_services(server, harness, encoder)
    server.add_insecure_port(address)
    await server.start()
    iterating = asyncio.Event()
    iterating.set()
    executor = asyncio.create_task(iterate(harness, iterating))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            yield Service(harness, stub, address, encoder, iterating)
            await until(lambda: not harness.engine._requests)
        finally:
            executor.cancel()
            await server.stop(None)
            encoder.close()
    await settle()
    assert harness.engine._owners == {}
    assert harness.pool.load.num_running == harness.pool.load.num_waiting == 0
    admission = harness.engine.admission
    assert admission.num_reserved == 0
    assert admission._requests_of == {}
    assert admission._response_bytes == 0


async def iterate(harness: EngineHarness, iterating: asyncio.Event) -> None:
    """The executors' loop."""
    while True:
        await iterating.wait()
        await harness.step()


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a state of this process."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call must end in."""
    if hasattr(call, "__aiter__"):
        call = read_all(call)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def read_all(call: Any) -> list[inference_pb2.GenerateResponse]:
    """Every response of a stream."""
    return [response async for response in call]


def retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    """The hint of a refusal, if there is one."""
    hint = detail(error, error_details_pb2.RetryInfo)
    return None if hint is None else hint.retry_delay.ToTimedelta().total_seconds()


def detail(error: grpc.aio.AioRpcError, kind: type[M]) -> M | None:
    """The detail of a kind that an error carries, if it does."""
    status = rpc_status.from_call(
        SimpleNamespace(
            trailing_metadata=error.trailing_metadata, code=error.code, details=error.details
        )
    )
    message = kind()
    for packed in status.details if status is not None else ():
        if packed.Unpack(message):
            return message
    return None
