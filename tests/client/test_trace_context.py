"""What the client sends of its caller's trace."""

import asyncio
import subprocess
import sys

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span

from nanovllm import AsyncClient, Client
from nanovllm.trace_context import trace_metadata
from tests.client.fake_server import FakeServer

TRACER = TracerProvider(shutdown_on_exit=False).get_tracer("test")


def traceparent(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def test_without_a_current_span_nothing_is_sent(server: FakeServer):
    assert trace_metadata() == ()
    with Client(server.address) as client:
        client.generate("a")
    assert "traceparent" not in server.service.metadata[-1]


def test_the_client_sends_the_span_that_is_current_when_a_request_starts(server: FakeServer):
    with Client(server.address) as client:
        with TRACER.start_as_current_span("caller") as span:
            stream = client.stream("a")
        list(stream)
    assert server.service.metadata[-1]["traceparent"] == traceparent(span)


def test_the_asyncio_client_sends_the_span_of_each_task(server: FakeServer):
    async def generate(client: AsyncClient, name: str) -> str:
        with TRACER.start_as_current_span(name) as span:
            await client.generate("a")
            return traceparent(span)

    async def main() -> list[str]:
        async with AsyncClient(server.address) as client:
            return await asyncio.gather(*(generate(client, name) for name in "abc"))

    expected = asyncio.run(main())
    assert len(set(expected)) == 3
    assert {metadata["traceparent"] for metadata in server.service.metadata} == set(expected)


def test_the_client_does_not_load_opentelemetry_by_itself():
    program = (
        "import sys, nanovllm, nanovllm.trace_context as t\n"
        "assert t.trace_metadata() == ()\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
