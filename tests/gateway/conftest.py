"""The gateway's service in this process, with a simulated executor behind it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from scheduler_service.text.tokenizer import Tokenizer
from tests.gateway.serving import Gateway, gateway

Serve = Callable[..., None]


@pytest.fixture
def serve(tokenizer: Tokenizer, checkpoint: Path, tmp_path: Path) -> Serve:
    """Runs a scenario against the service; the executor iterates by itself meanwhile."""

    def run(scenario: Callable[[Gateway], Awaitable[None]], **options: Any) -> None:
        async def main() -> None:
            address = f"unix:{tmp_path}/scheduler.sock"
            serving: AbstractAsyncContextManager[Gateway] = gateway(
                tokenizer, checkpoint, address, **options
            )
            async with serving as service:
                await scenario(service)

        asyncio.run(main())

    return run
