"""Load and silence by turns through the gateway smg: does any connection break, any request fail?

    python -m benchmarks.gateway_soak
    python -m benchmarks.gateway_soak --minutes 10 --silence-s 150 --json FILE

A connection that the server thinks is pinged too often ends with ENHANCE_YOUR_CALM, typically after
some two minutes of silence; so the silences are longer than that by default. Starts two replicas
and the gateway, and reads in the gateway's log how often it had to connect again.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openai import APIError, AsyncOpenAI

from benchmarks.machine import describe_machine, machine_line
from benchmarks.options import add_engine_options
from benchmarks.report import write_json
from examples.smg import SmgGateway
from nanovllm.cli.options import positive_float, positive_int
from nanovllm.load import Percentiles
from nanovllm.services import LocalServices

_NUM_REPLICAS = 2
_MAX_TOKENS = 32
_CONNECTED = "KV event stream connected"
_TOO_MANY_PINGS = "ENHANCE_YOUR_CALM"


@dataclass(slots=True)
class Soak:
    """What happened."""

    num_requests: int = 0
    num_streamed: int = 0
    num_phases: int = 0
    duration_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    # Of the first request after each silence, which would meet a broken connection.
    first_latencies_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    num_reconnects: int = 0
    num_too_many_pings: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether nothing failed and nothing broke."""
        return not (self.failures or self.num_reconnects or self.num_too_many_pings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: percentiles instead of every latency."""
        figures = {name: value for name, value in asdict(self).items() if name != "latencies_s"}
        latency_s = Percentiles.of(self.latencies_s)
        return figures | {"latency_s": None if latency_s is None else asdict(latency_s)}

    def summary(self) -> str:
        """One line."""
        p50_s = statistics.median(self.latencies_s) if self.latencies_s else float("nan")
        return (
            f"{self.num_requests} requests ({self.num_streamed} streamed) in {self.num_phases} "
            f"phases over {self.duration_s:.0f} s: {len(self.failures)} failed, "
            f"{self.num_reconnects} reconnects, {self.num_too_many_pings} connections refused for "
            f"pings; latency p50 {p50_s * 1e3:.0f} ms, after a silence at most "
            f"{max(self.first_latencies_s, default=float('nan')) * 1e3:.0f} ms"
        )


async def soak(base_url: str, options: argparse.Namespace) -> Soak:
    """Load and silence for at least as long as asked for; begins and ends with load."""
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60) as client:
        return await _soak(client, options)


async def _soak(client: AsyncOpenAI, options: argparse.Namespace) -> Soak:
    result = Soak()
    model = (await client.models.list()).data[0].id
    start_s = time.monotonic()
    while True:
        phase_end_s = time.monotonic() + options.load_s
        is_first = True
        while time.monotonic() < phase_end_s:
            width = 1 if is_first else options.concurrency
            begin = result.num_requests
            numbers = range(begin, begin + width)
            times_s = await asyncio.gather(*(_one(client, model, n, result) for n in numbers))
            (result.first_latencies_s if is_first else result.latencies_s).extend(times_s)
            is_first = False
        result.num_phases += 1
        if time.monotonic() - start_s >= options.minutes * 60:
            break
        await asyncio.sleep(options.silence_s)
    result.duration_s = time.monotonic() - start_s
    return result


async def _one(client: AsyncOpenAI, model: str, number: int, result: Soak) -> float:
    start_s = time.monotonic()
    result.num_requests += 1
    fields: dict[str, Any] = {
        "model": model,
        "prompt": f"Group {number % 16}, request {number}:",
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
    }
    try:
        if number % 2:
            result.num_streamed += 1
            reasons = [
                event.choices[0].finish_reason
                async for event in await client.completions.create(**fields, stream=True)
                if event.choices
            ]
            if not any(reasons):
                result.failures.append("a stream ended without a finish reason")
        else:
            await client.completions.create(**fields)
    except APIError as error:
        result.failures.append(f"{type(error).__name__}: {error}")
    return time.monotonic() - start_s


def run(options: argparse.Namespace, folder: Path) -> Soak:
    """Starts everything, soaks it, reads the log."""
    log_path = folder / "smg.log"
    with ExitStack() as stack:
        replicas = [
            LocalServices(
                options.model,
                executor_args=options.executor_arg,
                scheduler_args=options.scheduler_arg,
                listen="tcp",
                log_dir=folder / f"replica-{index}",
            )
            for index in range(_NUM_REPLICAS)
        ]
        for replica in replicas:
            stack.enter_context(replica)
        addresses = [replica.address for replica in replicas]
        gateway = stack.enter_context(SmgGateway(addresses, log_path=log_path))
        result = asyncio.run(soak(gateway.base_url, options))
        log = log_path.read_text(errors="replace")
    result.num_reconnects = log.count(_CONNECTED) - _NUM_REPLICAS
    result.num_too_many_pings = log.count(_TOO_MANY_PINGS)
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_engine_options(parser)
    parser.add_argument("--minutes", type=positive_float, default=10.0)
    parser.add_argument("--load-s", type=positive_float, default=15.0)
    parser.add_argument("--silence-s", type=positive_float, default=150.0)
    parser.add_argument("--concurrency", type=positive_int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if nothing failed and nothing broke."""
    options = parse(arguments)
    machine = describe_machine()
    print(machine_line(machine))
    with tempfile.TemporaryDirectory(prefix="nanovllm-soak-") as folder:
        result = run(options, Path(folder))
    print(result.summary())
    for failure in dict.fromkeys(result.failures):
        print(f"  {failure}")
    if options.json is not None:
        write_json(options.json, {"machine": machine, "soak": result.as_dict()})
    return 0 if result.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
