"""Puts the scheduler process together and runs it."""

import asyncio
import logging
import signal

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from nanovllm.channel import check_address
from nanovllm.model_store import ModelNotFoundError, model_name, resolve_model
from nanovllm.service_settings import (
    SERVER_OPTIONS,
    StartupError,
    announce_ready,
    bind,
    serve_metrics,
)
from nanovllm.v1 import inference_pb2, inference_pb2_grpc
from scheduler_service.engine import Engine, EngineLimits
from scheduler_service.executor_link import ExecutorLink, LinkSettings
from scheduler_service.metrics import SchedulerMetrics
from scheduler_service.model_spec import ModelSpec, ModelSpecError
from scheduler_service.prompt_encoder import PromptEncoder
from scheduler_service.scheduler import Scheduler
from scheduler_service.servicer import InferenceServicer
from scheduler_service.settings import SchedulerSettings
from scheduler_service.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# For calls whose answer is made already, or will be in a moment.
_LAST_WRITES_S = 1.0

_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


async def serve(settings: SchedulerSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises StartupError."""
    try:
        check_address(settings.executor)
    except ValueError as error:
        raise StartupError(f"--executor: {error}") from error
    model, tokenizer = _load_model(settings.model)
    scheduler = Scheduler(settings.policy())
    metrics = SchedulerMetrics(scheduler, model.name)
    engine = Engine(
        scheduler,
        model,
        tokenizer,
        metrics,
        EngineLimits(
            max_queued_requests=settings.max_queued_requests,
            executor_wait_timeout_s=settings.executor_wait_timeout_s,
            max_executor_losses=settings.max_executor_losses,
        ),
    )
    health_servicer = health.aio.HealthServicer()

    async def on_executor_change(connected: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for service in ("", _SERVICE):
            await health_servicer.set(service, status.SERVING if connected else status.NOT_SERVING)

    await on_executor_change(False)
    link = ExecutorLink(
        engine,
        LinkSettings(settings.executor, settings.executor_stall_timeout_s),
        on_executor_change,
    )
    encoder = PromptEncoder(tokenizer)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(
            engine, encoder, link, metrics, has_chat_template=tokenizer.has_chat_template
        ),
        server,
    )
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection(
        (_SERVICE, _HEALTH_SERVICE, reflection.SERVICE_NAME), server
    )
    address = bind(server, settings.listen)
    serve_metrics(metrics.registry, settings.metrics_host, settings.metrics_port)

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    engine.start()
    link_task = asyncio.create_task(link.run(), name="executor link")
    announce_ready(address)
    stopped = asyncio.create_task(stop.wait())
    # A link that ends by itself has a bug; do not go on as a server that can only refuse.
    await asyncio.wait([stopped, link_task], return_when=asyncio.FIRST_COMPLETED)
    logger.info("draining for at most %g s", settings.drain_timeout_s)
    await health_servicer.enter_graceful_shutdown()
    await _drain(server, engine, settings.drain_timeout_s)
    encoder.close()
    stopped.cancel()
    if link_task.done():
        link_task.result()
    link_task.cancel()
    await asyncio.gather(link_task, return_exceptions=True)


async def _drain(server: grpc.aio.Server, engine: Engine, timeout_s: float) -> None:
    """Refuses new calls at once, lets requests go on for `timeout_s`, then ends every call.

    A call without an end, as a watcher of the health service makes, is not waited for.
    """
    refusing = asyncio.create_task(server.stop(timeout_s))
    idle = asyncio.create_task(engine.wait_until_idle())
    await asyncio.wait([refusing, idle], return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()
    await server.stop(min(timeout_s, _LAST_WRITES_S))
    await refusing


def _load_model(name: str) -> tuple[ModelSpec, Tokenizer]:
    try:
        directory = resolve_model(name, weights=False)
        return ModelSpec.from_directory(directory, model_name(name)), Tokenizer(directory)
    except (ModelNotFoundError, ModelSpecError) as error:
        raise StartupError(f"--model {name}: {error}") from error
