"""vLLM's service over the engine harness, beside our own service on the same server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from scheduler_service.access.security import Security
from scheduler_service.access.tenancy import Tenancy
from scheduler_service.gateway.load import LoadReader
from scheduler_service.gateway.servicer import VllmEngineServicer
from scheduler_service.intake import Intake
from scheduler_service.text.prompt_encoder import PromptEncoder
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler_service.engine_harness import EngineHarness
from tests.scheduler_service.serving import Service, served

PROMPT = [0, 1, 1, 2]


@dataclass
class Gateway:
    """The running service as a gateway sees it."""

    service: Service
    stub: vllm_engine_pb2_grpc.VllmEngineStub
    #: What the health check reports.
    serving: SimpleNamespace

    @property
    def harness(self) -> EngineHarness:
        return self.service.harness


@asynccontextmanager
async def gateway(
    tokenizer: Tokenizer,
    directory: Path,
    address: str,
    *,
    security: Security | None = None,
    **options: Any,
) -> AsyncIterator[Gateway]:
    """Serves both APIs at `address`; checks at the end that nothing is left behind."""
    serving = SimpleNamespace(is_serving=True, is_draining=False)
    tenancy = security.tenancy if security else Tenancy()

    def add(server: grpc.aio.Server, harness: EngineHarness, encoder: PromptEncoder) -> None:
        VllmEngineServicer(
            harness.engine,
            Intake(harness.engine, encoder, harness.metrics, tenancy),
            serving,  # type: ignore[arg-type]
            LoadReader(harness.pool.load, harness.metrics),
            directory,
            tenancy=tenancy,
        ).add_to(server)

    async with (
        served(tokenizer, address, security=security, add_services=add, **options) as service,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield Gateway(service, vllm_engine_pb2_grpc.VllmEngineStub(channel), serving)


def request(*, stream: bool = False, request_id: str = "", **params: Any) -> pb.GenerateRequest:
    """What smg sends for a greedy request of nine tokens, but for `params`."""
    fields = {"top_p": 1.0, "repetition_penalty": 1.0, "n": 1, "temperature": 0.0}
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(input_ids=PROMPT),
        stream=stream,
        sampling_params=pb.SamplingParams(
            **(fields | {"max_tokens": 9, "ignore_eos": True} | params)
        ),
    )
