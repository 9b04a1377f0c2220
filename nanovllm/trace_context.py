"""The caller's trace: sent with requests, so that the server's spans become part of it."""

import sys

TraceMetadata = tuple[tuple[str, str], ...]


def trace_metadata() -> TraceMetadata:
    """Returns the current span's context (W3C `traceparent`) as gRPC metadata; empty without one.

    OpenTelemetry is no dependency of the client. A process that never loaded it has no span.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((name.lower(), value) for name, value in carrier.items())
