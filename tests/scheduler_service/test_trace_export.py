"""Where traces go: what the environment decides, what a start refuses, who waits for a receiver."""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from nanovllm.service_settings import StartupError
from scheduler_service.access.caller import Caller
from scheduler_service.server import start_tracing
from scheduler_service.settings import SchedulerSettings
from scheduler_service.telemetry import tracing
from scheduler_service.telemetry.call_record import CallRecord
from scheduler_service.telemetry.trace_export import otlp_provider
from scheduler_service.telemetry.tracing import RequestTracer

ENDPOINT = "http://127.0.0.1:1"


@pytest.fixture
def provider() -> Iterator[Callable[..., TracerProvider]]:
    made = []

    def make(endpoint: str = ENDPOINT) -> TracerProvider:
        made.append(otlp_provider(endpoint))
        return made[-1]

    yield make
    for each in made:
        each.shutdown()


@pytest.mark.parametrize("endpoint", ["localhost:4317", "collector", "http://", "ftp://host:1", ""])
def test_what_is_no_url_is_refused_with_the_form_that_is(endpoint: str):
    with pytest.raises(StartupError, match="http://HOST:PORT"):
        otlp_provider(endpoint)


def test_without_an_endpoint_there_are_no_traces():
    assert start_tracing(SchedulerSettings.from_arguments([]), "tiny") is None


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delitem(sys.modules, "scheduler_service.telemetry.trace_export", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    settings = SchedulerSettings.from_arguments(["--otlp-endpoint", ENDPOINT])
    with pytest.raises(StartupError, match=r"pip install 'nanovllm-grpc\[tracing\]'"):
        start_tracing(settings, "tiny")


def test_the_service_has_a_name_unless_the_environment_gives_another(
    provider, monkeypatch: pytest.MonkeyPatch
):
    assert provider().resource.attributes["service.name"] == "nanovllm-scheduler"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=pod-1")
    attributes = provider().resource.attributes
    assert attributes["service.name"] == "chat"
    assert attributes["k8s.pod.name"] == "pod-1"


def test_the_environment_chooses_the_sampler(provider, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert provider().sampler is ALWAYS_OFF


def test_the_end_of_the_process_does_not_wait_for_a_receiver_that_is_silent(
    provider, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracing, "_FLUSH_S", 0.05)
    # The time that the SDK would wait.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracer = RequestTracer(provider(f"http://127.0.0.1:{silent.getsockname()[1]}"), "tiny")
        now_s = time.monotonic()
        tracer.record(CallRecord(now_s, Caller("unix"), "mine", ended_s=now_s))
        tracer.close()
        flushes = [thread for thread in threading.enumerate() if thread.name == "trace flush"]
        assert len(flushes) == 1
        flushes[0].join(30)
