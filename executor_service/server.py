"""Puts the executor process together and runs it."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from executor_service.engine_factory import Engine, create_engine
from executor_service.error_guard import ErrorGuard
from executor_service.metrics import ExecutorMetrics
from executor_service.servicer import ExecutorServicer
from executor_service.settings import ExecutorSettings
from executor_service.worker import Worker
from nanovllm.logs import fields
from nanovllm.model_store import ModelNotFoundError, fingerprint, model_name, resolve_model
from nanovllm.service_metrics import process_age_s
from nanovllm.service_settings import (
    EXECUTOR_SERVER_OPTIONS,
    StartupError,
    announce_ready,
    bind,
    check_exposure,
    freeze_heap,
    serve_metrics,
    server_tls,
)
from nanovllm.stop_signals import StopSignals
from nanovllm.v1 import executor_pb2, executor_pb2_grpc

logger = logging.getLogger(__name__)

_SERVICE = executor_pb2.DESCRIPTOR.services_by_name["ExecutorService"].full_name
_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
# One stream is the rule; a fenced one, health checks and reflection come on top.
_NUM_GRPC_THREADS = 16
_STOP_GRACE_S = 2.0
# Longer than any iteration takes; a device that hangs does not keep the process alive.
_WORKER_STOP_S = 20.0
# From a model's directory and the settings to what serves it.
MakeEngine: TypeAlias = Callable[[Path, ExecutorSettings], Engine]
# Exit code after a device error: the supervisor is to start a new process.
EXIT_DEVICE_FAILED = 3


def serve(settings: ExecutorSettings, make_engine: MakeEngine = create_engine) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code. Raises StartupError."""
    tls = server_tls(settings)
    # Whoever reaches an executor can steer it: encryption alone is not enough.
    check_exposure(
        settings.listen,
        settings,
        is_protected=settings.tls_client_ca is not None,
        remedy="give --tls-cert, --tls-key and --tls-client-ca",
    )
    try:
        directory = resolve_model(settings.model)
        model_fingerprint = fingerprint(directory)
    except ModelNotFoundError as error:
        raise StartupError(f"--model {settings.model}: {error}") from error
    # Before the slow part, so that a taken port shows at once. Nothing is served until start().
    server = grpc.server(
        ThreadPoolExecutor(_NUM_GRPC_THREADS, thread_name_prefix="grpc"),
        interceptors=[ErrorGuard()],
        options=EXECUTOR_SERVER_OPTIONS,
    )
    address = bind(server, settings.listen, tls, only_owner=True)
    stop = threading.Event()
    signals = StopSignals(address, stop.set)
    metrics = ExecutorMetrics(model_name(settings.model))
    serve_metrics(metrics.registry, settings.metrics_host, settings.metrics_port)

    engine = make_engine(directory, settings)
    metrics.set_kv_blocks(engine.limits.num_blocks)
    if engine.gpu_memory is not None:
        metrics.watch_gpu_memory(
            weight_bytes=engine.gpu_memory.weight_bytes,
            kv_cache_bytes=engine.gpu_memory.kv_cache_bytes,
            read_reserved_bytes=engine.gpu_memory.reserved_bytes,
        )
    exit_code = 0

    def on_fatal() -> None:
        nonlocal exit_code
        exit_code = EXIT_DEVICE_FAILED
        stop.set()

    worker = Worker(engine.runner, engine.state, metrics, on_fatal)
    metrics.watch_slots(lambda: worker.num_active_slots)
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
    worker.start()
    server.start()
    logger.info(
        "model loaded",
        extra=fields(
            model=settings.model,
            dtype=engine.dtype_name,
            device=engine.device_name,
            attention_backend=engine.attention_backend,
            num_blocks=engine.limits.num_blocks,
            block_size=engine.limits.block_size,
        ),
    )
    freeze_heap()
    metrics.set_start(model_load_s=engine.model_load_s, startup_s=process_age_s())
    signals.service_is_up()
    announce_ready(address)
    stop.wait()
    health_servicer.enter_graceful_shutdown()
    # Ends the session, so that its stream closes by itself with a reason.
    if not worker.stop(_WORKER_STOP_S):
        logger.error("an iteration did not end in time", extra=fields(limit_s=_WORKER_STOP_S))
        exit_code = EXIT_DEVICE_FAILED
    server.stop(_STOP_GRACE_S).wait()
    return exit_code
