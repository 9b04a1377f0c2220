"""Puts the scheduler process together and runs it."""

import asyncio
import logging
from importlib.util import find_spec
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from nanovllm.logs import fields
from nanovllm.model_store import ModelNotFoundError, model_name, resolve_model
from nanovllm.service_settings import (
    SERVER_OPTIONS,
    StartupError,
    announce_ready,
    bind,
    freeze_heap,
    serve_metrics,
)
from nanovllm.stop_signals import StopSignals
from nanovllm.v1 import admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from scheduler_service.access.security import Security
from scheduler_service.admin import AdminServicer
from scheduler_service.drain import drain
from scheduler_service.engine import Engine, EngineLimits
from scheduler_service.executors.pool import ExecutorPool
from scheduler_service.health import HealthServicer
from scheduler_service.intake import Intake
from scheduler_service.link.executor_link import LinkSettings
from scheduler_service.link.executor_links import ExecutorLinks
from scheduler_service.link.executor_liveness import LivenessLimits
from scheduler_service.model_spec import ModelSpec, ModelSpecError
from scheduler_service.servicer import InferenceServicer
from scheduler_service.serving_state import ServingState
from scheduler_service.settings import SchedulerSettings
from scheduler_service.telemetry.loop_lag import watch_loop_lag
from scheduler_service.telemetry.metrics import SchedulerMetrics
from scheduler_service.telemetry.metrics.vllm import export_vllm_names
from scheduler_service.telemetry.request_log import RequestLog
from scheduler_service.telemetry.request_metrics import RequestMetrics
from scheduler_service.telemetry.request_observer import RequestObserver, Tracer
from scheduler_service.text.prompt_encoder import PromptEncoder
from scheduler_service.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
#: Name under which the health service answers SERVING as long as this process works, with or
#: without an executor: for supervisors, which must not restart it when the executor is gone.
LIVENESS_SERVICE = "liveness"
_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


async def serve(settings: SchedulerSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises StartupError."""
    security = Security.of(settings)
    directory, model, tokenizer = _load_model(settings.model)
    pool = ExecutorPool(settings.policy(), settings.routing(), settings.executor_wait_timeout_s)
    for executor in settings.executor_addresses:
        pool.add_executor(executor)
    metrics = SchedulerMetrics(pool.load, model.name)
    if settings.metrics_compat == "vllm":
        export_vllm_names(metrics, model.max_model_len)
    engine = Engine(
        pool,
        model,
        tokenizer,
        RequestMetrics(metrics),
        EngineLimits(
            admission=settings.admission(),
            max_executor_losses=settings.max_executor_losses,
        ),
    )
    health_servicer = HealthServicer()

    serving = ServingState(engine, health_servicer, ("", _SERVICE))
    await serving.set_connected(False)
    await health_servicer.set(LIVENESS_SERVICE, health_pb2.HealthCheckResponse.SERVING)
    links = ExecutorLinks(
        pool,
        LinkSettings(
            model,
            LivenessLimits(
                silence_timeout_s=settings.executor_silence_timeout_s,
                stall_timeout_s=settings.executor_stall_timeout_s,
            ),
            security.executor_tls,
        ),
        metrics,
        serving.set_connected,
    )
    encoder = PromptEncoder(tokenizer, max_pending_bytes=settings.max_tokenizing_bytes)
    observer = RequestObserver(
        RequestLog(log_prompts=settings.log_prompts), start_tracing(settings, model.name)
    )
    server = grpc.aio.server(
        interceptors=security.interceptors,
        options=list((dict(SERVER_OPTIONS) | settings.connection_options()).items()),
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(
            engine,
            encoder,
            metrics,
            has_chat_template=tokenizer.has_chat_template,
            tenancy=security.tenancy,
            write_timeout_s=settings.write_timeout_s,
            observer=observer,
        ),
        server,
    )
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    service_names = [_SERVICE, _HEALTH_SERVICE, reflection.SERVICE_NAME]
    if gateway_is_wanted(settings):
        from scheduler_service.gateway.load import LoadReader
        from scheduler_service.gateway.servicer import VllmEngineServicer

        gateway = VllmEngineServicer(
            engine,
            Intake(engine, encoder, metrics, security.tenancy),
            serving,
            LoadReader(pool.load, metrics),
            directory,
            tenancy=security.tenancy,
            write_timeout_s=settings.write_timeout_s,
            observer=observer,
        )
        service_names.append(gateway.add_to(server))
    reflection.enable_server_reflection(service_names, server)
    address = bind(server, settings.listen, security.tls)
    admin_server = _admin_server(settings, security, AdminServicer(engine, serving, settings))
    serve_metrics(metrics.registry, settings.metrics_host, settings.metrics_port)

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = StopSignals(address, lambda: loop.call_soon_threadsafe(stop.set))
    await server.start()
    if admin_server is not None:
        await admin_server.start()
    pool.start()
    tokenizer.warm_up()
    links_task = asyncio.create_task(links.run(), name="executor links")
    lag_task = asyncio.create_task(watch_loop_lag(metrics.event_loop_lag.observe), name="loop lag")
    freeze_heap()
    signals.service_is_up()
    announce_ready(address)
    stopped = asyncio.create_task(stop.wait())
    # A link that ends by itself has a bug; do not go on as a server that can only refuse.
    await asyncio.wait([stopped, links_task], return_when=asyncio.FIRST_COMPLETED)
    logger.info("draining", extra=fields(limit_s=settings.drain_timeout_s))
    if admin_server is not None:
        # Nobody can have requests taken again from here on.
        await admin_server.stop(None)
    await health_servicer.enter_graceful_shutdown()
    await drain(server, engine, settings.drain_timeout_s)
    encoder.close()
    tokenizer.close()
    await observer.close()
    stopped.cancel()
    if links_task.done():
        links_task.result()
    links_task.cancel()
    lag_task.cancel()
    await asyncio.gather(links_task, lag_task, return_exceptions=True)


def _admin_server(
    settings: SchedulerSettings, security: Security, servicer: AdminServicer
) -> grpc.aio.Server | None:
    address = settings.admin_listen
    if address is None:
        return None
    server = grpc.aio.server(interceptors=security.admin_interceptors, options=SERVER_OPTIONS)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, server)
    # A unix socket is protected by its mode instead.
    tls = None if address.startswith("unix:") else security.tls
    bound = bind(server, address, tls, only_owner=True, option="--admin-listen")
    print(f"admin: {bound}", flush=True)
    return server


def gateway_is_wanted(settings: SchedulerSettings) -> bool:
    """Whether to serve gateways: if nobody said no and the stubs are there. Raises StartupError."""
    if not settings.gateway:
        return False
    if find_spec("smg_grpc_proto") is not None:
        return True
    if "gateway" in settings.model_fields_set:
        raise StartupError(
            "--gateway needs smg_grpc_proto; install the extra: "
            "pip install 'nanovllm-grpc[gateway]'"
        )
    return False


def start_tracing(settings: SchedulerSettings, model_name: str) -> Tracer | None:
    """What makes traces of requests, if any are wanted. Raises StartupError."""
    if settings.otlp_endpoint is None:
        return None
    try:
        # OpenTelemetry is an extra.
        from scheduler_service.telemetry.trace_export import otlp_provider
        from scheduler_service.telemetry.tracing import RequestTracer
    except ModuleNotFoundError as error:
        raise StartupError(
            f"--otlp-endpoint needs {error.name}; install the extra: "
            "pip install 'nanovllm-grpc[tracing]'"
        ) from error
    return RequestTracer(otlp_provider(settings.otlp_endpoint), model_name)


def _load_model(name: str) -> tuple[Path, ModelSpec, Tokenizer]:
    try:
        directory = resolve_model(name, weights=False)
        spec = ModelSpec.from_directory(directory, model_name(name))
        return directory, spec, Tokenizer(directory)
    except (ModelNotFoundError, ModelSpecError) as error:
        raise StartupError(f"--model {name}: {error}") from error
