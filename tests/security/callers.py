"""A scheduler in this process that knows two token owners and an administrator."""

import asyncio
from pathlib import Path

from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.access.security import Security
from scheduler_service.settings import SchedulerSettings
from tests.scheduler_service.serving import Service, read_all

ALICE, BOB = "a" * 32, "b" * 32


def with_tokens(directory: Path, *arguments: str) -> Security:
    """What settings with a file of tokens make of it."""
    path = directory / "tokens"
    path.write_text(f"alice:{ALICE}\nbob:{BOB}\n")
    path.chmod(0o600)
    settings = SchedulerSettings.from_arguments(["--auth-tokens-file", str(path), *arguments])
    return Security.of(settings)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def request(
    request_id: str = "", *, cache_salt: str = "", max_tokens: int = 3
) -> pb.GenerateRequest:
    """Three blocks of prompt, of which two can be shared."""
    return pb.GenerateRequest(
        request_id=request_id,
        token_ids=pb.TokenIds(ids=range(12)),
        cache_salt=cache_salt,
        sampling_params=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
    )


def start(
    service: Service, token: str, request_id: str = "", *, max_tokens: int = 3
) -> "asyncio.Task[list[pb.GenerateResponse]]":
    """A request under way, which reads all of its responses."""
    message = request(request_id, max_tokens=max_tokens)
    call = service.stub.Generate(message, metadata=bearer(token))
    return asyncio.create_task(read_all(call))
