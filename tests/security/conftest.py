import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health

from nanovllm.admin import AdminClient
from nanovllm.v1 import admin_pb2_grpc
from scheduler_service.admin import AdminServicer
from scheduler_service.serving_state import ServingState
from scheduler_service.settings import SchedulerSettings
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler_service.serving import Service, served
from tests.security.callers import with_tokens
from tests.security.pki import Pki

Scenario = Callable[[Service, AdminClient, ServingState], Awaitable[None]]


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """An authority whose files are gone after the test."""
    return Pki(tmp_path / "pki")


@pytest.fixture
def administer(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario with an administrator of a service that has two tenants.

    `settings` are arguments of the scheduler's command line.
    """

    def run(scenario: Scenario, *settings: str, **options: Any) -> None:
        async def main() -> None:
            address = f"unix:{tmp_path}/scheduler.sock"
            security = with_tokens(tmp_path)
            async with served(tokenizer, address, security=security, **options) as service:
                serving = ServingState(service.harness.engine, health.aio.HealthServicer(), ("",))
                await serving.set_connected(True)
                server = grpc.aio.server()
                admin_pb2_grpc.add_AdminServiceServicer_to_server(
                    AdminServicer(
                        service.harness.engine,
                        serving,
                        SchedulerSettings.from_arguments([*settings]),
                    ),
                    server,
                )
                server.add_insecure_port(f"unix:{tmp_path}/admin.sock")
                await server.start()
                try:
                    with AdminClient(f"unix:{tmp_path}/admin.sock", timeout_s=20) as client:
                        await scenario(service, client, serving)
                finally:
                    await server.stop(None)

        asyncio.run(main())

    return run
