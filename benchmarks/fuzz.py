"""Random requests, valid and not, against both real services: how does each of them end?

    python -m benchmarks.fuzz
    python -m benchmarks.fuzz --requests 100000 --seed 1 --json FILE

Every field of GenerateRequest takes plausible values, limits, and what lies beyond them, in all
combinations; some requests are bytes that are no message, and some clients give up halfway. A
request passes if it ends in terminal messages or in a status that blames the request, the load or
its client. At the end every KV block must be free or cached again and both processes must live.
"""

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks.machine import describe_machine, machine_line
from benchmarks.report import write_json
from nanovllm.aio import AsyncClient
from nanovllm.channel import channel_options
from nanovllm.cli.options import positive_int
from nanovllm.services import LocalServices, ServiceStartError
from nanovllm.v1 import inference_pb2
from tests.checkpoints import make_checkpoint
from tests.fuzz.messages import PROPER, mutated, random_request

_METHOD = "/nanovllm.v1.InferenceService/Generate"
_LIMIT_S = 60.0
# Short, for many requests leave max_tokens out.
_MODEL_LEN = 128
_EXECUTOR_ARGS = ("--max-num-seqs=32", "--num-kv-blocks=512", "--dtype=float32", "--device=cpu")
_NUM_FAILURES_SHOWN = 10
# Its indented lines, then the exception.
_TRACEBACK = re.compile(r"^(Traceback.*\n)((?: .*\n)*)(.*)$", re.MULTILINE)


@dataclass(slots=True)
class Tally:
    """How requests ended."""

    by_status: Counter[str] = field(default_factory=Counter)
    # What no request should end in, with the request's number.
    failures: list[str] = field(default_factory=list)

    def add(self, number: int, status: str, problem: str = "") -> None:
        """Counts one request; `problem` says why its end was not proper."""
        self.by_status[status] += 1
        if problem:
            self.failures.append(f"request {number}: {status}: {problem}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 1 if a request failed."""
    options = _parser().parse_args(arguments)
    machine = describe_machine()
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            document = _measure(options, Path(folder))
    except ServiceStartError as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 1
    print(machine_line(machine))
    print(f"{options.requests} requests, {document['requests_per_s']:.0f} per second")
    for status, count in document["by_status"].items():
        print(f"{status:<22}{count:>9}")
    for problem in document["failures"][:_NUM_FAILURES_SHOWN]:
        print(problem)
    print(f"requests that ended improperly: {len(document['failures'])}")
    if options.json is not None:
        write_json(options.json, {"machine": machine, **document})
    return 1 if document["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description="Sends random requests to both services."
    )
    parser.add_argument("--requests", type=positive_int, default=100_000, metavar="N")
    parser.add_argument("--concurrency", type=positive_int, default=64, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = make_checkpoint(folder / "tiny", max_position_embeddings=_MODEL_LEN)
    with LocalServices(
        str(model),
        executor_args=_EXECUTOR_ARGS,
        # Refusals for the load would leave little to try.
        log_dir=folder,
    ) as services:
        start_s = time.perf_counter()
        tally = asyncio.run(_send_all(services.address, options))
        duration_s = time.perf_counter() - start_s
        for service in (services.scheduler, services.executor):
            if not service.running:
                tally.failures.append(f"{service.module} ended with {service.returncode}")
    for log in sorted(folder.glob("*.log")):
        for *_, error in _TRACEBACK.findall(log.read_text()):
            tally.failures.append(f"{log.name} holds a traceback: {error}")
    return {
        "parameters": {
            name: getattr(options, name) for name in ("requests", "concurrency", "seed")
        },
        "requests_per_s": options.requests / duration_s,
        "by_status": dict(tally.by_status.most_common()),
        "failures": tally.failures,
    }


async def _send_all(address: str, options: argparse.Namespace) -> Tally:
    tally = Tally()
    numbers = iter(range(options.requests))
    async with grpc.aio.insecure_channel(address, options=channel_options(address)) as channel:
        send = channel.unary_stream(
            _METHOD, response_deserializer=inference_pb2.GenerateResponse.FromString
        )

        async def work() -> None:
            for number in numbers:
                await _send(send, number, random.Random(f"{options.seed} {number}"), tally)

        async with asyncio.TaskGroup() as group:
            for _ in range(options.concurrency):
                group.create_task(work())
    deadline_s = time.monotonic() + _LIMIT_S
    async with AsyncClient(address) as client:
        while left := await _leak(client):
            if time.monotonic() > deadline_s:
                tally.failures.append(f"{left} although every request has ended")
                break
            await asyncio.sleep(0.1)
    return tally


async def _leak(client: AsyncClient) -> str:
    """Says what is still owned, or nothing."""
    status = await client.server_status()
    unowned = status.num_free_kv_blocks + status.num_cached_kv_blocks
    if status.num_running or status.num_waiting or unowned != status.num_kv_blocks:
        return (
            f"{status.num_running} sequences run, {status.num_waiting} wait, {unowned} of "
            f"{status.num_kv_blocks} blocks are nobody's"
        )
    return ""


async def _send(send: Any, number: int, rng: random.Random, tally: Tally) -> None:
    request = random_request(rng)
    data = request.SerializeToString()
    is_message = rng.random() > 0.05
    timeout_s = rng.choice((None, None, None, None, 0.001, 0.05))
    num_reads = rng.choice((None, None, None, None, 0, 1))
    call = send(data if is_message else mutated(data, rng), timeout=timeout_s)
    ended: list[int] = []
    try:
        async with asyncio.timeout(_LIMIT_S):
            await _read(call, num_reads, ended)
    except grpc.aio.AioRpcError as error:
        code = error.code()
        tally.add(number, code.name, "" if code in PROPER else error.details() or "no reason")
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        tally.add(number, "CANCELLED")
    except TimeoutError:
        call.cancel()
        tally.add(number, "NO END", f"not within {_LIMIT_S:g} s")
    else:
        params = request.sampling_params
        n = params.n if params.HasField("n") else 1
        complete = len(ended) == len(set(ended)) == n or not is_message
        tally.add(number, "OK", "" if complete else f"{len(ended)} terminal messages for n={n}")


async def _read(call: Any, num_reads: int | None, ended: list[int]) -> None:
    if num_reads == 0:
        call.cancel()
    count = 0
    async for response in call:
        if response.finish_reason:
            ended.append(response.index)
        count += 1
        if count == num_reads:
            call.cancel()


if __name__ == "__main__":
    sys.exit(main())
