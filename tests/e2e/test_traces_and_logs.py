"""Traces and logs of the real processes: one request seen from its client to its last token."""

import json
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.trace import TracerProvider

from nanovllm import Client, InvalidRequestError, SamplingParams
from tests.e2e.support import LIMIT_S, greedy, running_services, wait_until

FORGED = "mine\nINFO forged: \x1b[31mgone"
SECRET = "my secret prompt"


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """A receiver of traces, as a collector is one."""

    spans: "queue.SimpleQueue[trace_pb2.Span]" = field(default_factory=queue.SimpleQueue)
    resources: list[dict[str, str]] = field(default_factory=list)

    def Export(self, request, context):  # noqa: N802
        for resource_spans in request.resource_spans:
            self.resources.append(attributes_of(resource_spans.resource))
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    self.spans.put(span)
        return trace_service_pb2.ExportTraceServiceResponse()

    def take(self, count: int) -> dict[str, trace_pb2.Span]:
        """Waits for spans; returns them by name."""
        spans = [self.spans.get(timeout=LIMIT_S) for _ in range(count)]
        return {span.name: span for span in spans}


def attributes_of(holder) -> dict:
    """Attributes as plain values."""
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in holder.attributes
    }


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[Receiver, str]]:
    service = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"http://127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def observed_client(
    checkpoint: Callable[[str], Path], receiver: tuple[Receiver, str], logs: Path
) -> Iterator[Client]:
    """A client of services that send traces and write JSON."""
    with pytest.MonkeyPatch.context() as environment:
        # Spans are not kept for seconds, and the resource is named as OpenTelemetry has it.
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
        environment.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        with (
            running_services(
                checkpoint("qwen3"),
                logs,
                executor=["--log-format", "json", "--num-kv-blocks", "256"],
                scheduler=["--otlp-endpoint", receiver[1], "--log-format", "json"],
            ) as services,
            Client(services.address) as client,
        ):
            yield client


def lines_of(log: Path, message: str) -> list[dict]:
    """The lines of a JSON log with a message. Fails if any line is no object."""
    found = []
    for line in log.read_text().splitlines():
        # gRPC's C core writes lines of its own.
        if line.startswith("{"):
            found.append(json.loads(line))
    return [line for line in found if line["message"] == message]


def line_of(log: Path, request_id: str) -> dict:
    """Waits for the line of a request that has ended, which comes after its last message."""

    def found() -> list[dict]:
        lines = lines_of(log, "request ended") + lines_of(log, "request refused")
        return [line for line in lines if line.get("request_id") == request_id]

    wait_until(lambda: bool(found()), f"the line of {request_id!r}")
    (line,) = found()
    return line


def test_a_request_is_a_part_of_its_clients_trace(
    observed_client: Client, receiver: tuple[Receiver, str], logs: Path
) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    with tracer.start_as_current_span("caller") as caller:
        observed_client.generate(SECRET, greedy(12), request_id="traced", cache_salt="traced")
    spans = receiver[0].take(4)
    root = spans["nanovllm.request"]
    queued, prefill, decode = spans["queue"], spans["prefill"], spans["decode"]

    context = caller.get_span_context()
    assert {span.trace_id for span in spans.values()} == {context.trace_id.to_bytes(16, "big")}
    assert root.parent_span_id == context.span_id.to_bytes(8, "big")
    assert {s.parent_span_id for s in (queued, prefill, decode)} == {root.span_id}
    assert root.kind == trace_pb2.Span.SPAN_KIND_SERVER

    assert root.start_time_unix_nano <= queued.start_time_unix_nano
    assert queued.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.start_time_unix_nano < decode.end_time_unix_nano <= root.end_time_unix_nano
    assert caller.start_time < root.start_time_unix_nano

    # Twelve tokens of a sequence that was alone: twelve iterations.
    first = attributes_of(prefill)["nanovllm.iteration.first"]
    assert first >= 1
    assert attributes_of(decode)["nanovllm.iteration.last"] == first + 11
    assert attributes_of(prefill)["nanovllm.plan.id"] >= 1
    executor = observed_client.server_status().executor
    assert executor is not None
    assert attributes_of(prefill)["nanovllm.executor.epoch"] == str(executor.epoch)

    usage = attributes_of(root)
    assert usage["gen_ai.usage.input_tokens"] == len(observed_client.tokenize(SECRET))
    assert usage["gen_ai.usage.output_tokens"] == 12
    assert usage["rpc.response.status_code"] == "OK"
    assert receiver[0].resources[-1]["service.name"] == "nanovllm-scheduler"
    assert receiver[0].resources[-1]["deployment.environment.name"] == "test"

    line = line_of(logs / "scheduler.log", "traced")
    assert line["trace_id"] == f"{context.trace_id:032x}"
    assert (line["code"], line["finish_reason"]) == ("OK", "length")
    assert (line["output_tokens"], line["caller"]) == (12, "unix")


def test_a_refused_request_is_an_error_in_the_trace_and_a_line_in_the_log(
    observed_client: Client, receiver: tuple[Receiver, str], logs: Path
) -> None:
    with pytest.raises(InvalidRequestError):
        observed_client.generate(SECRET, SamplingParams(top_p=2.0), request_id="refused")
    root = receiver[0].take(1)["nanovllm.request"]
    assert root.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert attributes_of(root)["rpc.response.status_code"] == "INVALID_ARGUMENT"
    line = line_of(logs / "scheduler.log", "refused")
    assert (line["code"], line["field"]) == ("INVALID_ARGUMENT", "sampling_params.top_p")


def test_a_client_that_leaves_is_seen_as_cancelled(
    observed_client: Client, receiver: tuple[Receiver, str], logs: Path
) -> None:
    with observed_client.stream(SECRET, greedy(2000), request_id="left") as stream:
        next(stream)
    root = receiver[0].take(4)["nanovllm.request"]
    assert attributes_of(root)["rpc.response.status_code"] == "CANCELLED"
    line = line_of(logs / "scheduler.log", "left")
    assert (line["code"], line["finish_reason"]) == ("CANCELLED", "abort")


def test_a_request_id_forges_no_line_and_no_prompt_is_logged(
    observed_client: Client, receiver: tuple[Receiver, str], logs: Path
) -> None:
    observed_client.generate(SECRET, greedy(1), request_id=FORGED)
    receiver[0].take(4)
    assert line_of(logs / "scheduler.log", FORGED)["output_tokens"] == 1
    text = (logs / "scheduler.log").read_text()
    assert "\x1b" not in text
    assert not any(line.startswith("INFO forged") for line in text.splitlines())
    assert "secret" not in text
    assert "secret" not in (logs / "executor.log").read_text()


def test_both_services_say_what_they_are_connected_to(observed_client: Client, logs: Path) -> None:
    (connected,) = lines_of(logs / "scheduler.log", "executor connected")
    (loaded,) = lines_of(logs / "executor.log", "model loaded")
    assert connected["num_blocks"] == loaded["num_blocks"] == 256
    assert loaded["level"] == "info"
    assert loaded["ts"].endswith("Z")
