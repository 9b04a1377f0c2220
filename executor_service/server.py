"""Puts the executor process together and runs it."""

import logging
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from executor_service.engine_factory import create_engine
from executor_service.metrics import ExecutorMetrics
from executor_service.servicer import ExecutorServicer
from executor_service.settings import ExecutorSettings
from executor_service.worker import Worker
from nanovllm.model_store import ModelNotFoundError, fingerprint, model_name, resolve_model
from nanovllm.service_settings import (
    EXECUTOR_SERVER_OPTIONS,
    StartupError,
    announce_ready,
    bind,
    serve_metrics,
)
from nanovllm.v1 import executor_pb2, executor_pb2_grpc

logger = logging.getLogger(__name__)

_SERVICE = executor_pb2.DESCRIPTOR.services_by_name["ExecutorService"].full_name
_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
# One stream is the rule; a fenced one, health checks and reflection come on top.
_NUM_GRPC_THREADS = 16
_STOP_GRACE_S = 2.0
# Longer than any iteration takes; a device that hangs does not keep the process alive.
_WORKER_STOP_S = 20.0
# Exit code after a device error: the supervisor is to start a new process.
EXIT_DEVICE_FAILED = 3


def serve(settings: ExecutorSettings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code. Raises StartupError."""
    try:
        directory = resolve_model(settings.model)
        model_fingerprint = fingerprint(directory)
    except ModelNotFoundError as error:
        raise StartupError(f"--model {settings.model}: {error}") from error
    # Before the slow part, so that a taken port shows at once. Nothing is served until start().
    server = grpc.server(
        ThreadPoolExecutor(_NUM_GRPC_THREADS, thread_name_prefix="grpc"),
        options=EXECUTOR_SERVER_OPTIONS,
    )
    address = bind(server, settings.listen)
    metrics = ExecutorMetrics(model_name(settings.model))
    serve_metrics(metrics.registry, settings.metrics_host, settings.metrics_port)

    engine = create_engine(directory, settings)
    metrics.set_kv_blocks(engine.limits.num_blocks)
    stop = threading.Event()
    exit_code = 0

    def on_fatal() -> None:
        nonlocal exit_code
        exit_code = EXIT_DEVICE_FAILED
        stop.set()

    worker = Worker(engine.runner, engine.state, metrics, on_fatal)
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(
        ExecutorServicer(engine, worker, metrics, model_fingerprint), server
    )
    health_servicer = health.HealthServicer()
    for service in ("", _SERVICE):
        health_servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection(
        (_SERVICE, _HEALTH_SERVICE, reflection.SERVICE_NAME), server
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    worker.start()
    server.start()
    logger.info(
        "%s in %s on %s, attention %s, %d KV blocks of %d tokens",
        *(settings.model, engine.dtype_name, engine.device_name, engine.attention_backend),
        *(engine.limits.num_blocks, engine.limits.block_size),
    )
    announce_ready(address)
    stop.wait()
    health_servicer.enter_graceful_shutdown()
    # Ends the session, so that its stream closes by itself with a reason.
    if not worker.stop(_WORKER_STOP_S):
        logger.error("an iteration did not end within %g s", _WORKER_STOP_S)
        exit_code = EXIT_DEVICE_FAILED
    server.stop(_STOP_GRACE_S).wait()
    return exit_code
