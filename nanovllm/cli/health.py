"""`nanovllm health`: a probe for supervisors and container runtimes."""

import argparse
from typing import TYPE_CHECKING

from nanovllm.cli.connection import add_connection, connect
from nanovllm.cli.options import CommandError, positive_float
from nanovllm.errors import DeadlineExceededError
from nanovllm.server_info import Health

if TYPE_CHECKING:
    from nanovllm.cli.options import Commands

TIMEOUT_S = 5.0


def add_command(commands: "Commands") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "health",
        help="ask whether a scheduler or executor is serving",
        description="Asks the standard health service of a scheduler or an executor. Exit status "
        "0 means that it is serving, 1 that it is not or did not answer.",
    )
    add_connection(parser)
    parser.add_argument(
        "--service", default="", metavar="NAME", help="one service by name (default: the server)"
    )
    parser.add_argument(
        "--timeout-s",
        type=positive_float,
        default=TIMEOUT_S,
        metavar="S",
        help=f"how long to wait for the answer in seconds (default: {TIMEOUT_S:g})",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with connect(options) as client:
        try:
            health = client.health(options.service, timeout_s=options.timeout_s)
        except DeadlineExceededError as error:
            raise CommandError(
                f"{options.address} did not answer within {options.timeout_s:g} s"
            ) from error
    if health is not Health.SERVING:
        raise CommandError(f"{options.address} is {health}")
    print(health)
    return 0
