"""`nanovllm info`: what runs at an address."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from nanovllm.cli.connection import add_connection, connect
from nanovllm.server_info import ExecutorSummary, Health, ModelInfo, ServerStatus

if TYPE_CHECKING:
    from nanovllm.cli.options import Commands


def add_command(commands: "Commands") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "info",
        help="describe a running server",
        description="Shows the model, the load and the health of a running server.",
    )
    add_connection(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with connect(options) as client:
        model, status, health = client.model_info(), client.server_status(), client.health()
    if options.json:
        document = {
            "model": {
                **asdict(model),
                "default_sampling_params": model.default_sampling_params.set_fields(),
            },
            "status": asdict(status),
            "health": health,
        }
        print(json.dumps(document, indent=2))
    else:
        print(format_info(model, status, health))
    return 0


def format_info(model: ModelInfo, status: ServerStatus, health: Health) -> str:
    """Returns the description as text."""
    defaults = model.default_sampling_params.set_fields()
    rows = [
        ("health", str(health)),
        ("model", f"{model.model_name} ({model.architecture})"),
        ("length", f"{model.max_model_len} tokens, vocabulary of {model.vocab_size}"),
        ("chat template", "yes" if model.has_chat_template else "no"),
        ("sampling", ", ".join(f"{k}={v}" for k, v in defaults.items()) or "server defaults"),
        ("fingerprint", model.fingerprint[:16]),
        ("server", f"version {status.version}, up for {status.uptime_s:.0f} s"),
        ("requests", f"{status.num_running} running, {status.num_waiting} waiting"),
        (
            "KV blocks",
            f"{status.num_kv_blocks} of {status.kv_block_size} tokens, "
            f"{status.num_free_kv_blocks} free, {status.num_cached_kv_blocks} cached",
        ),
        *(("executor", _executor(executor)) for executor in status.executors),
    ]
    if not status.executors:
        rows.append(("executor", "not connected"))
    return "\n".join(f"{name:<15}{value}" for name, value in rows)


def _executor(executor: ExecutorSummary) -> str:
    return (
        f"{executor.address} on {executor.device}, {executor.dtype}, "
        f"attention by {executor.attention_backend}, up to {executor.max_num_seqs} sequences and "
        f"{executor.max_num_batched_tokens} tokens a step"
    )
