"""Where traces go: an OTLP receiver, over gRPC. Needs the extra `tracing`."""

from typing import Any
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from nanovllm import __version__
from nanovllm.channel import is_local
from nanovllm.service_settings import StartupError

_SERVICE_NAME = "nanovllm-scheduler"


def otlp_provider(endpoint: str) -> TracerProvider:
    """Returns a provider that exports in batches, on a thread of its own.

    The SDK's environment variables hold: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES,
    OTEL_TRACES_SAMPLER and its _ARG, OTEL_PROPAGATORS, OTEL_BSP_*, OTEL_EXPORTER_OTLP_HEADERS,
    _TIMEOUT, _COMPRESSION, _CERTIFICATE and others. Raises StartupError.
    """
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise StartupError(
            f"--otlp-endpoint {endpoint!r} is no URL; give http://HOST:PORT, or https:// for TLS"
        )
    defaults = {"service.name": _SERVICE_NAME, "service.version": __version__}
    resource = Resource.create(defaults).merge(OTELResourceDetector().detect())
    # gRPC would send even loopback traffic through $http_proxy.
    no_proxy: Any = (("grpc.enable_http_proxy", 0),)
    try:
        exporter = OTLPSpanExporter(
            endpoint=endpoint,
            channel_options=no_proxy if is_local(url.netloc) else None,
        )
    except (ValueError, RuntimeError) as error:
        raise StartupError(f"--otlp-endpoint {endpoint}: {error}") from error
    # The end of the process is the caller's: it must not wait for a receiver that is away.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
