"""An OTLP receiver in a process of its own that counts spans and keeps none."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass
class _CountingService(trace_service_pb2_grpc.TraceServiceServicer):
    num_spans: int = 0

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Takes in a batch."""
        self.num_spans += sum(
            len(scope.spans)
            for resource in request.resource_spans
            for scope in resource.scope_spans
        )
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass(frozen=True, slots=True)
class TraceReceiver:
    """The running receiver."""

    endpoint: str
    _connection: Connection

    def num_spans(self) -> int:
        """Spans that came so far."""
        self._connection.send("count")
        count: int = self._connection.recv()
        return count


@contextmanager
def running_receiver() -> Iterator[TraceReceiver]:
    """Starts the receiver on a free loopback port and ends it."""
    # Not forked: gRPC may have threads here already.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield TraceReceiver(f"http://127.0.0.1:{ours.recv()}", ours)
    finally:
        process.terminate()
        process.join()


def _serve(connection: Connection) -> None:
    service = _CountingService()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection.send(port)
    while connection.recv():
        connection.send(service.num_spans)
