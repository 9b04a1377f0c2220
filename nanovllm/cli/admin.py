"""`nanovllm admin`: looks into a running scheduler and steers it."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from nanovllm.admin import AdminClient, ExecutorStatus, LiveRequest, LogLevel, SchedulerState
from nanovllm.cli.connection import add_connection, client_arguments
from nanovllm.cli.options import CommandError

if TYPE_CHECKING:
    from nanovllm.cli.options import Commands

DEFAULT_ADDRESS = "127.0.0.1:50050"
ADDRESS_VARIABLE = "NANOVLLM_ADMIN_ADDRESS"
Action = Callable[[AdminClient, argparse.Namespace], None]


def add_command(commands: "Commands") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "admin",
        help="look into a running scheduler and steer it",
        description="Talks to the admin service, which a scheduler serves at --admin-listen.",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    state = _add(actions, "state", "list the live requests, without their text", _state)
    state.add_argument("--json", action="store_true", help="print one JSON object")
    abort = _add(actions, "abort", "end live requests by their id", _abort)
    abort.add_argument("request_id")
    abort.add_argument(
        "--caller", default="", metavar="NAME", help="whose, as 'state' shows it; default: all"
    )
    _add(actions, "drain", "refuse new requests; live ones go on", _drain)
    _add(actions, "undrain", "take new requests again", _undrain)
    _add(actions, "flush-prefix-cache", "forget cached prefixes that no request uses", _flush)
    log_level = _add(actions, "log-level", "change the scheduler's log level", _log_level)
    log_level.add_argument("level", type=LogLevel, choices=list(LogLevel), metavar="LEVEL")
    executors = _add(actions, "executors", "list the executors and what they have to do", _list)
    executors.add_argument("--json", action="store_true", help="print one JSON array")
    for name, meaning, action in (
        ("add-executor", "have an executor join, until the scheduler ends", _add_executor),
        ("remove-executor", "have an executor leave; what runs goes on elsewhere", _remove),
        (
            "drain-executor",
            "send an executor nothing new; what runs there goes on",
            _drain_executor,
        ),
        ("undrain-executor", "send an executor requests again", _undrain_executor),
    ):
        _add(actions, name, meaning, action).add_argument(
            "executor", metavar="ADDRESS", help="of the executor: HOST:PORT or unix:/path"
        )


def _add(actions: "Commands", name: str, meaning: str, action: Action) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=meaning, description=f"{meaning.capitalize()}.")
    add_connection(
        parser,
        server="the admin service",
        default_address=DEFAULT_ADDRESS,
        address_variable=ADDRESS_VARIABLE,
    )
    parser.set_defaults(run=lambda options: _run(action, options))
    return parser


def _run(action: Action, options: argparse.Namespace) -> int:
    try:
        client = AdminClient(options.address, **client_arguments(options))
    except ValueError as error:
        raise CommandError(str(error)) from error
    with client:
        action(client, options)
    return 0


def _state(client: AdminClient, options: argparse.Namespace) -> None:
    state = client.state()
    print(json.dumps(asdict(state)) if options.json else format_state(state))


def _abort(client: AdminClient, options: argparse.Namespace) -> None:
    num_aborted = client.abort(options.request_id, options.caller)
    if not num_aborted:
        raise CommandError(f"no live request has the id {options.request_id!r}")
    print(f"{num_aborted} ended")


def _drain(client: AdminClient, options: argparse.Namespace) -> None:
    print(f"draining, {client.drain()} requests live")


def _undrain(client: AdminClient, options: argparse.Namespace) -> None:
    client.undrain()
    print("taking requests")


def _flush(client: AdminClient, options: argparse.Namespace) -> None:
    print(f"{client.flush_prefix_cache()} KV blocks freed")


def _log_level(client: AdminClient, options: argparse.Namespace) -> None:
    print(f"{options.level}, was {client.set_log_level(options.level)}")


def _list(client: AdminClient, options: argparse.Namespace) -> None:
    executors = client.executors()
    print(json.dumps([*map(asdict, executors)]) if options.json else format_executors(executors))


def _add_executor(client: AdminClient, options: argparse.Namespace) -> None:
    client.add_executor(options.executor)
    print("added; 'nanovllm admin executors' shows when it is connected")


def _remove(client: AdminClient, options: argparse.Namespace) -> None:
    print(f"removed, {client.remove_executor(options.executor)} sequences interrupted")


def _drain_executor(client: AdminClient, options: argparse.Namespace) -> None:
    print(f"draining, {client.drain_executor(options.executor)} sequences running")


def _undrain_executor(client: AdminClient, options: argparse.Namespace) -> None:
    client.undrain_executor(options.executor)
    print("getting requests")


def format_executors(executors: Sequence[ExecutorStatus]) -> str:
    """Returns the executors as text, one line each."""
    return "\n".join(map(_executor_line, executors))


def _executor_line(executor: ExecutorStatus) -> str:
    summary = executor.summary
    state = "connected" if executor.connected else "absent"
    cells = [
        _visible(summary.address),
        f"{state}, draining" if executor.draining else state,
        f"{summary.num_running} running, {summary.num_waiting} waiting",
    ]
    if executor.connected:
        cells += [
            f"{executor.kv_usage_ratio:.0%} of {executor.num_kv_blocks} KV blocks",
            _visible(summary.device),
            f"epoch {summary.epoch}",
        ]
    else:
        cells.append(_visible(executor.problem))
    return "  ".join(cells)


def format_state(state: SchedulerState) -> str:
    """Returns the state as text, one line a request."""
    mode = "draining" if state.draining else "taking requests"
    lines = [f"{mode}, {len(state.requests)} live"]
    lines += [_line(request) for request in state.requests]
    return "\n".join(lines)


def _line(request: LiveRequest) -> str:
    sequences = ", ".join(
        f"{sequence.state} {sequence.prompt_tokens}+{sequence.output_tokens} tokens"
        for sequence in request.sequences
    )
    request_id, caller = _visible(request.request_id), _visible(request.caller)
    return f"{request_id}  {caller}  {request.age_s:.1f} s  {sequences or 'tokenizing'}"


def _visible(text: str) -> str:
    """What others have named, without control characters that a terminal would obey."""
    return text if text.isprintable() else repr(text)
