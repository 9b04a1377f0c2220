"""Processes die while the real gateway has requests with them."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from openai import APIError, AsyncOpenAI, OpenAI
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc

from examples.smg import SmgGateway
from nanovllm import Client, LocalServices, SamplingParams
from tests.e2e.support import CPU, LIMIT_S, Metrics, wait_until, wait_until_serving
from tests.gateway.replicas import (
    MODEL,
    Stack,
    make_ascii_checkpoint,
    running_replicas,
    skip_without_smg,
)

pytestmark = pytest.mark.slow

NUM_REQUESTS = 200
CONCURRENCY = 12
NUM_GROUPS = 8
#: Tokens of requests none of which must end before all have begun.
LONG = 1000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ascii_checkpoint(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture(scope="module")
def stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    # An executor that is only stopped for a while stays connected.
    patient = ["--executor-silence-timeout-s", "60"]
    with running_replicas(
        checkpoint, tmp_path_factory.mktemp("logs"), scheduler=patient
    ) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Work:
    """One request and the text that it must get, whatever happens meanwhile."""

    prompt: str
    max_tokens: int
    n: int
    stream: bool
    expected: str

    async def run(self, client: AsyncOpenAI, first_text: asyncio.Event | None = None) -> bool:
        """Whether every completion is the expected one. Raises APIError."""
        fields: dict[str, Any] = {
            "model": MODEL,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "n": self.n,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        texts = [""] * self.n
        if self.stream:
            async for event in await client.completions.create(**fields, stream=True):
                for choice in event.choices:
                    texts[choice.index] += choice.text
                if first_text is not None and texts[0]:
                    first_text.set()
        else:
            for choice in (await client.completions.create(**fields)).choices:
                texts[choice.index] = choice.text
        return texts == [self.expected] * self.n


def mixed_work(scheduler: Client) -> list[Work]:
    """Requests of several groups with a common prefix, of every kind."""
    work = []
    for number in range(NUM_REQUESTS):
        group, kind = number % NUM_GROUPS, number % 3
        prompt = f"{chr(97 + group) * 40} {number % 5}"
        max_tokens = 16 + 8 * (number % 4)
        work.append(Work(prompt, max_tokens, 2 if kind == 2 else 1, kind == 1, ""))
    params = {w.max_tokens: params_of(w.max_tokens) for w in work}
    texts = {
        key: scheduler.generate(key[0], params[key[1]]).text
        for key in {(w.prompt, w.max_tokens) for w in work}
    }
    return [
        Work(w.prompt, w.max_tokens, w.n, w.stream, texts[w.prompt, w.max_tokens]) for w in work
    ]


def params_of(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def test_no_request_fails_when_an_executor_is_killed(stack: Stack) -> None:
    victim = stack.replicas[0]
    with Client(victim.address) as scheduler:
        work = mixed_work(scheduler)

    async def main() -> list[bool]:
        places = asyncio.Semaphore(CONCURRENCY)
        is_half_done = asyncio.Event()
        num_done = 0

        async def one(item: Work, client: AsyncOpenAI) -> bool:
            nonlocal num_done
            async with places:
                result = await item.run(client)
            num_done += 1
            if num_done == NUM_REQUESTS // 3:
                is_half_done.set()
            return result

        async with stack.async_openai() as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item, client)) for item in work]
            await is_half_done.wait()
            victim.executor.kill()
            await asyncio.to_thread(victim.executor.wait, LIMIT_S)
            await asyncio.to_thread(victim.executor.restart, 60)
        return [task.result() for task in tasks]

    assert asyncio.run(main()) == [True] * NUM_REQUESTS
    assert Metrics(victim.scheduler.metrics_url)["executor_restarts_total"] == 1
    with Client(victim.address) as scheduler:
        wait_until_serving(scheduler)


def test_only_streams_of_a_killed_replica_fail(stack: Stack) -> None:
    num_streams, num_whole = 6, 6
    with Client(stack.replicas[0].address) as scheduler:
        # Long enough that none has ended when all have begun.
        texts = [
            scheduler.generate(chr(97 + i) * 20, params_of(LONG)).text for i in range(num_streams)
        ]

    async def main() -> tuple[int, list[Any], list[Any]]:
        async with stack.async_openai() as client:
            streams, begun = [], []
            for i in range(num_streams):
                event = asyncio.Event()
                item = Work(chr(97 + i) * 20, LONG, 1, True, texts[i])
                streams.append(asyncio.create_task(item.run(client, event)))
                begun.append(event.wait())
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*begun)
            # From here on nothing can end.
            for replica in stack.replicas:
                os.kill(replica.executor.pid, signal.SIGSTOP)
            on_stream = {replica.address: num_live(replica) for replica in stack.replicas}
            assert sum(on_stream.values()) == num_streams

            def has_both(replica: LocalServices) -> bool:
                return 0 < on_stream[replica.address] < num_live(replica)

            # Where they go is the gateway's choice: until one replica has requests of both kinds.
            whole: list[asyncio.Task[bool]] = []
            async with asyncio.timeout(LIMIT_S):
                while len(whole) < num_whole or not any(map(has_both, stack.replicas)):
                    i = len(whole) % num_streams
                    item = Work(chr(97 + i) * 20, LONG, 1, False, texts[i])
                    whole.append(asyncio.create_task(item.run(client)))
                    while sum(map(num_live, stack.replicas)) < num_streams + len(whole):
                        await asyncio.sleep(0.01)
            victim, survivor = sorted(stack.replicas, key=has_both, reverse=True)
            num_lost = on_stream[victim.address]
            victim.scheduler.kill()
            victim.executor.kill()
            os.kill(survivor.executor.pid, signal.SIGCONT)
            return (
                num_lost,
                await asyncio.gather(*streams, return_exceptions=True),
                await asyncio.gather(*whole, return_exceptions=True),
            )

    def num_live(replica: LocalServices) -> int:
        status = clients[replica.address].server_status()
        return status.num_running + status.num_waiting

    with ExitStack() as contexts:
        clients = {
            replica.address: contexts.enter_context(Client(replica.address))
            for replica in stack.replicas
        }
        num_lost, streams, whole = asyncio.run(main())
    assert whole
    assert all(result is True for result in whole)
    assert streams.count(True) == num_streams - num_lost
    assert all(isinstance(result, APIError) for result in streams if result is not True)
    wait_until(lambda: stack.gateway.num_healthy_workers == 1, "the gateway knows of the death")


def test_a_gateway_without_the_model_directory_gets_the_tokenizer_from_the_scheduler(
    tmp_path: Path,
) -> None:
    skip_without_smg()
    directory = make_ascii_checkpoint(tmp_path / "model")
    prompt = [{"role": "user", "content": "Name three rivers in France."}]
    with LocalServices(
        str(directory),
        executor_args=[*CPU, "--num-kv-blocks", "512"],
        listen="tcp",
        log_dir=tmp_path / "logs",
    ) as services:
        with Client(services.address) as scheduler:
            expected = scheduler.generate(prompt, params_of(20)).text
        with grpc.insecure_channel(services.address) as channel:
            stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            # Kept from here on, so the directory may go, as if it were another machine's.
            assert list(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
        directory.rename(tmp_path / "gone")
        with (
            SmgGateway([services.address], log_path=tmp_path / "smg.log") as gateway,
            OpenAI(base_url=gateway.base_url, api_key="none", max_retries=0) as client,
        ):
            answer = client.chat.completions.create(
                model="model",
                messages=prompt,  # type: ignore[arg-type]
                max_tokens=20,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
    assert answer.choices[0].message.content == expected
