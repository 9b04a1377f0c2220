"""`nanovllm chat`: a conversation."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

from nanovllm.cli.connection import add_connection, connect
from nanovllm.cli.options import (
    CommandError,
    add_sampling,
    add_timeout,
    sampling_params,
)
from nanovllm.client import Client
from nanovllm.errors import NanovllmError
from nanovllm.outputs import FinishReason
from nanovllm.requests import Message
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.cli.options import Commands

HELP = "/reset forgets the conversation, /exit ends it"


def add_command(commands: "Commands") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "chat",
        help="talk to the model",
        description=f"Talks to the model. {HELP}. Each line of piped input is one message.",
    )
    add_connection(parser)
    add_timeout(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    params = sampling_params(options)
    interactive = sys.stdin.isatty()
    with connect(options, timeout_s=options.timeout_s) as client:
        info = client.model_info()
        if not info.has_chat_template:
            raise CommandError(
                f"{info.model_name} has no chat template; use 'nanovllm generate' instead"
            )
        if interactive:
            print(f"{info.model_name} at {options.address}; {HELP}", file=sys.stderr)
        conversation = Conversation(client, params, options.system)
        for line in _lines(interactive):
            match line.strip():
                case "":
                    continue
                case "/exit":
                    break
                case "/reset":
                    conversation.reset()
                case command if command.startswith("/"):
                    print(f"unknown command {command}; {HELP}", file=sys.stderr)
                case text:
                    try:
                        conversation.say(text)
                    except (NanovllmError, CommandError) as error:
                        if not interactive:
                            raise
                        print(f"\nnanovllm: {error}", file=sys.stderr)
    return 0


class Conversation:
    """A chat whose answers are printed as they come."""

    def __init__(self, client: Client, params: SamplingParams, system: str | None) -> None:
        self._client = client
        self._params = params
        self._opening: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self._messages = list(self._opening)

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self._messages = list(self._opening)

    def say(self, text: str) -> None:
        """Sends a message and prints the answer; a failed exchange is forgotten.

        Raises:
            NanovllmError: The request failed.
            CommandError: The answer was aborted on the server.
        """
        messages: list[Message] = [*self._messages, {"role": "user", "content": text}]
        parts = []
        finish_reason: FinishReason | None = None
        with self._client.stream(messages, self._params) as stream:
            for delta in stream:
                parts.append(delta.text)
                print(delta.text, end="", flush=True)
                finish_reason = delta.finish_reason
        print()
        if finish_reason is FinishReason.ABORT:
            raise CommandError("the request was aborted on the server")
        self._messages = [*messages, {"role": "assistant", "content": "".join(parts)}]


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from sys.stdin
        return
    # Gives input() line editing and a history; absent on some builds of Python.
    with contextlib.suppress(ImportError):
        import_module("readline")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
