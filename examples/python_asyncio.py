"""The asyncio Python client: many requests at a time, and one that is given up early.

    python examples/python_asyncio.py

$NANOVLLM_ADDRESS is the scheduler's address, 127.0.0.1:50051 if unset.
"""

import asyncio
import os

from nanovllm import AsyncClient, SamplingParams


async def main() -> None:
    address = os.environ.get("NANOVLLM_ADDRESS", "127.0.0.1:50051")
    prompts = [f"A short story about a {animal}:" for animal in ("cat", "crow", "crab")]
    async with AsyncClient(address, timeout_s=120) as client:
        params = SamplingParams(temperature=0, max_tokens=16)
        outputs = await asyncio.gather(*(client.generate(prompt, params) for prompt in prompts))
        for output in outputs:
            print(repr(output.text))

        # Leaving the block ends the request on the server.
        async with client.stream("Count: 1, 2, 3,", SamplingParams(max_tokens=500)) as stream:
            num_tokens = 0
            async for delta in stream:
                num_tokens += len(delta.token_ids)
                if num_tokens >= 10:
                    break
        print(f"gave up after {num_tokens} tokens")


asyncio.run(main())
