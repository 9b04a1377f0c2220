"""`nanovllm demo`: both services on this machine, one answer, and where to look."""

import argparse
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.cli.options import CommandError, positive_float, positive_int
from nanovllm.client import Client
from nanovllm.embedded.catalogue import SMOLLM2_135M_INSTRUCT
from nanovllm.outputs import FinishReason
from nanovllm.requests import Prompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.service_process import ServiceProcess
from nanovllm.services import LocalServices

if TYPE_CHECKING:
    from nanovllm.cli.options import Commands

DEFAULT_PROMPT = "What is the capital of France? Answer in one sentence."
METRICS_TIMEOUT_S = 10.0


def add_command(commands: "Commands") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="start everything here, stream one answer, stop",
        description=(
            "Starts both services on free loopback ports of this machine, streams an answer "
            "through the gRPC client, and stops both."
        ),
    )
    parser.add_argument(
        "--model",
        default=SMOLLM2_135M_INSTRUCT.name,
        help="directory, embedded model or hub id (default: %(default)s)",
    )
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, metavar="TEXT")
    parser.add_argument("--max-tokens", type=positive_int, default=128, metavar="N")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--startup-timeout-s", type=positive_float, default=600.0, metavar="S")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    logs = Path(tempfile.mkdtemp(prefix="nanovllm-demo-"))
    try:
        _demonstrate(options, logs)
    except BaseException:
        if any(logs.iterdir()):
            print(f"\nlogs of both services: {logs}", flush=True)
        else:
            logs.rmdir()
        raise
    shutil.rmtree(logs, ignore_errors=True)
    return 0


def _demonstrate(options: argparse.Namespace, logs: Path) -> None:
    print(f"starting both services for {options.model} ...", flush=True)
    start_s = time.perf_counter()
    with LocalServices(
        options.model,
        executor_args=["--device", options.device],
        listen="tcp",
        metrics=True,
        log_dir=logs,
        startup_timeout_s=options.startup_timeout_s,
    ) as services:
        print(f"ready after {time.perf_counter() - start_s:.1f} s")
        print(f"  executor   {services.executor_address} (pid {services.executor.pid})")
        print(f"  scheduler  {services.address} (pid {services.scheduler.pid})\n")
        with Client(services.address) as client:
            _answer(client, options.prompt, options.max_tokens)
        print("\nmetrics:")
        for name, service in (("executor", services.executor), ("scheduler", services.scheduler)):
            print(f"  {name:<10} {service.metrics_url}")
            print(f"             {_one_metric(name, service)}")
    for name, service in (("executor", services.executor), ("scheduler", services.scheduler)):
        if service.returncode != 0:
            raise CommandError(f"the {name} ended with status {service.returncode}, expected 0")
    print("\nboth services stopped cleanly")


def _answer(client: Client, text: str, max_tokens: int) -> None:
    """Streams an answer to stdout, then prints how fast it came."""
    prompt: Prompt = text
    if client.model_info().has_chat_template:
        prompt = [{"role": "user", "content": text}]
    print(f"> {text}")
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    start_s = time.perf_counter()
    first_s: float | None = None
    num_first = num_tokens = 0
    finish_reason: FinishReason | None = None
    with client.stream(prompt, params) as stream:
        for delta in stream:
            print(delta.text, end="", flush=True)
            num_tokens += len(delta.token_ids)
            finish_reason = delta.finish_reason
            if first_s is None and num_tokens:
                first_s, num_first = time.perf_counter(), num_tokens
    end_s = time.perf_counter()
    print("\n")
    if first_s is None or finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
        raise CommandError(f"the answer ended with {finish_reason} after {num_tokens} tokens")
    print(f"{num_tokens} tokens, time to first token {(first_s - start_s) * 1e3:.1f} ms", end="")
    if num_tokens > num_first:
        print(f", {(num_tokens - num_first) / (end_s - first_s):.1f} tokens/s after it")
    else:
        print()


def _one_metric(name: str, service: ServiceProcess) -> str:
    """Fetches a metrics page and returns one sample, as proof that it answers."""
    if service.metrics_url is None:
        raise CommandError(f"the {name} did not say where its metrics are")
    # Loopback is never reached through a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(service.metrics_url, timeout=METRICS_TIMEOUT_S) as response:
            lines = response.read().decode().splitlines()
    except (urllib.error.URLError, TimeoutError) as error:
        raise CommandError(f"{service.metrics_url} does not answer: {error}") from error
    samples = [line for line in lines if line.startswith("nanovllm_")]
    # A counter that the answer has moved says more than a zero.
    moved = [line for line in samples if "_total" in line and not line.endswith(" 0.0")]
    if not samples:
        raise CommandError(f"{service.metrics_url} has no metric of this product")
    return (moved or samples)[0]
