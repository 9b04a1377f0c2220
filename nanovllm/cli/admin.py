"""`nanovllm admin`: looks into a running scheduler and steers it."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from nanovllm.admin import AdminClient, LiveRequest, LogLevel, SchedulerState
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
    """An id, or a name in a certificate, without control characters that a terminal would obey."""
    return text if text.isprintable() else repr(text)
