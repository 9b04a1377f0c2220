"""Many requests of every fate at once, on a cache that is too small for them."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nanovllm import AsyncClient, Client, NanovllmError, SamplingParams
from nanovllm.outputs import OutputFolder, RequestOutput
from nanovllm.requests import generate_request
from tests.e2e.support import (
    Metrics,
    random_prompt,
    running_services,
    wait_until_idle,
)

NUM_REQUESTS = 160
FATES = ("complete", "complete", "close", "abort", "cancel", "deadline")


@dataclass(frozen=True, slots=True)
class Visitor:
    """A request and what becomes of it."""

    fate: str
    prompt: list[int]
    params: SamplingParams
    # Seconds until it arrives, and from then until its fate strikes.
    delay_s: float
    patience_s: float


def visitor(index: int) -> Visitor:
    generator = random.Random(index)
    # Few different beginnings, so that prefixes are shared.
    prefix = random_prompt(generator.choice((0, 16, 40)), seed=generator.randrange(3))
    return Visitor(
        fate=FATES[index % len(FATES)],
        prompt=prefix + generator.choices(range(320), k=generator.randint(1, 60)),
        params=SamplingParams(
            temperature=generator.choice((0.0, 3.0)),
            seed=index,
            n=generator.choice((1, 1, 3)),
            max_tokens=generator.randint(1, 60),
            stop=generator.choice(((), ("a", "bc"))),
            logprobs=generator.choice((None, 2)),
        ),
        delay_s=generator.uniform(0, 1.5),
        patience_s=generator.uniform(0, 0.5),
    )


async def visit(client: AsyncClient, index: int) -> RequestOutput | None:
    """Returns the output of a request that was allowed to end by itself."""
    guest = visitor(index)
    await asyncio.sleep(guest.delay_s)
    request = generate_request(guest.prompt, guest.params, request_id=f"visitor-{index}")
    folder = OutputFolder(request)
    timeout_s = guest.patience_s if guest.fate == "deadline" else 60.0
    stream = client.start(request, timeout_s=timeout_s)

    async def read() -> RequestOutput:
        async for delta in stream:
            folder.add(delta)
        return folder.output()

    reading = asyncio.create_task(read())
    if guest.fate not in ("complete", "deadline"):
        await asyncio.wait([reading], timeout=guest.patience_s)
    match guest.fate:
        case "close":
            stream.close()
        case "abort":
            await client.abort(request.request_id)
        case "cancel":
            reading.cancel()
    (result,) = await asyncio.gather(reading, return_exceptions=True)
    if guest.fate == "complete":
        assert isinstance(result, RequestOutput), result
        return result
    assert isinstance(result, (RequestOutput, NanovllmError, asyncio.CancelledError)), result
    return None


async def visit_all(address: str) -> dict[int, RequestOutput]:
    async with AsyncClient(address) as client:
        outputs = await asyncio.gather(*(visit(client, index) for index in range(NUM_REQUESTS)))
    return {index: output for index, output in enumerate(outputs) if output is not None}


@pytest.mark.parametrize("options", [(), ("--no-enable-prefix-caching",)], ids=["cache", "none"])
def test_requests_that_stay_get_their_tokens_whatever_happens_to_the_others(
    checkpoint: Callable[[str], Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    with (
        running_services(
            checkpoint("qwen3"),
            tmp_path,
            executor=[
                *("--num-kv-blocks", "60", "--block-size", "8"),
                *("--max-num-seqs", "8", "--max-num-batched-tokens", "40"),
            ],
            scheduler=options,
            metrics=True,
        ) as services,
        Client(services.address) as client,
    ):
        outputs = asyncio.run(visit_all(services.address))
        assert len(outputs) >= NUM_REQUESTS / 3
        wait_until_idle(client)
        metrics = Metrics(services.scheduler.metrics_url)
        assert metrics["num_preemptions_total"] > 0
        assert (metrics["prefix_cache_hits_total"] > 0) == (not options)
        assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
        # Alone, the first completion of each is the same as in the crowd.
        for index, output in list(outputs.items())[::2]:
            guest = visitor(index)
            alone = client.generate(guest.prompt, replace(guest.params, n=1))
            assert output.token_ids == alone.token_ids
            assert output.text == alone.text
            assert output.finish_reason is alone.finish_reason
