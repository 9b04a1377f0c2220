"""`nanovllm generate`: one prompt, one answer."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from nanovllm.cli.connection import add_connection, connect
from nanovllm.cli.options import (
    CommandError,
    add_sampling,
    add_timeout,
    positive_int,
    sampling_params,
)
from nanovllm.outputs import FinishReason
from nanovllm.requests import Prompt

if TYPE_CHECKING:
    from nanovllm.cli.options import Commands


def add_command(commands: "Commands") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="complete a prompt and stream the text",
        description="Completes a prompt and streams the text to standard output.",
    )
    parser.add_argument("prompt", nargs="?", help="default: standard input")
    add_connection(parser)
    add_timeout(parser)
    parser.add_argument(
        "--chat", action="store_true", help="treat the prompt as a user's message to the model"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object when everything is done"
    )
    parser.add_argument(
        "--n", type=positive_int, metavar="N", help="number of completions; needs --json"
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="K", help="log-probabilities with the top K; needs --json"
    )
    parser.add_argument("--priority", type=int, default=0, metavar="N", help="larger goes first")
    add_sampling(parser)
    parser.set_defaults(run=lambda options: _run(parser, options))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if not options.json and (options.n is not None or options.logprobs is not None):
        parser.error("--n and --logprobs need --json")
    params = sampling_params(options, n=options.n, logprobs=options.logprobs)
    text = sys.stdin.read() if options.prompt is None else options.prompt
    prompt: Prompt = text
    if options.chat or options.system is not None:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        prompt = [*system, {"role": "user", "content": text}]

    finish_reason: FinishReason | None = None
    with connect(options, timeout_s=options.timeout_s) as client:
        if options.json:
            output = client.generate(prompt, params, priority=options.priority)
            finish_reason = output.finish_reason
            print(json.dumps(asdict(output), ensure_ascii=False))
        else:
            with client.stream(prompt, params, priority=options.priority) as stream:
                for delta in stream:
                    print(delta.text, end="", flush=True)
                    finish_reason = delta.finish_reason
            print()
    if finish_reason is FinishReason.ABORT:
        raise CommandError("the request was aborted on the server")
    return 0
